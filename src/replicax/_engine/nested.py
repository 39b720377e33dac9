"""Records a nested map as one equation, and runs it on the devices that the layout reserves for nested maps.

In the program of an outer replica, all devices of a nested map run the same program on equal arrays. Inside the nested
map, each device runs its own lanes. So :func:`enter` slices an argument, and :func:`leave` returns a split result as a
:class:`DeviceShard`. A shard stays split if it is an argument of another nested map, or a result of the program. Any
other use gathers the shard first. This holds for maps at any depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.blocks import on_data, real_rows
from replicax._engine.callbacks import refuse_ordered
from replicax._engine.levels import OneReplica, over_lanes, pad_rows
from replicax._engine.outputs import Outputs, check_outputs
from replicax._engine.replica import Replica
from replicax._engine.varying import NOWHERE, Analysis
from replicax._jax import Equation, Jaxpr
from replicax._layout.axes import match_out_axes
from replicax._layout.layout import LogicalAxis, Scope
from replicax._typing import Array, ArrayLike, Atom, Axes, PyTreeDef

# ---------------------------------------------------------------------------------------------------------------
# Parts of arrays


@dataclass(frozen=True)
class Split:
    """A dimension of an array that is split over the devices of a nested map.

    Attributes:
        dim: The dimension.
        axis: The mapped axis of the nested map.
    """

    dim: int
    axis: LogicalAxis

    def has_rows_of(self, other: Split) -> bool:
        """Whether both splits give each device the same rows. The axis names may differ."""
        return (self.dim, self.axis.device_axis, self.axis.placement) == (
            other.dim,
            other.axis.device_axis,
            other.axis.placement,
        )

    def outside(self, dim: int | None) -> Split:
        """Returns this split of one replica's array as a split of the stacked array with mapped axis ``dim``."""
        return Split(self.dim + (dim is not None and dim <= self.dim), self.axis)

    def inside(self, dim: int | None) -> Split:
        """Returns this split of the stacked array with mapped axis ``dim`` as a split of one replica's array."""
        return Split(self.dim - (dim is not None and dim < self.dim), self.axis)


@dataclass(frozen=True)
class DeviceShard:
    """One device's part of an array.

    Attributes:
        value: The part.
        splits: The split dimensions, each over a different mesh axis.
    """

    value: Array
    splits: tuple[Split, ...]

    def join(self, *splits: Split) -> DeviceShard:
        """Gathers the array along ``splits``. The result is equal on all devices along the mesh axes of the splits."""
        value = self.value
        for split in splits:
            value = on_data(functools.partial(_joined_along, split), value)
        return DeviceShard(value, tuple(split for split in self.splits if split not in splits))

    def only(self, kept: Sequence[Split]) -> Array:
        """Gathers the array along all splits except ``kept``."""
        return self.join(*(split for split in self.splits if not any(map(split.has_rows_of, kept)))).value


def _joined_along(split: Split, x: jax.Array) -> jax.Array:
    rows = primitives.join_parts(x, split.axis.device_axis, split.dim)
    return real_rows(rows, split.dim, split.axis.placement)


def collect_result(x: ArrayLike | DeviceShard) -> ArrayLike:
    """Gathers the full array if ``x`` is a :class:`DeviceShard`, else returns ``x``."""
    return x.only(()) if isinstance(x, DeviceShard) else x


def as_shard(x: Array, splits: tuple[Split, ...]) -> Array | DeviceShard:
    """Returns ``x`` as a :class:`DeviceShard` if it has splits, else ``x``."""
    return DeviceShard(x, splits) if splits else x


# ---------------------------------------------------------------------------------------------------------------
# Arguments and results of a nested map


def enter(axis: LogicalAxis, x: Array | DeviceShard, dim: int | None) -> tuple[Array, tuple[Split, ...]]:
    """Returns this device's lanes of an argument, and the splits that remain in the array of each replica.

    Args:
        axis: The mapped axis of the nested map.
        x: The argument, or one device's part of it.
        dim: The mapped dimension; None if every replica gets the full array.
    """
    part = x if isinstance(x, DeviceShard) else DeviceShard(x, ())
    own = None if dim is None else Split(dim, axis)
    found = next((split for split in part.splits if own is not None and split.has_rows_of(own)), None)
    if found is None:
        part = part.join(*(s for s in part.splits if s.dim == dim or s.axis.device_axis == axis.device_axis))
        value = _own_block(axis, part.value, dim)
    else:
        value = part.value
    return value, tuple(split.inside(dim) for split in part.splits if split is not found)


def _own_block(axis: LogicalAxis, x: Array, dim: int | None) -> Array:
    if axis.device_axis is None:
        return x
    if dim is None:
        return on_data(lambda x: primitives.share(x, axis.device_axis), x)
    return on_data(lambda x: primitives.own_part(x, axis.device_axis, dim), pad_rows(x, dim, axis.placement))


def leave(axis: LogicalAxis, y: Array, dim: int | None, splits: Iterable[Split]) -> Array | DeviceShard:
    """Converts a result of a nested map to a value of the outer program.

    Args:
        axis: The mapped axis of the nested map.
        y: The result of this device's lanes; the value of all replicas if ``dim`` is None.
        dim: The mapped dimension of the result.
        splits: The splits of each replica's result.
    """
    if dim is None:
        return y if axis.device_axis is None else on_data(lambda y: primitives.equal_parts(y, axis.device_axis), y)
    own = () if axis.device_axis is None else (Split(dim, axis),)
    return as_shard(y, (*(split.outside(dim) for split in splits), *own))


def run_inside(
    axis: LogicalAxis,
    one_replica: Callable[[Sequence[Array | DeviceShard]], Sequence[Array | DeviceShard]],
    args: Sequence[Array | DeviceShard],
    in_axes: Axes,
    out_axes: Axes,
) -> list[Array | DeviceShard]:
    """Runs a nested map.

    Args:
        axis: The mapped axis of the nested map.
        one_replica: Function from the arguments of one replica to its results. Both may be device shards.
        args: The arguments, which may be device shards.
        in_axes: The mapped axis of each argument.
        out_axes: The mapped axis of each result. A result without a mapped axis is a full array.
    """
    entered = [enter(axis, x, a) for x, a in zip(args, in_axes, strict=True)]
    made: list[tuple[Split, ...]] = []

    def one_lane(*own: Array) -> tuple[Array, ...]:
        results = one_replica([as_shard(x, splits) for x, (_, splits) in zip(own, entered, strict=True)])
        made[:] = [y.splits if isinstance(y, DeviceShard) else () for y in results]
        return tuple(y.value if isinstance(y, DeviceShard) else y for y in results)

    lanes: OneReplica = over_lanes(one_lane, axis, in_axes, out_axes)
    results = lanes(*(value for value, _ in entered))
    return [leave(axis, y, a, splits) for y, a, splits in zip(results, out_axes, made, strict=True)]


# ---------------------------------------------------------------------------------------------------------------
# Arguments and results of a program that stay split. Splits over a padded axis do not: JAX's shardings are even.


def splits_taken(jaxpr: Jaxpr, scope: Scope) -> list[tuple[Split, ...]]:
    """Returns the splits of each argument of a program: those that all its uses take. Only nested maps take splits."""
    opened = inline_jits_with_maps(jaxpr, scope)
    wanted: dict[Atom, list[frozenset[Split]]] = {var: [] for var in opened.invars}
    for eqn in opened.eqns:
        wants = _wants(eqn, scope) if primitives.is_nested_map(eqn) else [frozenset[Split]()] * len(eqn.invars)
        for atom, splits in zip(eqn.invars, wants, strict=True):
            if not _jax.is_literal(atom) and atom in wanted:
                wanted[atom].append(splits)
    for atom in opened.outvars:
        if not _jax.is_literal(atom) and atom in wanted:
            wanted[atom].append(frozenset())
    return [tuple(frozenset.intersection(*uses)) if uses else () for uses in wanted.values()]


def _wants(eqn: Equation, scope: Scope) -> list[frozenset[Split]]:
    inside, (jaxpr,) = scope.enter(eqn.params["name"], eqn.params["size"]), _jax.sub_jaxprs(eqn)
    return [
        frozenset(_across(inside.axes[-1], dim, splits))
        for dim, splits in zip(eqn.params["in_axes"], splits_taken(jaxpr, inside), strict=True)
    ]


def splits_made(jaxpr: Jaxpr, scope: Scope) -> list[tuple[Split, ...]]:
    """Returns the splits of each result of a program. A result that is not from a nested map has none."""
    opened = inline_jits_with_maps(jaxpr, scope)
    made: dict[Atom, tuple[Split, ...]] = {}
    for eqn in opened.eqns:
        if primitives.is_nested_map(eqn):
            inside, (inner,) = scope.enter(eqn.params["name"], eqn.params["size"]), _jax.sub_jaxprs(eqn)
            each = zip(eqn.params["out_axes"], splits_made(inner, inside), strict=True)
            splits = [tuple(_across(inside.axes[-1], dim, s)) if dim is not None else () for dim, s in each]
            made.update(zip(eqn.outvars, splits, strict=True))
    return [() if _jax.is_literal(atom) else made.get(atom, ()) for atom in opened.outvars]


def _across(axis: LogicalAxis, dim: int | None, splits: Iterable[Split]) -> Iterable[Split]:
    """Yields the splits of the stacked array of all replicas: those of one replica's array, and that of the map."""
    yield from (split.outside(dim) for split in splits)
    if dim is not None and axis.device_axis is not None and not axis.padding:
        yield Split(dim, axis)


def inline_jits_with_maps(jaxpr: Jaxpr, scope: Scope) -> Jaxpr:
    """Returns the open jaxpr. Those of the user's ``jit`` calls that contain a nested map are inlined."""
    return _jax.inline(jaxpr, _hides_maps) if scope.levels else _jax.body(jaxpr)


def _hides_maps(eqn: Equation) -> bool:
    return eqn.primitive.name == "jit" and primitives.NESTED_MAP in _jax.primitives(eqn.params["jaxpr"])


# ---------------------------------------------------------------------------------------------------------------
# Recording a nested map while the outer replica is traced


@dataclass(frozen=True, eq=False)
class Recorded:
    """A nested map, recorded in the program of an outer replica. The outer map lowers it.

    Attributes:
        closed: The closed-over arrays that ``staged`` takes after the argument leaves.
        out_tree: The structure of the result.
        staged: The function from argument leaves and closed-over arrays to result leaves.
    """

    closed: tuple[Array, ...]
    out_tree: PyTreeDef
    staged: Callable[..., Sequence[Array]]

    @property
    def reusable(self) -> bool:
        """Whether other calls may reuse it, because it closes over no tracer of an enclosing transformation."""
        return not any(isinstance(x, jax.core.Tracer) for x in self.closed)


def record(replica: Replica, axis: LogicalAxis, in_axes: Axes, outputs: Outputs, name: str) -> Recorded:
    """Records a map as one equation of the enclosing map's program.

    Args:
        replica: The traced program of one replica.
        axis: The mapped axis.
        in_axes: The mapped axis of each argument leaf.
        outputs: ``out_axes``, and the policy for results without a mapped axis.
        name: The name of the user's function.

    Raises:
        AxisSpecError: ``out_axes`` does not fit the result.
        DivergentOutputError: ``out_axes`` is None for a result that may differ between replicas.
        OrderedCallbackError: The program contains a callback with ``ordered=True``.
    """
    refuse_ordered(replica.jaxpr, name)
    out_axes, out_tree = match_out_axes(outputs.axes, replica.out, axis.size)
    varying = [NOWHERE if a is None else frozenset({axis}) for a in in_axes]
    where = Analysis(Scope([axis])).results(replica.jaxpr, varying) if None in out_axes else [NOWHERE] * len(out_axes)
    check_outputs(outputs.policy, replica, out_axes, where, axis)
    first = [a is None and axis in varies for a, varies in zip(out_axes, where, strict=True)]
    all_out_axes = [0 if f else a for a, f in zip(out_axes, first, strict=True)]
    with _jax.axis_env({axis.name: axis.size}):
        jaxpr = _jax.without_constants(replica.jaxpr)

    def staged(*args: ArrayLike) -> list[Array]:
        leaves, consts = args[: len(in_axes)], args[len(in_axes) :]
        axes = (*[None] * len(consts), *in_axes)
        results = primitives.nested_map(
            jaxpr, [*consts, *leaves], name=axis.name, size=axis.size, in_axes=axes, out_axes=all_out_axes
        )
        return [y[0] if f else y for y, f in zip(results, first, strict=True)]

    return Recorded(tuple(replica.consts), out_tree, staged)
