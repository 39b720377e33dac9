"""What a program communicates: which of its equations have to change, and which replicas have to take part."""

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

#: So many derivatives of a program are provided for: a rule often calls its own function, and so on without an end.
TWICE = 2


class Communication:
    """Looks through a traced program, each jaxpr in it once.

    Args:
        scope: The mapped axes in scope.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self._inside: dict[tuple[Hashable, int], Communication] = {}
        self._changing: dict[int, tuple[Jaxpr, list[bool]]] = {}
        self._communicates: dict[int, tuple[Jaxpr, frozenset[LogicalAxis]]] = {}
        self._awaits: dict[tuple[int, int], tuple[Jaxpr, frozenset[LogicalAxis]]] = {}

    def inside(self, eqn: Equation) -> Communication:
        """That of the program of an inner map."""
        key = eqn.params["name"], eqn.params["size"]
        if key not in self._inside:
            self._inside[key] = Communication(self.scope.enter(*key))
        return self._inside[key]

    def changes(self, jaxpr: Jaxpr) -> list[bool]:
        """Which equations of a jaxpr have to be rewritten; the others are bound as they are."""
        if id(jaxpr) not in self._changing:
            self._changing[id(jaxpr)] = (jaxpr, list(map(self._change, _jax.body(jaxpr).eqns)))
        return self._changing[id(jaxpr)][1]

    def _change(self, eqn: Equation) -> bool:
        if primitives.is_nested_map(eqn) or _jax.derivative_rules(eqn) or callback_primitives.is_guarded(eqn):
            return True
        subs = list(_jax.sub_jaxprs(eqn))
        if subs:
            return any(any(self.changes(sub)) for sub in subs)
        if repeated := [name for name in _jax.repeated_axes(eqn) if name in self.scope]:
            raise CollectiveArgumentError(_repeated(eqn, repeated[0]))
        return (
            any(name in self.scope for name in _jax.named_axes(eqn))
            or (self.doubled and _jax.has_side_effect(eqn))
            or eqn.primitive.name in AWAITING
            or (self.vectorized and _jax.draws_batches(eqn))
        )

    def axes_inside(self, eqn: Equation) -> frozenset[LogicalAxis]:
        """The mapped axes that collectives anywhere inside the equation are over."""
        if primitives.is_nested_map(eqn):
            inside = self.inside(eqn)
            return inside.axes_of(*_jax.sub_jaxprs(eqn)) - {inside.scope.axes[-1]}
        return frozenset().union(*map(self.axes_of, _jax.sub_jaxprs(eqn)))

    def awaited(self, eqn: Equation, *, in_rules: int) -> frozenset[LogicalAxis]:
        """The mapped axes whose replicas a collective anywhere inside the equation waits for.

        With ``in_rules`` also one of a derivative rule inside, which runs if JAX differentiates so many times.
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
                if eqn.primitive.name != "axis_index":  # which waits for nobody
                    axes |= self._axes_named(eqn)
                if in_rules and _jax.derivative_rules(eqn):
                    axes |= self._awaited_in_rules(eqn, in_rules - 1)
            self._awaits[key] = (jaxpr, frozenset(axes))
        return self._awaits[key][1]

    def _awaited_in_rules(self, eqn: Equation, further: int) -> frozenset[LogicalAxis]:
        axes = self.scope.axes
        try:
            with _jax.axis_env({axis.name: axis.size for axis in axes}):
                rules = list(_jax.rule_jaxprs(eqn))
        except Exception:  # the user's, of a rule that JAX may never call; if it does, they see it then
            return frozenset(axes)
        return frozenset().union(*(self._awaited_in(rule, further) for rule in rules))

    def axes_of(self, jaxpr: Jaxpr) -> frozenset[LogicalAxis]:
        """The mapped axes that collectives anywhere in a jaxpr are over."""
        if id(jaxpr) not in self._communicates:
            axes: set[LogicalAxis] = set()
            for eqn in _jax.body(jaxpr).eqns:
                axes |= self.axes_inside(eqn) | self._axes_named(eqn)
            self._communicates[id(jaxpr)] = (jaxpr, frozenset(axes))
        return self._communicates[id(jaxpr)][1]

    def _axes_named(self, eqn: Equation) -> set[LogicalAxis]:
        """The mapped axes whose replicas have to take part in a collective.

        Where maps are nested, a permutation along one axis of the mesh is one of all devices to XLA.
        Workaround: permutations_of_a_part.
        """
        axes = {self.scope[name] for name in _jax.named_axes(eqn) if name in self.scope}
        entry = REGISTRY.get(eqn.primitive.name)
        by_groups = entry is not None and entry.by_groups and eqn.params.get("axis_index_groups") is None
        return axes if by_groups or not axes else set(self.scope.axes)

    @cached_property
    def doubled(self) -> bool:
        """Whether a replica runs more than once: in padding lanes, or on the devices of maps inside."""
        return any(axis.padding for axis in self.scope.axes) or bool(self.scope.copies)

    @cached_property
    def vectorized(self) -> bool:
        """Whether a device runs several replicas at once."""
        return any(axis.lane_axis is not None for axis in self.scope.axes)


def _repeated(eqn: Equation, name: Hashable) -> str:
    entry = REGISTRY.get(eqn.primitive.name)
    return (
        f"{entry.called if entry else _jax.equation_name(eqn)} names the mapped axis {name!r} more than once. Name "
        f"each axis once, as in {name!r} or ({name!r}, 'another')."
    )
