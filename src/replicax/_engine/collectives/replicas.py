"""Masks for padding lanes, and values that are equal in all replicas."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from replicax import _jax
from replicax._engine.blocks import as_unbatched, lane_position
from replicax._layout.layout import LogicalAxis
from replicax._typing import Array


def is_replica(axis: LogicalAxis) -> jax.Array:
    """Returns False in a padding lane, else True."""
    position = lane_position(axis)
    if axis.placement.padding_is_last:
        return position < axis.size
    return jnp.asarray(axis.placement.is_replica)[position]


def physical(axes: Sequence[LogicalAxis]) -> tuple[Hashable, ...]:
    """Returns the names of the lane and device axes of each mapped axis.

    In one collective over both, JAX reduces over the vmapped axis first. So each device sends the bytes of one lane.
    """
    return tuple(name for axis in axes for name, _ in axis.physical)


def where_replica(axes: Sequence[LogicalAxis], x: Array) -> Array:
    """Returns ``x``, with zeros in padding lanes."""
    for axis in axes:
        if axis.padding:
            x = lax.select(jnp.broadcast_to(is_replica(axis), x.shape), x, jnp.zeros_like(x))
    return x


def any_replica(axes: Sequence[LogicalAxis], x: Array) -> Array:
    """Whether a bool is True in any replica."""
    names = physical(axes)
    return lax.pmax(x.astype(jnp.int32), names) > 0 if names else x


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def equal_value(axis: LogicalAxis, x: Array) -> Array:
    """Returns ``x``, which is equal in all replicas. Each replica gets an equal part of the result's cotangent.

    A reverse rule of the user may depend on this part. If only the sum of the parts matters, use ``as_unbatched``.
    """
    return as_unbatched(axis, x)


def _equal_tangent(axis: LogicalAxis, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    with _jax.axis_env(dict(axis.physical)):  # JAX calls this after vmap and shard_map have returned
        total = lax.psum(where_replica([axis], tangents[0]), physical([axis]))
        return as_unbatched(axis, primals[0]), (total / axis.size).astype(total.dtype)


equal_value.defjvp(_equal_tangent)
