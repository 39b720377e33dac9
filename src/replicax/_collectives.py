"""The collectives over a logical axis, each as a collective over its lanes and then one over its devices.

A rule takes the logical axes in scope, the operand as one replica sees it, and the parameters of JAX's primitive.
It runs once per replica too: inside the ``vmap`` over lanes and the ``shard_map`` over devices, where the lane and
device axes are bound. Lanes come first, so that the wire between devices carries the least.

Padding lanes are exact copies of replica N - 1, and every rule keeps them so: they get what that replica gets. What
they contribute is masked, sliced off, or (where a copy cannot change the result, as in ``pmax``) harmless.

To add a collective, write one function with the parameters of its primitive under :func:`collective`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from replicax._errors import UnsupportedCollectiveError
from replicax._layout import LaneAxis, LogicalAxes, LogicalAxis

Names = Sequence[Hashable]


@dataclass(frozen=True)
class Collective:
    """How a collective is made of collectives over lanes and devices.

    Attributes:
        rule: ``rule(logical, *operands, **parameters)``.
        uniform: Whether all replicas along the axis get the same result.
    """

    rule: Callable[..., Any]
    uniform: bool


#: The collectives that replicax has, by the name of JAX's primitive.
REGISTRY: dict[str, Collective] = {}

Rule = TypeVar("Rule", bound=Callable[..., Any])


def collective(*primitives: str, uniform: bool) -> Callable[[Rule], Rule]:
    """Registers a rule for the primitives of these names."""

    def register(rule: Rule) -> Rule:
        REGISTRY.update(dict.fromkeys(primitives, Collective(rule, uniform)))
        return rule

    return register


def refuse_groups(primitive: str, axis_index_groups: object) -> None:
    """Refuses ``axis_index_groups``, which no rule takes yet."""
    if axis_index_groups is not None:
        raise UnsupportedCollectiveError(
            f"{primitive} with axis_index_groups={axis_index_groups} over a mapped axis: replicax has no rule for "
            f"groups yet. Call {primitive} without axis_index_groups, or mask the replicas outside the group."
        )


# ---------------------------------------------------------------------------------------------------------------
# Which replica


def lane_position(axis: LogicalAxis) -> jax.Array:
    """Device index · L + lane: the replica's index, were padding lanes replicas."""
    device = lax.axis_index(axis.device_axis) if axis.device_axis is not None else jnp.int32(0)
    lane = lax.axis_index(axis.lane_axis) if axis.lane_axis is not None else jnp.int32(0)
    return device * axis.lanes + lane


def is_replica(axis: LogicalAxis) -> jax.Array:
    """False in a padding lane."""
    return lane_position(axis) < axis.size


def replica_index(axis: LogicalAxis) -> jax.Array:
    """The replica's index; in a padding lane that of the replica it copies."""
    position = lane_position(axis)
    return jnp.minimum(position, axis.size - 1) if axis.padding else position


@collective("axis_index", uniform=False)
def axis_index(logical: LogicalAxes, *, axis_name: Hashable) -> jax.Array:
    """The replica's index along one axis, or along several as one, the last varying fastest."""
    index = jnp.int32(0)
    for name in axis_name if isinstance(axis_name, tuple) else (axis_name,):
        axis = logical.get(name)
        size, own = (axis.size, replica_index(axis)) if axis else (lax.axis_size(name), lax.axis_index(name))
        index = index * size + own
    return index


# ---------------------------------------------------------------------------------------------------------------
# Reductions


def split_axes(logical: LogicalAxes, axes: Names) -> tuple[list[LogicalAxis], tuple[int, ...], tuple[Hashable, ...]]:
    """The logical axes, the operand's own dimensions (where an inner vmap bound the name), and foreign axes."""
    ours = [logical[name] for name in axes if name in logical]
    positional = tuple(name for name in axes if isinstance(name, int))
    foreign = tuple(name for name in axes if name not in logical and not isinstance(name, int))
    return ours, positional, foreign


def physical(axes: Sequence[LogicalAxis]) -> tuple[Hashable, ...]:
    """The lanes and devices of every axis.

    JAX reduces over a vmapped axis before it reduces over a mesh axis named in the same collective, so that devices
    send one lane's bytes.
    """
    return tuple(name for axis in axes for name, _ in axis.physical)


def where_replica(axes: Sequence[LogicalAxis], x: Any) -> Any:
    """``x``, and zero in padding lanes."""
    for axis in axes:
        if axis.padding:
            x = lax.select(jnp.broadcast_to(is_replica(axis), x.shape), x, jnp.zeros_like(x))
    return x


@collective("psum", "psum_invariant", uniform=True)
def psum(logical: LogicalAxes, x: Any, *, axes: Names, axis_index_groups: Any = None) -> Any:
    """The sum over the replicas; padding lanes add nothing."""
    refuse_groups("psum", axis_index_groups)
    ours, positional, foreign = split_axes(logical, axes)
    x = jnp.sum(x, positional, dtype=x.dtype) if positional else x
    names = physical(ours) + foreign
    return lax.psum(where_replica(ours, x), names) if names else x


@collective("pmax", uniform=True)
def pmax(logical: LogicalAxes, x: Any, *, axes: Names, axis_index_groups: Any = None) -> Any:
    """The maximum over the replicas; a copy of a replica does not change it."""
    refuse_groups("pmax", axis_index_groups)
    return extremum(logical, x, axes, lax.pmax, jnp.max)


@collective("pmin", uniform=True)
def pmin(logical: LogicalAxes, x: Any, *, axes: Names, axis_index_groups: Any = None) -> Any:
    """The minimum over the replicas; a copy of a replica does not change it."""
    refuse_groups("pmin", axis_index_groups)
    return extremum(logical, x, axes, lax.pmin, jnp.min)


def extremum(
    logical: LogicalAxes, x: Any, axes: Names, named: Callable[..., Any], positional_extremum: Callable[..., Any]
) -> Any:
    """A maximum or minimum over the replicas."""
    ours, positional, foreign = split_axes(logical, axes)
    x = positional_extremum(x, positional) if positional else x
    names = physical(ours) + foreign
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        # XLA's CPU backend reduces complex numbers between devices by sums alone.
        lanes = tuple(name for name in names if isinstance(name, LaneAxis))
        x = named(x, lanes) if lanes else x
        for name in names:
            x = x if name in lanes else positional_extremum(lax.all_gather(x, name), axis=0)
        return x
    return named(x, names) if names else x


# ---------------------------------------------------------------------------------------------------------------
# Gathers and scatters


def gather(axis: LogicalAxis, x: Any) -> Any:
    """Every replica's ``x``, stacked along a new first dimension of length N."""
    shape = x.shape
    for name, _ in axis.physical:
        x = lax.all_gather(x, name)
    return x.reshape(axis.devices * axis.lanes, *shape)[: axis.size]


@collective("all_gather", "all_gather_invariant", uniform=True)
def all_gather(
    logical: LogicalAxes,
    x: Any,
    *,
    all_gather_dimension: int,
    axis_name: Names | Hashable,
    axis_size: int,
    tiled: bool,
    axis_index_groups: Any = None,
) -> Any:
    """Every replica's operand along a new dimension, or (tiled) along an old one; padding is cut off."""
    refuse_groups("all_gather", axis_index_groups)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # JAX lowers no gather of keys but along a new first dimension
        rule = partial(all_gather, logical, axis_name=axis_name, axis_size=axis_size, tiled=tiled)
        data = rule(jax.random.key_data(x), all_gather_dimension=all_gather_dimension)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    axis = logical.get(names[0])
    if len(names) == 1 and axis is not None and axis.lanes == 1 and axis.device_axis is not None and not axis.padding:
        return lax.all_gather(x, axis.device_axis, axis=all_gather_dimension, tiled=tiled)
    shape = x.shape
    for name in reversed(names):
        x = gather(logical[name], x) if name in logical else lax.all_gather(x, name)
    x = jnp.moveaxis(x.reshape(axis_size, *shape), 0, all_gather_dimension)
    if not tiled:
        return x
    before, own, after = shape[:all_gather_dimension], shape[all_gather_dimension], shape[all_gather_dimension + 1 :]
    return x.reshape(*before, axis_size * own, *after)


def scatter_sum(axis: LogicalAxis, x: Any) -> Any:
    """Of the sum over the replicas of ``x``, whose first dimension has length N, this replica's element."""
    x = where_replica([axis], x)
    if axis.padding:  # A padding lane gets what the replica gets that it copies.
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (axis.padding, *x.shape[1:]))])
    x = x.reshape(axis.devices, axis.lanes, *x.shape[1:])
    if axis.lane_axis is not None:
        x = lax.psum(x, axis.lane_axis)
    x = x[0] if axis.device_axis is None else lax.psum_scatter(x, axis.device_axis)
    if axis.lane_axis is None:
        return x[0]
    return lax.dynamic_index_in_dim(x, lax.axis_index(axis.lane_axis), keepdims=False)


@collective("reduce_scatter", uniform=False)
def psum_scatter(
    logical: LogicalAxes,
    x: Any,
    *,
    scatter_dimension: int,
    axis_name: Names | Hashable,
    axis_size: int,
    tiled: bool,
    axis_index_groups: Any = None,
) -> Any:
    """Of the sum over the replicas, this replica's slice along a dimension: the transpose of ``all_gather``."""
    refuse_groups("psum_scatter", axis_index_groups)
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if tiled:
        before, own, after = x.shape[:scatter_dimension], x.shape[scatter_dimension], x.shape[scatter_dimension + 1 :]
        x = x.reshape(*before, axis_size, own // axis_size, *after)
    x = jnp.moveaxis(x, scatter_dimension, 0)
    sizes = [logical[name].size if name in logical else lax.axis_size(name) for name in names]
    x = x.reshape(*sizes, *x.shape[1:])
    for name in names:
        x = scatter_sum(logical[name], x) if name in logical else lax.psum_scatter(x, name)
    return x


def any_replica(axes: Sequence[LogicalAxis], x: Any) -> Any:
    """Whether a truth value holds in any replica."""
    names = physical(axes)
    return lax.pmax(x.astype(jnp.int32), names) > 0 if names else x


def lane_by_lane(axes: Iterable[LogicalAxis], x: Any) -> Any:
    """``x``, which ``vmap`` takes to differ between lanes from here on, whether it does or not."""
    for axis in axes:
        if axis.lane_axis is not None:
            x = lax.select(jnp.broadcast_to(lax.axis_index(axis.lane_axis) >= 0, x.shape), x, x)
    return x
