"""``all_to_all`` and ``ragged_all_to_all``."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from replicax._engine import primitives
from replicax._engine.blocks import block, fetch, only_axis, own_lane, real_rows, replica_index, size_of
from replicax._engine.collectives.arguments import Names, as_names, direct, groups_of
from replicax._engine.collectives.definitions import groups_in, in_each_group
from replicax._engine.collectives.gathers import all_gather, chunks, joined, wire_of_gather
from replicax._engine.collectives.registry import collective, moves_data, per_replica
from replicax._engine.collectives.wire import fetched, gathered, size_in_bytes
from replicax._layout.exchange import DeviceGroups, Groups, device_groups, groups
from replicax._layout.layout import LogicalAxes, LogicalAxis
from replicax._typing import Array, IndexGroups, Params, ShapeAndDtype
from replicax.errors import CollectiveArgumentError


def _transposed_rows(
    size: int,
    x: jax.Array,
    *,
    split_axis: int,
    concat_axis: int,
    axis_index_groups: IndexGroups = None,
    **_: object,
) -> jax.Array:
    def one_group(mine: jax.Array) -> Sequence[jax.Array]:
        cut = [jnp.split(operand, len(mine), split_axis) for operand in mine]
        return [jnp.concatenate([pieces[k] for pieces in cut], concat_axis) for k in range(len(mine))]

    return in_each_group(size, x, axis_index_groups, one_group)


def _wire_of_pieces(axis: LogicalAxis, x: ShapeAndDtype, *, axis_index_groups: IndexGroups = None, **_: object) -> int:
    split = groups_of("all_to_all", axis_index_groups, axis.size, of_one_size=True)
    size = axis.size if split is None else len(split.groups[0])
    piece = size_in_bytes(x) // size
    whole = device_groups(axis, split) if split else None
    if split is None or whole is not None:
        return gathered(axis, axis.lanes * piece, whole)
    return piece * fetched(axis, split.members * size + split.rank[:, None], size)


@collective(
    "all_to_all",
    "all_to_all_start",
    names=("all_to_all", "pswapaxes"),
    awaited_by=("all_to_all_done",),
    result=per_replica,
    definition=_transposed_rows,
    wire=_wire_of_pieces,
)
@moves_data
def all_to_all(
    logical: LogicalAxes,
    x: Array,
    *,
    axis_name: Names | Hashable,
    split_axis: int,
    concat_axis: int,
    axis_index_groups: IndexGroups,
    tiled: bool,
) -> Array:
    """Splits each operand of the group along one dimension, and concatenates this replica's chunks along another.

    JAX's primitive is always tiled. For an untiled call, JAX adds dimensions before it and removes them after it.

    Raises:
        CollectiveArgumentError: An untiled call has a negative axis. JAX 0.10 adds dimensions in the wrong place then:
            https://github.com/jax-ml/jax/pull/38998. Workaround: axes_from_the_end.
    """
    if not tiled and min(split_axis, concat_axis) < 0:
        raise CollectiveArgumentError(
            "all_to_all: split_axis and concat_axis must not be negative, because this release of JAX computes a wrong "
            "result unless tiled=True. Count the axes from the front."
        )
    names, split_axis, concat_axis = as_names(axis_name), split_axis % x.ndim, concat_axis % x.ndim
    size = size_of(logical, names)
    split = groups_of("all_to_all", axis_index_groups, size, of_one_size=True)
    axis = only_axis(logical, names)
    if (name := direct(axis)) is not None:
        return all_to_all_devices(x, name, split_axis, concat_axis, split.groups if split else None)
    size = size if split is None else len(split.groups[0])
    return joined(pieces(logical, names, chunks(x, split_axis, size), split), concat_axis)


def pieces(logical: LogicalAxes, names: Names, x: Array, split: Groups | None) -> Array:
    """Returns the chunk that each member of the group has for this replica, as ``(group, ...)``.

    Args:
        logical: The mapped axes.
        names: The axis names of the collective.
        x: ``(group, ...)``: this replica's chunk for each member.
        split: The groups; None for one group of all replicas.
    """
    axis = only_axis(logical, names)
    if axis is not None:
        whole = device_groups(axis, split) if split else None
        if split is None or whole is not None:
            return pieces_between_devices(axis, x, whole)
    split = split or groups([range(x.shape[0])], x.shape[0])
    return fetch(logical, names, x, split.members * x.shape[0] + split.rank[:, None])


def pieces_between_devices(axis: LogicalAxis, x: Array, whole: DeviceGroups | None) -> Array:
    """Returns the same as :func:`pieces`, with one exchange between devices. Groups must consist of whole devices.

    Args:
        axis: The mapped axis.
        x: ``(group, ...)``: this replica's chunk for each member.
        whole: The groups of devices; None for one group of all devices.
    """
    rest = x.shape[1:]
    if axis.padding:  # a padding lane gets the result of the replica that it copies
        x = primitives.pad_rows(x, 0, axis.placement)
    devices = x.shape[0] // axis.lanes
    # (sending lane, receiving device, receiving lane, ...)
    x = block(axis, x).reshape(axis.lanes, devices, axis.lanes, *rest)
    if devices > 1:
        x = all_to_all_devices(x, axis.device_axis, 1, 1, whole)
    x = jnp.moveaxis(x, 2, 0).swapaxes(1, 2)  # (receiving lane, sending device, sending lane, ...)
    x = x.reshape(axis.lanes, devices * axis.lanes, *rest)
    return own_lane(axis, real_rows(x, 1, axis.placement) if axis.padding else x)


def all_to_all_devices(
    x: Array, name: Hashable, split_axis: int, concat_axis: int, split: DeviceGroups | None
) -> Array:
    """Calls JAX's ``all_to_all`` over all devices, or over groups of devices."""
    if split is None:
        return lax.all_to_all(x, name, split_axis, concat_axis, tiled=True)
    return primitives.grouped_all_to_all(x, name, split_axis, concat_axis, split)


def _ragged_rows(
    size: int,
    operand: jax.Array,
    output: jax.Array,
    start: jax.Array,
    length: jax.Array,
    target: jax.Array,
    received: jax.Array,
    *,
    axis_index_groups: IndexGroups = None,
    **_: object,
) -> jax.Array:
    """Implements JAX's definition, one slice at a time."""
    del received
    rows, row = list(output), jnp.arange(output.shape[1])
    for group in groups_in(size, axis_index_groups):
        slices = start.shape[1] // len(group)
        for receiver, replica in enumerate(group):
            for sender in group:
                for k in range(receiver * slices, (receiver + 1) * slices):
                    at = row - target[sender, k]
                    sent = operand[sender][jnp.clip(start[sender, k] + at, 0, operand.shape[1] - 1)]
                    inside = ((at >= 0) & (at < length[sender, k])).reshape(-1, *[1] * (sent.ndim - 1))
                    rows[replica] = jnp.where(inside, sent, rows[replica])
    return jnp.stack(rows)


def _wire_of_ragged(
    axis: LogicalAxis,
    operand: ShapeAndDtype,
    output: ShapeAndDtype,
    input_offsets: ShapeAndDtype,
    send_sizes: ShapeAndDtype,
    output_offsets: ShapeAndDtype,
    recv_sizes: ShapeAndDtype,
    **params: Any,
) -> int:
    del output, recv_sizes
    return sum(wire_of_gather(axis, x, **params) for x in (operand, input_offsets, send_sizes, output_offsets))


@collective("ragged_all_to_all", result=per_replica, definition=_ragged_rows, wire=_wire_of_ragged)
def ragged_all_to_all(
    logical: LogicalAxes,
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: Names | Hashable,
    axis_index_groups: IndexGroups,
) -> Array:
    """Returns ``output``, overwritten with the rows that the group sends to this replica.

    The number of rows for each replica is known only at run time. So each device of a group receives the full operand
    of every member, and each replica selects its rows. Where slices overlap, the last one is kept, as in JAX.

    Raises:
        CollectiveArgumentError: The number of slices is not a multiple of the size of the group.
    """
    del recv_sizes  # equal to send_sizes of the senders
    names = as_names(axis_name)
    size = size_of(logical, names)
    split = groups_of("ragged_all_to_all", axis_index_groups, size, of_one_size=True)
    size, rows = size if split is None else len(split.groups[0]), operand.shape[0]
    if input_offsets.shape[0] % size:
        raise CollectiveArgumentError(
            f"ragged_all_to_all: input_offsets has {input_offsets.shape[0]} elements, which is not a multiple of the "
            f"number of replicas, {size}. Pass the same number of slices for each replica."
        )

    def from_all(x: Array) -> Array:
        x = jnp.asarray(x)
        params: Params = {"axis_name": names, "axis_size": size, "axis_index_groups": axis_index_groups}
        return all_gather(logical, x, all_gather_dimension=0, tiled=False, **params)

    me = replica_index(logical, names)
    me = me if split is None else jnp.asarray(split.rank, jnp.int32)[me]
    table = jnp.stack([from_all(x) for x in (input_offsets, send_sizes, output_offsets)])
    mine = lax.dynamic_index_in_dim(table.reshape(3, size, size, -1), me, 2, keepdims=False)  # (3, senders, slices)
    sender = jnp.repeat(jnp.arange(size), mine.shape[2])[:, None]
    start, length, target = mine.reshape(3, -1, 1)
    row = jnp.arange(output.shape[0])
    covers = (target <= row) & (row < target + length)  # (slices, rows of the output)
    last = len(covers) - 1 - jnp.argmax(covers[::-1], 0)
    source = jnp.take_along_axis(sender * rows + start + row - target, last[None], 0)[0]
    received = from_all(operand).reshape(size * rows, *operand.shape[1:])
    received = received[jnp.clip(source, 0, max(size * rows - 1, 0))] if rows else output
    covered = jnp.broadcast_to(covers.any(0).reshape(-1, *[1] * (output.ndim - 1)), output.shape)
    return lax.select(covered, received.astype(output.dtype), output)
