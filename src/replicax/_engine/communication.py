"""Analyses communication in a program: equations to rewrite, and axes whose replicas must participate."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.collectives import AWAITING, REGISTRY
from replicax._engine.primitives import callbacks as callback_primitives
from replicax._jax import Equation, Jaxpr
from replicax._layout.layout import LogicalAxis, Scope
from replicax.errors import CollectiveArgumentError

#: How many levels of derivative rules to search. A rule often calls its own function, so the search needs a limit.
NESTED_DERIVATIVES = 2


class Communication:
    """The analysis of the communication in one traced program. Each jaxpr is analysed once.

    Args:
        scope: The mapped axes in scope.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        # An eager call is not differentiated from outside, so JAX calls none of the derivative rules that are left.
        self.differentiated = not _jax.eager()
        self._inside: dict[tuple[Hashable, int], Communication] = {}
        self._changing: dict[int, tuple[Jaxpr, list[bool]]] = {}
        self._communicates: dict[int, tuple[Jaxpr, frozenset[LogicalAxis]]] = {}
        self._awaits: dict[tuple[int, int], tuple[Jaxpr, frozenset[LogicalAxis]]] = {}

    def inside(self, eqn: Equation) -> Communication:
        """Returns the analysis of the program inside a nested map."""
        key = eqn.params["name"], eqn.params["size"]
        if key not in self._inside:
            self._inside[key] = Communication(self.scope.enter(*key))
        return self._inside[key]

    def changes(self, jaxpr: Jaxpr) -> list[bool]:
        """Returns for each equation of a jaxpr whether it must be rewritten. Other equations are bound unchanged."""
        if id(jaxpr) not in self._changing:
            self._changing[id(jaxpr)] = (jaxpr, list(map(self.changes_equation, _jax.body(jaxpr).eqns)))
        return self._changing[id(jaxpr)][1]

    def changes_equation(self, eqn: Equation) -> bool:
        """Whether an equation must be rewritten."""
        if primitives.is_nested_map(eqn) or _jax.derivative_rules(eqn) or callback_primitives.is_guarded(eqn):
            return True
        subs = list(_jax.sub_jaxprs(eqn))
        if subs:
            return any(any(self.changes(sub)) for sub in subs)
        if repeated := [name for name in _jax.repeated_axes(eqn) if name in self.scope]:
            raise CollectiveArgumentError(_repeated(eqn, repeated[0]))
        return (
            any(name in self.scope for name in _jax.named_axes(eqn))
            or (self.runs_duplicates and _jax.has_side_effect(eqn))
            or eqn.primitive.name in AWAITING
            or (self.vectorized and _jax.draws_batches(eqn))
        )

    def axes_inside(self, eqn: Equation) -> frozenset[LogicalAxis]:
        """Returns the mapped axes that collectives inside the equation name, at any depth."""
        if primitives.is_nested_map(eqn):
            inside = self.inside(eqn)
            return inside.axes_of(*_jax.sub_jaxprs(eqn)) - {inside.scope.axes[-1]}
        return frozenset().union(*map(self.axes_of, _jax.sub_jaxprs(eqn)))

    def awaited(self, eqn: Equation, *, in_rules: int) -> frozenset[LogicalAxis]:
        """Returns the mapped axes whose replicas must all run the collectives inside the equation.

        Args:
            eqn: The equation.
            in_rules: How many levels of derivative rules to search, too; 0 for none.
        """
        if primitives.is_nested_map(eqn):
            inside, (jaxpr,) = self.inside(eqn), _jax.sub_jaxprs(eqn)
            return inside._awaited_in(jaxpr, in_rules) - {inside.scope.axes[-1]}
        return frozenset().union(*(self._awaited_in(sub, in_rules) for sub in _jax.sub_jaxprs(eqn)))

    def _awaited_in(self, jaxpr: Jaxpr, in_rules: int) -> frozenset[LogicalAxis]:
        key = id(jaxpr), in_rules
        if key not in self._awaits:
            axes: set[LogicalAxis] = set()
            for eqn in _jax.body(jaxpr).eqns:
                axes |= self.awaited(eqn, in_rules=in_rules)
                if eqn.primitive.name != "axis_index":  # axis_index does not communicate
                    axes |= self._axes_named(eqn)
                if in_rules and self.differentiated and _jax.derivative_rules(eqn):
                    axes |= self._awaited_in_rules(eqn, in_rules - 1)
            self._awaits[key] = (jaxpr, frozenset(axes))
        return self._awaits[key][1]

    def _awaited_in_rules(self, eqn: Equation, further: int) -> frozenset[LogicalAxis]:
        axes = self.scope.axes
        try:
            with _jax.axis_env({axis.name: axis.size for axis in axes}):
                rules = list(_jax.rule_jaxprs(eqn))
        except Exception:  # the user's rule raised. If JAX calls the rule later, the user sees the error
            return frozenset(axes)
        return frozenset().union(*(self._awaited_in(rule, further) for rule in rules))

    def axes_of(self, jaxpr: Jaxpr) -> frozenset[LogicalAxis]:
        """Returns the mapped axes that collectives in a jaxpr name, at any depth."""
        if id(jaxpr) not in self._communicates:
            axes: set[LogicalAxis] = set()
            for eqn in _jax.body(jaxpr).eqns:
                axes |= self.axes_inside(eqn) | self._axes_named(eqn)
            self._communicates[id(jaxpr)] = (jaxpr, frozenset(axes))
        return self._communicates[id(jaxpr)][1]

    def _axes_named(self, eqn: Equation) -> set[LogicalAxis]:
        """Returns the mapped axes whose replicas must all run a collective.

        With nested maps, XLA treats a permutation along one mesh axis as a permutation of all devices, so the
        replicas of all axes must run it. Workaround: permutations_of_a_part.
        """
        axes = {self.scope[name] for name in _jax.named_axes(eqn) if name in self.scope}
        entry = REGISTRY.get(eqn.primitive.name)
        by_groups = entry is not None and entry.by_groups and eqn.params.get("axis_index_groups") is None
        return axes if by_groups or not axes else set(self.scope.axes)

    @cached_property
    def runs_duplicates(self) -> bool:
        """Whether several lanes or devices run the same replica: padding lanes, or the devices of nested maps."""
        return any(axis.padding for axis in self.scope.axes) or bool(self.scope.copies)

    @cached_property
    def vectorized(self) -> bool:
        """Whether a device runs several replicas with ``vmap``."""
        return any(axis.lane_axis is not None for axis in self.scope.axes)


def _repeated(eqn: Equation, name: Hashable) -> str:
    entry = REGISTRY.get(eqn.primitive.name)
    return (
        f"{entry.called if entry else _jax.equation_name(eqn)} names the mapped axis {name!r} more than once. Name "
        f"each axis once, as in {name!r} or ({name!r}, 'another')."
    )
