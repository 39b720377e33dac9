"""``psum``, ``pmax`` and ``pmin``."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replicax._engine import ordered
from replicax._engine.blocks import block, fetch, on_device, only_axis, own_lane, size_of, take, with_zero
from replicax._engine.collectives.arguments import Names, direct, groups_of, split_axes
from replicax._engine.collectives.definitions import in_each_group
from replicax._engine.collectives.registry import collective, equal, keeps_constants
from replicax._engine.collectives.replicas import physical, where_replica
from replicax._engine.collectives.wire import fetched, reduced, size_in_bytes
from replicax._engine.reductions import MAX, MIN, SUM, Reduction, without_derivative
from replicax._layout.exchange import NOTHING, Groups, Table, segments
from replicax._layout.layout import LaneAxis, LogicalAxes, LogicalAxis
from replicax._typing import Array, IndexGroups, ShapeAndDtype


def _of_rows(reduce: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns the definition of a reduction over replicas and over integer ``axes``, which are array dimensions."""

    def definition(size: int, x: jax.Array, *, axes: Names, axis_index_groups: IndexGroups = None) -> jax.Array:
        over = (0, *(axis + 1 for axis in axes if isinstance(axis, int)))
        return in_each_group(size, x, axis_index_groups, lambda mine: [reduce(mine, over)] * len(mine))

    return definition


def _wire_of_sum(axis: LogicalAxis, x: ShapeAndDtype, *, axes: Names, axis_index_groups: IndexGroups = None) -> int:
    lane = size_in_bytes(x, [dim for dim in axes if isinstance(dim, int)])
    split = groups_of("psum", axis_index_groups, axis.size, of_one_size=False)
    if split is None:
        return reduced(axis, lane)
    runs = segments(axis, split).shared
    return lane * sum((stop - start) * sum(len(on) for on in shared if len(on) > 1) for start, stop, shared in runs)


def _wire_of_extremum(
    axis: LogicalAxis, x: ShapeAndDtype, *, axes: Names, axis_index_groups: IndexGroups = None
) -> int:
    """Counts the bytes of a maximum or minimum.

    They are the bytes of a sum, except that floats are sent as integers of at least 32 bits, and complex numbers are
    gathered.
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        lane = size_in_bytes(x, [dim for dim in axes if isinstance(dim, int)])
        split = groups_of("pmax", axis_index_groups, axis.size, of_one_size=False)
        return lane * (fetched(axis, _members(split, MAX)) if split else axis.devices * (axis.devices - 1))
    if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4:
        x = jax.ShapeDtypeStruct(x.shape, np.int32)
    return _wire_of_sum(axis, x, axes=axes, axis_index_groups=axis_index_groups)


@collective(
    "psum",
    "psum_invariant",
    "psum_start",
    names=("psum", "pmean"),
    awaited_by=("psum_done",),
    result=equal,
    definition=_of_rows(lambda x, axis: jnp.sum(x, axis, dtype=x.dtype)),
    wire=_wire_of_sum,
    by_groups=True,
    sums=True,
)
@keeps_constants
def psum(logical: LogicalAxes, x: Array, *, axes: Names, axis_index_groups: IndexGroups = None) -> Array:
    """Returns the sum over the replicas. Padding lanes contribute zero."""
    axis = ordered_axis(logical, axes, x)
    if axis is not None:
        return _psum_in_order(logical, axis, x, axes, axis_index_groups)
    if axis_index_groups is not None:
        return reduce_groups(logical, x, axes, axis_index_groups, SUM)
    ours, positional, foreign = split_axes(logical, axes)
    x = SUM.local(x, positional) if positional else x
    names = physical(ours) + foreign
    return lax.psum(where_replica(ours, x), names) if names else x


def ordered_axis(logical: LogicalAxes, names: Names, x: Array) -> LogicalAxis | None:
    """Returns the mapped axis over which ``x`` must be added in an order that depends on N alone, else None."""
    if not ordered.depends_on_order(x.dtype):
        return None
    return next((logical[name] for name in names if name in logical and logical[name].ordered), None)


def _psum_in_order(
    logical: LogicalAxes, axis: LogicalAxis, x: Array, names: Names, axis_index_groups: IndexGroups
) -> Array:
    if axis_index_groups is not None:
        split = groups_of("psum", axis_index_groups, size_of(logical, names), of_one_size=False)
        assert split is not None
        return sum_in_order(logical, axis, x[None], names, _members(split, SUM))
    dimensions = tuple(name for name in names if isinstance(name, int))
    if dimensions:
        x = ordered.within_lanes(axis, lambda x: SUM.local(x, dimensions), x)
    rows = block(axis, x).astype(ordered.dtype_of_sum(x.dtype))
    return ordered.of_devices(axis, [ordered.of_rows(axis, rows)])[0].astype(x.dtype)


def sum_in_order(logical: LogicalAxes, axis: LogicalAxis, items: Array, names: Names, wants: Table) -> Array:
    """Adds the items that this replica needs, in the order of ``wants``: see :func:`fetch`."""
    found = fetch(logical, names, items.astype(ordered.dtype_of_sum(items.dtype)), wants)

    def add(rows: Array) -> Array:
        return lax.scan(lambda total, row: (total + row, None), rows[0], rows[1:])[0]

    return ordered.within_lanes(axis, add, found).astype(items.dtype)


@collective("pmax", result=equal, definition=_of_rows(jnp.max), wire=_wire_of_extremum, by_groups=True)
def pmax(logical: LogicalAxes, x: Array, *, axes: Names, axis_index_groups: IndexGroups = None) -> Array:
    """Returns the maximum over the replicas. Padding lanes do not change it, because they are copies of a replica."""
    return extremum(logical, x, axes, axis_index_groups, MAX)


@collective("pmin", result=equal, definition=_of_rows(jnp.min), wire=_wire_of_extremum, by_groups=True)
def pmin(logical: LogicalAxes, x: Array, *, axes: Names, axis_index_groups: IndexGroups = None) -> Array:
    """Returns the minimum over the replicas. Padding lanes do not change it, because they are copies of a replica."""
    return extremum(logical, x, axes, axis_index_groups, MIN)


def extremum(logical: LogicalAxes, x: Array, axes: Names, axis_index_groups: IndexGroups, which: Reduction) -> Array:
    """Returns the maximum or minimum over the replicas."""
    if axis_index_groups is not None:
        return reduce_groups(logical, x, axes, axis_index_groups, which)
    ours, positional, foreign = split_axes(logical, axes)
    x = which.local(x, positional) if positional else x
    x = without_derivative(which.name, x) if ours or foreign else x
    names = physical(ours) + foreign
    lanes = tuple(name for name in names if isinstance(name, LaneAxis))
    between = tuple(name for name in names if name not in lanes)
    if any(axis.ordered for axis in ours):  # of -0.0 and 0.0, and of several NaN, the same in any order
        return which.between(x, names) if names else x
    if lanes:
        x = which.named(x, lanes)
    # XLA's CPU backend has no maximum or minimum of complex numbers between devices. Workaround: complex_extremes.
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        for name in between:
            x = which.local(lax.all_gather(x, name), axis=0)
        return x
    return which.between(x, between) if between else x


def reduce_groups(
    logical: LogicalAxes, x: Array, names: Names, axis_index_groups: IndexGroups, which: Reduction
) -> Array:
    """Reduces over groups, behind an optimization barrier.

    XLA constant-folds a reduction as if all groups had the size of the first. Workaround: constants_over_groups.
    """
    hidden = lax.optimization_barrier
    x = x if which is SUM else without_derivative(which.name, x)
    return hidden(_reduce_groups(logical, hidden(x), names, axis_index_groups, which))


def _reduce_groups(
    logical: LogicalAxes, x: Array, names: Names, axis_index_groups: IndexGroups, which: Reduction
) -> Array:
    """Reduces over groups of replicas. Groups may have different sizes.

    Each device first reduces those of its lanes that are in the same group. Then the devices of a group reduce these
    results. For each group, a device sends the bytes of one lane.
    """
    split = groups_of(which.name, axis_index_groups, size_of(logical, names), of_one_size=False)
    assert split is not None
    axis = only_axis(logical, names)
    if axis is None or (which is not SUM and jnp.issubdtype(x.dtype, jnp.complexfloating)):
        return which.local(fetch(logical, names, x[None], _members(split, which)), axis=0)
    if (name := direct(axis)) is not None:
        return which.between(x, name, axis_index_groups=split.groups)
    plan = segments(axis, split)
    partial = over_segments(axis, block(axis, x), plan.lanes, plan.count, which)
    done, at = [], 0
    for start, stop, shared in plan.shared:
        done.append(which.between(partial[start:stop], axis.device_axis, axis_index_groups=shared))
        at = stop
    known = jnp.concatenate([*done, partial[at:]]) if at < plan.count or len(done) > 1 else done[0]
    return own_lane(axis, take(known, on_device(axis, plan.own)))


def _members(split: Groups, which: Reduction) -> Table:
    """Returns the members of each replica's group, as ``(replicas, largest group)``.

    Short rows are filled with :data:`NOTHING` for a sum, and with the first member for a maximum or minimum.
    """
    members = split.padded_members()
    return members if which is SUM else np.where(members == NOTHING, members[:, :1], members)


def over_segments(axis: LogicalAxis, lanes: Array, table: Table, count: int, which: Reduction) -> Array:
    """Reduces each segment of the lanes of a device. Returns ``(count, ...)``.

    Args:
        axis: The mapped axis.
        lanes: ``(lanes, ...)``: the values of the device's lanes.
        table: ``(devices, count * widest)``: the lanes of each segment. The number of lanes fills the rest.
        count: The number of segments.
        which: The reduction.
    """
    fill = table == axis.lanes
    if which is SUM:
        lanes = with_zero(lanes) if fill.any() else lanes
    else:  # fill with the segment's first lane, or with any lane if the device has no lane in the segment
        by_segment = table.reshape(-1, table.shape[1] // count)
        first = np.minimum(by_segment[:, :1], axis.lanes - 1)
        table = np.where(by_segment == axis.lanes, first, by_segment).reshape(table.shape)
    taken = take(lanes, on_device(axis, table))
    taken = taken.reshape(count, table.shape[1] // count, *taken.shape[1:])
    return taken[:, 0] if taken.shape[1] == 1 else which.local(taken, axis=1)
