"""One level of maps: what becomes of the arguments and results of a map where its replicas are lanes and devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from replicax._engine.blocks import on_data, real_rows
from replicax._engine.primitives import mapped as _primitives
from replicax._layout.layout import LogicalAxis
from replicax._layout.placement import Placement
from replicax._messages import text_of
from replicax.errors import UnsupportedCallbackError

OneReplica = Callable[..., Sequence[Any]]


def over_lanes(
    one_replica: OneReplica, axis: LogicalAxis, in_axes: Sequence[int | None], out_axes: Sequence[int | None]
) -> OneReplica:
    """What one device runs on its block of each argument: its lanes, vectorized."""
    if axis.lane_axis is not None:
        options = {"axis_name": axis.lane_axis, "axis_size": axis.lanes}
        vectorized = jax.vmap(one_replica, tuple(in_axes), tuple(out_axes), **options)
        return functools.partial(_explaining, vectorized, axis)

    def only_lane(*blocks: Any) -> tuple[Any, ...]:
        args = (x if a is None else lax.squeeze(x, [a]) for x, a in zip(blocks, in_axes, strict=True))
        outs = one_replica(*args)
        return tuple(y if a is None else lax.expand_dims(y, [a]) for y, a in zip(outs, out_axes, strict=True))

    return only_lane


def _explaining(vectorized: OneReplica, axis: LogicalAxis, *blocks: Any) -> Sequence[Any]:
    """Runs several lanes, where JAX refuses some callbacks."""
    try:
        return vectorized(*blocks)
    except Exception as error:  # JAX has no class of its own for these
        for theirs, (where, instead) in UNVECTORIZED.items():
            if theirs in text_of(error):
                raise UnsupportedCallbackError(
                    f"The mapped function calls jax.experimental.io_callback in {where}. Here {axis.lanes} replicas "
                    f"share a device, which runs them together and cannot make the calls of one alone. {instead}; or "
                    f"use jax.pure_callback or jax.debug.callback, if a call too many does no harm; or map over no "
                    f"more replicas than there are devices."
                ).with_traceback(error.__traceback__) from None
        raise


#: What JAX refuses of callbacks with an effect, where it is found, and what to write instead.
UNVECTORIZED = {
    "IO effect not supported in vmap-of-cond": (
        "a branch of jax.lax.cond or jax.lax.switch, which replicas choose differently",
        "Call it outside of the branch, and pass the choice along, as in io_callback(f, result, chosen, x)",
    ),
    "Unordered IO effects not supported in while_loop with batched predicate": (
        "a jax.lax.while_loop, which replicas leave at different times",
        "Write a loop with as many rounds for all, as jax.lax.fori_loop, and pass along whether a replica is still "
        "in it, as in io_callback(f, result, goes_on, x)",
    ),
}


def pad_rows(x: Any, dim: int, placement: Placement) -> Any:
    """``x`` along ``dim`` with a row for each slot; those for padding are copies, with no part in derivatives."""
    return on_data(lambda x: _primitives.pad_rows(x, dim, placement), x) if placement.padding else x


def own_rows(x: Any, dim: int, first: Any, placement: Placement) -> Any:
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
            return real_rows(_primitives.join_parts(x, name, dim), dim, self.axis.placement)

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
    return on_data(lambda x: _primitives.own_part(x, axis.device_axis, dim), pad_rows(x, dim, axis.placement))


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
