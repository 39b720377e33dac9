"""A program run on arguments that may lie anywhere: padded, moved to where it wants them, and taken if donated."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.levels import pad_rows
from replicax._engine.spec import ProgramSpec
from replicax._layout.placement import Placement
from replicax._messages import report
from replicax._runtime.executable import Executable
from replicax._runtime.taken import TakenArrays
from replicax._runtime.transfer import copy_small, is_small, put
from replicax._typing import Array, ArrayLike, Function
from replicax.errors import DeletedArrayError, UnsupportedTransformationError


def run(
    executable: Executable,
    leaves: Sequence[ArrayLike],
    names: Callable[[], Sequence[str]],
    compiled: Function | None = None,
) -> tuple[Sequence[Array], Sequence[Array]]:
    """Runs a program on arguments that may lie anywhere, and takes those that are donated.

    Args:
        executable: The program.
        leaves: Its arguments.
        names: What the user calls the arguments.
        compiled: What runs it on arrays in place, if not the executable itself.

    Returns:
        The results, and the arguments as they were moved.
    """
    call, spec = compiled or executable.run, executable.spec
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in leaves):
        _check_donated(spec, leaves, names)
    if not spec.inputs.donated or _jax.looks_for_nans():  # after a NaN, JAX runs the program again to find it
        placed = place(executable, [*leaves, *executable.closed_in_place])
        return call(*placed), placed
    _check_donated(spec, leaves, names)
    placed = place(executable, [*leaves, *executable.closed_in_place])
    moved = {i: x for i in spec.inputs.donated if placed[i] is not (x := leaves[i]) and isinstance(x, jax.Array)}
    for i, x in moved.items():
        if not _shares(x, placed[i]) and not any(x is y for y in placed):
            x.delete()
    results = call(*placed)
    for x in moved.values():
        x.delete()
    TakenArrays.delete(leaves)
    return results, placed


def cpp_cacheable(spec: ProgramSpec, leaves: Sequence[ArrayLike], placed: Sequence[Array]) -> bool:
    """Whether C++ may run such a call: each argument is in place, or gets there in the same way by itself."""
    if spec.closed or _jax.looks_for_nans():
        return False
    several = spec.layout.mesh.size > 1
    for x, y, axis in zip(leaves, placed, spec.inputs.axes, strict=False):
        if isinstance(x, jax.Array):
            moves = several and len(x.sharding.device_set) == 1 and not spec.inputs.donated
            if x is not y and not (moves and x.dtype == y.dtype and x.shape == y.shape):
                return False
        elif not _moves_by_itself(spec, x, axis):
            return False
    return True


def _moves_by_itself(spec: ProgramSpec, x: ArrayLike, axis: int | None) -> bool:
    """Whether C++ may move it from the host: it is not padded, has numbers, and is small if it has to be copied."""
    if (spec.layout.axis.padding and axis is not None) or jax.dtypes.float0 == getattr(x, "dtype", None):
        return False
    return spec.layout.mesh.size > 1 or not isinstance(x, np.ndarray) or is_small(x)


def reads_host_memory(spec: ProgramSpec, leaves: Sequence[ArrayLike]) -> bool:
    """Whether C++ would read NumPy arrays of such a call where they are (to C++ a NumPy scalar is one, too)."""
    return spec.layout.mesh.size == 1 and any(isinstance(x, np.ndarray | np.generic) for x in leaves)


def _shares(x: jax.Array, copy: jax.Array) -> bool:
    """Whether a moved array may have buffers of the original's: those of parts that did not have to move."""
    if x.shape != copy.shape or x.sharding.device_set.isdisjoint(copy.sharding.device_set):
        return False
    before, after = x.sharding.devices_indices_map(x.shape), copy.sharding.devices_indices_map(copy.shape)
    return any(before[device] == after[device] for device in before.keys() & after.keys())


def _check_donated(spec: ProgramSpec, leaves: Sequence[ArrayLike], names: Callable[[], Sequence[str]]) -> None:
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    times = Counter(map(id, arrays.values()))
    faults = {
        i: "has no buffer any more: it was donated to an earlier call, or deleted"
        for i, x in arrays.items()
        if x.is_deleted()
    }
    for i in spec.donated_in_place:  # where it has to be moved, it is the copy that the program takes
        x = arrays.get(i)
        if x is not None and i not in faults and times[id(x)] > 1 and _lies(x, spec.in_shardings[i]):
            faults[i] = "is donated, and passed twice"
    if faults:
        called = names()
        raise DeletedArrayError(
            report(
                "pmap cannot take these arguments:",
                [f"{called[i]} {fault}" for i, fault in sorted(faults.items())],
                "Use the result of the call that an array was donated to, and pass a copy, x + 0, where it is "
                "needed twice.",
            )
        )


# ---------------------------------------------------------------------------------------------------------------
# Moving arguments


def place(executable: Executable, leaves: Sequence[ArrayLike]) -> list[Array]:
    """The argument leaves, padded, and moved to where the program wants them; what lies right is not touched."""
    spec = executable.spec
    wanted, placement = spec.in_shardings, spec.layout.axis.placement
    placed, astray, to_pad = list(leaves), [], []
    for i, x in enumerate(placed):
        axis = spec.inputs.axes[i] if placement.padding else None
        if not isinstance(x, jax.Array):
            placed[i] = _put(spec, x, wanted[i], axis)
            continue
        if x.dtype != spec.dtypes[i]:  # made while 64-bit types were enabled
            placed[i] = x = x.astype(spec.dtypes[i])
        if axis is not None and x.sharding.device_set == spec.device_set:
            to_pad.append(i)
            continue
        if axis is not None:
            placed[i] = x = _pad_where_it_lies(x, axis, placement)
        if not _lies(x, wanted[i]):
            astray.append(i)
    if to_pad:
        for i, x in zip(to_pad, executable.pad(tuple(to_pad), [placed[i] for i in to_pad]), strict=True):
            placed[i] = x
    if astray:
        moved = jax.device_put([placed[i] for i in astray], [wanted[i] for i in astray])
        for i, x in zip(astray, moved, strict=True):
            placed[i] = x
    return placed


def _put(spec: ProgramSpec, x: ArrayLike, wanted: jax.sharding.NamedSharding, axis: int | None) -> ArrayLike:
    """An argument from the host, padded, on its devices. What is small JAX puts on a single device by itself."""
    if axis is None and spec.layout.mesh.size == 1 and (not isinstance(x, np.ndarray) or is_small(x)):
        return copy_small(x)
    return put(x, wanted, axis, spec.layout.axis.placement)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _pad_where_it_lies(x: jax.Array, axis: int, placement: Placement) -> jax.Array:
    return pad_rows(primitives.retype(x, None), axis, placement)


def _lies(x: jax.Array, wanted: jax.sharding.NamedSharding) -> bool:
    """Whether the array lies as wanted, whatever its mesh and its axes are called."""
    return x.sharding == wanted or (_alike(x.sharding, wanted, x.ndim) and not primitives.split_over(x))


@functools.lru_cache(maxsize=4096)
def _alike(one: jax.sharding.Sharding, other: jax.sharding.Sharding, ndim: int) -> bool:
    return one.is_equivalent_to(other, ndim)


def stage(executable: Executable, leaves: Sequence[ArrayLike]) -> tuple[Array, ...]:
    """The results of a call inside a transformation."""
    spec = executable.spec
    settled = map(functools.partial(_settle, spec), [*leaves, *spec.closed], spec.inputs.axes)
    try:
        primitives.refuse_split_batches()
        return tuple(executable.staged(*settled))
    except primitives.SplitBatchError as error:
        raise UnsupportedTransformationError(
            f"A vmap of a map is to split its batch over {error.args[0]!r}, an axis of a mesh, by spmd_axis_name "
            f"or by the type of an argument. The replicas of the map take all of its devices, each with the whole "
            f"batch. Leave spmd_axis_name out, and pass arguments that are not split along the vmapped axis "
            f"(jax.sharding.reshard); or map over the batch with replicax.pmap, too."
        ) from None


def _settle(spec: ProgramSpec, x: ArrayLike, axis: int | None) -> ArrayLike:
    """An argument of a traced call, moved if its value is known already and lies on devices of its own.

    Where the call is recorded it is a constant of the program, which XLA puts where it has to be.
    """
    value, batched = _jax.outermost_value(x)
    if isinstance(value, jax.core.Tracer) or not isinstance(value, jax.Array):
        return x
    if _jax.staging():
        return x
    here = value.sharding if value.committed else None
    if batched and isinstance(here, jax.sharding.NamedSharding):
        here = jax.sharding.NamedSharding(here.mesh, jax.sharding.PartitionSpec())
    typed = primitives.split_over(x)
    if typed is not None and value.sharding.device_set != spec.device_set:
        x = primitives.retype(x, None)  # no type of the program can name a mesh of other devices
    return primitives.move(x, here, spec.layout.result_sharding(axis, on_mesh=spec.one_mesh))
