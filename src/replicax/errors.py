"""The exception tree.

Every error that replicax raises is a :class:`ReplicaxError`. It is also the builtin exception that ``jax.pmap`` raises
for the same fault (or ``jax.vmap``, if ``jax.pmap`` has no such error), so existing ``except`` clauses keep working::

    ReplicaxError
    ├── OptionError                                            an option of pmap, or of another function, is invalid
    │   ├── OptionTypeError                TypeError           an option has the wrong type
    │   ├── AxisSpecTypeError              TypeError           an entry of in_axes or out_axes is not an int or None
    │   ├── AxisSpecError                  ValueError          in_axes or out_axes does not match the arrays
    │   ├── ArgumentNameError              ValueError          an option names a parameter that does not exist
    │   ├── NotAFunctionError              TypeError           the object passed to pmap is not callable
    │   ├── DevicesError                   ValueError          devices is empty, has duplicates or mixes platforms
    │   ├── UnknownBackendError            RuntimeError        this installation of JAX has no such backend
    │   ├── SimulationError                RuntimeError        simulate_devices called after JAX has started
    │   └── ReplicasError                  ValueError          compat cannot show the program that many devices
    ├── ArgumentError                                          the arguments of a call are invalid
    │   ├── MappedSizeError                ValueError          the arguments do not agree on one number of replicas
    │   ├── NotAnArrayError                TypeError           an argument or a result is not an array
    │   │   └── UnconvertedArrayError      ValueError          a masked array, or an object with __jax_array__
    │   ├── UnsupportedDtypeError          TypeError           XLA cannot pad the dtype of an argument or a result
    │   ├── NumberTooLargeError            OverflowError       an int does not fit into the dtype that JAX gives it
    │   ├── DeletedArrayError              RuntimeError        an array was donated or deleted, or is donated twice
    │   ├── StaticArgumentError            ValueError          a static argument is missing, unhashable or donated
    │   ├── AheadOfTimeError               TypeError           a compiled program is called with unsuitable arguments
    │   └── ShardsError                    ValueError          the shards of device_put_sharded do not match
    ├── ProgramError                                           the mapped function does something a map cannot run
    │   ├── UnboundAxisError               NameError           a collective names an axis that no map binds
    │   ├── UnsupportedCollectiveError     NotImplementedError replicax has no rule for a collective
    │   ├── CollectiveArgumentError        ValueError          a permutation, group or index is invalid
    │   ├── DivergentOutputError           ValueError          out_axes=None for a result that differs between replicas
    │   ├── NestedMapError                 ValueError          a map inside a mapped function that cannot run there
    │   ├── UnsupportedTransformationError NotImplementedError a vmap of a map that shards its batch over a mesh
    │   ├── OrderedCallbackError           ValueError          a callback with ordered=True in a mapped function
    │   ├── UnsupportedCallbackError       NotImplementedError an io_callback where JAX cannot vectorize it
    │   └── CallbackError                  RuntimeError        a user callback raised an exception
    └── MismatchError                      AssertionError      replicax.testing found a difference
"""


class ReplicaxError(Exception):
    """Base class of every error that replicax raises.

    Attributes:
        nameless: Whether the message lacks the name of an argument, because the name was not known at the raise.
    """

    nameless = False


class OptionError(ReplicaxError):
    """An option of ``pmap``, or of another function of the package, is invalid."""


class ArgumentError(ReplicaxError):
    """The arguments of a call are invalid."""


class ProgramError(ReplicaxError):
    """The mapped function does something that a map cannot run."""


class MappedSizeError(ArgumentError, ValueError):
    """The mapped arguments and ``axis_size`` give different numbers of replicas, none, or zero."""


class AxisSpecError(OptionError, ValueError):
    """``in_axes`` or ``out_axes`` does not match the arguments or results, or an array lacks that axis."""


class AxisSpecTypeError(OptionError, TypeError):
    """``in_axes`` or ``out_axes`` contains something other than an int or None."""


class NotAnArrayError(ArgumentError, TypeError):
    """An argument, or a result of the mapped function, is not an array."""


class UnconvertedArrayError(NotAnArrayError, ValueError):
    """A value is a masked array or has ``__jax_array__``: JAX accepts neither without a conversion."""


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
    """An int argument does not fit into the dtype that JAX gives it."""


class StaticArgumentError(ArgumentError, ValueError):
    """A static argument is missing, unhashable, not comparable, or also donated."""


class ArgumentNameError(OptionError, ValueError):
    """An option for static or donated arguments names a parameter that the function does not have."""


class AheadOfTimeError(ArgumentError, TypeError):
    """A compiled program is called with arguments it was not compiled for, or inside a transformation."""


class DevicesError(OptionError, ValueError):
    """``devices`` is empty, contains a non-device or a duplicate, or mixes platforms."""


class UnknownBackendError(OptionError, RuntimeError):
    """``backend`` names a platform that this installation of JAX does not have."""


class UnboundAxisError(ProgramError, NameError):
    """A collective names an axis that no enclosing map binds."""


class UnsupportedCollectiveError(ProgramError, NotImplementedError):
    """replicax has no rule for a collective over a mapped axis."""


class UnsupportedTransformationError(ProgramError, NotImplementedError):
    """A ``vmap`` of a map asks to shard its batch over a mesh axis."""


class CollectiveArgumentError(ProgramError, ValueError):
    """A permutation, group or source of a collective does not match the replicas."""


class DivergentOutputError(ProgramError, ValueError):
    """``out_axes=None`` for a result that differs, or may differ, between replicas."""


class OrderedCallbackError(ProgramError, ValueError):
    """A mapped function has a callback with ``ordered=True``; replicas run in parallel, without an order."""


class UnsupportedCallbackError(ProgramError, NotImplementedError):
    """An ``io_callback`` in control flow that replicas on one device execute differently."""


class CallbackError(ProgramError, RuntimeError):
    """A user callback raised an exception in a replica; JAX reports it as text in its own error."""


class ShardsError(ArgumentError, ValueError):
    """``device_put_sharded`` needs one shard per device, all with the same structure, shapes and dtypes."""


class SimulationError(OptionError, RuntimeError):
    """JAX has already started, so the number of simulated devices cannot change."""


class ReplicasError(OptionError, ValueError):
    """``replicax.compat`` cannot show the program that number of devices, or cannot change it any more."""


class MismatchError(ReplicaxError, AssertionError):
    """A program computes something else under ``pmap`` than under the reference."""
