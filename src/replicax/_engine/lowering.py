"""Lowers the program of one replica to a function of all replicas, on a mesh of devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from replicax import _jax
from replicax._engine.blocks import real_rows, without_folding
from replicax._engine.callbacks import guard, raise_after, refuse_ordered
from replicax._engine.lanes import (
    AUTO,
    VECTORIZED,
    Auto,
    Cutter,
    LanePlan,
    LaneRule,
    Lanes,
    SegmentRunner,
    convolutions,
)
from replicax._engine.levels import OneReplica, as_equal, as_per_device, lend_rows, over_lanes
from replicax._engine.nested import DeviceShard, Split, as_shard, splits_made, splits_taken
from replicax._engine.outputs import OutputPolicy, Outputs, check_outputs
from replicax._engine.replica import Replica
from replicax._engine.rewrite import Rewriter, one_value
from replicax._engine.spec import Inputs, ProgramSpec
from replicax._engine.varying import NOWHERE, Varying
from replicax._jax import Jaxpr
from replicax._layout.axes import match_out_axes
from replicax._layout.layout import Layout, LogicalAxis, Splits
from replicax._typing import Array, ArrayLike, Axes, DType, Function
from replicax.errors import UnsupportedDtypeError


def lower(
    replica: Replica, layout: Layout, inputs: Inputs, outputs: Outputs, name: str, lanes: Lanes | Auto
) -> ProgramSpec:
    """Lowers the program of one replica to a function of all replicas.

    Args:
        replica: The traced program.
        layout: The layout of the replicas on the devices.
        inputs: The argument leaves.
        outputs: ``out_axes``, and the policy for results without a mapped axis.
        name: The name of the user's function.
        lanes: How many lanes a device runs at once. With ``AUTO``, a rule chooses the number.

    Raises:
        AxisSpecError: ``out_axes`` does not fit the result.
        DivergentOutputError: ``out_axes`` is None for a result that may differ between replicas.
        UnsupportedCollectiveError: replicax has no rule for a collective in the program.
        OrderedCallbackError: The program contains a callback with ``ordered=True``.
        UnsupportedDtypeError: The program takes or returns 2-bit integers, and the layout has padding.
    """
    refuse_ordered(replica.jaxpr, name)
    _refuse_two_bits([x.dtype for x in (*inputs.types, *jax.tree.leaves(replica.out))], layout)
    out_axes, out_tree = match_out_axes(outputs.axes, replica.out, layout.size)
    on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
    rewriter = Rewriter(layout.scope, bind=convolutions.bind if on_cpu else _jax.bind)
    varying = [NOWHERE if a is None else frozenset({layout.axis}) for a in inputs.axes]
    if None in out_axes:
        where = rewriter.analysis.results(replica.jaxpr, varying)
        check_outputs(outputs.policy, replica, out_axes, where, layout.axis)
    body = _body(replica, layout, varying, out_axes, name, outputs.policy)
    taken = Inputs((*inputs.types, *body.closed), (*inputs.axes, *[None] * len(body.closed)), inputs.donated)
    in_splits = (*map(_as_shardings, body.in_places, inputs.axes), *[()] * len(body.closed))
    out_splits = tuple(map(_as_shardings, body.out_places, body.out_axes))[: len(out_axes)]
    ins, outs = list(map(layout.spec, taken.axes, in_splits)), list(map(layout.spec, out_axes, out_splits))
    source = _jax.described_source(replica.jaxpr, _advice(name, layout))
    if lanes is AUTO:
        lanes = body.lanes_by_rule(rewriter) if on_cpu and LaneRule.RELEVANT & replica.primitives else VECTORIZED
    one_device, plan = body.one_device(rewriter, taken.axes, lanes)
    function = _over_devices(one_device, layout, source, ins, outs, out_axes)
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
        lanes=plan,
    )


@dataclass(frozen=True)
class _Body:
    """The program that one replica runs.

    Attributes:
        replica: The program, with guarded callbacks.
        guarded: Whether it contains callbacks. If so, its last result is a failure number.
        varying: The mapped axes over which each argument varies.
        out_axes: The mapped axis of each result.
        in_places: The splits of each argument over the devices of nested maps.
        out_places: The splits of each result over the devices of nested maps.
        passed: The indices of the closed-over arrays that are passed as arguments, after the user's arguments.
        in_rules: The names of the primitives in forward rules that contain callbacks.
        by_replica: Whether each replica must get an equal part of the cotangent of a result that is not mapped.
    """

    replica: Replica
    guarded: bool
    varying: Sequence[Varying]
    out_axes: Axes
    in_places: Sequence[tuple[Split, ...]]
    out_places: Sequence[tuple[Split, ...]]
    passed: Sequence[int]
    in_rules: frozenset[str]
    by_replica: bool

    @property
    def closed(self) -> tuple[Array, ...]:
        """The closed-over arrays that are passed as arguments."""
        return tuple(self.replica.consts[k] for k in self.passed)

    def one_replica(self, rewriter: Rewriter) -> OneReplica:
        """Returns the program as a function of the arguments, followed by the passed closed-over arrays."""
        axis = rewriter.scope.axes[-1]

        def one_replica(*args: Array) -> tuple[Array, ...]:
            consts = self._consts(args)
            own = [x if where else without_folding(x) for x, where in zip(args, self.varying, strict=False)]
            parts = list(map(as_shard, own, self.in_places))
            results = rewriter.run_on_shards(self.replica.jaxpr, consts, parts, self.varying)
            kept = [
                y.only(s) if isinstance(y, DeviceShard) else y for y, s in zip(results, self.out_places, strict=True)
            ]
            return self._results(axis, kept)

        return one_replica

    def _consts(self, args: Sequence[Array]) -> list[ArrayLike]:
        """The closed-over arrays, those that are passed taken from the end of the arguments."""
        consts = list(self.replica.consts)
        for k, value in zip(self.passed, args[len(self.varying) :], strict=True):
            consts[k] = value
        return consts

    def _results(self, axis: LogicalAxis, values: Sequence[ArrayLike]) -> tuple[ArrayLike, ...]:
        """The results of a lane: one value for all lanes where ``out_axes`` is None."""
        return tuple(
            one_value(axis, y, by_replica=self.by_replica) if a is None else y
            for y, a in zip(values, self.out_axes, strict=True)
        )

    @property
    def in_one_piece(self) -> bool:
        """Whether all lanes must run at once: with splits over the devices of nested maps, or with refs.

        A ref has one value for all lanes until a lane writes to it, so its type depends on all that follows.
        """
        split = any(map(any, (self.in_places, self.out_places)))
        return split or _has_references(self.replica.jaxpr)

    def lanes_by_rule(self, rewriter: Rewriter) -> Lanes:
        """Returns how many lanes a CPU runs at once, by the rule for all programs."""
        cutter = Cutter(rewriter.scope, one_lane=True)
        rule = LaneRule(rewriter.analysis, rewriter.scope.axes[-1], cutter.is_local)
        return rule.lanes(cutter.inlined(self.replica.jaxpr), self.varying)

    def one_device(self, rewriter: Rewriter, in_axes: Axes, lanes: Lanes) -> tuple[OneReplica, LanePlan]:
        """Returns the program of all lanes of a device, and how they run.

        The program is a function of blocks. It raises if a callback has failed.
        """
        axis = rewriter.scope.axes[-1]
        if not axis.ordered and (lanes is VECTORIZED or lanes >= axis.lanes or self.in_one_piece):
            run = over_lanes(self.one_replica(rewriter), axis, in_axes, self.out_axes)
            plan = LanePlan(axis.lanes, axis.lanes, 0, 0, (), 0)
        else:
            run, plan = self._in_segments(rewriter, in_axes, lanes or 1)
        return _raising(run) if self.guarded else run, plan

    def _in_segments(self, rewriter: Rewriter, in_axes: Axes, chunk: int) -> tuple[OneReplica, LanePlan]:
        """Returns the program of all lanes of a device, ``chunk`` lanes at a time, and how they run."""
        axis, cutter = rewriter.scope.axes[-1], Cutter(rewriter.scope, one_lane=chunk == 1)
        jaxpr = cutter.inlined(self.replica.jaxpr)
        cut = cutter.cut(jaxpr, [a is not None for a in in_axes[: len(self.varying)]])
        on_lanes = functools.partial(functools.partial, rewriter.equation)
        lanes = SegmentRunner(cut, axis, chunk, on_lanes, rewriter.bind, self.varying)

        stacked = [0 if lanes.is_stacked(atom) else None for atom in jaxpr.outvars]
        finish = over_lanes(lambda *values: self._results(axis, values), axis, stacked, self.out_axes)

        def one_device(*blocks: Array) -> Sequence[Array]:
            rows = [x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(blocks, in_axes, strict=True)]
            args = [x if where else without_folding(x) for x, where in zip(rows, self.varying, strict=False)]
            return finish(*map(jnp.asarray, lanes.run(jaxpr, self._consts(rows), args)))

        return one_device, cutter.plan(cut, chunk)


def _has_references(jaxpr: Jaxpr) -> bool:
    """Whether the program has refs outside of loops and the like."""
    return any(
        _jax.holds_references(eqn) or (eqn.primitive.name == "jit" and any(map(_has_references, _jax.sub_jaxprs(eqn))))
        for eqn in _jax.body(jaxpr).eqns
    )


def _body(
    replica: Replica,
    layout: Layout,
    varying: Sequence[Varying],
    out_axes: Axes,
    name: str,
    policy: OutputPolicy,
) -> _Body:
    running, guarded = replica, guard(replica.jaxpr, replica.consts, layout.axis, name)
    if guarded is not None:
        running = dataclasses.replace(replica, jaxpr=guarded.jaxpr, consts=guarded.consts)
    every = [*out_axes, *[None] * (guarded is not None)]
    splits = not layout.axis.padding
    in_places = splits_taken(running.jaxpr, layout.scope) if splits else [()] * len(varying)
    out_places = splits_made(running.jaxpr, layout.scope) if splits else [()] * len(every)
    out_places = [place if a is not None else () for place, a in zip(out_places, every, strict=True)]
    return _Body(
        replica=running,
        guarded=guarded is not None,
        varying=varying,
        out_axes=every,
        in_places=in_places,
        out_places=out_places,
        passed=[k for k, const in enumerate(running.consts) if _must_be_argument(const)],
        in_rules=frozenset() if guarded is None else frozenset(guarded.in_rules),
        by_replica="custom_vjp_call" in replica.primitives or policy is OutputPolicy.TAKE_FIRST,
    )


def _must_be_argument(const: ArrayLike) -> bool:
    """Whether a closed-over array must become an argument: a tracer of an enclosing trace, or an array on a mesh."""
    if isinstance(const, jax.core.Tracer):
        return True
    return isinstance(const, jax.Array) and not isinstance(const.sharding, jax.sharding.SingleDeviceSharding)


def _refuse_two_bits(dtypes: Sequence[DType], layout: Layout) -> None:
    """Refuses padding of 2-bit arrays. XLA overruns its buffers when it concatenates or slices sharded 2-bit arrays.

    Workaround: two_bits_padded.
    """
    found = sorted({dtype.name for dtype in dtypes if dtype.name in ("int2", "uint2")})
    if found and layout.axis.padding:
        raise UnsupportedDtypeError(
            f"The mapped function takes or returns {' and '.join(found)}, and {layout.size} replicas on "
            f"{layout.axis.devices} devices, {layout.axis.lanes} per device, need padding, but XLA cannot pad 2-bit "
            f"arrays. Convert the arrays, as in x.astype('int8'), or use a number of replicas that is a multiple of "
            f"the number of devices."
        )


def _as_shardings(splits: Sequence[Split], axis: int | None) -> Splits:
    """Converts splits of one replica's array to (dimension, mesh axis) pairs of the array of all replicas."""
    return tuple((split.outside(axis).dim, split.axis.device_axis) for split in splits)


def _raising(one_device: OneReplica) -> OneReplica:
    """Wraps ``one_device``: removes its last result, the failure number, and raises that failure."""

    def raising(*blocks: Array) -> Sequence[Array]:
        *results, failed = one_device(*blocks)
        raise_after(results, failed)
        return results

    return raising


def _over_devices(
    one_device: OneReplica,
    layout: Layout,
    source: Function,
    ins: Sequence[PartitionSpec],
    outs: Sequence[PartitionSpec],
    out_axes: Axes,
) -> Callable[..., tuple[Array, ...]]:
    """Returns the function that all devices run on padded arguments. It slices the results to N rows.

    Over several processes, the results keep their padding, because each process slices its own part.

    Args:
        one_device: The function that each device runs.
        layout: The layout of the replicas.
        source: The source location that JAX quotes in errors about devices.
        ins: The ``PartitionSpec`` of each argument.
        outs: The ``PartitionSpec`` of each result.
        out_axes: The mapped axis of each result.
    """

    def missing(spec: PartitionSpec) -> list[Hashable]:
        return [name for name in layout.scope.copies if name not in spec]

    def alike(*blocks: Array) -> tuple[Array, ...]:
        with _jax.source(None):
            filled = (
                (lend_rows(x, layout, spec) for x, spec in zip(blocks, ins, strict=True)) if layout.lent else blocks
            )
            given = (as_equal(x, missing(spec)) for x, spec in zip(filled, ins, strict=True))
            return tuple(as_per_device(y, missing(spec)) for y, spec in zip(one_device(*given), outs, strict=True))

    mapped = jax.shard_map(alike, mesh=layout.mesh, in_specs=tuple(ins), out_specs=tuple(outs), check_vma=False)

    def all_replicas(*args: Array) -> tuple[Array, ...]:
        with _jax.source(source):
            results = mapped(*args)
        if not layout.axis.padding or layout.own is not None:
            return results
        return tuple(
            out if a is None else real_rows(out, a, layout.axis.placement)
            for out, a in zip(results, out_axes, strict=True)
        )

    return all_replicas


def _advice(name: str, layout: Layout) -> str:
    """Returns text for JAX's error about an argument of a traced program that is on other devices than the map."""
    every = layout.mesh.size
    if jax.process_count() > 1:
        return (
            f"{name}, mapped by replicax.pmap over several processes. Inside jit, scan and the like, arrays are global "
            f"there. Convert an array of this process outside: x = replicax.to_global(x), and pass it"
        )
    used = -(-layout.size // -(-layout.size // every))
    which = f"as in pmap(f, devices=jax.devices()[:{used}])" if used < every else "as many as the smallest map uses"
    return (
        f"{name}, mapped by replicax.pmap, which uses all of its {every} devices under jit. To pass an array that is "
        f"on fewer devices, call all maps with the same devices, {which}; or pass replicax.fetch(x)"
    )
