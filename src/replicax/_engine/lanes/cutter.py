"""Cuts the program of one replica at its collectives into segments.

Loops and branches with collectives inside are cut, too, if all lanes run them in the same way. Else they run on all
lanes at once, like other collectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.blocks import is_narrow
from replicax._engine.collectives import AWAITING, REGISTRY, Result
from replicax._engine.communication import NESTED_DERIVATIVES
from replicax._engine.lanes.loops import cut_equation
from replicax._engine.lanes.plan import LanePlan
from replicax._engine.lanes.segments import Cut, CutEquation, Part, Segment, read_by, variables
from replicax._engine.primitives import callbacks as callback_primitives
from replicax._engine.reductions import MAX, MIN, SUM
from replicax._jax import Equation, Jaxpr
from replicax._layout.layout import LogicalAxis, Scope
from replicax._typing import Atom

#: The collectives whose result can be accumulated lane by lane.
REDUCTIONS = {"psum": SUM, "psum_invariant": SUM, "pmax": MAX, "pmin": MIN}


class Cutter:
    """Cuts programs at the collectives over one mapped axis.

    Args:
        scope: The mapped axes in scope.
        one_lane: Whether a segment runs one lane at a time, and not several.
    """

    def __init__(self, scope: Scope, *, one_lane: bool) -> None:
        self._scope, self._axis, self._one_lane = scope, scope.axes[-1], one_lane
        self._differentiated = not _jax.eager()  # an eager call is not differentiated from outside
        self._known: dict[tuple[int, int], tuple[Jaxpr, bool]] = {}
        self._parts: dict[tuple[int, tuple[bool, ...]], tuple[Jaxpr, Part]] = {}

    def inlined(self, jaxpr: Jaxpr) -> Jaxpr:
        """Returns the open jaxpr, with the user's ``jit`` calls that communicate inlined."""
        return _jax.inline(jaxpr, lambda eqn: not self.is_local(eqn))

    def cut(self, jaxpr: Jaxpr, mapped: Sequence[bool]) -> Cut:
        """Cuts an open jaxpr. Each equation is in the first segment in which its operands are known.

        An equation with equal results in all lanes is in the first segment that reads them: so XLA can compile it
        together with what reads them, and its results don't take memory before.

        Args:
            jaxpr: The program of one replica.
            mapped: Whether each argument has one value for each lane.
        """
        # The segment in which a variable can be read by a lane, and before which it can be read by all lanes.
        inside = dict.fromkeys((*jaxpr.constvars, *jaxpr.invars), 0)
        outside = dict(inside)
        stacked = {var for var, own in zip(jaxpr.invars, mapped, strict=True) if own}
        segments, whole, equal, reduced = [Segment()], list[Equation](), list[Equation](), 0
        inside_of = dict[int, CutEquation]()

        def segment(index: int) -> Segment:
            segments.extend(Segment() for _ in range(index + 1 - len(segments)))
            return segments[index]

        for eqn in jaxpr.eqns:
            operands = [atom for atom in eqn.invars if not _jax.is_literal(atom)]
            local = self.is_local(eqn) and not _combines_a_batch(eqn)
            varies = any(atom in stacked for atom in operands)
            if local and varies:
                at = max(inside[atom] for atom in operands)
                segment(at).eqns.append(eqn)
                known, read = at, at + 1
                stacked.update(eqn.outvars)
            elif self._is_reduction(eqn) and operands and outside[operands[0]] > inside[operands[0]]:
                at = inside[operands[0]]
                segment(at).sums.append(eqn)
                known = read = at + 1
                reduced += 1
            else:
                known = read = max((outside[atom] for atom in operands), default=0)
                segment(known).before.append(eqn)
                if local:
                    equal.append(eqn)
                else:
                    whole.append(eqn)
                    own = [True] * len(eqn.outvars)
                    if (found := self._cut_inside(eqn, stacked)) is not None:
                        inside_of[id(eqn)], own = found, list(found.stacked)
                    elif self._is_equal(eqn):
                        own = [False] * len(eqn.outvars)
                    stacked.update(var for var, is_stacked in zip(eqn.outvars, own, strict=True) if is_stacked)
            segment(read)
            inside.update(dict.fromkeys(eqn.outvars, known))
            outside.update(dict.fromkeys(eqn.outvars, read))
        _put_off(equal, segments, jaxpr)
        _find_results(segments, jaxpr.outvars)
        return Cut(segments, stacked, reduced, whole, inside_of)

    def _cut_inside(self, eqn: Equation, stacked: set[Atom]) -> CutEquation | None:
        """Cuts the jaxprs of a loop or branch that communicates, if all lanes run it in the same way."""

        def cut(jaxpr: Jaxpr, mapped: Sequence[bool]) -> Part:
            key = id(jaxpr), tuple(mapped)
            if key not in self._parts:
                inlined = self.inlined(jaxpr)
                part = Part(inlined, _jax.constants(jaxpr), mapped, self.cut(inlined, mapped))
                self._parts[key] = jaxpr, part  # keep the jaxpr alive: its id is the key
            return self._parts[key][1]

        if self._axis.ordered or not any(True for _ in _jax.sub_jaxprs(eqn)):
            return None  # an ordered axis cuts the loops of all replicas, also those that they run differently
        mapped = [not _jax.is_literal(atom) and atom in stacked for atom in eqn.invars]
        return cut_equation(eqn, mapped, cut, differentiated=self._differentiated)

    def plan(self, cut: Cut, chunk: int) -> LanePlan:
        """Describes how the lanes of a device run a program that is cut."""
        parts = sum(bool(segment.eqns) for segment in cut.segments)
        found = LanePlan(self._axis.lanes, chunk, parts, cut.reduced, (), 0)
        for eqn in cut.whole:
            if id(eqn) in cut.inside:
                for part in cut.inside[id(eqn)].parts:
                    found += self.plan(part.cut, chunk)
            elif any(True for _ in _jax.sub_jaxprs(eqn)) or not _jax.named_axes(eqn):
                deeper = _collectives_inside(eqn, self._axis)
                found += LanePlan(self._axis.lanes, chunk, 0, 0, (_jax.equation_name(eqn),), deeper)
            else:
                found += LanePlan(self._axis.lanes, chunk, 0, 1, (), 0)
        return found

    def is_local(self, eqn: Equation, depth: int = NESTED_DERIVATIVES) -> bool:
        """Whether a lane can run the equation without the others, at any depth."""
        if (
            primitives.is_nested_map(eqn)
            or callback_primitives.is_guarded(eqn)
            or _jax.has_side_effect(eqn)
            or eqn.primitive.name in AWAITING
            or any(name in self._scope for name in _jax.named_axes(eqn))
            or (not self._one_lane and _jax.draws_batches(eqn))
        ):
            return False
        if _jax.derivative_rules(eqn) and not self._has_local_rules(eqn, depth):
            return False
        return all(self._is_local_jaxpr(sub, depth) for sub in _jax.sub_jaxprs(eqn))

    def _has_local_rules(self, eqn: Equation, depth: int) -> bool:
        if not self._differentiated or depth == 0:
            return True
        if "custom_vjp" in eqn.primitive.name and self._axis.padding:
            return False  # its reverse rule runs for padding lanes, too, and may return NaN there
        try:
            with _jax.axis_env({axis.name: axis.size for axis in self._scope.axes}):
                return all(self._is_local_jaxpr(rule, depth - 1) for rule in _jax.rule_jaxprs(eqn))
        except Exception:  # the user's rule raised. If JAX calls the rule later, the user sees the error
            return False

    def _is_local_jaxpr(self, jaxpr: Jaxpr, depth: int) -> bool:
        key = id(jaxpr), depth
        if key not in self._known:
            local = all(self.is_local(eqn, depth) for eqn in _jax.body(jaxpr).eqns)
            self._known[key] = jaxpr, local  # keep the jaxpr alive: its id is the key
        return self._known[key][1]

    def _is_reduction(self, eqn: Equation) -> bool:
        """Whether the equation is a sum or an extremum over all replicas that can be accumulated lane by lane."""
        which = REDUCTIONS.get(eqn.primitive.name)
        if which is None or len(eqn.invars) != 1 or eqn.params.get("axis_index_groups") is not None:
            return False
        dtype = eqn.invars[0].aval.dtype
        if self._axis.ordered and which is not SUM and jnp.issubdtype(dtype, jnp.floating):
            return False  # lax.max of -0.0 and 0.0 depends on their order
        simple = not is_narrow(dtype, 4) and (which is SUM or not jnp.issubdtype(dtype, jnp.complexfloating))
        return simple and tuple(eqn.params["axes"]) == (self._axis.name,)

    def _is_equal(self, eqn: Equation) -> bool:
        """Whether the result of a collective is one value for all lanes."""
        if _combines_a_batch(eqn):
            return True
        entry = REGISTRY.get(eqn.primitive.name)
        names = [name for name in _jax.named_axes(eqn) if name in self._scope]
        return (
            entry is not None and names == [self._axis.name] and (entry.result(eqn.params, self._scope) is Result.EQUAL)
        )


def _collectives_inside(eqn: Equation, axis: LogicalAxis) -> int:
    """The number of collectives over the axis inside of an equation."""
    inner = [each for sub in _jax.sub_jaxprs(eqn) for each in _jax.body(sub).eqns]
    return sum(axis.name in _jax.named_axes(each) or _collectives_inside(each, axis) for each in inner)


def _combines_a_batch(eqn: Equation) -> bool:
    """Whether the equation reduces over the ``vmap`` around it, as ``unvmap_any`` of equinox does.

    A lane that runs alone is its own batch. But equinox calls back into Python where the result is true, and JAX cannot
    batch that callback, so the result must be one for all lanes.
    """
    return eqn.primitive.name.startswith("unvmap_")


def _put_off(equations: Sequence[Equation], segments: Sequence[Segment], jaxpr: Jaxpr) -> None:
    """Moves equations that run before a segment to the first segment that reads their results."""
    movable, first, moved = set(map(id, equations)), dict[Atom, int](), dict[int, int]()
    for index, segment in reversed(list(enumerate(segments))):
        first.update(dict.fromkeys(read_by([*segment.eqns, *segment.sums]), index))
        for eqn in reversed(segment.before):
            at = index
            if id(eqn) in movable:
                at = moved[id(eqn)] = min((first.get(var, len(segments) - 1) for var in eqn.outvars), default=index)
            for atom in variables(eqn.invars):
                first[atom] = min(at, first.get(atom, at))
    where = {id(eqn): index for index, segment in enumerate(segments) for eqn in segment.before} | moved
    for segment in segments:
        segment.before = []
    for eqn in jaxpr.eqns:
        if id(eqn) in where:
            segments[where[id(eqn)]].before.append(eqn)


def _find_results(segments: Sequence[Segment], outvars: Sequence[Atom]) -> None:
    """Finds the values of each segment that are read outside of it."""
    made = {var: segment for segment in segments for eqn in segment.eqns for var in eqn.outvars}
    wanted: dict[Atom, None] = {}
    for segment in segments:
        wanted.update(dict.fromkeys(segment.reads()))
        wanted.update((atom, None) for eqn in segment.before for atom in eqn.invars if not _jax.is_literal(atom))
    wanted.update((atom, None) for atom in outvars if not _jax.is_literal(atom))
    for atom in wanted:
        if atom in made:
            made[atom].results.append(atom)
