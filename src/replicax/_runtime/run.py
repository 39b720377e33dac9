"""Runs a program on arguments from any devices: pads, moves and donates the arguments."""

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
from replicax._runtime import agreement
from replicax._runtime.executable import Executable
from replicax._runtime.global_arrays import moved, on_all
from replicax._runtime.own_rows import OwnRows
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
    """Runs a program on arguments from any devices, and frees the donated arguments.

    Args:
        executable: The program.
        leaves: The argument leaves.
        names: Returns the names of the leaves, for messages.
        compiled: A callable to run instead of ``executable.run``.

    Returns:
        The results, and the argument leaves after padding and moving.

    Raises:
        DeletedArrayError: an argument was donated to an earlier call or deleted, or is donated and passed twice.
    """
    call, spec = compiled or executable.run, executable.spec
    if spec.over_processes:
        agreement.refuse_after_abort()
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in leaves):
        _check_donated(spec, leaves, names)
    if not spec.inputs.donated or _jax.looks_for_nans():  # jax_debug_nans runs the program again on the same buffers
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
    for i in set(spec.inputs.donated) - set(spec.donated_in_place):  # padded in another process, but not in this one
        if placed[i] is (x := leaves[i]) and isinstance(x, jax.Array):
            x.delete()
    TakenArrays.delete(leaves)
    return results, placed


def cpp_cacheable(spec: ProgramSpec, leaves: Sequence[ArrayLike], placed: Sequence[Array]) -> bool:
    """Whether JAX's C++ fast path can run such a call: it must place each argument in the same way as Python does."""
    if spec.closed or _jax.looks_for_nans():
        return False
    several = spec.layout.local.mesh.size > 1
    for x, y, axis in zip(leaves, placed, spec.inputs.axes, strict=False):
        if isinstance(x, jax.Array):
            moves = several and len(x.sharding.device_set) == 1 and not spec.inputs.donated
            if x is not y and not (moves and x.dtype == y.dtype and x.shape == y.shape):
                return False
        elif not _moves_by_itself(spec, x, axis):
            return False
    return True


def _moves_by_itself(spec: ProgramSpec, x: ArrayLike, axis: int | None) -> bool:
    """Whether C++ can transfer a host argument: no padding, not ``float0``, and small if it must be copied first."""
    if (spec.layout.local.axis.padding and axis is not None) or jax.dtypes.float0 == getattr(x, "dtype", None):
        return False
    return spec.layout.local.mesh.size > 1 or not isinstance(x, np.ndarray) or is_small(x)


def reads_host_memory(spec: ProgramSpec, leaves: Sequence[ArrayLike]) -> bool:
    """Whether C++ would alias the caller's NumPy arrays. C++ treats a NumPy scalar as an array."""
    return spec.layout.local.mesh.size == 1 and any(isinstance(x, np.ndarray | np.generic) for x in leaves)


def _shares(x: jax.Array, copy: jax.Array) -> bool:
    """Whether a moved array may share buffers with the original: a shard was already on the right device."""
    if x.shape != copy.shape or x.sharding.device_set.isdisjoint(copy.sharding.device_set):
        return False
    before, after = x.sharding.devices_indices_map(x.shape), copy.sharding.devices_indices_map(copy.shape)
    return any(before[device] == after[device] for device in before.keys() & after.keys())


def _check_donated(spec: ProgramSpec, leaves: Sequence[ArrayLike], names: Callable[[], Sequence[str]]) -> None:
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    times = Counter(map(id, arrays.values()))
    faults = {i: "was donated to an earlier call, or deleted" for i, x in arrays.items() if x.is_deleted()}
    for i in spec.donated_in_place:  # an array that has to be moved may be passed twice: the program gets a copy
        x = arrays.get(i)
        if x is not None and i not in faults and times[id(x)] > 1 and _lies(x, spec.own_in_shardings[i]):
            faults[i] = "is donated, and passed twice"
    if faults:
        called = names()
        raise DeletedArrayError(
            report(
                "pmap cannot use the buffers of these arguments:",
                [f"{called[i]} {fault}" for i, fault in sorted(faults.items())],
                "Use the result of the call that the array was donated to. To pass an array twice, pass a copy: x + 0.",
            )
        )


# ---------------------------------------------------------------------------------------------------------------
# Moving arguments


def place(executable: Executable, leaves: Sequence[ArrayLike]) -> list[Array]:
    """Pads and moves the argument leaves. Leaves already on ``in_shardings`` are passed through."""
    spec = executable.spec
    wanted, placement = spec.own_in_shardings, spec.layout.local.axis.placement
    placed, astray, to_pad = list(leaves), [], []
    if isinstance(executable, OwnRows) and spec.layout.local.size == 0:
        placed = [
            x if axis is None else executable.no_rows[i]
            for i, (x, axis) in enumerate(zip(placed, spec.inputs.axes, strict=True))
        ]
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
        there = moved([placed[i] for i in astray], [wanted[i] for i in astray])
        for i, x in zip(astray, there, strict=True):
            placed[i] = x
    return placed


def _put(spec: ProgramSpec, x: ArrayLike, wanted: jax.sharding.NamedSharding, axis: int | None) -> ArrayLike:
    """Pads a host argument and copies it to its devices. On a single device, JAX transfers small arrays itself."""
    if axis is None and spec.layout.local.mesh.size == 1 and (not isinstance(x, np.ndarray) or is_small(x)):
        return copy_small(x)
    return put(x, wanted, axis, spec.layout.local.axis.placement)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _pad_where_it_lies(x: jax.Array, axis: int, placement: Placement) -> jax.Array:
    return pad_rows(primitives.retype(x, None), axis, placement)


def _lies(x: jax.Array, wanted: jax.sharding.NamedSharding) -> bool:
    """Whether the sharding of the array is equivalent to ``wanted``; the axis names of the meshes do not matter."""
    return x.sharding == wanted or (_alike(x.sharding, wanted, x.ndim) and not primitives.split_over(x))


@functools.lru_cache(maxsize=4096)
def _alike(one: jax.sharding.Sharding, other: jax.sharding.Sharding, ndim: int) -> bool:
    return one.is_equivalent_to(other, ndim)


def stage(executable: Executable, leaves: Sequence[ArrayLike]) -> tuple[Array, ...]:
    """Runs a call inside a transformation.

    Raises:
        UnsupportedTransformationError: an enclosing ``vmap`` shards its batch over a mesh axis.
    """
    spec = executable.spec
    if spec.over_processes and not _jax.staging():
        agreement.refuse_after_abort()
    settled = map(functools.partial(_settle, spec), [*leaves, *spec.closed], spec.inputs.axes)
    try:
        primitives.refuse_split_batches()
        return tuple(executable.staged(*settled))
    except primitives.SplitBatchError as error:
        raise UnsupportedTransformationError(
            f"A vmap of a map cannot shard its batch over the mesh axis {error.args[0]!r} (by spmd_axis_name, or by "
            f"the sharding in the type of an argument): the map already uses all of its devices, each for the whole "
            f"batch. Leave spmd_axis_name out, and pass arguments that are not sharded along the vmapped axis "
            f"(jax.sharding.reshard). Or map over the batch with replicax.pmap instead of vmap."
        ) from None


def _settle(spec: ProgramSpec, x: ArrayLike, axis: int | None) -> ArrayLike:
    """Moves an argument of a traced call to the devices of the map if its value is already known.

    If the call is staged into a jaxpr, the value is a constant of that program, and XLA places it.
    """
    value, batched = _jax.outermost_value(x)
    if isinstance(value, jax.core.Tracer) or not isinstance(value, jax.Array):
        return x
    if _jax.staging() or spec.layout.own is not None:  # a program on own rows moves its arguments itself
        return x
    if jax.process_count() > 1 and not (where := spec.layout.result_sharding(axis)).is_fully_addressable:
        return on_all(x, where)
    here = value.sharding if value.committed else None
    if batched and isinstance(here, jax.sharding.NamedSharding):
        here = jax.sharding.NamedSharding(here.mesh, jax.sharding.PartitionSpec())
    typed = primitives.split_over(x)
    if typed is not None and value.sharding.device_set != spec.device_set:
        x = primitives.retype(x, None)  # a type in the program cannot name a mesh with other devices
    return primitives.move(x, here, spec.layout.result_sharding(axis, on_mesh=spec.one_mesh))
