"""Sums in the order of a tree that depends on the number of replicas alone, for ``deterministic=True``.

A sum of floats depends on the order of the additions. XLA may also contract a product and the sum that it is added to,
if it compiles both into one kernel. So what a lane computes is compiled in a loop, even if a device has one lane: see
:func:`each_lane`. Its values are added in a loop inside, and those of devices between such loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.blocks import all_lanes, of_lane, on_device, take
from replicax._layout.layout import LogicalAxis
from replicax._layout.trees import Schedule, tree
from replicax._typing import Array, DType, HostArray

C = TypeVar("C")


def depends_on_order(dtype: DType) -> bool:
    """Whether a sum of such numbers depends on the order of the additions."""
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def dtype_of_sum(dtype: DType) -> DType:
    """The dtype in which numbers are added: sums of many 16-bit floats need more bits."""
    short = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return np.dtype(np.float32) if short else np.dtype(dtype)


# ---------------------------------------------------------------------------------------------------------------
# On one device


def each_lane(
    axis: LogicalAxis,
    step: Callable[[C, Sequence[Array], Array], tuple[C, list[Array]]],
    carry: C,
    rows: Sequence[Array],
) -> tuple[C, list[Array]]:
    """Runs the lanes of a device one after the other, like ``lax.scan``, also if there is one lane.

    A lane alone is compiled like a lane of several. XLA would inline a loop of one iteration, and fuse it with what is
    around it, so the number of iterations is known only at run time. And a slice of one row would be no slice, so there
    are two rows.

    Args:
        axis: The mapped axis.
        step: Function of the carry, the values of one lane, and the lane. Returns the new carry, and results.
        carry: The first carry.
        rows: ``(lanes, ...)``: the values of all lanes.

    Returns:
        The last carry, and the results as ``(lanes, ...)``.
    """
    dtypes, count, storage = [x.dtype for x in rows], _at_run_time(axis.lanes), max(2, axis.lanes)
    data = [jnp.concatenate([x, x]) if axis.lanes == 1 else x for x in map(_data, rows)]

    def one_lane(carry: C, lane: Array) -> tuple[C, list[Array]]:
        own = [lax.dynamic_index_in_dim(x, lane, keepdims=False) for x in data]
        return step(carry, [_with_dtype(x, dtype) for x, dtype in zip(own, dtypes, strict=True)], lane)

    types = jax.eval_shape(one_lane, carry, jnp.int32(0))[1]
    made = [_data(_jax.zeros(jax.ShapeDtypeStruct((storage, *x.shape), x.dtype))) for x in types]

    def body(state: tuple[Array, C, list[Array]]) -> tuple[Array, C, list[Array]]:
        lane, carry, made = state
        carry, results = one_lane(carry, lane)
        made = [lax.dynamic_update_index_in_dim(x, _data(y), lane, 0) for x, y in zip(made, results, strict=True)]
        return _next(lane), carry, made

    _, carry, made = lax.while_loop(lambda state: state[0] < count, body, (jnp.int32(0), carry, made))
    return carry, [_with_dtype(x[: axis.lanes], y.dtype) for x, y in zip(made, types, strict=True)]


def _at_run_time(number: int) -> Array:
    """Returns a number that XLA does not know when it compiles."""
    return lax.optimization_barrier(jnp.int32(number))


def _next(lane: Array) -> Array:
    """Returns ``lane + 1``. The sort prevents XLA from compiling the whole loop as one kernel.

    In one kernel, LLVM contracts products and sums of several operations. XLA compiles loops that access few bytes in
    this way (its pass ``small-while-loop-hoisting``), but not loops that contain a sort.
    """
    return lax.sort(jnp.stack([lane + 1, lane]))[1]


def _data(x: Array) -> Array:
    """Returns the data of typed keys, and other arrays unchanged."""
    return jax.random.key_data(x) if _is_key(x.dtype) else x


def _is_key(dtype: DType) -> bool:
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def _with_dtype(x: Array, dtype: DType) -> Array:
    """Returns key data as typed keys, if ``dtype`` is one of keys."""
    return jax.random.wrap_key_data(x, impl=dtype._impl) if _is_key(dtype) else x  # type: ignore[attr-defined]


def without_fusion(function: Callable[..., list[Array]], args: Sequence[Array]) -> list[Array]:
    """Runs a function in the branch of a ``cond``, so that XLA does not fuse it with what is around it.

    Its arguments come from sums between devices, or from loops over lanes, in other shapes for each number of devices.
    If XLA fuses these with the function, it contracts other products and sums.
    """
    arrays = list(map(jnp.asarray, args))
    types = jax.eval_shape(function, *arrays)
    # XLA does not know that the predicate is true, so it cannot inline the branch. The other branch never runs.
    return lax.cond(_at_run_time(1) > 0, function, lambda *_: list(map(_jax.zeros, types)), *arrays)


def within_lanes(axis: LogicalAxis, function: Callable[[Array], Array], x: Array) -> Array:
    """Runs a function inside the ``vmap`` over lanes, on one lane after the other.

    Its values for several lanes at once may have other bits than for each lane alone.
    """
    _, (y,) = each_lane(axis, lambda carry, own, _: (carry, [function(*own)]), (), [all_lanes(axis, x)])
    return of_lane(axis, y)


def no_lanes(axis: LogicalAxis, shape: Sequence[int], dtype: DType) -> Array:
    """Returns the partial sums of no lanes, ``(slots, *shape)``."""
    return jnp.zeros((tree(axis.placement).lanes.slots + bool(axis.padding), *shape), dtype)


def with_lane(axis: LogicalAxis, sums: Sequence[Array], own: Sequence[Array], lane: Array) -> list[Array]:
    """Returns partial sums with the values of one more lane. A padding lane adds nothing.

    Args:
        axis: The mapped axis.
        sums: The partial sums of the lanes before, see :func:`no_lanes`.
        own: The values of the lane.
        lane: The lane.
    """
    plan = tree(axis.placement).lanes
    return _added(plan, lambda table: on_device(axis, table), sums, own, lane)


def _added(
    plan: Schedule,
    row: Callable[[HostArray], HostArray | Array],
    sums: Sequence[Array],
    items: Sequence[Array],
    k: Array,
) -> list[Array]:
    """Adds item ``k`` to those partial sums that the schedule says, and keeps the sum in its slot."""
    if not sums:
        return []
    merged, count, kept = (jnp.asarray(row(table))[k] for table in (plan.merged, plan.count, plan.kept))

    def add(state: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        j, items = state
        left = [lax.dynamic_index_in_dim(s, merged[j], keepdims=False) for s in sums]
        return j + 1, [a + b for a, b in zip(left, items, strict=True)]

    _, items = lax.while_loop(lambda state: state[0] < count, add, (jnp.int32(0), list(items)))
    return [lax.dynamic_update_index_in_dim(s, x, kept, 0) for s, x in zip(sums, items, strict=True)]


def of_rows(axis: LogicalAxis, rows: Array) -> Array:
    """Returns the partial sums of all lanes of a device, from their values ``(lanes, ...)``."""

    def step(sums: list[Array], own: Sequence[Array], lane: Array) -> tuple[list[Array], list[Array]]:
        return with_lane(axis, sums, own, lane), []

    (sums,), _ = each_lane(axis, step, [no_lanes(axis, rows.shape[1:], rows.dtype)], [rows])
    return sums


# ---------------------------------------------------------------------------------------------------------------
# Between devices


def of_devices(axis: LogicalAxis, sums: Sequence[Array]) -> list[Array]:
    """Returns sums over all replicas, from the partial sums of each device. Devices communicate once for each dtype.

    Each device adds a part of the elements, and the devices gather the parts. So a device sends its partial sums once,
    and its part of the result, and not its partial sums to every device.
    """
    partials = [_partials(axis, x) for x in sums]
    if axis.device_axis is None:
        return [x[0] for x in partials]
    totals: dict[int, Array] = {}
    for dtype in dict.fromkeys(x.dtype for x in partials):
        which = [k for k, x in enumerate(partials) if x.dtype == dtype]
        flat = _of_devices(axis, [partials[k].reshape(len(partials[k]), -1) for k in which])
        ends = np.cumsum([math.prod(partials[k].shape[1:]) for k in which])
        parts = jnp.split(flat, ends[:-1])
        totals.update((k, part.reshape(partials[k].shape[1:])) for k, part in zip(which, parts, strict=True))
    return [totals[k] for k in range(len(partials))]


def _of_devices(axis: LogicalAxis, partials: Sequence[Array]) -> Array:
    """Returns the sums over all replicas, one after the other, from the partial sums ``(partials, elements)``."""
    size = sum(x.shape[1] for x in partials)
    if size < SMALL:
        return _total(axis, lax.all_gather(jnp.concatenate(partials, 1), axis.device_axis, tiled=True))
    own = _exchanged(axis, _parts(partials, axis.devices, -(-size // axis.devices)))
    return lax.all_gather(own, axis.device_axis, tiled=True)[:size]


def _parts(rows: Sequence[Array], parts: int, length: int) -> Array:
    """Returns the rows ``(rows, elements)`` of several arrays, side by side and padded, as ``(rows, parts, length)``.

    Each part is put together by itself, so no array of all elements has to be copied.
    """
    ends = np.cumsum([x.shape[1] for x in rows])
    padding = jnp.zeros((len(rows[0]), parts * length - ends[-1]), rows[0].dtype)
    pieces = []
    for start in range(0, parts * length, length):
        inside = []
        for x, end in zip((*rows, padding), (*ends, parts * length), strict=True):
            before = end - x.shape[1]
            first, last = max(start, before), min(start + length, end)
            if first < last:
                inside.append(x[:, first - before : last - before])
        pieces.append(jnp.concatenate(inside, 1))
    return jnp.stack(pieces, 1)


#: Sums of fewer elements are computed on every device.
SMALL = 4096


#: More partial sums are added in a loop, so that the program does not grow with the number of devices.
MANY = 64


def rows_of_devices(axis: LogicalAxis, sums: Array) -> Array:
    """Returns the rows of the sum over all replicas for the lanes of this device, ``(lanes, ...)``.

    Args:
        axis: The mapped axis.
        sums: The partial sums ``(slots, replicas, ...)``.
    """
    partials = _partials(axis, sums)
    if axis.padding:  # a padding lane gets the row of the replica that it copies
        partials = primitives.pad_rows(partials, 1, axis.placement)
    if axis.device_axis is None:
        return partials[0]
    return _exchanged(axis, partials.reshape(-1, axis.devices, axis.lanes, *partials.shape[2:]))


def _partials(axis: LogicalAxis, sums: Array) -> Array:
    return take(sums, on_device(axis, tree(axis.placement).partials))


def _exchanged(axis: LogicalAxis, partials: Array) -> Array:
    """Returns this device's part of the sum, from its partial sums ``(partials, devices, ...)`` of all parts."""
    items = lax.all_to_all(partials, axis.device_axis, 1, 0, tiled=True)
    return _total(axis, items.reshape(-1, *partials.shape[2:]))


def _total(axis: LogicalAxis, items: Array) -> Array:
    """Adds the partial sums of all devices: as one expression, or in a loop if they are many."""
    plan, order, slot = (getattr(tree(axis.placement), name) for name in ("between", "order", "total"))
    if len(order) <= MANY:
        kept: dict[int, Array] = {}
        for k, item in enumerate(order):
            x = items[item]
            for j in range(plan.count[0, k]):
                x = kept[plan.merged[0, k, j]] + x
            kept[plan.kept[0, k]] = x
        return kept[slot]

    def step(k: Array, sums: Array) -> Array:
        item = lax.dynamic_index_in_dim(items, jnp.asarray(order)[k], keepdims=False)
        return _added(plan, lambda table: table[0], [sums], [item], k)[0]

    start = jnp.zeros((plan.slots, *items.shape[1:]), items.dtype)
    return lax.fori_loop(0, len(order), step, start)[slot]
