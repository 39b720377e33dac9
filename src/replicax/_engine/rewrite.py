"""The rewriter: runs a program of one replica, traced with logical axes, on lanes and devices.

It walks a jaxpr's equations. A collective over a logical axis becomes its rule; a higher-order equation is bound
again with every jaxpr in it rewritten; everything else is bound as it is. Rewriting changes no type.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from replicax import _jax
from replicax._engine.blocks import any_lane, lane_by_lane, one_by_one
from replicax._engine.callbacks import call_guarded, runs_here
from replicax._engine.collectives import AWAITING, REGISTRY, any_replica, equal_value, unsupported, where_replica
from replicax._engine.levels import Part, over_lanes, own_block, whole
from replicax._engine.primitives import callbacks as _callback_primitives
from replicax._engine.primitives import mapped as _primitives
from replicax._engine.sums import find_sums, in_sight
from replicax._engine.varying import NOWHERE, Analysis, Varying, mapped, union
from replicax._jax import Equation, Jaxpr
from replicax._layout.layout import LogicalAxis, Scope
from replicax.errors import CollectiveArgumentError, UnsupportedCollectiveError


class Rewriter:
    """Rewrites one traced program for the logical axes in scope.

    Args:
        scope: The mapped axes in scope.
        analysis: Their analysis, where there is one already.
    """

    def __init__(self, scope: Scope, analysis: Analysis | None = None) -> None:
        self.scope = scope
        self.analysis = Analysis(scope) if analysis is None else analysis
        self._inside: dict[tuple[Hashable, int], Rewriter] = {}
        self._seen: dict[int, tuple[Jaxpr, Jaxpr]] = {}
        self._changing: dict[int, tuple[Jaxpr, list[bool]]] = {}
        self._communicates: dict[int, tuple[Jaxpr, frozenset[LogicalAxis]]] = {}
        self._awaits: dict[tuple[int, bool], tuple[Jaxpr, frozenset[LogicalAxis]]] = {}
        self._rewritten: dict[Hashable, tuple[Jaxpr, tuple[Jaxpr, list[Any]]]] = {}

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], varying: Sequence[Varying]) -> list[Any]:
        """Runs a jaxpr on the values of one replica.

        Args:
            jaxpr: The program.
            consts: The values of its constants; none of them varies.
            args: The values of its arguments.
            varying: Where each argument varies.

        Returns:
            The values of its results.
        """
        return list(map(_joined, self.run_in_parts(jaxpr, consts, args, varying)))

    def run_in_parts(
        self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], varying: Sequence[Varying]
    ) -> list[Any]:
        """As :meth:`run`; but an argument, or a result, of a map inside may be a device's :class:`Part` of it."""
        if not any(self._changes(jaxpr)):
            return _jax.run(_jax.body(jaxpr), args, consts)
        inside = self._in_sight(jaxpr)
        changes = self._changes(inside)
        env = dict(zip([*inside.constvars, *inside.invars], [*consts, *args], strict=True))
        last_use = {atom: eqn for eqn in inside.eqns for atom in eqn.invars if not _jax.is_literal(atom)}
        sums = find_sums(inside, self.scope, lambda: self.analysis.values(inside, varying))
        replaced = {id(eqn) for found in sums.values() for eqn in found.made.values()}
        kept = {atom for atom in inside.outvars if not _jax.is_literal(atom)}
        kept = kept.union(*(found.needs for found in sums.values()))
        joined: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            if _jax.is_literal(atom):
                return atom.val
            if isinstance(env[atom], Part) and atom not in joined:
                joined[atom] = env[atom].join()
            return joined.get(atom, env[atom])

        def read_part(atom: Any) -> Any:
            return atom.val if _jax.is_literal(atom) else env[atom]

        def where() -> list[Varying]:
            known = self.analysis.values(inside, varying)
            return [NOWHERE if _jax.is_literal(atom) else known[atom] for atom in eqn.invars]

        for eqn, change in zip(inside.eqns, changes, strict=True):
            if id(eqn) in replaced:
                continue
            if id(eqn) in sums:
                env[eqn.outvars[0]] = sums[id(eqn)].run(self.scope, read)
                continue
            reader = read_part if _primitives.is_nested_map(eqn) else read
            with _jax.equation_context(eqn):
                operands = [reader(atom) for atom in eqn.invars]
                results = self._equation(eqn, operands, where) if change else _jax.bind(eqn, operands)
            env.update(zip(eqn.outvars, results, strict=True))
            for atom in eqn.invars:
                if not _jax.is_literal(atom) and last_use[atom] is eqn and atom not in kept:
                    env.pop(atom, None)
        return [read_part(atom) for atom in inside.outvars]

    def _equation(self, eqn: Equation, args: list[Any], where: Callable[[], list[Varying]]) -> list[Any]:
        """An equation that has to change; ``where`` finds out where its operands vary."""
        if _callback_primitives.is_guarded(eqn):
            return call_guarded(self.scope, eqn, args, union(where()[1:]))
        if _jax.draws_batches(eqn):
            return self._draw(eqn, args, union(where()))
        if not _primitives.is_nested_map(eqn) and not any(True for _ in _jax.sub_jaxprs(eqn)):
            return self._leaf(eqn, args)
        varying = where()
        if _primitives.is_nested_map(eqn):
            return self._nested(eqn, args, varying)
        if (disagree := self.analysis.predicate(eqn, varying)) and disagree & self._awaited(eqn, in_rules=True):
            return {"while": self._divergent_while, "cond": self._divergent_cond}[eqn.primitive.name](
                eqn, args, varying
            )
        apart = bool(_jax.derivative_rules(eqn)) and (any(varying) or bool(self._axes_inside(eqn)))
        inside = zip(_jax.sub_jaxprs(eqn), self.analysis.operands(eqn, varying), strict=True)
        hoist = _jax.bears_no_constants(eqn)
        new = {id(sub): self._sub_jaxpr(sub, operands, apart=apart, hoist=hoist) for sub, operands in inside}

        def rewrite_rule(rule: Callable[..., Any], role: str) -> Callable[..., Any]:
            return self._rule(rule, role, apart=len(eqn.outvars) if apart else 0)

        return _jax.bind_again(eqn, args, lambda sub: new[id(sub)], rewrite_rule)

    def _leaf(self, eqn: Equation, args: list[Any]) -> list[Any]:
        names = [name for name in _jax.named_axes(eqn) if name in self.scope]
        if names:
            known = REGISTRY.get(eqn.primitive.name)
            if known is None and (expansion := _jax.expansion(eqn)) is not None:
                return self._expanded(expansion, args, apart=len(eqn.outvars))
            if known is None:
                raise unsupported(_jax.equation_name(eqn), names)
            return [known.on_lanes(self.scope, _jax.operands(eqn, args), eqn.params)]
        if _jax.has_side_effect(eqn):
            return self._guarded(eqn, args)
        if eqn.primitive.name in AWAITING:
            return args  # nothing to await: the rule of what was started gave the result itself
        raise UnsupportedCollectiveError(
            f"{_jax.equation_name(eqn)}: replicax has no rule for this operation over mapped axes, and does not leave "
            f"it as it is. Call it outside the mapped function."
        )

    def _draw(self, eqn: Equation, args: list[Any], varying: Varying) -> list[Any]:
        """Random numbers of each replica's own key, however many replicas a device runs."""
        lanes = [axis for axis in self.scope.axes if axis in varying and axis.lane_axis is not None]
        return one_by_one(lanes, lambda *own: _jax.bind(eqn, own), *_jax.operands(eqn, args))

    def _nested(self, eqn: Equation, args: list[Any], varying: list[Varying]) -> list[Any]:
        """A map inside: its replicas are lanes too, on the devices that this level has left to the next."""
        inside, (jaxpr,) = self._rewriter_inside(eqn), _jax.sub_jaxprs(eqn)
        axis, in_axes, out_axes = inside.scope.axes[-1], eqn.params["in_axes"], eqn.params["out_axes"]
        operands = mapped(eqn, varying, frozenset({axis}))
        by_replica = "custom_vjp_call" in _jax.primitives(jaxpr)

        def one_replica(*own: Any) -> tuple[Any, ...]:
            results = inside.run(jaxpr, _jax.constants(jaxpr), own, operands)
            return tuple(
                one_value(axis, y, by_replica=by_replica) if a is None else y
                for y, a in zip(results, out_axes, strict=True)
            )

        arrays = [x if isinstance(x, Part) else _jax.as_array(x, v.aval) for x, v in zip(args, eqn.invars, strict=True)]
        blocks = [own_block(axis, x, a) for x, a in zip(arrays, in_axes, strict=True)]
        results = over_lanes(one_replica, axis, in_axes, out_axes)(*blocks)
        return [whole(axis, y, a) for y, a in zip(results, out_axes, strict=True)]

    def _rewriter_inside(self, eqn: Equation) -> Rewriter:
        key = eqn.params["name"], eqn.params["size"]
        if key not in self._inside:
            analysis = self.analysis.inside(eqn)
            self._inside[key] = Rewriter(analysis.scope, analysis)
        return self._inside[key]

    # What a higher-order equation holds ------------------------------------------------------------------------

    def _changes(self, jaxpr: Jaxpr) -> list[bool]:
        """Which equations of a jaxpr have to be rewritten; the others are bound as they are."""
        if id(jaxpr) not in self._changing:
            self._changing[id(jaxpr)] = (jaxpr, list(map(self._change, _jax.body(jaxpr).eqns)))
        return self._changing[id(jaxpr)][1]

    def _in_sight(self, jaxpr: Jaxpr) -> Jaxpr:
        if id(jaxpr) not in self._seen:
            self._seen[id(jaxpr)] = (jaxpr, in_sight(jaxpr, self.scope))
        return self._seen[id(jaxpr)][1]

    def _change(self, eqn: Equation) -> bool:
        if _primitives.is_nested_map(eqn) or _jax.derivative_rules(eqn) or _callback_primitives.is_guarded(eqn):
            return True
        subs = list(_jax.sub_jaxprs(eqn))
        if subs:
            return any(any(self._changes(sub)) for sub in subs)
        if repeated := [name for name in _jax.repeated_axes(eqn) if name in self.scope]:
            raise CollectiveArgumentError(_repeated(eqn, repeated[0]))
        return (
            any(name in self.scope for name in _jax.named_axes(eqn))
            or (self._doubled and _jax.has_side_effect(eqn))
            or eqn.primitive.name in AWAITING
            or (self._vectorized and _jax.draws_batches(eqn))
        )

    def _axes_inside(self, eqn: Equation) -> frozenset[LogicalAxis]:
        """The mapped axes that collectives anywhere inside the equation are over."""
        if _primitives.is_nested_map(eqn):
            inside = self._rewriter_inside(eqn)
            return inside._axes_of(*_jax.sub_jaxprs(eqn)) - {inside.scope.axes[-1]}
        return frozenset().union(*map(self._axes_of, _jax.sub_jaxprs(eqn)))

    def _awaited(self, eqn: Equation, *, in_rules: bool) -> frozenset[LogicalAxis]:
        """The mapped axes whose replicas a collective anywhere inside the equation waits for.

        With ``in_rules`` also one of a derivative rule inside, which runs if JAX differentiates.
        """
        if _primitives.is_nested_map(eqn):
            inside, (jaxpr,) = self._rewriter_inside(eqn), _jax.sub_jaxprs(eqn)
            return inside._awaited_in(jaxpr, in_rules) - {inside.scope.axes[-1]}
        return frozenset().union(*(self._awaited_in(sub, in_rules) for sub in _jax.sub_jaxprs(eqn)))

    def _awaited_in(self, jaxpr: Jaxpr, in_rules: bool) -> frozenset[LogicalAxis]:
        key = id(jaxpr), in_rules
        if key not in self._awaits:
            axes: set[LogicalAxis] = set()
            for eqn in _jax.body(jaxpr).eqns:
                axes |= self._awaited(eqn, in_rules=in_rules)
                if eqn.primitive.name != "axis_index":  # which waits for nobody
                    axes |= self._axes_named(eqn)
                if in_rules and _jax.derivative_rules(eqn):
                    axes |= self._awaited_in_rules(eqn)
            self._awaits[key] = (jaxpr, frozenset(axes))
        return self._awaits[key][1]

    def _awaited_in_rules(self, eqn: Equation) -> frozenset[LogicalAxis]:
        axes = self.scope.axes
        try:
            with _jax.axis_env({axis.name: axis.size for axis in axes}):
                rules = list(_jax.rule_jaxprs(eqn))
        except Exception:  # the user's, of a rule that JAX may never call; if it does, they see it then
            return frozenset(axes)
        return frozenset().union(*(self._awaited_in(rule, True) for rule in rules))

    def _axes_of(self, jaxpr: Jaxpr) -> frozenset[LogicalAxis]:
        if id(jaxpr) not in self._communicates:
            axes: set[LogicalAxis] = set()
            for eqn in _jax.body(jaxpr).eqns:
                axes |= self._axes_inside(eqn) | self._axes_named(eqn)
            self._communicates[id(jaxpr)] = (jaxpr, frozenset(axes))
        return self._communicates[id(jaxpr)][1]

    def _axes_named(self, eqn: Equation) -> set[LogicalAxis]:
        """The mapped axes whose replicas have to come along to a collective.

        Where maps are nested, a permutation along one axis of the mesh is one of all devices to XLA.
        Workaround: permutations_of_a_part.
        """
        axes = {self.scope[name] for name in _jax.named_axes(eqn) if name in self.scope}
        entry = REGISTRY.get(eqn.primitive.name)
        by_groups = entry is not None and entry.by_groups and eqn.params.get("axis_index_groups") is None
        return axes if by_groups or not axes else set(self.scope.axes)

    @cached_property
    def _doubled(self) -> bool:
        """Whether a replica runs more than once: in padding lanes, or on the devices of maps inside."""
        return any(axis.padding for axis in self.scope.axes) or bool(self.scope.copies)

    @cached_property
    def _vectorized(self) -> bool:
        """Whether a device runs several replicas at once."""
        return any(axis.lane_axis is not None for axis in self.scope.axes)

    # How it is bound again -------------------------------------------------------------------------------------

    def _sub_jaxpr(
        self, jaxpr: Jaxpr, varying: Sequence[Varying], *, apart: bool, hoist: bool
    ) -> tuple[Jaxpr, list[Any]]:
        key = (id(jaxpr), tuple(varying), apart, hoist)
        if key not in self._rewritten:

            def run(*args: Any) -> list[Any]:
                results = self.run(jaxpr, _jax.constants(jaxpr), args, varying)
                return [lane_by_lane(self.scope.axes, x) for x in results] if apart else results

            self._rewritten[key] = (jaxpr, _jax.retrace(run, jaxpr, hoist=hoist))
        return self._rewritten[key][1]

    def _rule(self, rule: Callable[..., Any], role: str, *, apart: int) -> Callable[..., Any]:
        """A derivative rule of the user's, rewritten when JAX calls it.

        The rules are one replica's, and so is what they take and give. But JAX hands a reverse rule the sum over
        lanes for a result that it knows to be equal in all of them, and cannot match such a result with a tangent
        that differs. So with ``apart`` each lane gets results of its own, and padding has no part in cotangents.

        Args:
            rule: The rule.
            role: ``"jvp"``, ``"fwd"`` or ``"bwd"``.
            apart: How many results the function has that are to be each lane's own. With 0 nothing varies, but the
                cotangents of a function that is called alike everywhere.
        """
        axes = self.scope.axes
        everywhere = frozenset(axes)

        def rewritten(*args: Any) -> Any:
            with _jax.axis_env({axis.name: axis.size for axis in axes}):
                jaxpr, arrays, restore = _jax.trace_rule(rule, args)
            # JAX calls a rule when vmap and shard_map have long returned, and taken their axes along.
            with _jax.axis_env(self.scope.physical):
                varies = apart or (role == "bwd" and self._axes_of(jaxpr))
                varying = [everywhere if varies else frozenset()] * len(arrays)
                results = self.run(jaxpr, _jax.constants(jaxpr), arrays, varying)
                if apart and role == "bwd":
                    results = [where_replica(axes, x) for x in results]
                first = len(results) - apart if role == "fwd" else 0  # residuals come first
                own = [lane_by_lane(axes, x) for x in results[first:]] if apart else results[first:]
                return restore([*results[:first], *own])

        return rewritten

    def _expanded(
        self, expansion: tuple[Callable[..., Any], Callable[..., Any]], args: list[Any], *, apart: int
    ) -> list[Any]:
        """An operation that JAX keeps whole until it is compiled, and that communicates: what it stands for."""
        primal, jvp = (self._rule(rule, "jvp", apart=apart) for rule in expansion)
        call = jax.custom_jvp(primal)
        call.defjvp(lambda primals, tangents: jvp(*primals, *tangents))
        return list(call(*args))

    def _divergent_while(self, eqn: Equation, args: list[Any], varying: list[Varying]) -> list[Any]:
        """A loop that replicas leave at different times, and that communicates: all stay until the last leaves.

        As in ``vmap``, a replica that is done keeps its carry, and goes on taking part in the collectives.
        """
        cond, body = _jax.sub_jaxprs(eqn)
        for_cond, for_body = self.analysis.operands(eqn, varying)
        split = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
        cond_consts, body_consts, carry = args[: split[0]], args[split[0] : split[1]], args[split[1] :]
        waiting = self.analysis.predicate(eqn, varying) & self._awaited(eqn, in_rules=True)
        axes = sorted(waiting, key=lambda axis: axis.level)

        def goes_on(carry: Sequence[Any]) -> Any:
            return self.run(cond, _jax.constants(cond), [*cond_consts, *carry], for_cond)[0]

        def step(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
            own, carry = state
            after = self.run(body, _jax.constants(body), [*body_consts, *carry], for_body)
            carry = [_where_still(own, new, old) for new, old in zip(after, carry, strict=True)]
            return goes_on(carry), carry

        state = lax.while_loop(lambda state: any_replica(axes, jnp.any(state[0])), step, (goes_on(carry), carry))
        return list(state[1])

    def _divergent_cond(self, eqn: Equation, args: list[Any], varying: list[Varying]) -> list[Any]:
        """A choice that replicas make differently, and that communicates: all run every branch, as in ``vmap``.

        Where derivative rules alone communicate, a replica adds nothing to the derivatives of branches that it has not
        taken: see https://github.com/jax-ml/jax/issues/1052 for how ``vmap`` sees to that.
        """
        index, *operands = args
        by_rules = not varying[0] & self._awaited(eqn, in_rules=False)
        results = []
        for k, (branch, ops) in enumerate(zip(_jax.sub_jaxprs(eqn), self.analysis.operands(eqn, varying), strict=True)):
            own = [_where_taken(index == k, x) for x in operands] if by_rules else operands
            results.append(self.run(branch, _jax.constants(branch), own, ops))
        return [lax.select_n(index, *cases) if len(cases) > 1 else cases[0] for cases in zip(*results, strict=True)]

    def _guarded(self, eqn: Equation, args: list[Any]) -> list[Any]:
        """A callback of the user's that each replica makes once."""
        (runs,) = runs_here(self.scope)
        results = _jax.bind_callback_where(eqn, args, runs)
        for name in self.scope.copies:  # zeros where it was not made
            results = [_primitives.total(x, name) for x in results]
        return results


def one_value(axis: LogicalAxis, y: Any, *, by_replica: bool) -> Any:
    """The result that is equal in all replicas, or whose first is meant.

    Args:
        axis: The mapped axis.
        y: The result, as one replica has it.
        by_replica: Whether it matters which replica gets which part of a cotangent: to derivative rules of the
            user's, and where the replicas differ. Each gets one of N equal parts.
    """
    if by_replica and axis.physical and jnp.issubdtype(jnp.result_type(y), jnp.inexact):
        return equal_value(axis, lane_by_lane([axis], y))
    return any_lane(axis, y)


def _joined(x: Any) -> Any:
    return x.join() if isinstance(x, Part) else x


def _where_taken(taken: Any, x: Any) -> Any:
    """``x``, a constant to derivatives where the branch is not taken."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return x
    return lax.select_n(taken, lax.stop_gradient(x), x)


def _where_still(goes_on: Any, new: Any, old: Any) -> Any:
    """``new`` in the loops that go on. A loop under a vmap of the user's has a condition for each of its rows."""
    return lax.select_n(lax.broadcast_in_dim(goes_on, new.shape, range(goes_on.ndim)), old, new)


def _repeated(eqn: Equation, name: Hashable) -> str:
    entry = REGISTRY.get(eqn.primitive.name)
    return (
        f"{entry.called if entry else _jax.equation_name(eqn)} names the mapped axis {name!r} more than once, and a "
        f"replica has one place along it. Name each axis once, as in {name!r} or ({name!r}, 'another')."
    )
