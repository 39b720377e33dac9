"""From the program of one replica to one function of all of them, on a mesh of devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jax.tree_util import keystr

from replicax import _jax
from replicax._engine.blocks import real_rows, unfolded
from replicax._engine.callbacks import guard, raise_after, refuse_ordered
from replicax._engine.levels import OneReplica, Part, comes_in_parts, equal_on, over_lanes, own_on
from replicax._engine.primitives import mapped as _primitives
from replicax._engine.replica import Replica
from replicax._engine.rewrite import Rewriter, one_value
from replicax._engine.spec import Inputs, OutputPolicy, Outputs, ProgramSpec
from replicax._engine.varying import NOWHERE, Analysis, Varying
from replicax._layout.axes import match_out_axes
from replicax._layout.layout import Layout, LogicalAxis, Scope, Splits
from replicax._messages import report
from replicax.errors import DivergentOutputError, UnsupportedDtypeError


def lower(replica: Replica, layout: Layout, inputs: Inputs, outputs: Outputs, name: str) -> ProgramSpec:
    """Lowers the program of one replica to a function of all of them.

    Raises:
        AxisSpecError: ``out_axes`` does not fit the result.
        DivergentOutputError: ``out_axes`` is None where the result differs between replicas.
        UnsupportedCollectiveError: the program communicates in a way that replicax has no rule for.
        OrderedCallbackError: the program calls back into Python with ``ordered=True``.
        UnsupportedDtypeError: the program takes or returns numbers of two bits, and has to be padded.
    """
    refuse_ordered(replica.jaxpr, name)
    _refuse_two_bits([x.dtype for x in (*inputs.types, *jax.tree.leaves(replica.out))], layout)
    out_axes, out_tree = match_out_axes(outputs.axes, replica.out, layout.size)
    rewriter = Rewriter(layout.scope)
    varying = [NOWHERE if a is None else frozenset({layout.axis}) for a in inputs.axes]
    if outputs.policy is OutputPolicy.REQUIRE_EQUAL and None in out_axes:
        where = rewriter.analysis.results(replica.jaxpr, varying)
        _check_broadcast_results(replica, out_axes, where, layout.axis)
    body = _body(replica, layout, varying, out_axes, name, outputs.policy)
    taken = Inputs((*inputs.types, *body.closed), (*inputs.axes, *[None] * len(body.closed)), inputs.donated)
    in_splits = (*map(_split, body.in_places, inputs.axes), *[()] * len(body.closed))
    out_splits = tuple(map(_split, body.out_places, body.out_axes))[: len(out_axes)]
    one_device = over_lanes(body.one_replica(rewriter), layout.axis, taken.axes, body.out_axes)
    function = _over_devices(
        _raising(one_device) if body.guarded else one_device,
        layout,
        _jax.described_source(replica.jaxpr, _advice(name, layout)),
        list(map(layout.spec, taken.axes, in_splits)),
        list(map(layout.spec, out_axes, out_splits)),
        out_axes,
    )
    function.__name__ = function.__qualname__ = name
    return ProgramSpec(
        name=name,
        layout=layout,
        replica=replica,
        inputs=taken,
        out_axes=tuple(out_axes),
        out_tree=out_tree,
        in_splits=in_splits,
        out_splits=out_splits,
        function=function,
        closed=body.closed,
        one_mesh=_jax.needs_one_mesh(replica.primitives | body.in_rules),
        policy=outputs.policy,
    )


@dataclass(frozen=True)
class _Body:
    """What one replica runs.

    Attributes:
        replica: The program, its callbacks guarded.
        guarded: Whether it has any; then its last result is the number of a failure.
        varying: Where each argument varies.
        out_axes: The mapped axis of each result.
        in_places: Where each argument has the axis of a map inside, split over devices.
        out_places: The same of each result.
        passed: Which of the closed-over arrays are passed, after the arguments.
        in_rules: The names of the primitives in forward rules that call back.
        by_replica: Whether it matters which replica gets which part of a cotangent of an equal result.
    """

    replica: Replica
    guarded: bool
    varying: Sequence[Varying]
    out_axes: Sequence[int | None]
    in_places: Sequence[_Place]
    out_places: Sequence[_Place]
    passed: Sequence[int]
    in_rules: frozenset[str]
    by_replica: bool

    @property
    def closed(self) -> tuple[Any, ...]:
        """The closed-over arrays that are passed."""
        return tuple(self.replica.consts[k] for k in self.passed)

    def one_replica(self, rewriter: Rewriter) -> OneReplica:
        """The program as a function of the arguments and the closed-over arrays that are passed."""
        axis = rewriter.scope.axes[-1]

        def one_replica(*args: Any) -> tuple[Any, ...]:
            consts = list(self.replica.consts)
            for k, value in zip(self.passed, args[len(self.varying) :], strict=True):
                consts[k] = value
            own = [x if where else unfolded(x) for x, where in zip(args, self.varying, strict=False)]
            places = zip(own, self.in_places, strict=True)
            own = [x if place is None else Part(x, place[1], place[0]) for x, place in places]
            results = rewriter.run_in_parts(self.replica.jaxpr, consts, own, self.varying)
            results = [_at(y, place) for y, place in zip(results, self.out_places, strict=True)]
            return tuple(
                one_value(axis, y, by_replica=self.by_replica) if a is None else y
                for y, a in zip(results, self.out_axes, strict=True)
            )

        return one_replica


def _body(
    replica: Replica,
    layout: Layout,
    varying: Sequence[Varying],
    out_axes: Sequence[int | None],
    name: str,
    policy: OutputPolicy,
) -> _Body:
    running, guarded = replica, guard(replica.jaxpr, replica.consts, layout.axis, name)
    if guarded is not None:
        running = dataclasses.replace(replica, jaxpr=guarded.jaxpr, consts=guarded.consts)
    every = [*out_axes, *[None] * (guarded is not None)]
    in_places, out_places = _places(running.jaxpr, layout, every)
    return _Body(
        replica=running,
        guarded=guarded is not None,
        varying=varying,
        out_axes=every,
        in_places=in_places,
        out_places=out_places,
        passed=[k for k, const in enumerate(running.consts) if _has_to_be_passed(const)],
        in_rules=frozenset() if guarded is None else frozenset(guarded.in_rules),
        by_replica="custom_vjp_call" in replica.primitives or policy is OutputPolicy.TAKE_FIRST,
    )


@dataclass(frozen=True, eq=False)
class Recorded:
    """A map inside a replica of another, to be lowered with it.

    Attributes:
        closed: The arrays that it takes after its arguments.
        out_tree: The structure of the result.
        staged: From the argument leaves and these to the result leaves.
    """

    closed: tuple[Any, ...]
    out_tree: Any
    staged: Callable[..., Sequence[Any]]

    @property
    def reusable(self) -> bool:
        """Whether it may serve another call: it closes over no value of an enclosing transformation."""
        return not any(isinstance(x, jax.core.Tracer) for x in self.closed)


def record(replica: Replica, axis: LogicalAxis, in_axes: Sequence[int | None], outputs: Outputs, name: str) -> Recorded:
    """A map as one equation of the enclosing map's program.

    Raises:
        AxisSpecError: as :func:`lower`.
        DivergentOutputError: likewise.
    """
    refuse_ordered(replica.jaxpr, name)
    flat_out_axes, out_tree = match_out_axes(outputs.axes, replica.out, axis.size)
    first = [False] * len(flat_out_axes)
    if None in flat_out_axes:
        varying = [NOWHERE if a is None else frozenset({axis}) for a in in_axes]
        where = Analysis(Scope([axis])).results(replica.jaxpr, varying)
        if outputs.policy is OutputPolicy.REQUIRE_EQUAL:
            _check_broadcast_results(replica, flat_out_axes, where, axis)
        first = [a is None and axis in varies for a, varies in zip(flat_out_axes, where, strict=True)]
    all_out_axes = [0 if f else a for a, f in zip(flat_out_axes, first, strict=True)]
    with _jax.axis_env({axis.name: axis.size}):
        jaxpr = _jax.without_constants(replica.jaxpr)

    def staged(*args: Any) -> list[Any]:
        leaves, consts = args[: len(in_axes)], args[len(in_axes) :]
        axes = (*[None] * len(consts), *in_axes)
        results = _primitives.nested_map(
            jaxpr, [*consts, *leaves], name=axis.name, size=axis.size, in_axes=axes, out_axes=all_out_axes
        )
        return [y[0] if f else y for y, f in zip(results, first, strict=True)]

    return Recorded(tuple(replica.consts), out_tree, staged)


def _at(result: Any, place: _Place) -> Any:
    """A result where it is to be: a device's part of it, or the whole."""
    if not isinstance(result, Part):
        return result
    return result.join() if place is None else result.value


def _has_to_be_passed(const: Any) -> bool:
    """Whether a closed-over array belongs to an enclosing trace, or to a mesh of its own."""
    if isinstance(const, jax.core.Tracer):
        return True
    return isinstance(const, jax.Array) and not isinstance(const.sharding, jax.sharding.SingleDeviceSharding)


def _refuse_two_bits(dtypes: Sequence[Any], layout: Layout) -> None:
    """XLA overruns its buffers where it concatenates or cuts split arrays of two bits. Workaround: two_bits_padded."""
    found = sorted({dtype.name for dtype in dtypes if dtype.name in ("int2", "uint2")})
    if found and layout.axis.padding:
        raise UnsupportedDtypeError(
            f"{layout.size} replicas of a function that takes or returns {' and '.join(found)}, on "
            f"{layout.axis.devices} devices of {layout.axis.lanes} each: XLA cannot pad arrays of two bits. Convert "
            f"them to int4 or int8, as in x.astype('int8'), or map over a number of replicas that the devices divide."
        )


#: Where a value has the axis of a map inside, of which each device has its part alone; None for a whole value.
_Place = tuple[int, LogicalAxis] | None


def _places(
    jaxpr: _jax.Jaxpr, layout: Layout, out_axes: Sequence[int | None]
) -> tuple[Sequence[_Place], Sequence[_Place]]:
    """Which arguments go to maps inside and nowhere else, and which results come from them.

    Each device is sent its own part of such an argument, and keeps its part of such a result.
    """
    jaxpr = _jax.body(jaxpr)
    made: dict[Any, _Place] = {}
    uses: dict[Any, set[_Place]] = {var: set() for var in jaxpr.invars}
    for eqn in jaxpr.eqns:
        inner = layout.scope.enter(eqn.params["name"], eqn.params["size"]) if _primitives.is_nested_map(eqn) else None
        axis = inner.axes[-1] if inner and comes_in_parts(inner.axes[-1]) and not layout.axis.padding else None
        for k, atom in enumerate(eqn.invars):
            dim = eqn.params["in_axes"][k] if axis else None
            if not _jax.is_literal(atom) and atom in uses:
                uses[atom].add(None if axis is None or dim is None else (dim, axis))
        if axis:
            dims = zip(eqn.outvars, eqn.params["out_axes"], strict=True)
            made.update({var: (dim, axis) for var, dim in dims if dim is not None})
    for atom in jaxpr.outvars:
        if not _jax.is_literal(atom) and atom in uses:
            uses[atom].add(None)
    args = [next(iter(places)) if len(places) == 1 else None for places in uses.values()]
    results = [
        None if _jax.is_literal(atom) or axis is None else made.get(atom)
        for atom, axis in zip(jaxpr.outvars, out_axes, strict=True)
    ]
    return args, results


def _split(place: _Place, axis: int | None) -> Splits:
    """The dimension of a mapped array that is split over the devices of a map inside, and their mesh axis."""
    if place is None:
        return ()
    dim, inner = place
    return ((dim + (axis is not None and axis <= dim), inner.device_axis),)


def _raising(one_device: OneReplica) -> OneReplica:
    """The same without its last result, the number of a failure, which is raised."""

    def raising(*blocks: Any) -> Sequence[Any]:
        *results, failed = one_device(*blocks)
        raise_after(results, failed)
        return results

    return raising


def _over_devices(
    one_device: OneReplica,
    layout: Layout,
    source: Any,
    ins: Sequence[PartitionSpec],
    outs: Sequence[PartitionSpec],
    out_axes: Sequence[int | None],
) -> Callable[..., tuple[Any, ...]]:
    """What all devices run on padded arguments, the results cut to N rows.

    Args:
        one_device: What each of them runs.
        layout: Where the replicas lie.
        source: Where an error of JAX's about its devices is to say that it comes from.
        ins: How each argument is split.
        outs: How each result is split.
        out_axes: The mapped axis of each result.
    """

    def missing(spec: PartitionSpec) -> list[Hashable]:
        return [name for name in layout.scope.copies if name not in spec]

    def alike(*blocks: Any) -> tuple[Any, ...]:
        with _jax.source(None):
            given = (equal_on(x, missing(spec)) for x, spec in zip(blocks, ins, strict=True))
            return tuple(own_on(y, missing(spec)) for y, spec in zip(one_device(*given), outs, strict=True))

    mapped = jax.shard_map(alike, mesh=layout.mesh, in_specs=tuple(ins), out_specs=tuple(outs), check_vma=False)

    def all_replicas(*args: Any) -> tuple[Any, ...]:
        with _jax.source(source):
            results = mapped(*args)
        return tuple(
            out if a is None or not layout.axis.padding else real_rows(out, a, layout.axis.placement)
            for out, a in zip(results, out_axes, strict=True)
        )

    return all_replicas


def _advice(name: str, layout: Layout) -> str:
    """What JAX says of a map where an argument of the program that it is in lies on other devices than the map."""
    every = layout.mesh.size
    used = -(-layout.size // -(-layout.size // every))
    which = f"as in pmap(f, devices=jax.devices()[:{used}])" if used < every else "as many as the smallest of them uses"
    return (
        f"{name}, mapped by replicax.pmap, which takes all of its {every} devices under jit. To pass what a map has "
        f"left on fewer, map all with the same devices, {which}; or pass replicax.fetch(x)"
    )


def _check_broadcast_results(
    replica: Replica, out_axes: Sequence[int | None], varying: Sequence[Varying], axis: LogicalAxis
) -> None:
    paths = jax.tree_util.tree_leaves_with_path(replica.out)
    faults = [
        f"result{keystr(path)} of shape {aval.shape}"
        for (path, aval), out_axis, where in zip(paths, out_axes, varying, strict=True)
        if out_axis is None and axis in where
    ]
    if faults:
        raise DivergentOutputError(
            report(
                "out_axes=None returns one value for all replicas, but these results may differ between them:",
                faults,
                "Write an int in out_axes to get each replica's value, or make them equal first, for example with "
                "jax.lax.pmean or jax.lax.psum over the mapped axis.",
            )
        )
