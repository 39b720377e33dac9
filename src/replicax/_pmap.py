"""The public function ``pmap`` and the callable that it returns."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, final, overload

import jax

from replicax._engine.outputs import Outputs
from replicax._engine.replica import ANONYMOUS
from replicax._layout.axes import check_spec, choose
from replicax._messages import as_int
from replicax._runtime.arguments import function_name
from replicax._runtime.call_path import PathTaker
from replicax._runtime.dispatch import dispatcher
from replicax._runtime.options import Options, check_deterministic, check_devices
from replicax._runtime.stages import Lowered, Traced, trace
from replicax._typing import PyTree
from replicax.errors import NotAFunctionError, OptionTypeError, StaticArgumentError

R = TypeVar("R")

#: The default of ``fun``. It means that pmap was called with options only, as a decorator.
_ABSENT: Any = object()


@final
class MappedFunction(PathTaker[R]):
    """Callable returned by :func:`pmap`: runs the mapped function once per replica."""

    # Slots, because functools.wraps copies all attributes in __dict__ to the wrapper.
    __slots__ = ("__dict__", "_dispatcher", "_fun", "options")

    if TYPE_CHECKING:  # functools.update_wrapper sets it; an annotation would hide those of the function

        @property
        def __wrapped__(self) -> Callable[..., R]: ...

    def __init__(self, fun: Callable[..., R], options: Options) -> None:
        functools.update_wrapper(self, fun)
        for name in vars(MappedFunction).keys() & vars(self).keys() - {"__doc__", "__module__"}:
            del vars(self)[name]  # an attribute of the function must not hide a method, such as "lower"
        if not hasattr(fun, "__name__"):  # such as a functools.partial; the callable of jax.pmap always has a name
            self.__name__ = self.__qualname__ = function_name(fun)
        self.options, self._fun, self._dispatcher = options, fun, dispatcher(fun, options)
        made = self._dispatcher
        super().__init__(functools.partial(made.table, fun), functools.partial(made.call, fun), made.switch)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __init_subclass__(cls, **_: object) -> None:
        raise TypeError(
            "replicax.MappedFunction cannot be subclassed: each object sets its own __call__. Wrap it instead."
        )

    def __copy__(self) -> MappedFunction[R]:
        return self  # copy.copy of a Python function returns the function, too

    def __deepcopy__(self, memo: object) -> MappedFunction[R]:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return MappedFunction, (self._fun, self.options)  # without the compiled programs

    def __repr__(self) -> str:
        name = self.options.axis_name
        axis = "" if name is ANONYMOUS else f" over axis {name!r}"
        return f"<replicax.pmap of {getattr(self._fun, '__qualname__', repr(self._fun))}{axis}>"

    def trace(self, *args: PyTree, **kwargs: PyTree) -> Traced:
        """Traces the map for these arguments, without lowering, compiling or running it.

        Args:
            args: Positional arguments of a call. Arrays ``(replicas, ...)`` may be ``jax.ShapeDtypeStruct`` instead.
            kwargs: Keyword arguments of a call, in the same form.

        Returns:
            The traced program, with ``jaxpr``, ``out_info`` and ``lower()``.

        Raises:
            AheadOfTimeError: the call is inside another mapped function, or ``fun`` closes over a tracer.
            ReplicaxError: a call with these arguments is invalid.

        Example:
            >>> import numpy as np, replicax
            >>> replicax.pmap(lambda x: 2 * x).trace(np.ones((12, 3), np.float32)).out_info.shape
            (12, 3)
        """
        return trace(self._dispatcher, self._fun, args, kwargs)

    def lower(self, *args: PyTree, **kwargs: PyTree) -> Lowered:
        """Lowers the map for these arguments, without compiling or running it.

        Args:
            args: Positional arguments of a call. Arrays ``(replicas, ...)`` may be ``jax.ShapeDtypeStruct`` instead.
            kwargs: Keyword arguments of a call, in the same form.

        Returns:
            The lowered program, a ``jax.stages.Lowered``. ``as_text()`` returns StableHLO. ``compile()`` returns a
            ``jax.stages.Compiled`` that is called like the map.

        Raises:
            AheadOfTimeError: the call is inside another mapped function, or ``fun`` closes over a tracer.
            ReplicaxError: a call with these arguments is invalid.

        Example:
            >>> import jax, numpy as np, replicax
            >>> double = replicax.pmap(lambda x: 2 * x).lower(jax.ShapeDtypeStruct((12,), "float32")).compile()
            >>> double(np.arange(12, dtype=np.float32))[-1]
            Array(22., dtype=float32)
        """
        return self.trace(*args, **kwargs).lower()

    def eval_shape(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Computes the shapes and dtypes of the result, without compiling or running anything.

        Args:
            args: Positional arguments of a call. Arrays ``(replicas, ...)`` may be ``jax.ShapeDtypeStruct`` instead.
            kwargs: Keyword arguments of a call, in the same form.

        Returns:
            The result's pytree with ``jax.ShapeDtypeStruct`` leaves, of shape ``(replicas, ...)`` for ``out_axes=0``.

        Raises:
            ReplicaxError: a call with these arguments is invalid.

        Example:
            >>> import jax, replicax
            >>> replicax.pmap(lambda x: x.sum()).eval_shape(jax.ShapeDtypeStruct((12, 3), "float32"))
            ShapeDtypeStruct(shape=(12,), dtype=float32)
        """
        return self._dispatcher.eval_shape(self._fun, args, kwargs)

    def clear_cache(self) -> None:
        """Frees the programs compiled for this function with these options. The next call compiles again."""
        self._dispatcher.clear()

    def explain_cache_miss(self, *args: PyTree, **kwargs: PyTree) -> str:
        """Explains whether a call with these arguments needs a new compilation, and why.

        With JAX's setting ``jax_explain_cache_misses``, the logger ``"replicax"`` logs the same text at level WARNING
        for every compilation.

        Args:
            args: Positional arguments of a call. Arrays ``(replicas, ...)`` may be ``jax.ShapeDtypeStruct`` instead.
            kwargs: Keyword arguments of a call, in the same form.

        Returns:
            A text: how the call differs from the most similar compiled call, or that it needs no compilation.

        Raises:
            ReplicaxError: a call with these arguments is invalid.

        Example:
            >>> import numpy as np, replicax
            >>> def double(x):
            ...     return 2 * x
            >>> mapped = replicax.pmap(double)
            >>> y = mapped(np.ones((8, 2), np.float32))
            >>> print(mapped.explain_cache_miss(np.ones((8, 3), np.float32)))
            double needs a new compilation. Differences to the call that it was compiled for:
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
    lanes: str | int = ...,
    deterministic: bool = ...,
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
    lanes: str | int = ...,
    deterministic: bool = ...,
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
    lanes: str | int = "auto",
    deterministic: bool = False,
) -> Any:
    """Maps a function over an axis of its arguments, in parallel on all devices.

    You write the program of one replica. ``pmap`` compiles it once, and each device runs it on its own shard of the
    arguments. Replicas communicate with the collectives of ``jax.lax``. The number of replicas does not depend on the
    number of devices: ``pmap(f)`` computes what ``jax.vmap(f)`` computes.

    Args:
        fun: The program of one replica. Its arguments and results are arrays, scalars and pytrees of them. Without
            ``fun``, ``pmap`` returns a decorator.
        axis_name: The name of the mapped axis, for collectives such as ``jax.lax.psum(x, axis_name)``. Any hashable
            value except an int.
        in_axes: The mapped axis of each positional argument: one int for all arguments, or a tuple with one entry
            per argument. An entry is an int, None, or a pytree prefix of ints and None. Negative ints count from the
            end. With None, every replica gets the full argument or subtree. Keyword arguments are always mapped along
            axis 0.
        out_axes: The position of the mapped axis in each result: an int, None, or a pytree prefix of ints and None.
            A result with None must be equal in all replicas, and is returned once, without the mapped axis.
        static_broadcasted_argnums: The positions of static arguments: compile-time constants. Their values must be
            hashable, and each new value triggers a compilation. Every call must pass them, by position or by name.
        static_broadcasted_argnames: The names of static arguments. A call may leave out one with a default value.
        devices: The devices to use; all devices of the backend when None. Only the outermost map may set them: maps
            inside ``fun`` run on the devices of the outer map.
        backend: The platform to use: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
        axis_size: The number of replicas. Required only if no argument is mapped.
        donate_argnums: The positions of donated arguments: the program may reuse their buffers, and the caller can no
            longer read them after the call. A call may pass these arguments by position or by name. If an
            array has to be moved to other devices, the original is freed after the move.
        donate_argnames: The names of donated arguments.
        lanes: How a device runs its replicas if it has several: ``"vectorized"`` (all at once, as ``vmap`` does),
            ``"sequential"`` (one after the other), an int (so many at a time), or ``"auto"``: a rule chooses, by the
            program and the free memory. One after the other, each replica runs its own loop iterations and takes its
            own branches, and the intermediate values of one replica are in memory, and not of all. Results are the
            same, to rounding.
        deterministic: Whether the bits of the results must not depend on the devices: their number, the processes, and
            the replicas of each. Replicas run one after the other on each device, and sums are added in an order that
            depends on N alone. See the page "The same bits on any number of devices" in the documentation.

    Returns:
        A callable that runs ``fun`` for all N replicas. Arguments are NumPy arrays, or ``jax.Array`` on any devices, of
        shape ``(replicas, ...)`` for ``in_axes=0``, or scalars where ``in_axes`` is None. Results are ``jax.Array``, of
        shape ``(replicas, ...)`` for ``out_axes=0``, sharded over the devices. Replica r runs on device ``r // L``,
        where L = ceil(N / D) for D devices, so D' = ceil(N / L) devices are used. JAX has no uneven sharding: if D'
        does not divide N, a result is split into gcd(N, D') equal shards, each on D' / gcd(N, D') devices.

    Raises:
        NotAFunctionError: ``fun`` is not callable.
        OptionTypeError: an option has the wrong type.
        AxisSpecTypeError: ``in_axes`` or ``out_axes`` contains an entry that is not an int or None.
        ArgumentNameError: an option names a parameter that ``fun`` does not have.
        DevicesError: ``devices`` is empty, contains a non-device or a duplicate, or mixes platforms.
        StaticArgumentError: an argument is both static and donated.
        ReplicaxError: a call of the returned callable is invalid. See :mod:`replicax.errors` for all classes; each
            is also the builtin exception that ``jax.pmap`` raises for the same fault.

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
            lanes=lanes,
            deterministic=deterministic,
        )
    if not callable(fun):
        if isinstance(fun, str):
            raise NotAFunctionError(
                f"The first argument of pmap must be callable, got {fun!r}. To name the axis in a decorator, write "
                f"pmap(axis_name={fun!r})."
            )
        raise NotAFunctionError(
            f"The first argument of pmap must be callable, got {fun!r} of type {type(fun).__name__}. Write pmap(f), "
            f"and pass the arguments of f to the callable that pmap returns."
        )
    static = choose("static_broadcasted", fun, static_broadcasted_argnums, static_broadcasted_argnames)
    donated = choose("donate", fun, donate_argnums, donate_argnames)
    both: list[Any] = sorted({*static.names} & {*donated.names})
    both = both or sorted({*static.positions} & {*donated.positions})
    if both:
        raise StaticArgumentError(
            f"The options for static arguments and the options for donated arguments both name {both}, but a static "
            f"argument has no buffer to donate. Name each argument in only one of them."
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
        lanes=check_deterministic(deterministic, lanes),
        deterministic=deterministic,
    )
    return MappedFunction(fun, options)


def _check_name(name: Hashable) -> Hashable:
    try:
        hash(name)
    except TypeError:
        raise OptionTypeError(
            f"axis_name must be hashable, got {name!r:.60} of type {type(name).__name__}. Use a string."
        ) from None
    if isinstance(name, int):
        raise OptionTypeError(
            f"axis_name must not be an int, got {name!r}: jax.lax.psum(x, {name!r}) would sum over a positional axis "
            f"of the array. Use a string."
        )
    return name


def _check_type(which: str, value: object, kind: type | types.UnionType, what: str) -> Any:
    if isinstance(value, kind):
        return value
    raise OptionTypeError(f"{which} must be {what}, got {value!r:.60} of type {type(value).__name__}.")
