"""Test utilities for SPMD programs: compare a program under ``pmap`` with a reference."""

from replicax.errors import MismatchError as MismatchError
from replicax.testing._check import check as check
from replicax.testing._lockstep import lockstep as lockstep
from replicax.testing._processes import Processes as Processes
from replicax.testing._processes import processes as processes

__all__ = ["MismatchError", "Processes", "check", "lockstep", "processes"]
