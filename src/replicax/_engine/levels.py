"""One level of maps: what becomes of the arguments and results of a map where its replicas are lanes and devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from replicax._engine import primitives
from replicax._engine.blocks import on_data
from replicax._layout.layout import LogicalAxis
from replicax._layout.placement import Placement
from replicax._messages import text_of
from replicax._typing import Array, Axes
from replicax.errors import UnsupportedCallbackError

OneReplica = Callable[..., Sequence[Array]]


def over_lanes(one_replica: OneReplica, axis: LogicalAxis, in_axes: Axes, out_axes: Axes) -> OneReplica:
    """What one device runs on its block of each argument: its lanes, vectorized."""
    if axis.lane_axis is not None:
        options = {"axis_name": axis.lane_axis, "axis_size": axis.lanes}
        vectorized = jax.vmap(one_replica, tuple(in_axes), tuple(out_axes), **options)
        return functools.partial(_explaining, vectorized, axis)

    def only_lane(*blocks: Array) -> tuple[Array, ...]:
        args = (x if a is None else lax.squeeze(x, [a]) for x, a in zip(blocks, in_axes, strict=True))
        outs = one_replica(*args)
        return tuple(y if a is None else lax.expand_dims(y, [a]) for y, a in zip(outs, out_axes, strict=True))

    return only_lane


def _explaining(vectorized: OneReplica, axis: LogicalAxis, *blocks: Array) -> Sequence[Array]:
    """Runs several lanes, where JAX refuses some callbacks."""
    try:
        return vectorized(*blocks)
    except Exception as error:  # JAX has no class of its own for these
        for theirs, (where, instead) in UNVECTORIZED.items():
            if theirs in text_of(error):
                raise UnsupportedCallbackError(
                    f"The mapped function calls jax.experimental.io_callback in {where}. Here, each device runs "
                    f"{axis.lanes} replicas, vectorized, and JAX cannot vectorize this callback. {instead}. Or use "
                    f"jax.pure_callback or jax.debug.callback, if extra calls do no harm. Or map over at most as many "
                    f"replicas as devices."
                ).with_traceback(error.__traceback__) from None
        raise


#: What JAX refuses of callbacks with an effect, where it is found, and what to write instead.
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
    """``x`` along ``dim`` with a row for each slot; those for padding are copies, with no part in derivatives."""
    return on_data(lambda x: primitives.pad_rows(x, dim, placement), x) if placement.padding else x


def own_rows(x: Array, dim: int, first: Array, placement: Placement) -> Array:
    """The rows of ``x`` along ``dim`` for a device's lanes, of which ``first`` is the first slot."""
    last, count = x.shape[dim] - 1, placement.lanes
    if not placement.padding_is_last:
        table = jnp.asarray(placement.replica_at, jnp.int32)
        return jnp.take(x, lax.dynamic_slice_in_dim(table, first, count), dim)
    return lax.cond(
        first + count <= last + 1,
        lambda: lax.dynamic_slice_in_dim(x, jnp.minimum(first, last + 1 - count), count, dim),
        lambda: jnp.take(x, jnp.minimum(first + jnp.arange(count), last), dim),
    )


def equal_on(x: Array, names: Sequence[Hashable]) -> Array:
    """``x``, an array which all devices along these mesh axes have been given alike."""
    for name in names:
        x = on_data(functools.partial(primitives.equal_parts, axis=name), x)
    return x


def own_on(y: Array, names: Sequence[Hashable]) -> Array:
    """``y``, which all devices along these mesh axes have found alike, and any of which may give the result."""
    for name in names:
        y = on_data(functools.partial(primitives.share, axis=name), y)
    return y
