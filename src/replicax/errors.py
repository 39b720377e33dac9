"""The exception tree.

Every error that replicax raises is a :class:`ReplicaxError` and also the builtin that ``jax.pmap`` (or, where that
has none, ``jax.vmap``) raises for the same fault, so ``except`` clauses written for either keep working::

    ReplicaxError
    ├── OptionError                                            what was asked of pmap, or of another function, cannot be
    │   ├── OptionTypeError                TypeError           an option of pmap is of the wrong type
    │   ├── AxisSpecTypeError              TypeError           in_axes or out_axes holds something that is no axis
    │   ├── AxisSpecError                  ValueError          in_axes or out_axes does not fit
    │   ├── ArgumentNameError              ValueError          an option names a parameter that the function lacks
    │   ├── NotAFunctionError              TypeError           what was to be mapped is no function
    │   ├── DevicesError                   ValueError          devices is empty, repeated or mixed
    │   ├── UnknownBackendError            RuntimeError        no such backend here
    │   ├── SimulationError                RuntimeError        simulate_devices after JAX has started
    │   └── ReplicasError                  ValueError          compat cannot let the program see that many devices
    ├── ArgumentError                                          the arguments of a call do not fit
    │   ├── MappedSizeError                ValueError          the arguments do not say one number of replicas
    │   ├── NotAnArrayError                TypeError           an argument or a result is no array
    │   │   └── UnconvertedArrayError      ValueError          it has to be converted: a masked array, or __jax_array__
    │   ├── UnsupportedDtypeError          TypeError           an argument or a result of a dtype that XLA cannot pad
    │   ├── NumberTooLargeError            OverflowError       an int does not fit into the type that JAX gives it
    │   ├── DeletedArrayError              RuntimeError        an array was donated, deleted, or is donated twice
    │   ├── StaticArgumentError            ValueError          a static argument is missing, unhashable or donated
    │   ├── AheadOfTimeError               TypeError           a compiled program called in a way that it cannot be
    │   └── ShardsError                    ValueError          the shards of device_put_sharded do not fit together
    ├── ProgramError                                           the mapped function does what no map can run
    │   ├── UnboundAxisError               NameError           a collective over a name that no map binds
    │   ├── UnsupportedCollectiveError     NotImplementedError a collective that replicax has no rule for
    │   ├── CollectiveArgumentError        ValueError          a permutation, group or index that cannot be
    │   ├── DivergentOutputError           ValueError          out_axes=None for a result that differs between replicas
    │   ├── NestedMapError                 ValueError          what cannot run as a map inside a mapped function
    │   ├── UnsupportedTransformationError NotImplementedError a vmap that splits its batch over a mesh, of a map
    │   ├── OrderedCallbackError           ValueError          a callback with ordered=True, in a mapped function
    │   ├── UnsupportedCallbackError       NotImplementedError an io_callback where JAX cannot vectorize it
    │   └── CallbackError                  RuntimeError        a callback of the user's raised an exception
    └── MismatchError                      AssertionError      replicax.testing found a difference
"""


class ReplicaxError(Exception):
    """The base of every error that replicax raises.

    Attributes:
        nameless: Whether it is about an argument whose name was not known where it was raised.
    """

    nameless = False


class OptionError(ReplicaxError):
    """What was asked of ``pmap``, or of another function of the package, cannot be."""


class ArgumentError(ReplicaxError):
    """The arguments of a call do not fit."""


class ProgramError(ReplicaxError):
    """The mapped function does what no map can run."""


class MappedSizeError(ArgumentError, ValueError):
    """The mapped arguments, and ``axis_size``, do not agree on one number of replicas, or name none."""


class AxisSpecError(OptionError, ValueError):
    """``in_axes`` or ``out_axes`` does not fit the arguments or results, or names an axis that they lack."""


class AxisSpecTypeError(OptionError, TypeError):
    """``in_axes`` or ``out_axes`` holds something that is neither an int nor None."""


class NotAnArrayError(ArgumentError, TypeError):
    """An argument, or a result of the mapped function, is not an array."""


class UnconvertedArrayError(NotAnArrayError, ValueError):
    """An argument is a masked array, or of a type with ``__jax_array__``: JAX takes neither as it is."""


class UnsupportedDtypeError(ArgumentError, TypeError):
    """An argument, or a result of the mapped function, is of a dtype that XLA cannot pad."""


class NotAFunctionError(OptionError, TypeError):
    """What was to be mapped cannot be called."""


class NestedMapError(ProgramError, ValueError):
    """A map inside a mapped function names devices, or is a ``jax.shard_map`` that cannot run as a map inside a map."""


class OptionTypeError(OptionError, TypeError):
    """An option, such as ``axis_size`` or ``donate_argnums``, is of the wrong type."""


class DeletedArrayError(ArgumentError, RuntimeError):
    """An array's buffer is gone, because it was donated to an earlier call or deleted; or it is donated twice."""


class NumberTooLargeError(ArgumentError, OverflowError):
    """An int among the arguments does not fit into the type that JAX gives it."""


class StaticArgumentError(ArgumentError, ValueError):
    """A static argument is missing, unhashable or not comparable, or is to be donated too."""


class ArgumentNameError(OptionError, ValueError):
    """An option for static or donated arguments names a parameter that the function does not have."""


class AheadOfTimeError(ArgumentError, TypeError):
    """A compiled program was called with other arguments than it was compiled for, or inside a transformation."""


class DevicesError(OptionError, ValueError):
    """``devices`` is empty, holds something that is no device, one twice, or devices of several platforms."""


class UnknownBackendError(OptionError, RuntimeError):
    """``backend`` names a platform that this installation of JAX does not have."""


class UnboundAxisError(ProgramError, NameError):
    """A collective names an axis that no enclosing map binds."""


class UnsupportedCollectiveError(ProgramError, NotImplementedError):
    """A collective over a mapped axis that replicax has no rule for."""


class UnsupportedTransformationError(ProgramError, NotImplementedError):
    """A ``vmap`` of a map that is to split its batch over an axis of a mesh."""


class CollectiveArgumentError(ProgramError, ValueError):
    """A collective's permutation, groups or source do not fit the replicas."""


class DivergentOutputError(ProgramError, ValueError):
    """``out_axes=None`` for a result that differs, or may differ, between replicas."""


class OrderedCallbackError(ProgramError, ValueError):
    """A mapped function calls back into Python with ``ordered=True``, and nothing orders the calls of replicas."""


class UnsupportedCallbackError(ProgramError, NotImplementedError):
    """An ``io_callback`` in a branch or loop that replicas of one device go through differently."""


class CallbackError(ProgramError, RuntimeError):
    """A callback of the user's raised an exception in a replica; JAX shows it as text in an error of its own."""


class ShardsError(ArgumentError, ValueError):
    """The shards of ``device_put_sharded`` are not one for each device, or differ in more than their values."""


class SimulationError(OptionError, RuntimeError):
    """Devices cannot be simulated any more, because JAX has started already."""


class ReplicasError(OptionError, ValueError):
    """A number of devices that ``replicax.compat`` cannot let the program see, or not any more."""


class MismatchError(ReplicaxError, AssertionError):
    """A program does not compute under ``pmap`` what it computes under the oracle."""
