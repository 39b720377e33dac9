"""A forward analysis of a jaxpr: which values differ between replicas.

A value *varies* over a mapped axis if it depends on a mapped argument or on the replica's index, unless a collective
makes it equal in all replicas. In doubt, the analysis says that a value varies.

The analysis decides which results may have ``out_axes=None``. It also finds loops and branches whose predicate differs
between replicas. In these, all replicas must participate in every collective.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.collectives import REGISTRY, Result
from replicax._engine.primitives import callbacks as callback_primitives
from replicax._jax import Equation, Jaxpr
from replicax._layout.layout import LogicalAxis, Scope
from replicax._typing import Atom

#: The mapped axes over which a value varies.
Varying = frozenset[LogicalAxis]
NOWHERE: Varying = frozenset()


def union(varying: Sequence[Varying]) -> Varying:
    """Returns the mapped axes over which any of the values varies."""
    first, *others = varying or (NOWHERE,)
    return first if all(other is first for other in others) else first.union(*others)


class Analysis:
    """The analysis of one traced program. Each jaxpr is analysed once for each pattern of varying arguments.

    Args:
        scope: The mapped axes in scope.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self._inside: dict[tuple[Hashable, int], Analysis] = {}
        self._known: dict[tuple[int, tuple[Varying, ...]], tuple[Jaxpr, dict[Atom, Varying]]] = {}

    def inside(self, eqn: Equation) -> Analysis:
        """Returns the analysis of the program inside a nested map."""
        key = eqn.params["name"], eqn.params["size"]
        if key not in self._inside:
            self._inside[key] = Analysis(self.scope.enter(*key))
        return self._inside[key]

    def results(self, jaxpr: Jaxpr, args: Sequence[Varying]) -> list[Varying]:
        """Returns the axes over which each result of a jaxpr varies, given those of each argument."""
        known = self.values(jaxpr, args)
        return [NOWHERE if _jax.is_literal(atom) else known[atom] for atom in _jax.body(jaxpr).outvars]

    def values(self, jaxpr: Jaxpr, args: Sequence[Varying]) -> dict[Atom, Varying]:
        """Returns the axes over which each value in a jaxpr varies, given those of each argument."""
        key = (id(jaxpr), tuple(args))
        if key not in self._known:
            self._known[key] = (jaxpr, self._run(_jax.body(jaxpr), args))  # keep the jaxpr alive: its id is the key
        return self._known[key][1]

    def _run(self, jaxpr: Jaxpr, args: Sequence[Varying]) -> dict[Atom, Varying]:
        known = dict.fromkeys(jaxpr.constvars, NOWHERE) | dict(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            operands = [NOWHERE if _jax.is_literal(atom) else known[atom] for atom in eqn.invars]
            known.update(zip(eqn.outvars, self.equation(eqn, operands), strict=True))
        return known

    def equation(self, eqn: Equation, args: Sequence[Varying]) -> list[Varying]:
        """Returns the axes over which each result of an equation varies."""
        if callback_primitives.is_guarded(eqn):  # only its last result, a failure number, depends on args[0]
            return [*[union(args[1:])] * (len(eqn.outvars) - 1), union(args)]
        subs = list(_jax.sub_jaxprs(eqn))
        if primitives.is_nested_map(eqn):
            inside = self.inside(eqn)
            own = frozenset({inside.scope.axes[-1]})
            return [out - own for out in inside.results(subs[0], mapped(eqn, args, own))]
        if not subs:
            return [self._leaf(eqn, union(args))] * len(eqn.outvars)
        operands = self.operands(eqn, args)
        outs = [self.results(sub, ops) for sub, ops in zip(subs, operands, strict=True)]
        match eqn.primitive.name:
            case "while":
                return operands[1][eqn.params["body_nconsts"] :]
            case "cond":
                return [union([args[0], *results]) for results in zip(*outs, strict=True)]
            case "scan":
                return [*operands[0][_jax.loop_carry(eqn)], *outs[0][_jax.loop_counts(eqn)[1] :]]
        if len(subs) == 1 and len(outs[0]) == len(eqn.outvars):
            return outs[0]
        return [union([*args, *map(union, outs)])] * len(eqn.outvars)

    def operands(self, eqn: Equation, args: Sequence[Varying]) -> list[list[Varying]]:
        """Returns the axes over which each argument of each sub-jaxpr varies, in at least one iteration of a loop."""
        subs = list(_jax.sub_jaxprs(eqn))
        match eqn.primitive.name:
            case "cond":
                return [list(args[1:])] * len(subs)
            case "scan":
                return [self._scan(eqn, subs[0], args)]
            case "while":
                return self._while(eqn, args)
        if len(subs) == 1 and len(_jax.body(subs[0]).invars) == len(args):  # jit, remat, custom_jvp, custom_vjp, …
            return [list(args)]
        return [[union(args)] * len(_jax.body(sub).invars) for sub in subs]

    def _scan(self, eqn: Equation, step: Jaxpr, args: Sequence[Varying]) -> list[Varying]:
        operands, carry = list(args), _jax.loop_carry(eqn)
        while True:
            after = self.results(step, operands)
            grown = [a | b for a, b in zip(operands[carry], after, strict=False)]
            if grown == operands[carry]:
                return operands
            operands[carry] = grown

    def _while(self, eqn: Equation, args: Sequence[Varying]) -> list[list[Varying]]:
        cond, body = _jax.sub_jaxprs(eqn)
        cond_consts, body_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        for_cond, for_body = list(args[:cond_consts]), list(args[cond_consts : cond_consts + body_consts])
        carry = list(args[cond_consts + body_consts :])
        while True:
            # Replicas that leave the loop at different times have different carries.
            predicate = union(self.results(cond, for_cond + carry))
            after = self.results(body, for_body + carry)
            grown = [a | b | predicate for a, b in zip(carry, after, strict=True)]
            if grown == carry:
                return [for_cond + carry, for_body + carry]
            carry = grown

    def predicate(self, eqn: Equation, args: Sequence[Varying]) -> Varying:
        """Returns the axes over which the branch index of a ``cond``, or the condition of a ``while``, varies."""
        match eqn.primitive.name:
            case "cond":
                return args[0]
            case "while":
                cond, _ = _jax.sub_jaxprs(eqn)
                return union(self.results(cond, self.operands(eqn, args)[0]))
        return NOWHERE

    def _leaf(self, eqn: Equation, args: Varying) -> Varying:
        axes = {self.scope[name] for name in _jax.named_axes(eqn) if name in self.scope}
        if not axes:
            return args
        collective = REGISTRY.get(eqn.primitive.name)
        if collective is None:
            return args | axes
        match collective.result(eqn.params, self.scope):
            case Result.EQUAL:
                return args - axes
            case Result.AS_GIVEN:
                return args
        return args | axes


def mapped(eqn: Equation, args: Sequence[Varying], own: Varying) -> list[Varying]:
    """Returns the axes over which each argument of a nested map varies, inside the map."""
    return [a if axis is None else a | own for a, axis in zip(args, eqn.params["in_axes"], strict=True)]
