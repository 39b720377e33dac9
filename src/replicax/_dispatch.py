"""From a call to a compiled program: the signature looked up, the arguments moved to where the program wants them."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from replicax import _jax
from replicax._axes import Leaf, Spec, mapped_size, match_in_axes, name_leaves, parameter_names
from replicax._errors import (
    DeletedArrayError,
    DevicesError,
    NotAnArrayError,
    OptionTypeError,
    StaticArgumentError,
    UnknownBackendError,
    UnsupportedTransformationError,
    report,
)
from replicax._layout import Layout, lanes_only, layout
from replicax._lowering import Program, describe_type, lower, pad_rows, trace_replica, tracing_replica


@dataclass(frozen=True)
class Options:
    """What the user asked of ``pmap``, checked: the part of a signature that does not change between calls.

    Attributes:
        axis_name: The user's name of the mapped axis (or the name of one without a name).
        in_axes: The mapped axes of the positional arguments.
        out_axes: The mapped axes of the result.
        static: The positions of static arguments.
        donated: The positions of donated arguments.
        devices: The devices to use, or None for all of the backend.
        backend: The platform to use, or None for JAX's default.
        axis_size: The number of replicas, or None to read it off the arguments.
    """

    axis_name: Hashable
    in_axes: Spec
    out_axes: Spec
    static: tuple[int, ...]
    donated: tuple[int, ...]
    devices: tuple[jax.Device, ...] | None
    backend: str | None
    axis_size: int | None

    def resolve_devices(self) -> tuple[jax.Device, ...]:
        """The devices that replicas may lie on; the first moment that JAX's backends are touched."""
        if self.devices is not None and self.backend is None:
            return self.devices
        try:
            known = tuple(jax.devices(self.backend))
        except RuntimeError as error:
            if self.backend is None:
                raise
            raise UnknownBackendError(
                f"backend={self.backend!r}: JAX has no such backend here ({error}). Name one that it has, such as "
                f"{jax.default_backend()!r}, or leave backend out."
            ) from None
        if self.devices is None:
            return known
        foreign = [repr(device) for device in self.devices if device not in known]
        if foreign:
            raise DevicesError(
                report(
                    f"devices and backend={self.backend!r} contradict each other:",
                    [f"{device} is not a device of that backend" for device in foreign],
                    "Give one of the two.",
                )
            )
        return self.devices


class Dispatcher:
    """The compiled programs of one function under one set of options.

    It does not hold the function: a function that is dropped takes its programs with it.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._programs: dict[Hashable, Program] = {}

    def __call__(self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs ``fun`` once for each replica."""
        with _jax.own_mesh((args, kwargs)):
            return self._call(fun, args, kwargs)

    def _call(self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        program, leaves = self.resolve(fun, args, kwargs)
        if not _jax.eager():
            results = self._stage(program, leaves)
        else:
            if program.donated:
                self._check_donated(program, fun, args, kwargs, leaves)
            results = self._run(program, leaves)
        return jax.tree.unflatten(program.out_tree, results)

    def _stage(self, program: Program, leaves: list[Any]) -> tuple[Any, ...]:
        settled = map(functools.partial(_settle, program), [*leaves, *program.closed], program.in_axes)
        try:
            if program.layout.mesh is not None:
                _jax.refuse_split_batches()
            return tuple(program.staged(*settled))
        except _jax.SplitBatchError as error:
            raise UnsupportedTransformationError(
                f"A vmap of a map is to split its batch over {error.args[0]!r}, an axis of a mesh, by spmd_axis_name "
                f"or by the type of an argument. The replicas of the map take all of its devices, each with the whole "
                f"batch. Leave spmd_axis_name out, and pass arguments that are not split along the vmapped axis "
                f"(jax.sharding.reshard); or map over the batch with replicax.pmap, too."
            ) from None

    def _run(self, program: Program, leaves: list[Any]) -> tuple[Any, ...]:
        placed = place(program, [*leaves, *program.closed_in_place])
        results = program.compiled(*placed)
        for i in program.donated:  # What was moved is still there; what was not, the program has taken.
            if placed[i] is not leaves[i] and isinstance(leaves[i], jax.Array):
                leaves[i].delete()
        return results

    def _check_donated(
        self,
        program: Program,
        fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Any],
    ) -> None:
        arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
        times = Counter(map(id, arrays.values()))
        given = {id(arrays[i]) for i in program.donated if i in arrays}
        faults = {i: "was donated before, and its buffer is gone" for i, x in arrays.items() if x.is_deleted()}
        twice = {key for key, count in times.items() if count > 1} & given
        faults |= {i: "is donated, and passed twice" for i, x in arrays.items() if id(x) in twice}
        if faults:
            names = name_leaves(fun, self._split(fun, args)[1], kwargs)
            raise DeletedArrayError(
                report(
                    "pmap cannot take these arguments:",
                    [f"{names[i]} {fault}" for i, fault in sorted(faults.items())],
                    "Use the result of the call that an array was donated to, and pass a copy, x + 0, where it is "
                    "needed twice.",
                )
            )

    def resolve(
        self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, abstract: bool = False
    ) -> tuple[Program, list[Any]]:
        """The program for a call, traced and lowered at most once a signature, and the leaves to run it on.

        With ``abstract`` a ``jax.ShapeDtypeStruct`` may stand for an array.
        """
        static, dynamic = self._split(fun, args)
        leaves, tree = jax.tree.flatten((dynamic, kwargs))
        try:
            types = tuple(map(_type_key, leaves))
            if not abstract and any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
                raise TypeError
        except (TypeError, ValueError):
            _refuse_non_arrays(fun, dynamic, kwargs, leaves)
            raise
        values = tuple((i, type(value), value) for i, value in static.items())
        key = (tree, types, values, _jax.trace_context(), _jax.eager(), tracing_replica())
        try:
            program = None if jax.config.jax_disable_jit else self._programs.get(key)
        except TypeError:
            _refuse_unhashable(fun, static)
            raise
        if program is None:
            program, reusable = self._lower(fun, args, dynamic, kwargs, leaves)
            if reusable and not jax.config.jax_disable_jit:  # under it every call runs the user's Python
                self._programs[key] = program
        return program, leaves

    def lowered(self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> jax.stages.Lowered:
        """The program for a call, lowered to StableHLO but not compiled."""
        with _jax.own_mesh():
            return self._lowered(fun, args, kwargs)

    def _lowered(self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> jax.stages.Lowered:
        program, leaves = self.resolve(fun, args, kwargs, abstract=True)
        return program.compiled.lower(*map(program.padded_type, [*leaves, *program.closed], program.in_axes))

    def _split(self, fun: Callable[..., Any], args: tuple[Any, ...]) -> tuple[dict[int, Any], dict[int, Any]]:
        """The static and the other positional arguments, by position."""
        positions = {i % len(args) if -len(args) <= i < len(args) else i for i in self.options.static}
        missing = [i for i in sorted(positions) if i >= len(args) or i < 0]
        if missing:
            names = parameter_names(fun, missing)
            raise StaticArgumentError(
                report(
                    f"static_broadcasted_argnums={self.options.static} names positional arguments that are missing "
                    f"from a call with {len(args)}:",
                    [names[i] for i in missing],
                    "Pass static arguments by position.",
                )
            )
        static = {i: args[i] for i in positions}
        return static, {i: arg for i, arg in enumerate(args) if i not in positions}

    def _lower(
        self,
        fun: Callable[..., Any],
        args: tuple[Any, ...],
        dynamic: Mapping[int, Any],
        kwargs: dict[str, Any],
        leaves: Sequence[Any],
    ) -> tuple[Program, bool]:
        options = self.options
        names = name_leaves(fun, dynamic, kwargs)
        named = [Leaf(name, _type(x)) for name, x in zip(names, leaves, strict=True)]
        in_axes = match_in_axes(options.in_axes, dynamic, len(args), named)
        size = mapped_size(in_axes, named, options.axis_size)
        if tracing_replica():
            placed = lanes_only(options.axis_name, size)
        else:
            placed = layout(options.axis_name, size, options.resolve_devices(), spread=not _jax.eager())

        one = [_without(leaf.aval, axis) for leaf, axis in zip(named, in_axes, strict=True)]
        one_dynamic, one_kwargs = jax.tree.unflatten(jax.tree.structure((dict(dynamic), kwargs)), one)
        one_args = [one_dynamic.get(i, arg) for i, arg in enumerate(args)]
        static = [i for i in range(len(args)) if i not in dynamic]
        replica = trace_replica(fun, one_args, one_kwargs, static, options.axis_name, size)

        donated_args = {i % len(args) for i in options.donated if -len(args) <= i < len(args)}
        owners = [i for i, tree in dynamic.items() for _ in jax.tree.leaves(tree)]
        donated = [k for k, i in enumerate(owners) if i in donated_args]
        name = getattr(fun, "__name__", type(fun).__name__)
        dtypes = [leaf.aval.dtype for leaf in named]
        program = lower(replica, placed, in_axes, options.out_axes, dtypes, donated, name)
        return program, not replica.closes_over_tracers


def _type(x: Any) -> jax.ShapeDtypeStruct:
    aval = _jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def _type_key(x: Any) -> Hashable:
    aval = _jax.typeof(x)
    return aval.shape, aval.dtype, getattr(aval, "weak_type", False)


def _without(aval: jax.ShapeDtypeStruct, axis: int | None) -> jax.ShapeDtypeStruct:
    """The type of one replica's part of a mapped array."""
    if axis is None:
        return aval
    shape = (*aval.shape[:axis], *aval.shape[axis + 1 :])
    return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=aval.weak_type)


# ---------------------------------------------------------------------------------------------------------------
# Faults


def _refuse_non_arrays(
    fun: Callable[..., Any], dynamic: Mapping[int, Any], kwargs: Mapping[str, Any], leaves: Sequence[Any]
) -> None:
    faults = []
    for name, x in zip(name_leaves(fun, dynamic, kwargs), leaves, strict=True):
        if not _jax.is_array_type(x) and not isinstance(x, bool):
            faults.append(f"{name} {describe_type(x)}")
    raise NotAnArrayError(
        report(
            "pmap maps arrays, and these arguments are none:",
            faults,
            "Convert them to arrays of numbers; or pass what is none by position and name that position in "
            "static_broadcasted_argnums (it has to be hashable); or bind it beforehand with functools.partial.",
        )
    )


def _refuse_unhashable(fun: Callable[..., Any], static: Mapping[int, Any]) -> None:
    names, faults = parameter_names(fun, static), []
    for i, value in static.items():
        try:
            hash(value)
        except (TypeError, ValueError):
            faults.append(f"{names[i]} is of type {type(value).__name__}")
    raise StaticArgumentError(
        report(
            "Non-hashable static arguments are not supported, since each new value is compiled for anew:",
            faults,
            "Pass a hashable value, such as a tuple for a list, or drop the position from static_broadcasted_argnums.",
        )
    )


def check_devices(devices: Sequence[jax.Device]) -> tuple[jax.Device, ...]:
    """The devices as a tuple.

    Raises:
        OptionTypeError: it is no sequence.
        DevicesError: it is empty, or holds something that is no device, one twice, or devices of several platforms.
    """
    if isinstance(devices, str) or not isinstance(devices, Iterable):
        raise OptionTypeError(f"devices must be a list of devices, and is {devices!r:.60}. Write [device] for one.")
    given = tuple(devices)
    if not given:
        raise DevicesError(
            "The 'devices' argument to pmap must be non-empty, or None. Pass some of jax.devices(), or leave devices "
            "out to use all of them."
        )
    faults = [
        f"devices[{i}] is {d!r}, which is no device" for i, d in enumerate(given) if not isinstance(d, jax.Device)
    ]
    faults = faults or [
        f"{d!r} stands in it {given.count(d)} times" for d in dict.fromkeys(given) if given.count(d) > 1
    ]
    platforms = sorted({d.platform for d in given}) if not faults else []
    if len(platforms) > 1:
        faults = [f"its devices are of the platforms {', '.join(platforms)}"]
    if faults:
        raise DevicesError(
            report(
                "devices must be one or more different devices of one platform:",
                faults,
                "Pass some of jax.devices(), or leave devices out to use all of them.",
            )
        )
    return given


# ---------------------------------------------------------------------------------------------------------------
# Moving arguments


def place(program: Program, leaves: Sequence[Any]) -> list[Any]:
    """The argument leaves, padded, and moved to where the program wants them; what lies right is not touched.

    A NumPy array is copied first. JAX aliases the memory of one that is aligned to 64 bytes, in ``jit`` as in
    ``device_put``, and reads it later, while its owner is free to change it as soon as the call returns.
    """
    placed = list(map(_own, leaves, program.dtypes))
    wanted = program.in_shardings
    if program.layout.axis.padding:
        _pad_all(program, placed)
    astray = [i for i, x in enumerate(placed) if isinstance(x, jax.Array) and not _lies(x, wanted[i])]
    if astray:
        moved = jax.device_put([placed[i] for i in astray], [wanted[i] for i in astray])
        for i, x in zip(astray, moved, strict=True):
            placed[i] = x
    return placed


def _pad_all(program: Program, placed: list[Any]) -> None:
    """Pads the mapped arguments: those on the program's devices together, others where they lie."""
    devices, here = program.layout.sharding(None).device_set, []
    for i, axis in enumerate(program.in_axes):
        x = placed[i]
        if axis is None:
            continue
        if program.dtypes[i] == jax.dtypes.float0:
            placed[i] = np.zeros(program.padded_type(x, axis).shape, jax.dtypes.float0)
        elif not isinstance(x, jax.Array):
            placed[i] = _pad_on_host(x, axis, program.layout)
        elif x.sharding.device_set == devices:
            here.append(i)
        else:
            placed[i] = _pad_where_it_lies(x, axis, program.layout.axis.padding)
    if here:
        for i, x in zip(here, program.pad(tuple(here), [placed[i] for i in here]), strict=True):
            placed[i] = x


_pad_where_it_lies = jax.jit(pad_rows, static_argnums=(1, 2))


def _own(x: Any, dtype: Any) -> Any:
    """``x``; of a NumPy array, a copy that nobody changes, aligned so that it can serve as a CPU device's memory."""
    if dtype == jax.dtypes.float0:  # no bytes, which no device holds
        return x
    if not isinstance(x, np.ndarray):
        return x.astype(dtype) if isinstance(x, jax.Array) and x.dtype != dtype else x
    raw = np.empty(x.nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    copy = raw[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


_ALIGNMENT = 64


def _pad_on_host(x: Any, axis: int, where: Layout) -> jax.Array:
    """A mapped NumPy array, of which each device gets its own rows, with the last replica's for each padding lane."""
    host = np.asarray(x, _jax.typeof(x).dtype)

    def block(index: tuple[slice, ...]) -> np.ndarray[Any, Any]:
        start, stop, _ = index[axis].indices(where.padded_size)
        return (
            host[index] if stop <= where.size else host.take(np.minimum(np.arange(start, stop), where.size - 1), axis)
        )

    shape = (*host.shape[:axis], where.padded_size, *host.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, where.sharding(axis), block)


def _lies(x: jax.Array, wanted: jax.sharding.NamedSharding) -> bool:
    """Whether the array lies as wanted, whatever its mesh and its axes are called."""
    return x.sharding == wanted or (x.sharding.is_equivalent_to(wanted, x.ndim) and not _jax.split_over(x))


def _settle(program: Program, x: Any, axis: int | None) -> Any:
    """An argument of a traced call, moved if its value is known already and lies on devices of its own.

    Where the call is recorded it is a constant of the program, which XLA puts where it has to be.
    """
    value, batched = _jax.outermost_value(x)
    if isinstance(value, jax.core.Tracer) or not isinstance(value, jax.Array):
        return x
    if program.layout.mesh is None or _jax.staging():
        return x
    here = value.sharding if value.committed else None
    if batched and isinstance(here, jax.sharding.NamedSharding):
        here = jax.sharding.NamedSharding(here.mesh, jax.sharding.PartitionSpec())
    return _jax.move(x, here, program.layout.result_sharding(axis))


# ---------------------------------------------------------------------------------------------------------------
# One dispatcher for each function and options


_dispatchers: dict[int, tuple[weakref.ref[Any], dict[Hashable, Dispatcher]]] = {}


def dispatcher(fun: Callable[..., Any], options: Options) -> Dispatcher:
    """The dispatcher of ``fun``, shared by all who map the same function in the same way, and freed with it."""
    owner = getattr(fun, "__self__", None) if hasattr(fun, "__func__") else fun
    try:
        reference = weakref.ref(owner, functools.partial(_forget, id(owner)))
        key = (getattr(fun, "__func__", None), options)
        hash(key)
    except TypeError:  # no weak references, or an unhashable axis name: not shared
        return Dispatcher(options)
    _, known = _dispatchers.setdefault(id(owner), (reference, {}))
    return known.setdefault(key, Dispatcher(options))


def _forget(owner: int, _: object) -> None:
    _dispatchers.pop(owner, None)
