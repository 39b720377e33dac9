"""``pmap``: what people call."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar, final, overload

import jax

from replicax._engine.outputs import Outputs
from replicax._engine.replica import ANONYMOUS
from replicax._layout.axes import check_spec, choose
from replicax._messages import as_int
from replicax._runtime.arguments import function_name
from replicax._runtime.call_path import PathTaker
from replicax._runtime.dispatch import dispatcher
from replicax._runtime.options import Options, check_devices
from replicax._runtime.stages import Lowered, Traced, trace
from replicax._typing import PyTree
from replicax.errors import NotAFunctionError, OptionTypeError, StaticArgumentError

R = TypeVar("R")

#: In place of a function, where pmap is called with options alone.
_ABSENT: Any = object()


@final
class MappedFunction(PathTaker[R]):
    """A function that runs once for each replica; what :func:`pmap` returns."""

    __slots__ = ("__dict__", "_dispatcher", "_fun", "options")  # functools.wraps copies __dict__ alone

    def __init__(self, fun: Callable[..., R], options: Options) -> None:
        functools.update_wrapper(self, fun)
        for name in vars(MappedFunction).keys() & vars(self).keys() - {"__doc__", "__module__"}:
            del vars(self)[name]  # an attribute of the function's own, such as "lower"
        if not hasattr(fun, "__name__"):  # a functools.partial, say; what jax.pmap returns always has a name
            self.__name__ = self.__qualname__ = function_name(fun)
        self.options, self._fun, self._dispatcher = options, fun, dispatcher(fun, options)
        made = self._dispatcher
        super().__init__(functools.partial(made.table, fun), functools.partial(made.call, fun), made.switch)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __init_subclass__(cls, **_: object) -> None:
        raise TypeError("replicax.MappedFunction is no base class: what calls it is chosen for each object. Wrap it.")

    def __copy__(self) -> MappedFunction[R]:
        return self  # as Python copies functions

    def __deepcopy__(self, memo: object) -> MappedFunction[R]:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return MappedFunction, (self._fun, self.options)  # and not the compiled programs

    def __repr__(self) -> str:
        name = self.options.axis_name
        axis = "" if name is ANONYMOUS else f" over axis {name!r}"
        return f"<replicax.pmap of {getattr(self._fun, '__qualname__', repr(self._fun))}{axis}>"

    def trace(self, *args: PyTree, **kwargs: PyTree) -> Traced:
        """Traces the map for these arguments, without running, lowering or compiling it.

        Args:
            args: As in a call: arrays, or ``jax.ShapeDtypeStruct`` in their place.
            kwargs: Likewise.

        Returns:
            The traced program, with ``jaxpr``, ``out_info`` and ``lower()``.

        Raises:
            AheadOfTimeError: the map is called inside another, or closes over a value of a transformation.

        Example:
            >>> import numpy as np, replicax
            >>> replicax.pmap(lambda x: 2 * x).trace(np.ones((12, 3), np.float32)).out_info.shape
            (12, 3)
        """
        return trace(self._dispatcher, self._fun, args, kwargs)

    def lower(self, *args: PyTree, **kwargs: PyTree) -> Lowered:
        """Lowers the program for these arguments, without running or compiling it.

        Args:
            args: As in a call: arrays, or ``jax.ShapeDtypeStruct`` in their place.
            kwargs: Likewise.

        Returns:
            The lowered program, a ``jax.stages.Lowered``, whose ``as_text()`` is StableHLO, and whose ``compile()``
            gives a ``jax.stages.Compiled`` that is called like the map itself.

        Raises:
            AheadOfTimeError: the map is called inside another, or closes over a value of a transformation.

        Example:
            >>> import jax, numpy as np, replicax
            >>> double = replicax.pmap(lambda x: 2 * x).lower(jax.ShapeDtypeStruct((12,), "float32")).compile()
            >>> double(np.arange(12, dtype=np.float32))[-1]
            Array(22., dtype=float32)
        """
        return self.trace(*args, **kwargs).lower()

    def eval_shape(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """The shapes and dtypes of the result, without compiling or running anything.

        Args:
            args: As in a call: arrays that may lie anywhere, or ``jax.ShapeDtypeStruct`` in their place.
            kwargs: Likewise.

        Returns:
            The result's tree, of ``jax.ShapeDtypeStruct``.

        Example:
            >>> import jax, replicax
            >>> replicax.pmap(lambda x: x.sum()).eval_shape(jax.ShapeDtypeStruct((12, 3), "float32"))
            ShapeDtypeStruct(shape=(12,), dtype=float32)
        """
        return self._dispatcher.eval_shape(self._fun, args, kwargs)

    def clear_cache(self) -> None:
        """Frees the programs compiled for this function, mapped with these options; the next call compiles anew."""
        self._dispatcher.clear()

    def explain_cache_miss(self, *args: PyTree, **kwargs: PyTree) -> str:
        """Whether a call with these arguments would be compiled anew, and which of them makes it so.

        JAX's own setting ``jax_explain_cache_misses`` logs the same, at level WARNING of the logger ``"replicax"``,
        whenever a program is compiled.

        Args:
            args: As in a call: arrays, or ``jax.ShapeDtypeStruct`` in their place.
            kwargs: Likewise.

        Returns:
            In what the call differs from the closest one that there is a program for.

        Example:
            >>> import numpy as np, replicax
            >>> def double(x):
            ...     return 2 * x
            >>> mapped = replicax.pmap(double)
            >>> y = mapped(np.ones((8, 2), np.float32))
            >>> print(mapped.explain_cache_miss(np.ones((8, 3), np.float32)))
            double is compiled anew. This is what differs from the call that it was compiled for:
              * x is float32[8,3], and was float32[8,2]
        """
        return self._dispatcher.explain(self._fun, args, kwargs)


@overload
def pmap(
    fun: Callable[..., R],
    axis_name: Hashable | None = ...,
    *,
    in_axes: PyTree = ...,
    out_axes: PyTree = ...,
    static_broadcasted_argnums: int | Iterable[int] = ...,
    static_broadcasted_argnames: str | Iterable[str] = ...,
    devices: Sequence[jax.Device] | None = ...,
    backend: str | None = ...,
    axis_size: int | None = ...,
    donate_argnums: int | Iterable[int] = ...,
    donate_argnames: str | Iterable[str] = ...,
) -> MappedFunction[R]: ...


@overload
def pmap(
    *,
    axis_name: Hashable | None = ...,
    in_axes: PyTree = ...,
    out_axes: PyTree = ...,
    static_broadcasted_argnums: int | Iterable[int] = ...,
    static_broadcasted_argnames: str | Iterable[str] = ...,
    devices: Sequence[jax.Device] | None = ...,
    backend: str | None = ...,
    axis_size: int | None = ...,
    donate_argnums: int | Iterable[int] = ...,
    donate_argnames: str | Iterable[str] = ...,
) -> Callable[[Callable[..., R]], MappedFunction[R]]: ...


def pmap(
    fun: Any = _ABSENT,
    axis_name: Hashable | None = None,
    *,
    in_axes: PyTree = 0,
    out_axes: PyTree = 0,
    static_broadcasted_argnums: int | Iterable[int] = (),
    static_broadcasted_argnames: str | Iterable[str] = (),
    devices: Sequence[jax.Device] | None = None,
    backend: str | None = None,
    axis_size: int | None = None,
    donate_argnums: int | Iterable[int] = (),
    donate_argnames: str | Iterable[str] = (),
) -> Any:
    """Maps a function over an axis of its arguments, in parallel on all devices.

    You write the program of one replica. It is compiled once, every device runs it on its part of the arguments, at
    the same time, and the replicas may talk through the collectives of ``jax.lax``. There may be any number of
    replicas on any number of devices: ``pmap(f)`` computes what ``jax.vmap(f)`` computes.

    Args:
        fun: The program of one replica, on arrays, scalars and pytrees of them. Without it ``pmap`` returns a
            decorator.
        axis_name: A name of the mapped axis, any hashable but an int, for collectives such as
            ``jax.lax.psum(x, axis_name)``.
        in_axes: Which axis of each positional argument is mapped: an int (negative ones count from the end) for all
            of them, or a tuple with an int, None, or a pytree prefix of those for each. An argument, or a part of
            one, with None goes whole to every replica. Keyword arguments are always mapped along axis 0.
        out_axes: Where the mapped axis goes in the result: an int, or a pytree prefix of the result. None stands for
            a result that is the same in all replicas, and returns it once.
        static_broadcasted_argnums: The positions of arguments that are compile-time constants: any hashable. Each
            new value is compiled for anew. They have to be passed, by position or by name.
        static_broadcasted_argnames: The names of such arguments, which may also be left out of a call where they
            have a default value.
        devices: The devices to use; all of the backend's when None. N replicas take up to all of them, and maps
            inside ``fun`` share out the rest, so that only the outermost map may name any.
        backend: The platform to use: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
        axis_size: The number of replicas. Needed only if no argument is mapped.
        donate_argnums: The positions of arguments whose buffers the program may reuse, however they are passed; the
            caller can no longer read them. One that lies elsewhere is freed as soon as it has been moved.
        donate_argnames: The names of such arguments.

    Returns:
        ``fun`` for all replicas: it takes the arguments with the mapped axis in them, each a NumPy array, a scalar
        or a ``jax.Array`` that may lie anywhere, and returns ``jax.Array`` with the mapped axis,
        ``(replicas, ...)`` for ``out_axes=0``, spread over the devices. Replica r lies on device ``r // L``, where
        each device runs L = ceil(N / D) replicas. JAX has no uneven sharding, so that when the D' = ceil(N / L)
        devices do not divide N, a result is split into gcd(N, D') equal parts instead, each on D' / gcd(N, D')
        of the devices.

    Raises:
        ReplicaxError: one of its classes, also the builtin that ``jax.pmap`` raises, for a call that fits no
            program: see :mod:`replicax.errors` for the tree.

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
            static_broadcasted_argnames=static_broadcasted_argnames,
            devices=devices,
            backend=backend,
            axis_size=axis_size,
            donate_argnums=donate_argnums,
            donate_argnames=donate_argnames,
        )
    if not callable(fun):
        raise NotAFunctionError(f"pmap maps a function, and was given {fun!r}, of type {type(fun).__name__}.")
    static = choose("static_broadcasted", fun, static_broadcasted_argnums, static_broadcasted_argnames)
    donated = choose("donate", fun, donate_argnums, donate_argnames)
    both: list[Any] = sorted({*static.names} & {*donated.names})
    both = both or sorted({*static.positions} & {*donated.positions})
    if both:
        raise StaticArgumentError(
            f"The options for static arguments and those for donated arguments both name {both}: a static argument "
            f"has no buffer to donate. Name each argument in one of the two."
        )
    options = Options(
        axis_name=ANONYMOUS if axis_name is None else _check_name(axis_name),
        in_axes=check_spec("in_axes", in_axes),
        outputs=Outputs(check_spec("out_axes", out_axes)),
        static=static,
        donated=donated,
        devices=None if devices is None else check_devices(devices),
        backend=_check_type("backend", backend, str | None, "a string such as 'cpu', or None"),
        axis_size=None if axis_size is None else as_int("axis_size", axis_size),
    )
    return MappedFunction(fun, options)


def _check_name(name: Hashable) -> Hashable:
    try:
        hash(name)
    except TypeError:
        raise OptionTypeError(
            f"axis_name must be hashable, such as a string, and is {name!r:.60}, of type {type(name).__name__}."
        ) from None
    if isinstance(name, int):
        raise OptionTypeError(
            f"axis_name is {name!r}, and a collective would take that for a position in an array's shape, as in "
            f"jax.lax.psum(x, {name!r}). Name the axis by anything else, such as a string."
        )
    return name


def _check_type(which: str, value: object, kind: type | types.UnionType, what: str) -> Any:
    if isinstance(value, kind):
        return value
    raise OptionTypeError(f"{which} must be {what}, and is {value!r:.60}, of type {type(value).__name__}.")
