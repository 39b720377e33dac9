"""Which lanes are replicas and which are padding, and what all replicas have in common."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from replicax import _jax
from replicax._engine.blocks import any_lane, lane_position
from replicax._layout.layout import LogicalAxis
from replicax._typing import Array


def is_replica(axis: LogicalAxis) -> jax.Array:
    """False in a padding lane."""
    position = lane_position(axis)
    if axis.placement.padding_is_last:
        return position < axis.size
    return jnp.asarray(axis.placement.is_replica)[position]


def physical(axes: Sequence[LogicalAxis]) -> tuple[Hashable, ...]:
    """The lanes and devices of every axis.

    JAX reduces over a vmapped axis before it reduces over a mesh axis named in the same collective, so that devices
    send one lane's bytes.
    """
    return tuple(name for axis in axes for name, _ in axis.physical)


def where_replica(axes: Sequence[LogicalAxis], x: Array) -> Array:
    """``x``, and zero in padding lanes."""
    for axis in axes:
        if axis.padding:
            x = lax.select(jnp.broadcast_to(is_replica(axis), x.shape), x, jnp.zeros_like(x))
    return x


def any_replica(axes: Sequence[LogicalAxis], x: Array) -> Array:
    """Whether a truth value holds in any replica."""
    names = physical(axes)
    return lax.pmax(x.astype(jnp.int32), names) > 0 if names else x


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def equal_value(axis: LogicalAxis, x: Array) -> Array:
    """``x``, which is equal in all replicas; its derivative falls to all of them in equal parts.

    ``any_lane`` is enough where the sum of the parts is all that counts, which a reverse rule of the user's may not
    heed.
    """
    return any_lane(axis, x)


def _equal_tangent(axis: LogicalAxis, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    with _jax.axis_env(dict(axis.physical)):  # JAX calls this when vmap and shard_map have long returned
        total = lax.psum(where_replica([axis], tangents[0]), physical([axis]))
        return any_lane(axis, primals[0]), (total / axis.size).astype(total.dtype)


equal_value.defjvp(_equal_tangent)
