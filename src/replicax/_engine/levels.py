"""Runs a function on all lanes of a device, and converts arguments and results of a map to blocks of lanes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from replicax._engine import primitives
from replicax._engine.blocks import on_data
from replicax._layout.layout import Layout, LogicalAxis
from replicax._layout.placement import Placement
from replicax._messages import text_of
from replicax._typing import Array, Axes
from replicax.errors import UnsupportedCallbackError

OneReplica = Callable[..., Sequence[Array]]


def over_lanes(one_replica: OneReplica, axis: LogicalAxis, in_axes: Axes, out_axes: Axes) -> OneReplica:
    """Returns the function that a device runs on its block of each argument: ``vmap`` over the lanes of the device."""
    if axis.lane_axis is not None:
        options = {"axis_name": axis.lane_axis, "axis_size": axis.lanes}
        vectorized = jax.vmap(one_replica, tuple(in_axes), tuple(out_axes), **options)
        return functools.partial(_with_clear_errors, vectorized, axis)

    def only_lane(*blocks: Array) -> tuple[Array, ...]:
        args = (x if a is None else lax.squeeze(x, [a]) for x, a in zip(blocks, in_axes, strict=True))
        outs = one_replica(*args)
        return tuple(y if a is None else lax.expand_dims(y, [a]) for y, a in zip(outs, out_axes, strict=True))

    return only_lane


def _with_clear_errors(vectorized: OneReplica, axis: LogicalAxis, *blocks: Array) -> Sequence[Array]:
    """Calls ``vectorized``, and replaces JAX's errors about callbacks under ``vmap`` with clearer errors."""
    try:
        return vectorized(*blocks)
    except Exception as error:  # JAX has no error class for these
        for theirs, (where, instead) in UNVECTORIZED.items():
            if theirs in text_of(error):
                raise UnsupportedCallbackError(
                    f"The mapped function calls jax.experimental.io_callback in {where}. Here, each device runs "
                    f"{axis.lanes} replicas, vectorized, and JAX cannot vectorize this callback. {instead}. Or use "
                    f"jax.pure_callback or jax.debug.callback, if extra calls do no harm. Or map over at most as many "
                    f"replicas as devices."
                ).with_traceback(error.__traceback__) from None
        raise


#: JAX's errors about callbacks with side effects under ``vmap``: where the callback is, and what to write instead.
UNVECTORIZED = {
    "IO effect not supported in vmap-of-cond": (
        "a branch of jax.lax.cond or jax.lax.switch that replicas select differently",
        "Call it outside the branch, and pass the predicate to it, as in io_callback(f, result, predicate, x)",
    ),
    "Unordered IO effects not supported in while_loop with batched predicate": (
        "a jax.lax.while_loop that replicas leave at different times",
        "Use a jax.lax.fori_loop with the same number of iterations for all replicas, and pass to the callback whether "
        "the replica is still active, as in io_callback(f, result, active, x)",
    ),
}


def pad_rows(x: Array, dim: int, placement: Placement) -> Array:
    """Pads ``x`` along ``dim`` to one row per slot. Padding rows are copies. Their cotangents are dropped."""
    return on_data(lambda x: primitives.pad_rows(x, dim, placement), x) if placement.padding else x


def own_rows(x: Array, dim: int, first: Array, placement: Placement) -> Array:
    """Returns the rows of ``x`` along ``dim`` for the lanes of one device.

    Args:
        x: The array, with one row per replica along ``dim``.
        dim: The mapped dimension.
        first: The first slot of the device.
        placement: Which replica each slot runs.
    """
    last, count = x.shape[dim] - 1, placement.lanes
    if not placement.padding_is_last:
        table = jnp.asarray(placement.replica_at, jnp.int32)
        return jnp.take(x, lax.dynamic_slice_in_dim(table, first, count), dim)
    if count > last + 1:  # a process with fewer replicas than lanes
        return jnp.take(x, jnp.minimum(first + jnp.arange(count), last), dim)
    return lax.cond(
        first + count <= last + 1,
        lambda: lax.dynamic_slice_in_dim(x, jnp.minimum(first, last + 1 - count), count, dim),
        lambda: jnp.take(x, jnp.minimum(first + jnp.arange(count), last), dim),
    )


def lend_rows(x: Array, layout: Layout, spec: PartitionSpec) -> Array:
    """Fills the block of a device whose process has no replicas with a row of another device, see ``Layout.lent``.

    Padding copies the replica that the placement says: maxima over groups rely on it, and loops end on such values.

    Args:
        x: The block of one device, ``(..., lanes, ...)``.
        layout: The layout.
        spec: The ``PartitionSpec`` of the whole array. Blocks of arrays without a mapped axis are returned unchanged.
    """
    name = layout.mesh.axis_names[0]
    if name not in spec:
        return x
    return on_data(lambda x: primitives.lend_rows(x, name, list(spec).index(name), layout.lent), x)


def as_equal(x: Array, names: Sequence[Hashable]) -> Array:
    """Returns ``x``, which is equal on all devices along these mesh axes. The first device gets the full cotangent."""
    for name in names:
        x = on_data(functools.partial(primitives.equal_parts, axis=name), x)
    return x


def as_per_device(y: Array, names: Sequence[Hashable]) -> Array:
    """Returns ``y``, which is equal on all devices along these mesh axes. The cotangent is summed over the devices."""
    for name in names:
        y = on_data(functools.partial(primitives.share, axis=name), y)
    return y
