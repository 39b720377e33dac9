"""The collectives over a logical axis, each as a collective over its lanes and then one over its devices.

A rule takes the logical axes in scope, the operand as one replica sees it, and the parameters of JAX's primitive.
It runs once per replica too: inside the ``vmap`` over lanes and the ``shard_map`` over devices, where the lane and
device axes are bound. Lanes come first, so that the wire between devices carries the least.

Padding lanes are exact copies of replica N - 1, and every rule keeps them so: they get what that replica gets. What
they contribute is masked, sliced off, or (where a copy cannot change the result, as in ``pmax``) harmless.

To add a collective, write one function with the parameters of its primitive under :func:`collective`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import chain
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replicax import _jax, _primitives
from replicax._blocks import (
    any_lane,
    block,
    exchanged,
    fetch,
    gather,
    lane_position,
    narrow,
    on_data,
    on_device,
    only_axis,
    own_lane,
    replica_index,
    size_of,
    take,
    unfolded,
    wide,
    with_zero,
)
from replicax._errors import CollectiveArgumentError
from replicax._exchange import (
    NOTHING,
    DeviceGroups,
    Groups,
    device_groups,
    exchange,
    groups,
    ranks,
    replica_at,
    segments,
)
from replicax._layout import LaneAxis, LogicalAxes, LogicalAxis
from replicax._reductions import MAX, MIN, SUM, Reduction, without_derivative

Names = Sequence[Hashable]


class Result(Enum):
    """What a collective's result is to the replicas along its axis."""

    EQUAL = auto()  #: the same for all
    OWN = auto()  #: each replica's own
    AS_GIVEN = auto()  #: the same for all if the operand is


ResultOf = Callable[[Mapping[str, Any], LogicalAxes], Result]


@dataclass(frozen=True)
class Collective:
    """How a collective is made of collectives over lanes and devices.

    Attributes:
        rule: ``rule(logical, *operands, **parameters)``.
        result: What the result is to the replicas, from the primitive's parameters and the logical axes.
    """

    rule: Callable[..., Any]
    result: ResultOf


#: The collectives that replicax has, by the name of JAX's primitive.
REGISTRY: dict[str, Collective] = {}

Rule = TypeVar("Rule", bound=Callable[..., Any])


def collective(*primitives: str, result: ResultOf, sums: bool = False) -> Callable[[Rule], Rule]:
    """Registers a rule for the primitives of these names; for ``sums`` see :func:`wide`."""

    def register(rule: Rule) -> Rule:
        REGISTRY.update(dict.fromkeys(primitives, Collective(_in_bytes(rule, 4 if sums else 2), result)))
        return rule

    return register


def _in_bytes(rule: Callable[..., Any], bits: int) -> Callable[..., Any]:
    """A rule for operands of any dtype: those of no more ``bits`` go as bytes, and so does what is made of them."""

    @functools.wraps(rule)
    def carrying(logical: LogicalAxes, *operands: Any, **params: Any) -> Any:
        out = rule(logical, *(wide(x, bits) for x in operands), **params)
        return narrow(out, operands[0].dtype, bits) if operands else out

    return carrying


def equal(params: Mapping[str, Any], logical: LogicalAxes) -> Result:
    """All replicas have the same result, and with groups each group its own."""
    del logical
    return Result.EQUAL if params.get("axis_index_groups") is None else Result.OWN


def own(params: Mapping[str, Any], logical: LogicalAxes) -> Result:
    """Every replica has a result of its own."""
    del params, logical
    return Result.OWN


def moves_data(rule: Rule) -> Rule:
    """A rule that only moves data moves the data of random keys, too."""

    @functools.wraps(rule)
    def moving(logical: LogicalAxes, x: Any, **params: Any) -> Any:
        return on_data(lambda data: rule(logical, data, **params), x)

    return moving  # type: ignore[return-value]


def keeps_constants(rule: Rule) -> Rule:
    """A rule that sums, or whose transpose does, in a form that XLA survives: see :func:`unfolded`."""

    @functools.wraps(rule)
    def unfolding(logical: LogicalAxes, x: Any, **params: Any) -> Any:
        return unfolded(rule(logical, unfolded(x), **params))

    return unfolding  # type: ignore[return-value]


def as_names(axis_name: Names | Hashable) -> Names:
    """The names of a collective that takes one or several."""
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def direct(axis: LogicalAxis | None) -> Hashable | None:
    """The mesh axis on which JAX's own collective is right as it is: one replica a device, and no padding."""
    return axis.device_axis if axis is not None and axis.lanes == 1 and not axis.padding else None


# ---------------------------------------------------------------------------------------------------------------
# Which replica


def is_replica(axis: LogicalAxis) -> jax.Array:
    """False in a padding lane."""
    return lane_position(axis) < axis.size


@collective("axis_index", result=own)
def axis_index(logical: LogicalAxes, *, axis_name: Names | Hashable) -> jax.Array:
    """The replica's index along one axis, or along several as one, the last varying fastest."""
    return replica_index(logical, as_names(axis_name))


def groups_of(primitive: str, axis_index_groups: Any, size: int, *, of_one_size: bool) -> Groups | None:
    """The groups as tables; None where all replicas are one group.

    Raises:
        CollectiveArgumentError: the groups do not cover all replicas once, or differ in size where they must not.
    """
    if axis_index_groups is None:
        return None
    if sorted(chain.from_iterable(axis_index_groups)) != list(range(size)):
        raise CollectiveArgumentError(
            f"{primitive}: axis_index_groups={_shown(axis_index_groups)} must hold each of the {size} replicas' "
            f"indices, 0 to {size - 1}, exactly once."
        )
    if of_one_size and len(set(map(len, axis_index_groups))) > 1:
        raise CollectiveArgumentError(
            f"{primitive}: the groups of axis_index_groups={_shown(axis_index_groups)} must be of one size, because "
            f"the result's shape depends on it. psum, pmax and pmin take groups of different sizes."
        )
    return groups([group for group in axis_index_groups if group], size)


def _shown(argument: Any) -> str:
    text = str([list(map(int, item)) for item in argument])
    return text if len(text) < 200 else f"{text[:197]}..."


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


@collective("psum", "psum_invariant", "psum_start", result=equal, sums=True)
@keeps_constants
def psum(logical: LogicalAxes, x: Any, *, axes: Names, axis_index_groups: Any = None) -> Any:
    """The sum over the replicas; padding lanes add nothing."""
    if axis_index_groups is not None:
        return reduce_groups(logical, x, axes, axis_index_groups, SUM)
    ours, positional, foreign = split_axes(logical, axes)
    x = SUM.local(x, positional) if positional else x
    names = physical(ours) + foreign
    return lax.psum(where_replica(ours, x), names) if names else x


@collective("pmax", result=equal)
def pmax(logical: LogicalAxes, x: Any, *, axes: Names, axis_index_groups: Any = None) -> Any:
    """The maximum over the replicas; a copy of a replica does not change it."""
    return extremum(logical, x, axes, axis_index_groups, MAX)


@collective("pmin", result=equal)
def pmin(logical: LogicalAxes, x: Any, *, axes: Names, axis_index_groups: Any = None) -> Any:
    """The minimum over the replicas; a copy of a replica does not change it."""
    return extremum(logical, x, axes, axis_index_groups, MIN)


def extremum(logical: LogicalAxes, x: Any, axes: Names, axis_index_groups: Any, which: Reduction) -> Any:
    """A maximum or minimum over the replicas."""
    if axis_index_groups is not None:
        return reduce_groups(logical, x, axes, axis_index_groups, which)
    ours, positional, foreign = split_axes(logical, axes)
    x = which.local(x, positional) if positional else x
    x = without_derivative(which.name, x) if ours or foreign else x
    names = physical(ours) + foreign
    lanes = tuple(name for name in names if isinstance(name, LaneAxis))
    between = tuple(name for name in names if name not in lanes)
    if lanes:
        x = which.named(x, lanes)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):  # which XLA's CPU backend reduces between devices by sums alone
        for name in between:
            x = which.local(lax.all_gather(x, name), axis=0)
        return x
    return which.between(x, between) if between else x


def reduce_groups(logical: LogicalAxes, x: Any, names: Names, axis_index_groups: Any, which: Reduction) -> Any:
    """A reduction over groups; hidden from XLA, which folds that of a constant as if all groups were the first."""
    hidden = lax.optimization_barrier
    x = x if which is SUM else without_derivative(which.name, x)
    return hidden(_reduce_groups(logical, hidden(x), names, axis_index_groups, which))


def _reduce_groups(logical: LogicalAxes, x: Any, names: Names, axis_index_groups: Any, which: Reduction) -> Any:
    """A reduction over groups of replicas, of any sizes: over the lanes that a device has of a group, then over the
    devices that share it, each sending one lane's bytes for a group.
    """
    split = groups_of(which.name, axis_index_groups, size_of(logical, names), of_one_size=False)
    assert split is not None
    axis = only_axis(logical, names)
    if axis is None or (which is not SUM and jnp.issubdtype(x.dtype, jnp.complexfloating)):
        members = split.padded_members()
        members = members if which is SUM else np.where(members == NOTHING, members[:, :1], members)
        return which.local(fetch(logical, names, x[None], members), axis=0)
    if (name := direct(axis)) is not None:
        return which.between(x, name, axis_index_groups=split.groups)
    plan = segments(axis, split)
    partial = over_segments(axis, block(axis, x), plan.lanes, plan.count, which)
    reduced, at = [], 0
    for start, stop, shared in plan.shared:
        reduced.append(which.between(partial[start:stop], axis.device_axis, axis_index_groups=shared))
        at = stop
    known = jnp.concatenate([*reduced, partial[at:]]) if at < plan.count or len(reduced) > 1 else reduced[0]
    return own_lane(axis, take(known, on_device(axis, plan.own)))


def over_segments(axis: LogicalAxis, lanes: Any, table: Any, count: int, which: Reduction) -> Any:
    """``(count, ...)``: a reduction over each segment of a device's lanes.

    Args:
        axis: The mapped axis.
        lanes: ``(lanes, ...)``.
        table: ``(devices, count · widest)``: the lanes of each segment, filled up with the number of lanes.
        count: The number of segments.
        which: The reduction.
    """
    fill = table == axis.lanes
    if which is SUM:
        lanes = with_zero(lanes) if fill.any() else lanes
    else:  # the same lane once more, and any lane where a device has no part in a segment
        by_segment = table.reshape(-1, table.shape[1] // count)
        first = np.minimum(by_segment[:, :1], axis.lanes - 1)
        table = np.where(by_segment == axis.lanes, first, by_segment).reshape(table.shape)
    taken = take(lanes, on_device(axis, table))
    taken = taken.reshape(count, table.shape[1] // count, *taken.shape[1:])
    return taken[:, 0] if taken.shape[1] == 1 else which.local(taken, axis=1)


# ---------------------------------------------------------------------------------------------------------------
# Permutations and broadcasts


def result_of_permutation(params: Mapping[str, Any], logical: LogicalAxes) -> Result:
    """Replicas that receive nothing get zeros; where all receive, they have the same if they had the same."""
    axis = only_axis(logical, as_names(params["axis_name"]))
    return Result.AS_GIVEN if axis is not None and len(params["perm"]) == axis.size else Result.OWN


@collective("ppermute", "ppermute_start", result=result_of_permutation)
@moves_data
def ppermute(logical: LogicalAxes, x: Any, *, axis_name: Names | Hashable, perm: Sequence[tuple[int, int]]) -> Any:
    """Another replica's operand, or zeros; only what changes device travels."""
    names = as_names(axis_name)
    sources = permutation(perm, size_of(logical, names))
    if (name := direct(only_axis(logical, names))) is not None:
        moved = [(int(source), r) for r, source in enumerate(sources) if source != NOTHING]
        if any(source != r for source, r in moved):
            return lax.ppermute(x, name, moved)
    return fetch(logical, names, x[None], sources[:, None])[0]


def permutation(perm: Sequence[tuple[int, int]], size: int) -> Any:
    """``(replicas,)``: from which replica each receives, or :data:`NOTHING`.

    As in JAX, a negative index counts from the end.

    Raises:
        CollectiveArgumentError: an index is out of range, or sends or receives twice.
    """
    try:
        flat = np.fromiter(map(operator.index, chain.from_iterable(perm)), np.int64)
        pairs = flat.reshape(-1, 2)
        whole = set(map(len, perm)) <= {2}
    except (OverflowError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CollectiveArgumentError(
            f"ppermute: perm={perm!r:.200} must be a list of pairs (source, destination) of replica indices."
        )
    sends, receives = (pairs % size).T
    out_of_range = list(pairs[((pairs < -size) | (pairs >= size)).any(1)])
    if out_of_range or len(np.unique(sends)) < len(pairs) or len(np.unique(receives)) < len(pairs):
        raise CollectiveArgumentError(
            f"ppermute: perm={_shown(perm)} must hold pairs (source, destination) of replica indices from 0 to "
            f"{size - 1}, with no source and no destination twice. "
            + (
                f"Out of range: {_shown(out_of_range)}. (Over several axes of which a vmap inside the mapped function "
                f"binds one, JAX has no ppermute: communicate over one axis after the other.)"
                if out_of_range
                else "To send to several, use all_gather."
            )
        )
    sources = np.full(size, NOTHING)
    sources[receives] = sends
    return sources


@collective("pbroadcast", result=equal)
@moves_data
def pbroadcast(logical: LogicalAxes, x: Any, *, axis_name: Names | Hashable, source: int) -> Any:
    """One replica's operand, for all: a sum in which the others are zero, as JAX defines it."""
    names = as_names(axis_name)
    size = size_of(logical, names)
    if not 0 <= source < size:
        raise CollectiveArgumentError(f"pbroadcast: source={source} must be a replica's index, from 0 to {size - 1}.")
    axis = only_axis(logical, names)
    if axis is None:
        return gather(logical, names, x)[source]
    device, lane = divmod(source, axis.lanes)
    x = block(axis, x)[lane]
    if axis.device_axis is None:
        return x
    here = lax.axis_index(axis.device_axis) == device
    sent = lax.select(jnp.broadcast_to(here, x.shape), x, jnp.zeros_like(x))
    return lax.psum(sent, axis.device_axis).astype(x.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Gathers and scatters


@collective("all_gather", "all_gather_invariant", "all_gather_start", result=equal)
@moves_data
@keeps_constants
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
    """The group's operands along a new dimension, or (tiled) along an old one; padding is cut off."""
    names = as_names(axis_name)
    split = groups_of("all_gather", axis_index_groups, size_of(logical, names), of_one_size=True)
    axis = only_axis(logical, names)
    if (name := direct(axis)) is not None:
        together = split and split.groups
        x = x if tiled else lax.expand_dims(x, [all_gather_dimension])  # the transpose of an untiled one fails in vmap
        return lax.all_gather(x, name, axis=all_gather_dimension, tiled=True, axis_index_groups=together)
    if split is None:
        gathered = gather(logical, names, x)
    elif axis is not None and axis.device_axis is not None and (whole := device_groups(axis, split)) is not None:
        gathered = lax.all_gather(block(axis, x)[None], axis.device_axis, axis_index_groups=whole, tiled=True)
        gathered = gathered.reshape(axis_size, *x.shape)
    else:
        gathered = fetch(logical, names, x[None], split.members)
    return joined(gathered, all_gather_dimension) if tiled else jnp.moveaxis(gathered, 0, all_gather_dimension)


def joined(x: Any, dimension: int) -> Any:
    """``x`` with its first dimension laid out along another of the rest."""
    x = jnp.moveaxis(x, 0, dimension)
    return x.reshape(*x.shape[:dimension], x.shape[dimension] * x.shape[dimension + 1], *x.shape[dimension + 2 :])


def chunks(x: Any, dimension: int, count: int) -> Any:
    """``x`` cut along a dimension into so many pieces, which are a new first dimension."""
    x = x.reshape(*x.shape[:dimension], count, x.shape[dimension] // count, *x.shape[dimension + 1 :])
    return jnp.moveaxis(x, dimension, 0)


@collective("reduce_scatter", "reduce_scatter_start", result=own, sums=True)
@keeps_constants
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
    """Of the sum over the group, this replica's slice along a dimension: the transpose of ``all_gather``.

    Raises:
        CollectiveArgumentError: the operand is of truth values, which JAX has no sum of here.
    """
    if x.dtype == bool:
        raise CollectiveArgumentError("psum_scatter: JAX has no sum of bool here. Convert the operand to int32 first.")
    names, scatter_dimension = as_names(axis_name), scatter_dimension % x.ndim
    split = groups_of("psum_scatter", axis_index_groups, size_of(logical, names), of_one_size=True)
    axis = only_axis(logical, names)
    if (name := direct(axis)) is not None:
        together = split and split.groups
        part = lax.psum_scatter(x, name, scatter_dimension=scatter_dimension, tiled=True, axis_index_groups=together)
        return part if tiled else lax.squeeze(part, [scatter_dimension])  # untiled, JAX has no right rule for vmap
    x = chunks(x, scatter_dimension, axis_size) if tiled else jnp.moveaxis(x, scatter_dimension, 0)
    if axis is not None:
        whole = device_groups(axis, split) if split else None
        if split is None or whole is not None:
            return scatter_sum(axis, x, whole)
        return scatter_sum_over_segments(axis, x, split)
    if split is None:
        return scatter_sum_over(logical, names, x)
    items = split.members * axis_size + split.rank[:, None]
    return SUM.local(fetch(logical, names, x, items), 0)


def scatter_sum(axis: LogicalAxis, x: Any, whole: DeviceGroups | None) -> Any:
    """Of the sum over the replicas of ``x``, whose first dimension is theirs, this replica's element.

    The replicas are all, or those of the device's group of whole devices.
    """
    x = where_replica([axis], x)
    if axis.lane_axis is not None:
        x = lax.psum(x, axis.lane_axis)
    if axis.padding:  # A padding lane gets what the replica gets that it copies.
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (axis.padding, *x.shape[1:]))])
    x = x.reshape(x.shape[0] // axis.lanes, axis.lanes, *x.shape[1:])
    if axis.device_axis is None:
        return own_lane(axis, x[0])
    return own_lane(axis, lax.psum_scatter(x, axis.device_axis, axis_index_groups=whole))


def scatter_sum_over(logical: LogicalAxes, names: Names, x: Any) -> Any:
    """The same along several axes as one."""
    sizes = [size_of(logical, [name]) for name in names]
    x = x.reshape(*sizes, *x.shape[1:])
    for name in names:
        x = scatter_sum(logical[name], x, None) if name in logical else lax.psum_scatter(x, name)
    return x


def scatter_sum_over_segments(axis: LogicalAxis, x: Any, split: Groups) -> Any:
    """The same for groups that share devices: a device sends one sum for each replica of its lanes' groups."""
    plan, size = segments(axis, split), x.shape[0]
    sums = over_segments(axis, block(axis, x), plan.lanes, plan.count, SUM)  # (segments, group, ...)
    items = sums.reshape(plan.count * size, *sums.shape[2:])
    contributing = np.flatnonzero(np.arange(axis.devices) * axis.lanes < axis.size)
    group, source = np.nonzero((plan.of[contributing] != NOTHING).T)
    counts = np.bincount(group, minlength=len(split.groups))
    widest, sources = int(counts.max()), contributing[source]
    sums_of = np.full((len(counts), widest), NOTHING)
    sums_of[group, ranks(counts)] = sources * plan.count + plan.of[sources, group]
    replica = replica_at(axis)
    wants = sums_of[split.of[replica]]
    wants = np.where(wants == NOTHING, NOTHING, wants * size + split.rank[replica][:, None])
    found = exchanged(axis, items, exchange(wants.reshape(axis.devices, -1), plan.count * size))
    return own_lane(axis, SUM.local(found.reshape(axis.lanes, widest, *items.shape[1:]), 1))


# ---------------------------------------------------------------------------------------------------------------
# All to all


@collective("all_to_all", "all_to_all_start", result=own)
@moves_data
def all_to_all(
    logical: LogicalAxes,
    x: Any,
    *,
    axis_name: Names | Hashable,
    split_axis: int,
    concat_axis: int,
    axis_index_groups: Any,
    tiled: bool,
) -> Any:
    """The group's pieces for this replica, cut along one dimension and laid out along another.

    JAX's primitive is always tiled; where the user's call is not, JAX adds and removes the dimensions around it.

    Raises:
        CollectiveArgumentError: an axis counts from the end, and JAX 0.10 has added dimensions in the wrong place.
    """
    if not tiled and min(split_axis, concat_axis) < 0:
        raise CollectiveArgumentError(
            "all_to_all: split_axis or concat_axis counts from the end, which this release of JAX gets wrong unless "
            "tiled=True. Count from the front."
        )
    names, split_axis, concat_axis = as_names(axis_name), split_axis % x.ndim, concat_axis % x.ndim
    size = size_of(logical, names)
    split = groups_of("all_to_all", axis_index_groups, size, of_one_size=True)
    axis = only_axis(logical, names)
    if (name := direct(axis)) is not None:
        return all_to_all_devices(x, name, split_axis, concat_axis, split.groups if split else None)
    size = size if split is None else len(split.groups[0])
    return joined(pieces(logical, names, chunks(x, split_axis, size), split), concat_axis)


def pieces(logical: LogicalAxes, names: Names, x: Any, split: Groups | None) -> Any:
    """``(group, ...)``: what each member has for this replica.

    Args:
        logical: The mapped axes.
        names: The axes of the collective.
        x: ``(group, ...)``: what this replica has for each member.
        split: The groups, or None for one.
    """
    axis = only_axis(logical, names)
    if axis is not None:
        whole = device_groups(axis, split) if split else None
        if split is None or whole is not None:
            return pieces_between_devices(axis, x, whole)
    split = split or groups([range(x.shape[0])], x.shape[0])
    return fetch(logical, names, x, split.members * x.shape[0] + split.rank[:, None])


def pieces_between_devices(axis: LogicalAxis, x: Any, whole: DeviceGroups | None) -> Any:
    """The same for all replicas, or for groups of whole devices: one exchange of lanes' pieces between devices."""
    size, rest = x.shape[0], x.shape[1:]
    if axis.padding:  # A padding lane gets what the replica gets that it copies.
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (axis.padding, *rest))])
    devices = x.shape[0] // axis.lanes
    x = block(axis, x).reshape(axis.lanes, devices, axis.lanes, *rest)  # from lanes, to devices, to lanes
    if devices > 1:
        x = all_to_all_devices(x, axis.device_axis, 1, 1, whole)
    x = jnp.moveaxis(x, 2, 0).swapaxes(1, 2)  # to lanes, from devices, from lanes
    return own_lane(axis, x.reshape(axis.lanes, devices * axis.lanes, *rest)[:, :size])


def all_to_all_devices(x: Any, name: Hashable, split_axis: int, concat_axis: int, split: DeviceGroups | None) -> Any:
    """JAX's collective over devices, or over groups of them."""
    if split is None:
        return lax.all_to_all(x, name, split_axis, concat_axis, tiled=True)
    return _primitives.grouped_all_to_all(x, name, split_axis, concat_axis, split)


@collective("ragged_all_to_all", result=own)
def ragged_all_to_all(
    logical: LogicalAxes,
    operand: Any,
    output: Any,
    input_offsets: Any,
    send_sizes: Any,
    output_offsets: Any,
    recv_sizes: Any,
    *,
    axis_name: Names | Hashable,
    axis_index_groups: Any,
) -> Any:
    """``output`` with the rows that the group sends this replica.

    How many rows go where is known only when the program runs, so that every replica's whole operand goes to each
    device of its group, and each replica picks its rows. A later slice covers an earlier one, as in JAX's definition.
    """
    del recv_sizes  # what the senders call send_sizes
    names = as_names(axis_name)
    size = size_of(logical, names)
    split = groups_of("ragged_all_to_all", axis_index_groups, size, of_one_size=True)
    size, rows = size if split is None else len(split.groups[0]), operand.shape[0]
    if input_offsets.shape[0] % size:
        raise CollectiveArgumentError(
            f"ragged_all_to_all: input_offsets has {input_offsets.shape[0]} elements, which {size} replicas do not "
            f"divide. It needs as many slices for each replica."
        )

    def from_all(x: Any) -> Any:
        x = jnp.asarray(x)
        params = {"axis_name": names, "axis_size": size, "axis_index_groups": axis_index_groups}
        return all_gather(logical, x, all_gather_dimension=0, tiled=False, **params)

    me = replica_index(logical, names)
    me = me if split is None else jnp.asarray(split.rank, jnp.int32)[me]
    table = jnp.stack([from_all(x) for x in (input_offsets, send_sizes, output_offsets)])
    mine = lax.dynamic_index_in_dim(table.reshape(3, size, size, -1), me, 2, keepdims=False)  # (3, from, slices)
    sender = jnp.repeat(jnp.arange(size), mine.shape[2])[:, None]
    start, length, target = mine.reshape(3, -1, 1)
    row = jnp.arange(output.shape[0])
    covers = (target <= row) & (row < target + length)  # (slices, rows of the output)
    last = len(covers) - 1 - jnp.argmax(covers[::-1], 0)
    source = jnp.take_along_axis(sender * rows + start + row - target, last[None], 0)[0]
    received = from_all(operand).reshape(size * rows, *operand.shape[1:])
    received = received[jnp.clip(source, 0, max(size * rows - 1, 0))] if rows else output
    covered = jnp.broadcast_to(covers.any(0).reshape(-1, *[1] * (output.ndim - 1)), output.shape)
    return lax.select(covered, received.astype(output.dtype), output)


# ---------------------------------------------------------------------------------------------------------------
# For loops and branches


def any_replica(axes: Sequence[LogicalAxis], x: Any) -> Any:
    """Whether a truth value holds in any replica."""
    names = physical(axes)
    return lax.pmax(x.astype(jnp.int32), names) > 0 if names else x


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def equal_value(axis: LogicalAxis, x: Any) -> Any:
    """``x``, which is equal in all replicas; its derivative falls to all of them in equal parts.

    ``any_lane`` is enough where the sum of the parts is all that counts, which a reverse rule of the user's may not
    heed.
    """
    return any_lane(axis, x)


def _equal_tangent(axis: LogicalAxis, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    with _jax.axis_env(dict(axis.physical)):  # JAX calls this when vmap and shard_map have long returned
        total = lax.psum(where_replica([axis], tangents[0]), physical([axis]))
        return any_lane(axis, primals[0]), (total / axis.size).astype(total.dtype)


equal_value.defjvp(_equal_tangent)
