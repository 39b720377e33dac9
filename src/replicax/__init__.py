"""Parallel map for JAX: any number of replicas of a program on any number of devices."""

from replicax import compat as compat
from replicax import testing as testing
from replicax._devices import simulate_devices as simulate_devices
from replicax._errors import AheadOfTimeError as AheadOfTimeError
from replicax._errors import ArgumentNameError as ArgumentNameError
from replicax._errors import AxisSpecError as AxisSpecError
from replicax._errors import AxisSpecTypeError as AxisSpecTypeError
from replicax._errors import CallbackError as CallbackError
from replicax._errors import CollectiveArgumentError as CollectiveArgumentError
from replicax._errors import DeletedArrayError as DeletedArrayError
from replicax._errors import DevicesError as DevicesError
from replicax._errors import DivergentOutputError as DivergentOutputError
from replicax._errors import MappedSizeError as MappedSizeError
from replicax._errors import MismatchError as MismatchError
from replicax._errors import NestedMapError as NestedMapError
from replicax._errors import NotAFunctionError as NotAFunctionError
from replicax._errors import NotAnArrayError as NotAnArrayError
from replicax._errors import NumberTooLargeError as NumberTooLargeError
from replicax._errors import OptionTypeError as OptionTypeError
from replicax._errors import OrderedCallbackError as OrderedCallbackError
from replicax._errors import ReplicasError as ReplicasError
from replicax._errors import ReplicaxError as ReplicaxError
from replicax._errors import ShardsError as ShardsError
from replicax._errors import SimulationError as SimulationError
from replicax._errors import StaticArgumentError as StaticArgumentError
from replicax._errors import UnboundAxisError as UnboundAxisError
from replicax._errors import UnconvertedArrayError as UnconvertedArrayError
from replicax._errors import UnknownBackendError as UnknownBackendError
from replicax._errors import UnsupportedCallbackError as UnsupportedCallbackError
from replicax._errors import UnsupportedCollectiveError as UnsupportedCollectiveError
from replicax._errors import UnsupportedDtypeError as UnsupportedDtypeError
from replicax._errors import UnsupportedTransformationError as UnsupportedTransformationError
from replicax._pmap import MappedFunction as MappedFunction
from replicax._pmap import pmap as pmap
from replicax._replicas import fetch as fetch
from replicax._replicas import local_replicas as local_replicas
from replicax._replicas import replicate as replicate
from replicax._replicas import shard as shard
from replicax._replicas import unreplicate as unreplicate
from replicax._report import show_replicas as show_replicas

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
