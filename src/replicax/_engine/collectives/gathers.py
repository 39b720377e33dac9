"""``all_gather`` and ``psum_scatter``."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replicax._engine import ordered, primitives
from replicax._engine.blocks import block, exchanged, fetch, gather, only_axis, own_lane, size_of
from replicax._engine.collectives.arguments import Names, as_names, direct, groups_of
from replicax._engine.collectives.definitions import in_each_group
from replicax._engine.collectives.reductions import ordered_axis, over_segments, sum_in_order
from replicax._engine.collectives.registry import collective, equal, keeps_constants, moves_data, per_replica
from replicax._engine.collectives.replicas import where_replica
from replicax._engine.collectives.wire import fetched, gathered, sent, size_in_bytes
from replicax._engine.reductions import SUM
from replicax._layout.exchange import (
    NOTHING,
    DeviceGroups,
    Groups,
    Segments,
    Table,
    device_groups,
    exchange,
    ranks,
    segments,
)
from replicax._layout.layout import LogicalAxes, LogicalAxis
from replicax._typing import Array, IndexGroups, ShapeAndDtype
from replicax.errors import CollectiveArgumentError


def _gathered_rows(
    size: int,
    x: jax.Array,
    *,
    all_gather_dimension: int,
    tiled: bool,
    axis_index_groups: IndexGroups = None,
    **_: object,
) -> jax.Array:
    join = jnp.concatenate if tiled else jnp.stack
    return in_each_group(size, x, axis_index_groups, lambda mine: [join(list(mine), all_gather_dimension)] * len(mine))


def wire_of_gather(axis: LogicalAxis, x: ShapeAndDtype, *, axis_index_groups: IndexGroups = None, **_: object) -> int:
    """Returns the bytes that devices send if each operand is sent to all replicas of its group."""
    lane = size_in_bytes(x)
    split = groups_of("all_gather", axis_index_groups, axis.size, of_one_size=True)
    if split is None:
        return gathered(axis, lane)
    return lane * fetched(axis, split.members)


@collective(
    "all_gather",
    "all_gather_invariant",
    "all_gather_start",
    awaited_by=("all_gather_done",),
    result=equal,
    definition=_gathered_rows,
    wire=wire_of_gather,
    by_groups=True,
)
@moves_data
@keeps_constants
def all_gather(
    logical: LogicalAxes,
    x: Array,
    *,
    all_gather_dimension: int,
    axis_name: Names | Hashable,
    axis_size: int,
    tiled: bool,
    axis_index_groups: IndexGroups = None,
) -> Array:
    """Gathers the operands of the group along a new dimension, or along an existing one if tiled, without padding."""
    names = as_names(axis_name)
    split = groups_of("all_gather", axis_index_groups, size_of(logical, names), of_one_size=True)
    axis = only_axis(logical, names)
    if (name := direct(axis)) is not None:
        index_groups = split and split.groups
        # The transpose of an untiled all_gather fails under vmap. Workaround: untiled_collectives.
        x = x if tiled else lax.expand_dims(x, [all_gather_dimension])
        return lax.all_gather(x, name, axis=all_gather_dimension, tiled=True, axis_index_groups=index_groups)
    if split is None:
        gathered = gather(logical, names, x)
    elif axis is not None and axis.device_axis is not None and (whole := device_groups(axis, split)) is not None:
        gathered = lax.all_gather(block(axis, x)[None], axis.device_axis, axis_index_groups=whole, tiled=True)
        gathered = gathered.reshape(axis_size, *x.shape)
    else:
        gathered = fetch(logical, names, x[None], split.members)
    return joined(gathered, all_gather_dimension) if tiled else jnp.moveaxis(gathered, 0, all_gather_dimension)


def joined(x: Array, dimension: int) -> Array:
    """Merges the first dimension of ``x`` into dimension ``dimension`` of the rest."""
    x = jnp.moveaxis(x, 0, dimension)
    return x.reshape(*x.shape[:dimension], x.shape[dimension] * x.shape[dimension + 1], *x.shape[dimension + 2 :])


def chunks(x: Array, dimension: int, count: int) -> Array:
    """Splits ``x`` along ``dimension`` into ``count`` chunks, stacked along a new first dimension."""
    x = x.reshape(*x.shape[:dimension], count, x.shape[dimension] // count, *x.shape[dimension + 1 :])
    return jnp.moveaxis(x, dimension, 0)


def _scattered_rows(
    size: int,
    x: jax.Array,
    *,
    scatter_dimension: int,
    tiled: bool,
    axis_index_groups: IndexGroups = None,
    **_: object,
) -> jax.Array:
    def one_group(mine: jax.Array) -> Sequence[jax.Array] | jax.Array:
        total = jnp.sum(mine, 0, dtype=mine.dtype)
        if tiled:
            return jnp.split(total, len(mine), scatter_dimension)
        return jnp.moveaxis(total, scatter_dimension, 0)

    return in_each_group(size, x, axis_index_groups, one_group)


def _wire_of_scatter(
    axis: LogicalAxis, x: ShapeAndDtype, *, axis_size: int, axis_index_groups: IndexGroups = None, **_: object
) -> int:
    piece = size_in_bytes(x) // axis_size
    split = groups_of("psum_scatter", axis_index_groups, axis.size, of_one_size=True)
    whole = device_groups(axis, split) if split else None
    if split is None or whole is not None:
        return gathered(axis, piece, whole)
    plan = segments(axis, split)
    wants = sums_wanted(axis, split, plan, axis_size)
    return piece * sent(exchange(wants.reshape(axis.devices, -1), plan.count * axis_size))


@collective(
    "reduce_scatter",
    "reduce_scatter_start",
    names=("psum_scatter",),
    awaited_by=("reduce_scatter_done",),
    result=per_replica,
    definition=_scattered_rows,
    wire=_wire_of_scatter,
    sums=True,
)
@keeps_constants
def psum_scatter(
    logical: LogicalAxes,
    x: Array,
    *,
    scatter_dimension: int,
    axis_name: Names | Hashable,
    axis_size: int,
    tiled: bool,
    axis_index_groups: IndexGroups = None,
) -> Array:
    """Returns this replica's slice of the sum over the group: the transpose of ``all_gather``.

    Raises:
        CollectiveArgumentError: The operand has dtype bool, which JAX does not support here.
    """
    if x.dtype == bool:
        raise CollectiveArgumentError("psum_scatter does not support bool in JAX. Convert the operand to int32 first.")
    names, scatter_dimension = as_names(axis_name), scatter_dimension % x.ndim
    split = groups_of("psum_scatter", axis_index_groups, size_of(logical, names), of_one_size=True)
    if (tree := ordered_axis(logical, names, x)) is not None:
        x = chunks(x, scatter_dimension, axis_size) if tiled else jnp.moveaxis(x, scatter_dimension, 0)
        if split is not None or len(names) > 1:
            return sum_in_order(logical, tree, x, names, _wanted_of_group(axis_size, split))
        rows = block(tree, x).astype(ordered.dtype_of_sum(x.dtype))
        return own_lane(tree, ordered.rows_of_devices(tree, ordered.of_rows(tree, rows))).astype(x.dtype)
    axis = only_axis(logical, names)
    if (name := direct(axis)) is not None:
        index_groups = split and split.groups
        part = lax.psum_scatter(
            x, name, scatter_dimension=scatter_dimension, tiled=True, axis_index_groups=index_groups
        )
        # JAX's batching rule for an untiled psum_scatter is wrong. Workaround: untiled_collectives.
        return part if tiled else lax.squeeze(part, [scatter_dimension])
    x = chunks(x, scatter_dimension, axis_size) if tiled else jnp.moveaxis(x, scatter_dimension, 0)
    if axis is not None:
        whole = device_groups(axis, split) if split else None
        if split is None or whole is not None:
            return scatter_sum(axis, x, whole)
        return scatter_sum_over_segments(axis, x, split)
    if split is None:
        return scatter_sum_over(logical, names, x)
    return SUM.local(fetch(logical, names, x, _wanted_of_group(axis_size, split)), 0)


def _wanted_of_group(size: int, split: Groups | None) -> Table:
    """Numbers the items as for :func:`fetch`: each replica has one item for each replica of its group of ``size``."""
    if split is None:
        return np.arange(size) * size + np.arange(size)[:, None]
    return split.members * size + split.rank[:, None]


def scatter_sum(axis: LogicalAxis, x: Array, whole: DeviceGroups | None) -> Array:
    """Sums ``x`` over the replicas, and returns this replica's row of the sum.

    Args:
        axis: The mapped axis.
        x: ``(replicas, ...)``: one row for each replica of the group.
        whole: The groups of devices; None for one group of all devices.
    """
    x = where_replica([axis], x)
    if axis.lane_axis is not None:
        x = lax.psum(x, axis.lane_axis)
    if axis.padding:  # a padding lane gets the result of the replica that it copies
        x = primitives.pad_rows(x, 0, axis.placement)
    x = x.reshape(x.shape[0] // axis.lanes, axis.lanes, *x.shape[1:])
    if axis.device_axis is None:
        return own_lane(axis, x[0])
    return own_lane(axis, lax.psum_scatter(x, axis.device_axis, axis_index_groups=whole))


def scatter_sum_over(logical: LogicalAxes, names: Names, x: Array) -> Array:
    """Sums ``x`` over several axes, treated as one axis, and returns this replica's row of the sum."""
    sizes = [size_of(logical, [name]) for name in names]
    x = x.reshape(*sizes, *x.shape[1:])
    for name in names:
        x = scatter_sum(logical[name], x, None) if name in logical else lax.psum_scatter(x, name)
    return x


def scatter_sum_over_segments(axis: LogicalAxis, x: Array, split: Groups) -> Array:
    """Sums ``x`` over each group, for groups that share devices, and returns this replica's row of the sum.

    A device sends one partial sum for each replica of each group that has lanes on the device.
    """
    plan, size = segments(axis, split), x.shape[0]
    sums = over_segments(axis, block(axis, x), plan.lanes, plan.count, SUM)  # (segments, group, ...)
    items = sums.reshape(plan.count * size, *sums.shape[2:])
    wants = sums_wanted(axis, split, plan, size)
    found = exchanged(axis, items, exchange(wants.reshape(axis.devices, -1), plan.count * size))
    return own_lane(axis, SUM.local(found.reshape(axis.lanes, wants.shape[1], *items.shape[1:]), 1))


def sums_wanted(axis: LogicalAxis, split: Groups, plan: Segments, size: int) -> Table:
    """Returns the partial sums that each lane needs, as item numbers ``(slots, devices of the largest group)``.

    Args:
        axis: The mapped axis.
        split: The groups.
        plan: The segments of each device.
        size: The number of replicas in each group.
    """
    contributing = axis.placement.devices_with_replicas
    group, source = np.nonzero((plan.of[contributing] != NOTHING).T)
    counts = np.bincount(group, minlength=len(split.groups))
    sources = contributing[source]
    sums_of = np.full((len(counts), int(counts.max())), NOTHING)
    sums_of[group, ranks(counts)] = sources * plan.count + plan.of[sources, group]
    replica = axis.placement.replica_at
    wants = sums_of[split.of[replica]]
    return np.where(wants == NOTHING, NOTHING, wants * size + split.rank[replica][:, None])
