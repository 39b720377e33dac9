"""One level of maps: what becomes of the arguments and results of a map where its replicas are lanes and devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from replicax import _primitives
from replicax._blocks import on_data
from replicax._layout import LogicalAxis

OneReplica = Callable[..., Sequence[Any]]


def over_lanes(
    one_replica: OneReplica, axis: LogicalAxis, in_axes: Sequence[int | None], out_axes: Sequence[int | None]
) -> OneReplica:
    """What one device runs on its block of each argument: its lanes, vectorized."""
    if axis.lane_axis is not None:
        return jax.vmap(one_replica, tuple(in_axes), tuple(out_axes), axis_name=axis.lane_axis, axis_size=axis.lanes)

    def only_lane(*blocks: Any) -> tuple[Any, ...]:
        args = (x if a is None else lax.squeeze(x, [a]) for x, a in zip(blocks, in_axes, strict=True))
        outs = one_replica(*args)
        return tuple(y if a is None else lax.expand_dims(y, [a]) for y, a in zip(outs, out_axes, strict=True))

    return only_lane


def pad_rows(x: Any, dim: int, rows: int) -> Any:
    """``x`` with its last row along ``dim`` repeated ``rows`` more times; the copies have no part in derivatives."""
    return on_data(lambda x: _primitives.pad_rows(x, dim, rows), x) if rows else x


def own_rows(x: Any, dim: int, first: Any, count: int) -> Any:
    """``count`` rows of ``x`` along ``dim`` from the ``first`` on, the last one for each that it does not have."""
    last = x.shape[dim] - 1
    return lax.cond(
        first + count <= last + 1,
        lambda: lax.dynamic_slice_in_dim(x, jnp.minimum(first, last + 1 - count), count, dim),
        lambda: jnp.take(x, jnp.minimum(first + jnp.arange(count), last), dim),
    )


# ---------------------------------------------------------------------------------------------------------------
# A map inside a replica, where the devices of the map are there already, and all run the replica alike


@dataclass(frozen=True)
class Part:
    """A device's part of an array that a map inside has made or is going to take.

    Attributes:
        value: The part, ``(..., lanes, ...)``.
        axis: The mapped axis.
        dim: Where the array has it.
    """

    value: Any
    axis: LogicalAxis
    dim: int

    def join(self) -> Any:
        """The array, equal on all devices of the map."""
        assert self.axis.device_axis is not None
        name, dim = self.axis.device_axis, self.dim

        def joined(x: Any) -> Any:
            return lax.slice_in_dim(_primitives.join_parts(x, name, dim), 0, self.axis.size, axis=dim)

        return on_data(joined, self.value)


def own_block(axis: LogicalAxis, x: Any, dim: int | None) -> Any:
    """This device's lanes of an argument of a map inside, which is mapped along ``dim`` (None: broadcast)."""
    if isinstance(x, Part):
        if (x.axis, x.dim) == (axis, dim):
            return x.value
        x = x.join()
    if axis.device_axis is None:
        return x
    if dim is None:
        return on_data(lambda x: _primitives.share(x, axis.device_axis), x)
    return on_data(lambda x: _primitives.own_part(x, axis.device_axis, dim), pad_rows(x, dim, axis.padding))


def whole(axis: LogicalAxis, y: Any, dim: int | None) -> Any:
    """The result of a map inside of which each device has its lanes, or, with ``dim`` None, the one value of all."""
    if axis.device_axis is None:
        return y
    if dim is None:
        return on_data(lambda y: _primitives.equal_parts(y, axis.device_axis), y)
    return Part(y, axis, dim)


def comes_in_parts(axis: LogicalAxis) -> bool:
    """Whether a :class:`Part` of each device is an even split of the array, as JAX's shardings are."""
    return axis.device_axis is not None and not axis.padding


def equal_on(x: Any, names: Sequence[Hashable]) -> Any:
    """``x``, an array which all devices along these mesh axes have been given alike."""
    for name in names:
        x = on_data(functools.partial(_primitives.equal_parts, axis=name), x)
    return x


def own_on(y: Any, names: Sequence[Hashable]) -> Any:
    """``y``, which all devices along these mesh axes have found alike, and any of which may give the result."""
    for name in names:
        y = on_data(functools.partial(_primitives.share, axis=name), y)
    return y
