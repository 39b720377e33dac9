"""The exception tree.

Every error that replicax raises is a :class:`ReplicaxError`. Its class also inherits from the builtin exception that
``jax.pmap`` raises for the same fault (``jax.vmap`` if ``jax.pmap`` has no such error), so existing ``except`` clauses
keep working::

    ReplicaxError
    ├── OptionError                                            an option of a replicax function is invalid
    │   ├── OptionTypeError                TypeError           an option has the wrong type
    │   ├── AxisSpecTypeError              TypeError           an entry of in_axes or out_axes is not an int or None
    │   ├── AxisSpecError                  ValueError          in_axes or out_axes does not match the arrays
    │   ├── ArgumentNameError              ValueError          an option names a parameter that does not exist
    │   ├── NotAFunctionError              TypeError           the object passed to pmap is not callable
    │   ├── DevicesError                   ValueError          devices is empty, has duplicates or mixes platforms
    │   ├── UnknownBackendError            RuntimeError        this installation of JAX has no such backend
    │   ├── SimulationError                RuntimeError        simulate_devices cannot set this number of devices
    │   └── ReplicasError                  ValueError          the program cannot see this number of devices
    ├── ArgumentError                                          the arguments of a call are invalid
    │   ├── MappedSizeError                ValueError          the arguments do not agree on one number of replicas
    │   ├── NotAnArrayError                TypeError           an argument or a result is not an array
    │   │   └── UnconvertedArrayError      ValueError          a masked array, or an object with __jax_array__
    │   ├── UnsupportedDtypeError          TypeError           XLA cannot pad the dtype of an argument or a result
    │   ├── NumberTooLargeError            OverflowError       an int does not fit into the dtype that JAX uses
    │   ├── DeletedArrayError              RuntimeError        an array was donated or deleted, or is donated twice
    │   ├── StaticArgumentError            ValueError          a static argument is missing, unhashable or donated
    │   ├── AheadOfTimeError               TypeError           lower() or a compiled program cannot be called here
    │   └── ShardsError                    ValueError          the shards of device_put_sharded do not match
    ├── ProgramError                                           the mapped function does something a map cannot run
    │   ├── UnboundAxisError               NameError           a collective names an axis that no map binds
    │   ├── UnsupportedCollectiveError     NotImplementedError replicax has no rule for a collective
    │   ├── CollectiveArgumentError        ValueError          a permutation, group or index is invalid
    │   ├── DivergentOutputError           ValueError          out_axes=None for a result that differs between replicas
    │   ├── NestedMapError                 ValueError          a map cannot run inside a mapped function
    │   ├── UnsupportedTransformationError NotImplementedError a vmap over a map shards the batch axis
    │   ├── OrderedCallbackError           ValueError          a callback with ordered=True in a mapped function
    │   ├── UnsupportedCallbackError       NotImplementedError an io_callback where JAX cannot vectorize it
    │   └── CallbackError                  RuntimeError        a user callback raised an exception
    ├── ProcessesError                     RuntimeError        the processes of a map do not call it alike
    └── MismatchError                      AssertionError      replicax.testing found a difference
"""


class ReplicaxError(Exception):
    """Base class of every error that replicax raises.

    Attributes:
        nameless: Whether the message lacks the argument's name, because the code that raised it did not know it.
    """

    nameless = False


class OptionError(ReplicaxError):
    """An option of ``pmap`` or of another replicax function is invalid."""


class ArgumentError(ReplicaxError):
    """The arguments of a call are invalid."""


class ProgramError(ReplicaxError):
    """The mapped function does something that a map cannot run."""


class MappedSizeError(ArgumentError, ValueError):
    """The number of replicas is unknown, is less than 1, or does not match an array."""


class AxisSpecError(OptionError, ValueError):
    """``in_axes`` or ``out_axes`` does not match the arguments or results, or an array has no such axis."""


class AxisSpecTypeError(OptionError, TypeError):
    """``in_axes`` or ``out_axes`` contains an entry that is not an int or None."""


class NotAnArrayError(ArgumentError, TypeError):
    """An argument, or a result of the mapped function, is not an array."""


class UnconvertedArrayError(NotAnArrayError, ValueError):
    """A value is a masked array or an object with ``__jax_array__``, and must be converted first."""


class UnsupportedDtypeError(ArgumentError, TypeError):
    """An argument, or a result of the mapped function, has a dtype that XLA cannot pad."""


class NotAFunctionError(OptionError, TypeError):
    """The object passed to ``pmap`` is not callable."""


class NestedMapError(ProgramError, ValueError):
    """A map inside a mapped function sets ``devices``, or is a ``jax.shard_map`` that cannot run there."""


class OptionTypeError(OptionError, TypeError):
    """An option, such as ``axis_size`` or ``donate_argnums``, has the wrong type."""


class DeletedArrayError(ArgumentError, RuntimeError):
    """An array was donated to an earlier call or deleted, or is donated and passed twice in one call."""


class NumberTooLargeError(ArgumentError, OverflowError):
    """An int argument does not fit into the dtype that JAX converts it to."""


class StaticArgumentError(ArgumentError, ValueError):
    """A static argument is missing, unhashable, not comparable, or also donated."""


class ArgumentNameError(OptionError, ValueError):
    """An option for static or donated arguments names a parameter that the function does not have."""


class AheadOfTimeError(ArgumentError, TypeError):
    """A compiled program cannot take these arguments, or a map cannot be lowered here."""


class DevicesError(OptionError, ValueError):
    """``devices`` is empty, contains a non-device or a duplicate, or mixes platforms."""


class UnknownBackendError(OptionError, RuntimeError):
    """``backend`` names a platform that this installation of JAX does not have."""


class UnboundAxisError(ProgramError, NameError):
    """A collective names an axis that no enclosing map binds."""


class UnsupportedCollectiveError(ProgramError, NotImplementedError):
    """replicax has no rule for a collective over a mapped axis."""


class UnsupportedTransformationError(ProgramError, NotImplementedError):
    """A map is called inside a transformation, or exported, in a way that it does not support."""


class CollectiveArgumentError(ProgramError, ValueError):
    """An argument of a collective, such as its permutation, groups or source, is invalid."""


class DivergentOutputError(ProgramError, ValueError):
    """``out_axes`` is None for a result that may differ between replicas."""


class OrderedCallbackError(ProgramError, ValueError):
    """A mapped function calls a callback with ``ordered=True``, but replicas run in parallel, without an order."""


class UnsupportedCallbackError(ProgramError, NotImplementedError):
    """An ``io_callback`` is in a branch or loop whose predicate differs between replicas on one device."""


class CallbackError(ProgramError, RuntimeError):
    """A user callback raised an exception in a replica. A ``JaxRuntimeError`` contains this error as text."""


class ShardsError(ArgumentError, ValueError):
    """The shards for ``device_put_sharded`` are not one per device, or differ in structure, shape or dtype."""


class SimulationError(OptionError, RuntimeError):
    """``simulate_devices``: JAX has already started with other devices, or the number of devices is less than 1."""


class ReplicasError(OptionError, ValueError):
    """``replicax.compat`` cannot make a program see this number of devices, or can no longer change the number."""


class ProcessesError(ReplicaxError, RuntimeError):
    """The processes of a map do not run the same program, or one of them does not call the map."""


class MismatchError(ReplicaxError, AssertionError):
    """The results of a program under ``pmap`` differ from the results of the reference."""
