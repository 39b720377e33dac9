"""Access to all lanes of a device inside the program of one replica, and exchanges between devices.

Inside the ``vmap`` over lanes, each value belongs to one lane. :func:`block` returns the values of all lanes of the
device, stacked along a new first dimension. :func:`own_lane` is the inverse. Between the two calls, a rule uses array
operations and collectives over devices. Both functions cost nothing: ``vmap`` only renames a dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replicax._engine import primitives
from replicax._layout.exchange import Exchange, Table, exchange, wants_of
from replicax._layout.layout import LogicalAxes, LogicalAxis
from replicax._layout.placement import Placement
from replicax._typing import Array, DType, HostArray


def block(axis: LogicalAxis, x: Array) -> Array:
    """Returns the values of ``x`` in all lanes of this device, as ``(lanes, ...)``."""
    return x[None] if axis.lane_axis is None else lax.all_gather(x, axis.lane_axis)


def own_lane(axis: LogicalAxis, x: Array) -> Array:
    """Returns this lane's row of ``x``, which has shape ``(lanes, ...)``."""
    return x[0] if axis.lane_axis is None else primitives.own_lane(x, axis.lane_axis)


def all_lanes(axis: LogicalAxis, x: Array) -> Array:
    """Returns the values of ``x`` in all lanes, like :func:`block`. ``x`` may be of typed keys."""
    return on_data(functools.partial(block, axis), x)


def of_lane(axis: LogicalAxis, x: Array) -> Array:
    """Returns this lane's row of ``x``, like :func:`own_lane`. ``x`` may be of typed keys."""
    return on_data(functools.partial(own_lane, axis), x)


def as_unbatched(axis: LogicalAxis, x: Array) -> Array:
    """Returns ``x``, which is equal in all lanes, as a value that ``vmap`` tracks as unbatched."""
    return block(axis, x)[0] if axis.lane_axis is not None and isinstance(x, jax.core.Tracer) else x


def as_batched(axes: Iterable[LogicalAxis], x: Array) -> Array:
    """Returns ``x`` as a value that ``vmap`` tracks as batched, even if it is equal in all lanes."""
    for axis in axes:
        x = x if axis.lane_axis is None else primitives.each_lane(x, axis.lane_axis)
    return x


def one_lane_at_a_time(
    axes: Sequence[LogicalAxis], function: Callable[..., Sequence[Array]], *args: Array
) -> list[Array]:
    """Runs a function whose batching rule gives a different result, on one lane at a time.

    Args:
        axes: The mapped axes whose lanes run one at a time.
        function: The function, which takes the operands of one lane.
        args: The operands.
    """
    if not axes:
        return list(function(*args))
    axis, *rest = axes
    blocks = [on_data(functools.partial(block, axis), x) for x in args]
    results = lax.map(lambda lane: one_lane_at_a_time(rest, function, *lane), blocks)
    return [on_data(functools.partial(own_lane, axis), x) for x in results]


def on_device(axis: LogicalAxis, table: Table) -> HostArray | Array:
    """Returns this device's row of ``table``, as a NumPy array if all rows are equal."""
    if (table == table[:1]).all():
        return table[0]
    return jnp.asarray(table, jnp.int32)[lax.axis_index(axis.device_axis)]


def take(x: Array, rows: HostArray | Array) -> Array:
    """Returns ``x[rows]``. Uses slices instead of a gather if ``rows`` is a NumPy array of few contiguous runs."""
    if isinstance(rows, np.ndarray):
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
        if 0 < len(runs) <= _FEW:
            pieces = [lax.slice_in_dim(x, int(run[0]), int(run[-1]) + 1) for run in runs]
            return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
        if len(rows) > 1 and (np.diff(rows) == -1).all():
            return lax.rev(lax.slice_in_dim(x, int(rows[-1]), int(rows[0]) + 1), (0,))
    unique = isinstance(rows, np.ndarray) and len(np.unique(rows)) == len(rows)
    return x.at[rows].get(mode="promise_in_bounds", unique_indices=unique)


#: Up to this many slices compile to less code than one gather.
_FEW = 8


def without_folding(x: Array) -> Array:
    """Puts a complex ``x``, and its cotangent, behind an optimization barrier. Returns any other ``x`` unchanged.

    XLA crashes the process when it constant-folds a sum of complex constants between devices (CPU, JAX 0.10 and
    0.12). Workaround: complex_constants.
    """
    return lax.optimization_barrier(x) if jnp.issubdtype(x.dtype, jnp.complexfloating) else x


def with_zero(x: Array) -> Array:
    """Returns ``x`` with one row of zeros appended along its first dimension."""
    return jnp.concatenate([x, jnp.zeros((1, *x.shape[1:]), x.dtype)])


def exchanged(axis: LogicalAxis, items: Array, plan: Exchange) -> Array:
    """Returns the items that this device needs from all devices, as ``(wanted, ...)``.

    Args:
        axis: The mapped axis.
        items: ``(items, ...)``: the items that this device holds.
        plan: Which device sends which items to which device.
    """
    received = [
        lax.ppermute(take(items, on_device(axis, shift.send)), axis.device_axis, shift.pairs) for shift in plan.shifts
    ]
    known = jnp.concatenate([items, *received]) if received else items
    return take(with_zero(known) if plan.zeros else known, on_device(axis, plan.take))


def fetch(logical: LogicalAxes, names: Sequence[Hashable], items: Array, wants: Table) -> Array:
    """Returns the items that this replica needs from all replicas, as ``(wanted, ...)``.

    Over one mapped axis, each item is sent once to each device that needs it. Over several axes, or over an axis that
    replicax did not bind, all items are gathered first.

    Args:
        logical: The mapped axes.
        names: The axis names of the collective.
        items: ``(items, ...)``: the items that this replica holds.
        wants: ``(replicas, wanted)``: the items that each replica needs. Number ``r * items + k`` is item ``k`` of
            replica ``r``; :data:`NOTHING` stands for zeros.
    """
    if (axis := only_axis(logical, names)) is not None:
        held = block(axis, items).reshape(axis.lanes * items.shape[0], *items.shape[1:])
        plan = exchange(wants_of(axis, wants, items.shape[0]), held.shape[0])
        found = exchanged(axis, held, plan)
        return own_lane(axis, found.reshape(axis.lanes, wants.shape[1], *items.shape[1:]))
    everything = gather(logical, names, items)
    everything = everything.reshape(-1, *items.shape[1:])
    row = jnp.asarray(np.where(wants < 0, len(everything), wants), jnp.int32)[replica_index(logical, names)]
    return take(with_zero(everything) if (wants < 0).any() else everything, row)


def only_axis(logical: LogicalAxes, names: Sequence[Hashable]) -> LogicalAxis | None:
    """Returns the mapped axis if ``names`` contains only this axis, else None."""
    return logical.get(names[0]) if len(names) == 1 else None


def size_of(logical: LogicalAxes, names: Sequence[Hashable]) -> int:
    """Returns the number of replicas along the given axes, treated as one axis."""
    sizes = [logical[name].size if name in logical else lax.axis_size(name) for name in names]
    return int(np.prod(sizes, dtype=np.int64))


def replica_index(logical: LogicalAxes, names: Sequence[Hashable]) -> jax.Array:
    """Returns the replica's index along the given axes, treated as one axis. The last axis varies fastest."""
    index = jnp.int32(0)
    for name in names:
        axis = logical.get(name)
        size, own = (axis.size, replica_along(axis)) if axis else (lax.axis_size(name), lax.axis_index(name))
        index = index * size + own
    return index


def replica_along(axis: LogicalAxis) -> jax.Array:
    """Returns the replica's index along one mapped axis. A padding lane has the index of the replica that it copies."""
    position = lane_position(axis)
    if not axis.padding:
        return position
    if axis.placement.padding_is_last:
        return jnp.minimum(position, axis.size - 1)
    return jnp.asarray(axis.placement.replica_at, jnp.int32)[position]


def lane_position(axis: LogicalAxis) -> jax.Array:
    """Returns this lane's slot: ``device index * L + lane``."""
    device = lax.axis_index(axis.device_axis) if axis.device_axis is not None else jnp.int32(0)
    lane = lax.axis_index(axis.lane_axis) if axis.lane_axis is not None else jnp.int32(0)
    return device * axis.lanes + lane


def gather(logical: LogicalAxes, names: Sequence[Hashable], x: Array) -> Array:
    """Returns the values of ``x`` in all replicas along the given axes, as ``(replicas, ...)``."""
    shape = x.shape
    for name in reversed(names):
        x = _gather_along(logical[name], x) if name in logical else _gather(x, name)
    return x.reshape(size_of(logical, names), *shape)


def _gather_along(axis: LogicalAxis, x: Array) -> Array:
    shape = x.shape
    for name, _ in axis.physical:
        x = _gather(x, name)
    return real_rows(x.reshape(axis.placement.slots, *shape), 0, axis.placement)


def real_rows(x: Array, dim: int, placement: Placement) -> Array:
    """Returns ``x`` without the rows of padding slots along ``dim``, as ``(..., replicas, ...)``."""
    runs = [lax.slice_in_dim(x, first, first + count, axis=dim) for first, count in placement.runs]
    return runs[0] if len(runs) == 1 else jnp.concatenate(runs, dim)


def _gather(x: Array, name: Hashable) -> Array:
    """Calls a tiled ``lax.all_gather``, whose transpose JAX can ``vmap``. Workaround: untiled_collectives."""
    return lax.all_gather(x[None], name, tiled=True)


def on_data(function: Callable[[Array], Array], x: Array) -> Array:
    """Applies a function that only moves data, to key data for typed PRNG keys, and to bytes for 2-bit integers."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(function(jax.random.key_data(x)), impl=jax.random.key_impl(x))
    return narrow(function(wide(x)), x.dtype)


def wide(x: Array, bits: int = 2) -> Array:
    """Returns ``x`` as int8 or uint8 if its dtype is an integer type of at most ``bits`` bits.

    XLA has three bugs with such dtypes (JAX 0.10 and 0.12). The CPU backend overruns its buffers when it gathers,
    concatenates or exchanges 2-bit arrays; ``jax.jit(lambda x: jnp.concatenate([x, x]))`` reproduces this. XLA does not
    support sums of 2-bit arrays between devices. A sum of 4-bit arrays between devices returns values of more than
    4 bits; ``jax.pmap`` of ``psum`` reproduces this.
    Workarounds: two_bits_concatenated, two_bits_gathered, two_bits_summed, four_bits_summed.
    """
    return x.astype("int8" if x.dtype.name.startswith("i") else "uint8") if is_narrow(x.dtype, bits) else x


def narrow(x: Array, dtype: DType, bits: int = 2) -> Array:
    """Converts the result of an operation on :func:`wide` operands back to ``dtype``."""
    return x.astype(dtype) if is_narrow(dtype, bits) else x


def is_narrow(dtype: DType, bits: int = 2) -> bool:
    """Whether ``dtype`` is an integer type of at most ``bits`` bits."""
    return dtype.name in _NARROW[bits]


_NARROW = {2: ("int2", "uint2"), 4: ("int2", "uint2", "int4", "uint4")}
