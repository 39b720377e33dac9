"""Runs the lanes of a device one after the other, or a few at a time, instead of all at once.

The program is cut at its collectives into segments. A segment is a ``scan`` over the lanes: each lane runs its own
loop trips and takes its own branches, and only the values that something outside of the segment reads are stacked. A
value that only a ``psum``, ``pmax`` or ``pmin`` reads is reduced in the carry of the scan, so a sum of gradients is
accumulated, and devices communicate once. Values that are equal in all lanes are computed once.

Loops and branches with collectives inside are cut, too, if all lanes run them in the same way. Else they run on all
lanes at once, like other collectives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replicax import _jax
from replicax._engine import ordered, primitives
from replicax._engine.blocks import as_unbatched, is_narrow, without_folding
from replicax._engine.collectives import AWAITING, REGISTRY, Result, where_replica
from replicax._engine.communication import NESTED_DERIVATIVES
from replicax._engine.cut_loops import cut_equation, run_cut_equation
from replicax._engine.cuts import Cut, CutEquation, LanePlan, Part, Segment
from replicax._engine.levels import over_lanes
from replicax._engine.primitives import callbacks as callback_primitives
from replicax._engine.reductions import MAX, MIN, SUM, Reduction, without_derivative
from replicax._engine.varying import NOWHERE, Varying
from replicax._jax import Equation, Jaxpr
from replicax._layout.layout import LogicalAxis, Scope
from replicax._typing import Array, ArrayLike, Atom

#: Runs an equation on all lanes, inside the ``vmap`` over lanes.
RunOnLanes = Callable[[Equation, Sequence[ArrayLike]], Sequence[ArrayLike]]

RunJaxprOnLanes = Callable[[Jaxpr, Sequence[Varying]], RunOnLanes]

#: Runs an equation that does not communicate.
Bind = Callable[[Equation, Sequence[ArrayLike]], list[Array]]

#: Runs a segment on the values of one lane. Returns its results, and what it adds to each reduction.
OneLane = Callable[..., tuple[list[Array], list[Array]]]


_REDUCTIONS = {"psum": SUM, "psum_invariant": SUM, "pmax": MAX, "pmin": MIN}


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
        which = _REDUCTIONS.get(eqn.primitive.name)
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
        first.update(dict.fromkeys(_read_by([*segment.eqns, *segment.sums]), index))
        for eqn in reversed(segment.before):
            at = index
            if id(eqn) in movable:
                at = moved[id(eqn)] = min((first.get(var, len(segments) - 1) for var in eqn.outvars), default=index)
            for atom in _variables(eqn.invars):
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


class LanesInSegments:
    """Runs a program that is cut, on the lanes of one device.

    Args:
        cut: The program.
        axis: The mapped axis.
        chunk: The number of lanes that a segment runs at once.
        on_lanes: Returns what runs the equations of a jaxpr that communicate, inside the ``vmap`` over lanes, given
            the mapped axes over which each argument of the jaxpr varies.
        bind: Runs the other equations.
        varying: The mapped axes over which each argument of the program varies.
    """

    def __init__(
        self,
        cut: Cut,
        axis: LogicalAxis,
        chunk: int,
        on_lanes: RunJaxprOnLanes,
        bind: Bind,
        varying: Sequence[Varying],
    ) -> None:
        self._cut, self._axis, self._chunk = cut, axis, chunk
        self._on_lanes, self._bind, self._varying = on_lanes, bind, varying

    def run(self, jaxpr: Jaxpr, consts: Sequence[ArrayLike], args: Sequence[Array]) -> list[ArrayLike]:
        """Runs the program.

        Args:
            jaxpr: The program that was cut.
            consts: The values of its constants.
            args: Its arguments, those with a value for each lane as ``(lanes, ...)``.

        Returns:
            The value of each result, ``(lanes, ...)`` where it is stacked.
        """
        values: dict[Atom, ArrayLike] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        communicating = set(map(id, self._cut.whole))
        for segment in self._cut.segments:
            for alone, eqns in itertools.groupby(segment.before, lambda eqn: id(eqn) not in communicating):
                run = self._before if alone else self._communicating
                values.update(run(list(eqns), values, jaxpr))
            if segment.eqns:
                values.update(self._scan(segment, values))
        return [_read(values, atom) for atom in jaxpr.outvars]

    def _communicating(
        self, eqns: Sequence[Equation], values: dict[Atom, ArrayLike], jaxpr: Jaxpr
    ) -> dict[Atom, ArrayLike]:
        """Runs equations that communicate. Returns all values."""
        for eqn in eqns:
            values.update(zip(eqn.outvars, self._all_lanes(jaxpr, eqn, values), strict=True))
        return values

    def _before(self, eqns: Sequence[Equation], values: dict[Atom, ArrayLike], jaxpr: Jaxpr) -> dict[Atom, ArrayLike]:
        """Runs equations whose results are equal in all lanes. Returns all values, or those that others read."""
        if not self._axis.ordered:
            return self._run_equations(eqns, values)
        own = {var: None for eqn in eqns for var in eqn.outvars}
        read = list(dict.fromkeys(atom for atom in _read_by(eqns) if atom not in own))
        here = set(map(id, eqns))
        elsewhere = {*_read_by(eqn for eqn in jaxpr.eqns if id(eqn) not in here), *_variables(jaxpr.outvars)}
        wanted = [atom for atom in own if atom in elsewhere]

        def run(*args: Array) -> list[Array]:
            found = self._run_equations(eqns, dict(zip(read, args, strict=True)))
            return [found[atom] for atom in wanted]

        return dict(zip(wanted, ordered.apart(run, [values[atom] for atom in read]), strict=True))

    def _run_equations(self, eqns: Sequence[Equation], values: dict[Atom, ArrayLike]) -> dict[Atom, ArrayLike]:
        """Runs equations that do not communicate. Returns all values."""
        for eqn in eqns:
            with _jax.equation_context(eqn):
                results = self._bind(eqn, [_read(values, atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, results, strict=True))
        return values

    def is_stacked(self, atom: Atom) -> bool:
        """Whether a variable has one value for each lane."""
        return not _jax.is_literal(atom) and atom in self._cut.stacked

    def _all_lanes(self, jaxpr: Jaxpr, eqn: Equation, values: Mapping[Atom, ArrayLike]) -> Sequence[Array]:
        """Runs an equation of a jaxpr that communicates."""
        if id(eqn) in self._cut.inside:
            with _jax.equation_context(eqn):
                operands = [_read(values, atom) for atom in eqn.invars]
                return run_cut_equation(self._cut.inside[id(eqn)], operands, self._axis.lanes, self._run_part)
        on_lanes = self._on_lanes(jaxpr, self._varying)
        stacked = [self.is_stacked(var) for var in eqn.outvars]

        def one_lane(*operands: Array) -> tuple[Array, ...]:
            with _jax.equation_context(eqn):
                results = on_lanes(eqn, operands)
            return tuple(y if own else as_unbatched(self._axis, y) for y, own in zip(results, stacked, strict=True))

        in_axes = [0 if self.is_stacked(atom) else None for atom in eqn.invars]
        outs = [0 if own else None for own in stacked]
        return over_lanes(one_lane, self._axis, in_axes, outs)(*(_read(values, atom) for atom in eqn.invars))

    def _run_part(self, part: Part, args: Sequence[ArrayLike]) -> list[ArrayLike]:
        """Runs a jaxpr inside of an equation."""
        varying = [frozenset({self._axis}) if own else NOWHERE for own in part.mapped]
        inside = LanesInSegments(part.cut, self._axis, self._chunk, self._on_lanes, self._bind, varying)
        return inside.run(part.jaxpr, part.consts, list(map(jnp.asarray, args)))

    def _scan(self, segment: Segment, values: Mapping[Atom, ArrayLike]) -> dict[Atom, Array]:
        """Runs a segment on all lanes, and returns its results and its reductions."""
        lanes, chunk = self._axis.lanes, self._chunk
        stacked = [atom for atom in segment.reads() if atom in self._cut.stacked]
        rows = [jnp.asarray(values[atom]) for atom in stacked]
        real = [] if not self._axis.padding else [self._is_real()]
        shared = {atom: values[atom] for atom in segment.reads() if atom not in self._cut.stacked}
        sums = [_Accumulated.of(eqn, self._axis) for eqn in segment.sums]

        def one_lane(*own: Array) -> tuple[list[Array], list[Array]]:
            found = self._run_equations(segment.eqns, shared | dict(zip(stacked, own, strict=False)))
            # Of the values of padding lanes, which copy a replica, only sums must not see any.
            added = [each.operand(_read(found, each.eqn.invars[0]), *own[len(stacked) :]) for each in sums]
            return [found[atom] for atom in segment.results], added

        # A derivative from outside saves the arguments of a lane, and not all of its values.
        one_lane = jax.checkpoint(one_lane, prevent_cse=False)

        if self._axis.ordered:
            return self._scan_in_order(segment, sums, one_lane, [*rows, *real])

        def step(totals: list[Array], own: Sequence[Array]) -> tuple[list[Array], list[Array]]:
            results, added = one_lane(*own) if chunk == 1 else jax.vmap(one_lane)(*own)
            if chunk != 1:
                added = [each.over_rows(x) for each, x in zip(sums, added, strict=True)]
            return [each.which.combine(a, b) for each, a, b in zip(sums, totals, added, strict=True)], results

        totals = [each.initial() for each in sums]
        rest = lanes % chunk
        if chunk == 1:
            totals, made = lax.scan(step, totals, [*rows, *real])
        else:
            chunks = [x[: lanes - rest].reshape(lanes // chunk, chunk, *x.shape[1:]) for x in (*rows, *real)]
            totals, made = lax.scan(step, totals, chunks)
            made = [x.reshape(lanes - rest, *x.shape[2:]) for x in made]
        if rest:
            totals, last = step(totals, [x[lanes - rest :] for x in (*rows, *real)])
            made = [jnp.concatenate(parts) for parts in zip(made, last, strict=True)]
        found = dict(zip(segment.results, made, strict=True))
        return found | {
            each.eqn.outvars[0]: each.of_devices(x, self._axis) for each, x in zip(sums, totals, strict=True)
        }

    def _scan_in_order(
        self, segment: Segment, sums: Sequence[_Accumulated], one_lane: OneLane, rows: Sequence[Array]
    ) -> dict[Atom, Array]:
        """Runs a segment like :meth:`_scan`, and adds floats in the order of the tree over all replicas."""
        axis, shapes = self._axis, [each.eqn.invars[0].aval.shape for each in sums]
        tree = [k for k, each in enumerate(sums) if each.in_order]
        rest = [k for k in range(len(sums)) if k not in tree]
        partials = [ordered.no_lanes(axis, shapes[k], sums[k].dtype) for k in tree]
        totals = [sums[k].initial() for k in rest]

        def step(
            state: tuple[list[Array], list[Array]], own: Sequence[Array], lane: Array
        ) -> tuple[tuple[list[Array], list[Array]], list[Array]]:
            partials, totals = state
            results, added = one_lane(*own)
            totals = [sums[k].which.combine(total, added[k]) for k, total in zip(rest, totals, strict=True)]
            return (ordered.with_lane(axis, partials, [added[k] for k in tree], lane), totals), results

        (partials, totals), made = ordered.each_lane(axis, step, (partials, totals), rows)
        found = dict(zip(segment.results, made, strict=True))
        for k, total in zip(tree, ordered.of_devices(axis, partials), strict=True):
            found[sums[k].eqn.outvars[0]] = total.astype(sums[k].eqn.outvars[0].aval.dtype)
        return found | {sums[k].eqn.outvars[0]: sums[k].of_devices(x, axis) for k, x in zip(rest, totals, strict=True)}

    def _is_real(self) -> Array:
        """Whether each lane of this device runs a replica, and is not padding."""
        return over_lanes(lambda: (where_replica([self._axis], jnp.bool_(True)),), self._axis, [], [0])()[0]


@dataclass(frozen=True)
class _Accumulated:
    """A reduction that is accumulated over lanes.

    Attributes:
        eqn: The equation of the collective.
        which: The reduction.
        in_order: Whether it is added in the order of the tree over all replicas, which has no place for padding.
    """

    eqn: Equation
    which: Reduction
    in_order: bool

    @classmethod
    def of(cls, eqn: Equation, axis: LogicalAxis) -> _Accumulated:
        REGISTRY[eqn.primitive.name].known(eqn.params)
        which = _REDUCTIONS[eqn.primitive.name]
        in_order = axis.ordered and which is SUM and ordered.depends_on_order(eqn.invars[0].aval.dtype)
        return cls(eqn, which, in_order)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the total: sums of many 16-bit floats need more bits."""
        dtype = self.eqn.invars[0].aval.dtype
        return ordered.dtype_of_sum(dtype) if self.which is SUM else dtype

    def initial(self) -> Array:
        """The total of no lanes."""
        return self.which.identity(self.eqn.invars[0].aval.shape, self.dtype)

    def operand(self, x: ArrayLike, real: Array | None = None) -> Array:
        """What a lane adds. A padding lane adds zero to a sum; it does not change an extremum."""
        own = jnp.asarray(x).astype(self.dtype)
        if self.which is not SUM:
            return without_derivative(self.which.name, own)
        return own if real is None or self.in_order else jnp.where(real, own, jnp.zeros_like(own))

    def over_rows(self, x: Array) -> Array:
        """The total of several lanes, ``(lanes, ...)``."""
        return self.which.local(x, axis=0)

    def of_devices(self, total: Array, axis: LogicalAxis) -> Array:
        """The total of all devices."""
        own = total.astype(self.eqn.outvars[0].aval.dtype)
        with _jax.equation_context(self.eqn):
            if axis.device_axis is None:
                return own
            return without_folding(self.which.between(without_folding(own), (axis.device_axis,)))


def _variables(atoms: Iterable[Atom]) -> Iterator[Atom]:
    return (atom for atom in atoms if not _jax.is_literal(atom))


def _read_by(eqns: Iterable[Equation]) -> Iterator[Atom]:
    return (atom for eqn in eqns for atom in _variables(eqn.invars))


def _read(values: Mapping[Atom, ArrayLike], atom: Atom) -> ArrayLike:
    return atom.val if _jax.is_literal(atom) else values[atom]
