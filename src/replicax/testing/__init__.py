"""Test utilities for SPMD programs: compare a program under ``pmap`` with a reference, and the bits of two runs."""

from replicax.errors import MismatchError as MismatchError
from replicax.testing._check import check as check
from replicax.testing._divergence import Divergence as Divergence
from replicax.testing._divergence import first_divergence as first_divergence
from replicax.testing._fingerprint import fingerprint as fingerprint
from replicax.testing._lockstep import lockstep as lockstep
from replicax.testing._processes import Processes as Processes
from replicax.testing._processes import processes as processes

__all__ = [
    "Divergence",
    "MismatchError",
    "Processes",
    "check",
    "fingerprint",
    "first_divergence",
    "lockstep",
    "processes",
]
