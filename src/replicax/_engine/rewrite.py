"""The rewriter: runs a program of one replica, traced with logical axes, on lanes and devices.

The rewriter evaluates the equations of a jaxpr in order. For a collective over a logical axis, it calls the registered
rule. For a higher-order equation, it rewrites the jaxprs inside and binds the primitive with them. It binds all other
equations unchanged. Rewriting does not change types.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import jax.numpy as jnp

from replicax import _jax
from replicax._engine import control_flow, nested, primitives
from replicax._engine.blocks import all_lanes, as_batched, as_unbatched, of_lane, one_lane_at_a_time
from replicax._engine.callbacks import call_guarded, called_once
from replicax._engine.collectives import AWAITING, REGISTRY, equal_value, unsupported
from replicax._engine.communication import Communication
from replicax._engine.lanes import Bind, Cutter, SegmentRunner
from replicax._engine.nested import DeviceShard, collect_result
from replicax._engine.primitives import callbacks as callback_primitives
from replicax._engine.rules import expanded, rewritten_rule
from replicax._engine.sums import find_sums, inline_jits_with_products
from replicax._engine.varying import NOWHERE, Analysis, Varying, mapped, union
from replicax._jax import Equation, Jaxpr
from replicax._layout.layout import LogicalAxis, Scope
from replicax._typing import Array, ArrayLike, Atom, Function
from replicax.errors import UnsupportedCollectiveError


class _Values:
    """The values of a jaxpr's variables while it runs. Each value is dropped after its last use.

    Args:
        jaxpr: The open jaxpr.
        values: The values of its constants and arguments.
        kept: Variables that are not dropped, because sums of products read them later.
    """

    def __init__(self, jaxpr: Jaxpr, values: Sequence[ArrayLike | DeviceShard], kept: Sequence[Atom]) -> None:
        self._values = dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True))
        self._last = {atom: eqn for eqn in jaxpr.eqns for atom in eqn.invars if not _jax.is_literal(atom)}
        self._kept = {atom for atom in jaxpr.outvars if not _jax.is_literal(atom)}.union(kept)
        self._whole: dict[Atom, ArrayLike] = {}

    def read(self, atom: Atom) -> ArrayLike:
        """Returns the full value of a variable or literal."""
        value = self.read_shard(atom)
        if not isinstance(value, DeviceShard):
            return value
        if atom not in self._whole:
            self._whole[atom] = collect_result(value)
        return self._whole[atom]

    def read_shard(self, atom: Atom) -> ArrayLike | DeviceShard:
        """Returns the value of a variable or literal, which may be a :class:`DeviceShard`."""
        return atom.val if _jax.is_literal(atom) else self._values[atom]

    def write(self, eqn: Equation, results: Sequence[ArrayLike | DeviceShard]) -> None:
        """Stores the results of an equation."""
        self._values.update(zip(eqn.outvars, results, strict=True))

    def drop_after(self, eqn: Equation) -> None:
        """Drops the values that no equation after ``eqn`` uses."""
        for atom in eqn.invars:
            if not _jax.is_literal(atom) and self._last[atom] is eqn and atom not in self._kept:
                self._values.pop(atom, None)


class Rewriter:
    """Rewrites one traced program for the logical axes in scope.

    Args:
        scope: The mapped axes in scope.
        analysis: The analysis of which values vary, if it exists already.
        communication: The analysis of the communication, if it exists already.
        bind: Runs an equation of one lane that does not communicate, where lanes run one after the other.
    """

    def __init__(
        self,
        scope: Scope,
        analysis: Analysis | None = None,
        communication: Communication | None = None,
        bind: Bind = _jax.bind,
    ) -> None:
        self.scope, self.bind = scope, bind
        self.analysis = analysis or Analysis(scope)
        self.communication = communication or Communication(scope)
        self.cutter = Cutter(scope, one_lane=True)
        self._inside: dict[tuple[Hashable, int], Rewriter] = {}
        self._seen: dict[int, tuple[Jaxpr, Jaxpr]] = {}
        self._rewritten: dict[Hashable, tuple[Jaxpr, tuple[Jaxpr, list[Array]]]] = {}

    def run(
        self, jaxpr: Jaxpr, consts: Sequence[ArrayLike], args: Sequence[ArrayLike], varying: Sequence[Varying]
    ) -> list[ArrayLike]:
        """Runs a jaxpr on the values of one replica.

        Args:
            jaxpr: The program.
            consts: The values of its constants. Constants do not vary.
            args: The values of its arguments.
            varying: The mapped axes over which each argument varies.

        Returns:
            The values of its results.
        """
        return list(map(collect_result, self.run_on_shards(jaxpr, consts, args, varying)))

    def run_on_shards(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[ArrayLike],
        args: Sequence[ArrayLike | DeviceShard],
        varying: Sequence[Varying],
    ) -> list[ArrayLike | DeviceShard]:
        """Runs a jaxpr like :meth:`run`, but the arguments and results may be :class:`DeviceShard` values."""
        if self.scope.axes[-1].ordered:
            return [*self._one_after_the_other(jaxpr, consts, list(map(collect_result, args)), varying)]
        if not any(self.communication.changes(jaxpr)):
            return [*_jax.run(_jax.body(jaxpr), list(map(collect_result, args)), consts)]
        inside = self._inlined(jaxpr)
        changes = self.communication.changes(inside)
        sums = find_sums(inside, self.scope, lambda: self.analysis.values(inside, varying))
        replaced = {id(eqn) for found in sums.values() for eqn in found.made.values()}
        values = _Values(inside, [*consts, *args], [atom for found in sums.values() for atom in found.needs])
        for eqn, change in zip(inside.eqns, changes, strict=True):
            if id(eqn) in replaced:
                continue
            if id(eqn) in sums:
                values.write(eqn, [sums[id(eqn)].run(self.scope, values.read)])
                continue
            read = values.read_shard if primitives.is_nested_map(eqn) else values.read
            with _jax.equation_context(eqn):
                operands = list(map(read, eqn.invars))
                where = partial(self._where, inside, varying, eqn)
                values.write(eqn, self._equation(eqn, operands, where) if change else _jax.bind(eqn, operands))
            values.drop_after(eqn)
        return list(map(values.read_shard, inside.outvars))

    def _one_after_the_other(
        self, jaxpr: Jaxpr, consts: Sequence[ArrayLike], args: Sequence[ArrayLike], varying: Sequence[Varying]
    ) -> list[ArrayLike]:
        """Runs a jaxpr, such as the body of a loop that communicates, on one lane after the other."""
        axis, inside = self.scope.axes[-1], self.cutter.inlined(jaxpr)
        cut = self.cutter.cut(inside, list(map(bool, varying)))
        lanes = SegmentRunner(cut, axis, 1, partial(partial, self.equation), self.bind, varying)
        whole = [_jax.as_array(x, var.aval) for x, var in zip(args, inside.invars, strict=True)]
        rows = [all_lanes(axis, x) if where else as_unbatched(axis, x) for x, where in zip(whole, varying, strict=True)]
        results = zip(inside.outvars, lanes.run(inside, consts, rows), strict=True)
        return [of_lane(axis, y) if lanes.is_stacked(atom) else y for atom, y in results]

    def equation(
        self, jaxpr: Jaxpr, varying: Sequence[Varying], eqn: Equation, args: Sequence[ArrayLike]
    ) -> list[ArrayLike]:
        """Runs one equation of a jaxpr on the values of one replica.

        Args:
            jaxpr: The open jaxpr that has the equation.
            varying: The mapped axes over which each argument of the jaxpr varies.
            eqn: The equation.
            args: Its operands.
        """
        if not self.communication.changes_equation(eqn):
            return list(_jax.bind(eqn, args))
        where = partial(self._where, jaxpr, varying, eqn)
        return list(map(collect_result, self._equation(eqn, list(args), where)))

    def _where(self, jaxpr: Jaxpr, varying: Sequence[Varying], eqn: Equation) -> list[Varying]:
        """Returns the mapped axes over which each operand of an equation varies."""
        known = self.analysis.values(jaxpr, varying)
        return [NOWHERE if _jax.is_literal(atom) else known[atom] for atom in eqn.invars]

    def _equation(
        self, eqn: Equation, args: list[ArrayLike | DeviceShard], where: Callable[[], list[Varying]]
    ) -> Sequence[ArrayLike | DeviceShard]:
        """Runs an equation that must be rewritten.

        Args:
            eqn: The equation.
            args: Its operands.
            where: Returns the mapped axes over which each operand varies.
        """
        if callback_primitives.is_guarded(eqn):
            return call_guarded(self.scope, eqn, args, union(where()[1:]))
        if _jax.draws_batches(eqn):
            return _draw(self.scope, eqn, args, union(where()))
        if not primitives.is_nested_map(eqn) and not any(True for _ in _jax.sub_jaxprs(eqn)):
            return self._leaf(eqn, args)
        varying = where()
        if primitives.is_nested_map(eqn):
            return self._nested(eqn, args, varying)
        if control_flow.is_divergent(self, eqn, varying):
            return control_flow.run_divergent(self, eqn, args, varying)
        per_lane = bool(_jax.derivative_rules(eqn)) and (any(varying) or bool(self.communication.axes_inside(eqn)))
        inside = zip(_jax.sub_jaxprs(eqn), self.analysis.operands(eqn, varying), strict=True)
        hoist = _jax.bears_no_constants(eqn)
        new = {id(sub): self._sub_jaxpr(sub, operands, per_lane=per_lane, hoist=hoist) for sub, operands in inside}

        def rewrite_rule(rule: Function, role: str) -> Function:
            return rewritten_rule(self, rule, role, per_lane=len(eqn.outvars) if per_lane else 0)

        return _jax.bind_again(eqn, args, lambda sub: new[id(sub)], rewrite_rule)

    def _leaf(self, eqn: Equation, args: list[ArrayLike]) -> list[ArrayLike]:
        names = [name for name in _jax.named_axes(eqn) if name in self.scope]
        if names:
            known = REGISTRY.get(eqn.primitive.name)
            if known is None and (expansion := _jax.expansion(eqn)) is not None:
                return expanded(self, expansion, args, per_lane=len(eqn.outvars))
            if known is None:
                raise unsupported(_jax.equation_name(eqn), names)
            return [known.on_lanes(self.scope, _jax.operands(eqn, args), eqn.params)]
        if _jax.has_side_effect(eqn):
            return called_once(self.scope, eqn, args)
        if eqn.primitive.name in AWAITING:
            return args  # nothing to await: the rule of the start primitive returned the result
        raise UnsupportedCollectiveError(
            f"{_jax.equation_name(eqn)}: replicax has no rule for this operation over mapped axes. Call it outside "
            f"the mapped function."
        )

    def _nested(
        self, eqn: Equation, args: list[ArrayLike | DeviceShard], varying: list[Varying]
    ) -> list[Array | DeviceShard]:
        """Runs a nested map. Its replicas are lanes on the devices of the next nesting level."""
        inside, (jaxpr,) = self._rewriter_inside(eqn), _jax.sub_jaxprs(eqn)
        axis, in_axes, out_axes = inside.scope.axes[-1], eqn.params["in_axes"], eqn.params["out_axes"]
        operands = mapped(eqn, varying, frozenset({axis}))
        by_replica = "custom_vjp_call" in _jax.primitives(jaxpr)

        def one_replica(own: Sequence[Array | DeviceShard]) -> list[Array | DeviceShard]:
            results = inside.run_on_shards(jaxpr, _jax.constants(jaxpr), own, operands)
            return [
                one_value(axis, collect_result(y), by_replica=by_replica) if a is None else y
                for y, a in zip(results, out_axes, strict=True)
            ]

        arrays = [
            x if isinstance(x, DeviceShard) else _jax.as_array(x, v.aval) for x, v in zip(args, eqn.invars, strict=True)
        ]
        return nested.run_inside(axis, one_replica, arrays, in_axes, out_axes)

    def _rewriter_inside(self, eqn: Equation) -> Rewriter:
        key = eqn.params["name"], eqn.params["size"]
        if key not in self._inside:
            analysis = self.analysis.inside(eqn)
            self._inside[key] = Rewriter(analysis.scope, analysis, self.communication.inside(eqn), self.bind)
        return self._inside[key]

    def _inlined(self, jaxpr: Jaxpr) -> Jaxpr:
        if id(jaxpr) not in self._seen:
            self._seen[id(jaxpr)] = (
                jaxpr,
                inline_jits_with_products(nested.inline_jits_with_maps(jaxpr, self.scope), self.scope),
            )
        return self._seen[id(jaxpr)][1]

    def _sub_jaxpr(
        self, jaxpr: Jaxpr, varying: Sequence[Varying], *, per_lane: bool, hoist: bool
    ) -> tuple[Jaxpr, list[Array]]:
        key = (id(jaxpr), tuple(varying), per_lane, hoist)
        if key not in self._rewritten:

            def run(*args: Array) -> list[ArrayLike]:
                results = self.run(jaxpr, _jax.constants(jaxpr), args, varying)
                return [as_batched(self.scope.axes, x) for x in results] if per_lane else results

            self._rewritten[key] = (jaxpr, _jax.retrace(run, jaxpr, hoist=hoist))
        return self._rewritten[key][1]


def _draw(scope: Scope, eqn: Equation, args: list[ArrayLike], varying: Varying) -> list[Array]:
    """Draws random numbers with each replica's own key, one lane at a time."""
    lanes = [axis for axis in scope.axes if axis in varying and axis.lane_axis is not None]
    return one_lane_at_a_time(lanes, lambda *own: _jax.bind(eqn, own), *_jax.operands(eqn, args))


def one_value(axis: LogicalAxis, y: ArrayLike, *, by_replica: bool) -> ArrayLike:
    """Returns one value for all replicas: the value that they all have, or the first lane's if they differ.

    Args:
        axis: The mapped axis.
        y: The result of one replica.
        by_replica: Whether each replica must get 1/N of the cotangent. This matters for the user's derivative rules,
            and for results that differ between replicas.
    """
    if by_replica and axis.physical and jnp.issubdtype(jnp.result_type(y), jnp.inexact):
        return equal_value(axis, as_batched([axis], y))
    return as_unbatched(axis, y)
