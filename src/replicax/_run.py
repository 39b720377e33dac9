"""A program run on arguments that may lie anywhere: padded, moved to where it wants them, and taken if donated."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from replicax import _cpp, _jax, _primitives
from replicax._errors import DeletedArrayError, UnsupportedTransformationError, report
from replicax._levels import pad_rows
from replicax._lowering import Program
from replicax._placement import Placement
from replicax._transfer import is_small, own, put


def run(
    program: Program, leaves: Sequence[Any], executable: Callable[..., Any], names: Callable[[], Sequence[str]]
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Runs a program on arguments that may lie anywhere, and takes those that are donated.

    Args:
        program: The program.
        leaves: Its arguments.
        executable: It, compiled.
        names: What the user calls the arguments.

    Returns:
        The results, and the arguments as they were moved.
    """
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in leaves):
        _check_donated(program, leaves, names)
    if not program.donated or _jax.looks_for_nans():  # after a NaN, JAX runs the program again to find it
        placed = place(program, [*leaves, *program.closed_in_place])
        return executable(*placed), placed
    _check_donated(program, leaves, names)
    placed = place(program, [*leaves, *program.closed_in_place])
    moved = {i: x for i in program.donated if placed[i] is not (x := leaves[i]) and isinstance(x, jax.Array)}
    for i, x in moved.items():
        if not _shares(x, placed[i]) and not any(x is y for y in placed):
            x.delete()
    results = executable(*placed)
    for x in moved.values():
        x.delete()
    if _cpp.TAKEN_ARRAYS_CRASH:
        delete_taken(leaves)
    return results, placed


def delete_taken(leaves: Sequence[Any]) -> None:
    """Deletes the arrays that a program has taken, so that the next one to get them can say so."""
    for x in leaves:
        if type(x) is _cpp.ArrayImpl and x.is_deleted():
            x.delete()


def _shares(x: jax.Array, copy: jax.Array) -> bool:
    """Whether a moved array may have buffers of the original's: those of parts that did not have to move."""
    if x.shape != copy.shape or x.sharding.device_set.isdisjoint(copy.sharding.device_set):
        return False
    before, after = x.sharding.devices_indices_map(x.shape), copy.sharding.devices_indices_map(copy.shape)
    return any(before[device] == after[device] for device in before.keys() & after.keys())


def _check_donated(program: Program, leaves: Sequence[Any], names: Callable[[], Sequence[str]]) -> None:
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    times = Counter(map(id, arrays.values()))
    faults = {
        i: "has no buffer any more: it was donated to an earlier call, or deleted"
        for i, x in arrays.items()
        if x.is_deleted()
    }
    for i in program.taken:  # where it has to be moved, it is the copy that the program takes
        x = arrays.get(i)
        if x is not None and i not in faults and times[id(x)] > 1 and _lies(x, program.in_shardings[i]):
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


def place(program: Program, leaves: Sequence[Any]) -> list[Any]:
    """The argument leaves, padded, and moved to where the program wants them; what lies right is not touched."""
    wanted, placement = program.in_shardings, program.layout.axis.placement
    placed, astray, to_pad = list(leaves), [], []
    for i, x in enumerate(placed):
        axis = program.in_axes[i] if placement.padding else None
        if not isinstance(x, jax.Array):
            placed[i] = _put(program, x, wanted[i], axis)
            continue
        if x.dtype != program.dtypes[i]:  # made while 64-bit types were enabled
            placed[i] = x = x.astype(program.dtypes[i])
        if axis is not None and x.sharding.device_set == program.device_set:
            to_pad.append(i)
            continue
        if axis is not None:
            placed[i] = x = _pad_where_it_lies(x, axis, placement)
        if not _lies(x, wanted[i]):
            astray.append(i)
    if to_pad:
        for i, x in zip(to_pad, program.pad(tuple(to_pad), [placed[i] for i in to_pad]), strict=True):
            placed[i] = x
    if astray:
        moved = jax.device_put([placed[i] for i in astray], [wanted[i] for i in astray])
        for i, x in zip(astray, moved, strict=True):
            placed[i] = x
    return placed


def _put(program: Program, x: Any, wanted: jax.sharding.NamedSharding, axis: int | None) -> Any:
    """An argument from the host, padded, on its devices. What is small JAX puts on a single device by itself."""
    if axis is None and program.layout.mesh.size == 1 and (not isinstance(x, np.ndarray) or is_small(x)):
        return own(x)
    return put(x, wanted, axis, program.layout.axis.placement)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _pad_where_it_lies(x: jax.Array, axis: int, placement: Placement) -> jax.Array:
    return pad_rows(_primitives.retype(x, None), axis, placement)


def _lies(x: jax.Array, wanted: jax.sharding.NamedSharding) -> bool:
    """Whether the array lies as wanted, whatever its mesh and its axes are called."""
    return x.sharding == wanted or (_alike(x.sharding, wanted, x.ndim) and not _primitives.split_over(x))


@functools.lru_cache(maxsize=4096)
def _alike(one: jax.sharding.Sharding, other: jax.sharding.Sharding, ndim: int) -> bool:
    return one.is_equivalent_to(other, ndim)


def stage(program: Program, leaves: Sequence[Any]) -> tuple[Any, ...]:
    """The results of a call inside a transformation."""
    settled = map(functools.partial(_settle, program), [*leaves, *program.closed], program.in_axes)
    try:
        _primitives.refuse_split_batches()
        return tuple(program.staged(*settled))
    except _primitives.SplitBatchError as error:
        raise UnsupportedTransformationError(
            f"A vmap of a map is to split its batch over {error.args[0]!r}, an axis of a mesh, by spmd_axis_name "
            f"or by the type of an argument. The replicas of the map take all of its devices, each with the whole "
            f"batch. Leave spmd_axis_name out, and pass arguments that are not split along the vmapped axis "
            f"(jax.sharding.reshard); or map over the batch with replicax.pmap, too."
        ) from None


def _settle(program: Program, x: Any, axis: int | None) -> Any:
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
    typed = _primitives.split_over(x)
    if typed is not None and value.sharding.device_set != program.device_set:
        x = _primitives.retype(x, None)  # no type of the program can name a mesh of other devices
    whole = program.one_mesh and program.layout.axis.padding
    return _primitives.move(x, here, program.layout.sharding(None) if whole else program.layout.result_sharding(axis))
