"""Tests of SPMD programs: that a program computes under ``pmap`` what it computes under a reference."""

from replicax.errors import MismatchError as MismatchError
from replicax.testing._check import check as check
from replicax.testing._lockstep import lockstep as lockstep

__all__ = ["MismatchError", "check", "lockstep"]
