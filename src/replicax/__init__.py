"""Parallel map for JAX: any number of replicas of a program on any number of devices."""

from replicax import compat as compat
from replicax import distributed as distributed
from replicax import errors as errors
from replicax import testing as testing
from replicax._arrays import fetch as fetch
from replicax._arrays import local_replicas as local_replicas
from replicax._arrays import replicate as replicate
from replicax._arrays import shard as shard
from replicax._arrays import unreplicate as unreplicate
from replicax._devices import simulate_devices as simulate_devices
from replicax._global_arrays import to_global as to_global
from replicax._global_arrays import to_local as to_local
from replicax._pmap import MappedFunction as MappedFunction
from replicax._pmap import pmap as pmap
from replicax._report import show_replicas as show_replicas
from replicax._tune import tune as tune
from replicax._version import __version__ as __version__

__all__ = [
    "MappedFunction",
    "compat",
    "distributed",
    "errors",
    "fetch",
    "local_replicas",
    "pmap",
    "replicate",
    "shard",
    "show_replicas",
    "simulate_devices",
    "testing",
    "to_global",
    "to_local",
    "tune",
    "unreplicate",
]


def __getattr__(name: str) -> type[errors.ReplicaxError]:
    """Looks up exceptions, which earlier versions exported here: they are now in :mod:`replicax.errors`."""
    if name.endswith("Error") and hasattr(errors, name):
        return vars(errors)[name]
    raise AttributeError(f"module 'replicax' has no attribute {name!r}")
