"""Parallel map for JAX: any number of replicas of a program on any number of devices."""

from replicax import compat as compat
from replicax import testing as testing
from replicax._arrays import fetch as fetch
from replicax._arrays import local_replicas as local_replicas
from replicax._arrays import replicate as replicate
from replicax._arrays import shard as shard
from replicax._arrays import unreplicate as unreplicate
from replicax._devices import simulate_devices as simulate_devices
from replicax._pmap import MappedFunction as MappedFunction
from replicax._pmap import pmap as pmap
from replicax._report import show_replicas as show_replicas
from replicax.errors import AheadOfTimeError as AheadOfTimeError
from replicax.errors import ArgumentNameError as ArgumentNameError
from replicax.errors import AxisSpecError as AxisSpecError
from replicax.errors import AxisSpecTypeError as AxisSpecTypeError
from replicax.errors import CallbackError as CallbackError
from replicax.errors import CollectiveArgumentError as CollectiveArgumentError
from replicax.errors import DeletedArrayError as DeletedArrayError
from replicax.errors import DevicesError as DevicesError
from replicax.errors import DivergentOutputError as DivergentOutputError
from replicax.errors import MappedSizeError as MappedSizeError
from replicax.errors import MismatchError as MismatchError
from replicax.errors import NestedMapError as NestedMapError
from replicax.errors import NotAFunctionError as NotAFunctionError
from replicax.errors import NotAnArrayError as NotAnArrayError
from replicax.errors import NumberTooLargeError as NumberTooLargeError
from replicax.errors import OptionTypeError as OptionTypeError
from replicax.errors import OrderedCallbackError as OrderedCallbackError
from replicax.errors import ReplicasError as ReplicasError
from replicax.errors import ReplicaxError as ReplicaxError
from replicax.errors import ShardsError as ShardsError
from replicax.errors import SimulationError as SimulationError
from replicax.errors import StaticArgumentError as StaticArgumentError
from replicax.errors import UnboundAxisError as UnboundAxisError
from replicax.errors import UnconvertedArrayError as UnconvertedArrayError
from replicax.errors import UnknownBackendError as UnknownBackendError
from replicax.errors import UnsupportedCallbackError as UnsupportedCallbackError
from replicax.errors import UnsupportedCollectiveError as UnsupportedCollectiveError
from replicax.errors import UnsupportedDtypeError as UnsupportedDtypeError
from replicax.errors import UnsupportedTransformationError as UnsupportedTransformationError

__version__ = "0.1.0"

__all__ = [
    "AheadOfTimeError",
    "ArgumentNameError",
    "AxisSpecError",
    "AxisSpecTypeError",
    "CallbackError",
    "CollectiveArgumentError",
    "DeletedArrayError",
    "DevicesError",
    "DivergentOutputError",
    "MappedFunction",
    "MappedSizeError",
    "MismatchError",
    "NestedMapError",
    "NotAFunctionError",
    "NotAnArrayError",
    "NumberTooLargeError",
    "OptionTypeError",
    "OrderedCallbackError",
    "ReplicasError",
    "ReplicaxError",
    "ShardsError",
    "SimulationError",
    "StaticArgumentError",
    "UnboundAxisError",
    "UnconvertedArrayError",
    "UnknownBackendError",
    "UnsupportedCallbackError",
    "UnsupportedCollectiveError",
    "UnsupportedDtypeError",
    "UnsupportedTransformationError",
    "compat",
    "fetch",
    "local_replicas",
    "pmap",
    "replicate",
    "shard",
    "show_replicas",
    "simulate_devices",
    "testing",
    "unreplicate",
]
