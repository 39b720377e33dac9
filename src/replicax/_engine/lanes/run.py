"""Runs the lanes of a device one after the other, or a few at a time, instead of all at once.

A segment is a ``scan`` over the lanes: each lane runs its own loop trips and takes its own branches, and only values
that something outside of the segment reads are stacked. A value that only a ``psum``, ``pmax`` or ``pmin`` reads is
reduced in the carry of the scan, so a sum of gradients is accumulated, and devices communicate once. Values that are
equal in all lanes are computed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replicax import _jax
from replicax._engine import ordered
from replicax._engine.blocks import as_unbatched, without_folding
from replicax._engine.collectives import REGISTRY, where_replica
from replicax._engine.lanes.cutter import REDUCTIONS
from replicax._engine.lanes.loops import run_cut_equation
from replicax._engine.lanes.segments import Cut, Part, Segment, read_by, variables
from replicax._engine.levels import over_lanes
from replicax._engine.reductions import SUM, Reduction, without_derivative
from replicax._engine.varying import NOWHERE, Varying
from replicax._jax import Equation, Jaxpr
from replicax._layout.layout import LogicalAxis
from replicax._typing import Array, ArrayLike, Atom

#: Runs an equation on all lanes, inside the ``vmap`` over lanes.
RunOnLanes = Callable[[Equation, Sequence[ArrayLike]], Sequence[ArrayLike]]

RunJaxprOnLanes = Callable[[Jaxpr, Sequence[Varying]], RunOnLanes]

#: Runs an equation that does not communicate.
Bind = Callable[[Equation, Sequence[ArrayLike]], list[Array]]

#: Runs a segment on the values of one lane. Returns its results, and what it adds to each reduction.
OneLane = Callable[..., tuple[list[Array], list[Array]]]


class SegmentRunner:
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
        read = list(dict.fromkeys(atom for atom in read_by(eqns) if atom not in own))
        here = set(map(id, eqns))
        elsewhere = {*read_by(eqn for eqn in jaxpr.eqns if id(eqn) not in here), *variables(jaxpr.outvars)}
        wanted = [atom for atom in own if atom in elsewhere]

        def run(*args: Array) -> list[Array]:
            found = self._run_equations(eqns, dict(zip(read, args, strict=True)))
            return [found[atom] for atom in wanted]

        return dict(zip(wanted, ordered.without_fusion(run, [values[atom] for atom in read]), strict=True))

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
        inside = SegmentRunner(part.cut, self._axis, self._chunk, self._on_lanes, self._bind, varying)
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
        which = REDUCTIONS[eqn.primitive.name]
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


def _read(values: Mapping[Atom, ArrayLike], atom: Atom) -> ArrayLike:
    return atom.val if _jax.is_literal(atom) else values[atom]
