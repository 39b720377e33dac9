"""A device's block of lanes, seen as one array from within the program of one replica; and what devices exchange.

Inside the ``vmap`` over lanes a value is one lane's. :func:`block` shows all lanes of the device along a new first
dimension, :func:`own_lane` goes back, and between the two a collective is arithmetic on arrays and a collective
over devices. Both cost nothing: ``vmap`` only names a dimension.
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
    """``(lanes, ...)``: the device's lanes of ``x``."""
    return x[None] if axis.lane_axis is None else lax.all_gather(x, axis.lane_axis)


def own_lane(axis: LogicalAxis, x: Array) -> Array:
    """This lane's element of ``x``, whose first dimension is the device's lanes."""
    return x[0] if axis.lane_axis is None else primitives.own_lane(x, axis.lane_axis)


def any_lane(axis: LogicalAxis, x: Array) -> Array:
    """``x``, which is equal in all lanes, as ``vmap`` may not know."""
    return block(axis, x)[0] if axis.lane_axis is not None and isinstance(x, jax.core.Tracer) else x


def lane_by_lane(axes: Iterable[LogicalAxis], x: Array) -> Array:
    """``x``, which ``vmap`` takes to differ between lanes from here on, whether it does or not."""
    for axis in axes:
        x = x if axis.lane_axis is None else primitives.each_lane(x, axis.lane_axis)
    return x


def one_by_one(axes: Sequence[LogicalAxis], function: Callable[..., Sequence[Array]], *args: Array) -> list[Array]:
    """``function`` of the operands of one lane after the other, where that of all at once is another."""
    if not axes:
        return list(function(*args))
    axis, *rest = axes
    blocks = [on_data(functools.partial(block, axis), x) for x in args]
    results = lax.map(lambda lane: one_by_one(rest, function, *lane), blocks)
    return [on_data(functools.partial(own_lane, axis), x) for x in results]


def on_device(axis: LogicalAxis, table: Table) -> HostArray | Array:
    """This device's row of a table: a NumPy array where all devices have the same."""
    if (table == table[:1]).all():
        return table[0]
    return jnp.asarray(table, jnp.int32)[lax.axis_index(axis.device_axis)]


def take(x: Array, rows: HostArray | Array) -> Array:
    """These elements of ``x`` along its first dimension; known ones as slices, where they are few."""
    if isinstance(rows, np.ndarray):
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
        if 0 < len(runs) <= _FEW:
            pieces = [lax.slice_in_dim(x, int(run[0]), int(run[-1]) + 1) for run in runs]
            return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
        if len(rows) > 1 and (np.diff(rows) == -1).all():
            return lax.rev(lax.slice_in_dim(x, int(rows[-1]), int(rows[0]) + 1), (0,))
    unique = isinstance(rows, np.ndarray) and len(np.unique(rows)) == len(rows)
    return x.at[rows].get(mode="promise_in_bounds", unique_indices=unique)


#: As many slices still compile to less than a gather.
_FEW = 8


def unfolded(x: Array) -> Array:
    """``x``, and its cotangent, kept from XLA's folding of constants if it is complex.

    Where XLA folds a sum of complex constants between devices (on CPUs, in JAX 0.10 and 0.12), it ends the process.
    Workaround: complex_constants.
    """
    return lax.optimization_barrier(x) if jnp.issubdtype(x.dtype, jnp.complexfloating) else x


def with_zero(x: Array) -> Array:
    """``x`` with one more element along its first dimension: zeros."""
    return jnp.concatenate([x, jnp.zeros((1, *x.shape[1:]), x.dtype)])


def exchanged(axis: LogicalAxis, items: Array, plan: Exchange) -> Array:
    """``(wanted, ...)``: what this device wants of all devices' items.

    Args:
        axis: The mapped axis.
        items: ``(items, ...)``: what this device has.
        plan: Who sends what.
    """
    received = [
        lax.ppermute(take(items, on_device(axis, shift.send)), axis.device_axis, shift.pairs) for shift in plan.shifts
    ]
    known = jnp.concatenate([items, *received]) if received else items
    return take(with_zero(known) if plan.zeros else known, on_device(axis, plan.take))


def fetch(logical: LogicalAxes, names: Sequence[Hashable], items: Array, wants: Table) -> Array:
    """``(wanted, ...)``: what this replica wants of all replicas' items.

    Along one mapped axis an item goes once to each device that wants it. Along several axes as one, or with an axis
    of somebody else's among them, everything is gathered first.

    Args:
        logical: The mapped axes.
        names: The axes of the collective.
        items: ``(items, ...)``: what this replica has.
        wants: ``(replicas, wanted)``: which items each replica wants: number r · items + k is item k of replica r.
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
    """The mapped axis that a collective is over, if it is over nothing else."""
    return logical.get(names[0]) if len(names) == 1 else None


def size_of(logical: LogicalAxes, names: Sequence[Hashable]) -> int:
    """The number of replicas along these axes, as one."""
    sizes = [logical[name].size if name in logical else lax.axis_size(name) for name in names]
    return int(np.prod(sizes, dtype=np.int64))


def replica_index(logical: LogicalAxes, names: Sequence[Hashable]) -> jax.Array:
    """The replica's index along these axes as one, the last varying fastest."""
    index = jnp.int32(0)
    for name in names:
        axis = logical.get(name)
        size, own = (axis.size, replica_along(axis)) if axis else (lax.axis_size(name), lax.axis_index(name))
        index = index * size + own
    return index


def replica_along(axis: LogicalAxis) -> jax.Array:
    """The replica's index along one mapped axis; in a padding lane that of the replica it copies."""
    position = lane_position(axis)
    if not axis.padding:
        return position
    if axis.placement.padding_is_last:
        return jnp.minimum(position, axis.size - 1)
    return jnp.asarray(axis.placement.replica_at, jnp.int32)[position]


def lane_position(axis: LogicalAxis) -> jax.Array:
    """Device index · L + lane: the replica's index, were padding lanes replicas."""
    device = lax.axis_index(axis.device_axis) if axis.device_axis is not None else jnp.int32(0)
    lane = lax.axis_index(axis.lane_axis) if axis.lane_axis is not None else jnp.int32(0)
    return device * axis.lanes + lane


def gather(logical: LogicalAxes, names: Sequence[Hashable], x: Array) -> Array:
    """``(replicas, ...)``: every replica's ``x`` along these axes as one."""
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
    """``(..., replicas, ...)``: the rows of replicas among those of all slots along ``dim``."""
    runs = [lax.slice_in_dim(x, first, first + count, axis=dim) for first, count in placement.runs]
    return runs[0] if len(runs) == 1 else jnp.concatenate(runs, dim)


def _gather(x: Array, name: Hashable) -> Array:
    """``lax.all_gather``, in the form whose transpose JAX can ``vmap``. Workaround: untiled_collectives."""
    return lax.all_gather(x[None], name, tiled=True)


def on_data(function: Callable[[Array], Array], x: Array) -> Array:
    """A function that moves data along axes of ``x``, in a form that can be moved: of random keys, their data."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(function(jax.random.key_data(x)), impl=jax.random.key_impl(x))
    return narrow(function(wide(x)), x.dtype)


def wide(x: Array, bits: int = 2) -> Array:
    """``x`` as bytes, if its numbers are of no more ``bits``.

    XLA's CPU backend overruns its buffers where it gathers, concatenates or exchanges arrays of two bits
    (``jax.jit(lambda x: jnp.concatenate([x, x]))`` alone shows it), has no sums of them between devices, and leaves
    sums of four bits between devices with more bits than that (JAX 0.10 and 0.12; ``jax.pmap`` of ``psum`` shows it).
    Workarounds: two_bits_concatenated, two_bits_gathered, two_bits_summed, four_bits_summed.
    """
    return x.astype("int8" if x.dtype.name.startswith("i") else "uint8") if is_narrow(x.dtype, bits) else x


def narrow(x: Array, dtype: DType, bits: int = 2) -> Array:
    """What has been done to :func:`wide` operands, in the dtype that they had."""
    return x.astype(dtype) if is_narrow(dtype, bits) else x


def is_narrow(dtype: DType, bits: int = 2) -> bool:
    """Whether it is a dtype of integers of no more ``bits``."""
    return dtype.name in _NARROW[bits]


_NARROW = {2: ("int2", "uint2"), 4: ("int2", "uint2", "int4", "uint4")}
