"""``pmap``: what people call."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar, overload

import jax

from replicax._axes import check_spec
from replicax._dispatch import Dispatcher, Options, check_devices, dispatcher
from replicax._errors import NotAFunctionError, OptionTypeError, StaticArgumentError, as_int
from replicax._lowering import ANONYMOUS

R = TypeVar("R")

#: In place of a function, where pmap is called with options alone.
_ABSENT: Any = object()


class MappedFunction(Generic[R]):
    """A function that runs once for each replica; what :func:`pmap` returns."""

    def __init__(self, fun: Callable[..., R], options: Options) -> None:
        functools.update_wrapper(self, fun)
        self._fun = fun
        self.options = options
        self._dispatcher: Dispatcher = dispatcher(fun, options)

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        return self._dispatcher(self._fun, args, kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __reduce__(self) -> Any:
        return MappedFunction, (self._fun, self.options)  # and not the compiled programs

    def __repr__(self) -> str:
        name = self.options.axis_name
        axis = "" if name is ANONYMOUS else f" over axis {name!r}"
        return f"<replicax.pmap of {getattr(self._fun, '__qualname__', repr(self._fun))}{axis}>"

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Lowers the program for these arguments, without running or compiling it.

        Args:
            args: As in a call: arrays, or ``jax.ShapeDtypeStruct`` in their place.
            kwargs: Likewise.

        Returns:
            The lowered program, whose ``as_text()`` is StableHLO and whose ``compile()`` gives the program that a
            call runs, on flat arguments that lie in place.
        """
        return self._dispatcher.lowered(self._fun, args, kwargs)


@overload
def pmap(
    fun: Callable[..., R],
    axis_name: Hashable | None = ...,
    *,
    in_axes: Any = ...,
    out_axes: Any = ...,
    static_broadcasted_argnums: int | Iterable[int] = ...,
    devices: Sequence[jax.Device] | None = ...,
    backend: str | None = ...,
    axis_size: int | None = ...,
    donate_argnums: int | Iterable[int] = ...,
) -> MappedFunction[R]: ...


@overload
def pmap(
    *,
    axis_name: Hashable | None = ...,
    in_axes: Any = ...,
    out_axes: Any = ...,
    static_broadcasted_argnums: int | Iterable[int] = ...,
    devices: Sequence[jax.Device] | None = ...,
    backend: str | None = ...,
    axis_size: int | None = ...,
    donate_argnums: int | Iterable[int] = ...,
) -> Callable[[Callable[..., R]], MappedFunction[R]]: ...


def pmap(
    fun: Any = _ABSENT,
    axis_name: Hashable | None = None,
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    static_broadcasted_argnums: int | Iterable[int] = (),
    devices: Sequence[jax.Device] | None = None,
    backend: str | None = None,
    axis_size: int | None = None,
    donate_argnums: int | Iterable[int] = (),
) -> Any:
    """Maps a function over an axis of its arguments, in parallel on all devices.

    You write the program of one replica. It is compiled once, every device runs it on its part of the arguments, at
    the same time, and the replicas may talk through the collectives of ``jax.lax``. There may be any number of
    replicas on any number of devices: ``pmap(f)`` computes what ``jax.vmap(f)`` computes.

    Args:
        fun: The program of one replica, on arrays, scalars and pytrees of them. Without it ``pmap`` returns a
            decorator.
        axis_name: A name of the mapped axis, any hashable, for collectives such as ``jax.lax.psum(x, axis_name)``.
        in_axes: Which axis of each positional argument is mapped: an int (negative ones count from the end) for all
            of them, or a tuple with an int, None, or a pytree prefix of those for each. An argument, or a part of
            one, with None goes whole to every replica. Keyword arguments are always mapped along axis 0.
        out_axes: Where the mapped axis goes in the result: an int, or a pytree prefix of the result. None stands for
            a result that is the same in all replicas, and returns it once.
        static_broadcasted_argnums: The positions of arguments that are compile-time constants: any hashable, passed
            by position. Each new value is compiled for anew.
        devices: The devices to use; all of the backend's when None. N replicas take up to all of them.
        backend: The platform to use: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
        axis_size: The number of replicas. Needed only if no argument is mapped.
        donate_argnums: The positions of arguments whose buffers the program may reuse; the caller can no longer
            read them.

    Returns:
        ``fun`` for all replicas: it takes the arguments with the mapped axis in them, each a NumPy array, a scalar
        or a ``jax.Array`` that may lie anywhere, and returns ``jax.Array`` with the mapped axis,
        ``(replicas, ...)`` for ``out_axes=0``, spread over the devices. Replica r lies on device ``r // L``, where
        each device runs L = ceil(N / D) replicas. JAX has no uneven sharding, so that when the D' = ceil(N / L)
        devices do not divide N, a result is split into gcd(N, D') equal parts instead, each on D' / gcd(N, D')
        of the devices.

    Raises:
        ReplicaxError: one of its classes, also the builtin that ``jax.pmap`` raises, for a call that fits no
            program: see :mod:`replicax` for the tree.

    Example:
        >>> import jax, jax.numpy as jnp, replicax
        >>> replicax.pmap(lambda x: x / jax.lax.psum(x, "i"), axis_name="i")(jnp.arange(4.0))
        Array([0.        , 0.16666667, 0.33333334, 0.5       ], dtype=float32)
    """
    if fun is _ABSENT:
        return functools.partial(
            pmap,
            axis_name=axis_name,
            in_axes=in_axes,
            out_axes=out_axes,
            static_broadcasted_argnums=static_broadcasted_argnums,
            devices=devices,
            backend=backend,
            axis_size=axis_size,
            donate_argnums=donate_argnums,
        )
    if not callable(fun):
        raise NotAFunctionError(f"pmap maps a function, and was given {fun!r}, of type {type(fun).__name__}.")
    static = _positions("static_broadcasted_argnums", static_broadcasted_argnums)
    donated = _positions("donate_argnums", donate_argnums)
    if both := sorted(set(static) & set(donated)):
        raise StaticArgumentError(
            f"static_broadcasted_argnums={static} and donate_argnums={donated} both name {both}: a static argument "
            f"has no buffer to donate. Name each position in one of the two."
        )
    options = Options(
        axis_name=ANONYMOUS
        if axis_name is None
        else _check_type("axis_name", axis_name, Hashable, "hashable, such as a string"),
        in_axes=check_spec("in_axes", in_axes),
        out_axes=check_spec("out_axes", out_axes),
        static=static,
        donated=donated,
        devices=None if devices is None else check_devices(devices),
        backend=_check_type("backend", backend, str | None, "a string such as 'cpu', or None"),
        axis_size=None if axis_size is None else as_int("axis_size", axis_size),
    )
    return MappedFunction(fun, options)


def _check_type(which: str, value: Any, kind: Any, what: str) -> Any:
    if isinstance(value, kind):
        return value
    raise OptionTypeError(f"{which} must be {what}, and is {value!r:.60}, of type {type(value).__name__}.")


def _positions(which: str, argnums: int | Iterable[int]) -> tuple[int, ...]:
    given = argnums if isinstance(argnums, Iterable) else (argnums,)
    return tuple(as_int(which, position) for position in given)
