"""The rule of ``lanes="auto"``: reads off a program how many lanes a CPU runs at once.

The rule is about loops and branches whose predicate differs between lanes. Vectorized, such a loop runs until the last
lane is done, such a branch runs both sides, and both select between whole values. But each operation also has a fixed
cost, which vectorized lanes share. So one lane after the other is the fastest if the time goes into large values, and a
few lanes at once if two thirds of it go into small ones. docs/lanes.md has the measurements behind the numbers below.

Convolutions of which each lane has its own inputs and its own kernel, as in gradients, count like such loops: XLA has
no fast kernels for those of all lanes at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.lanes.plan import VECTORIZED, Lanes
from replicax._engine.varying import NOWHERE, Analysis, Varying
from replicax._jax import Equation, Jaxpr
from replicax._layout.layout import LogicalAxis
from replicax._typing import Atom

#: Values with fewer elements are small, and the best number of lanes at once if most of the time goes into these; None
#: for all. Up to twice this number of lanes run all at once.
SMALL, FEW = (32, 32) if _jax.SMALL_LANES_GAIN else (2, VECTORIZED)

#: The fixed cost of an operation, in elements.
OPERATION = 64

#: The number of multiplications and additions of a product that cost as much as one element of other operations.
PER_ELEMENT = 16

#: A convolution whose inputs and kernel both differ between lanes is slow if it is vectorized: it counts so many times
#: if it has at least so many multiplications.
LARGE_CONVOLUTION, VECTORIZED_CONVOLUTION = 2**15, 4

#: The cost of a read or write of many lanes, each at its own index, in elements.
OWN_INDEX = 1000

#: The assumed number of iterations of a ``while_loop``.
TRIPS = 16

_INDEXED = {"dynamic_slice", "dynamic_update_slice", "gather", "scatter", "scatter-add", "scatter-mul"}


@dataclass
class _Cost:
    """The cost of a part of a program for one lane, in elements.

    Attributes:
        other: The cost outside of loops and branches whose predicate differs between lanes.
        small: The cost inside of these, for small values.
        large: The same for large values.
    """

    other: float = 0.0
    small: float = 0.0
    large: float = 0.0

    def add(self, cost: _Cost, times: float = 1.0) -> None:
        self.other += times * cost.other
        self.small += times * cost.small
        self.large += times * cost.large

    @property
    def differs(self) -> float:
        """The cost inside of loops and branches whose predicate differs between lanes."""
        return self.small + self.large


@dataclass
class LaneRule:
    """The rule, for one mapped axis.

    Attributes:
        analysis: Finds the predicates that differ between lanes.
        axis: The mapped axis.
        is_local: Whether a lane can run an equation of the program without the others.
    """

    analysis: Analysis
    axis: LogicalAxis
    is_local: Callable[[Equation], bool]
    _known: dict[tuple[int, tuple[Varying, ...], bool], tuple[Jaxpr, _Cost]] = field(default_factory=dict)

    #: The primitives that the rule looks for. In programs without them, all lanes run at once.
    RELEVANT: ClassVar = frozenset({"while", "cond", "conv_general_dilated"})

    def lanes(self, jaxpr: Jaxpr, varying: Sequence[Varying]) -> Lanes:
        """Returns how many lanes a CPU runs at once.

        Args:
            jaxpr: The program of one replica.
            varying: The mapped axes over which each argument varies.
        """
        total = self._cost(jaxpr, varying, differs=False)
        if total.differs <= total.other:
            return VECTORIZED
        return few_of(self.axis.lanes) if total.small > 2 * total.large else 1

    def _cost(self, jaxpr: Jaxpr, varying: Sequence[Varying], *, differs: bool) -> _Cost:
        key = id(jaxpr), tuple(varying), differs
        if key not in self._known:
            total, where = _Cost(), self.analysis.values(jaxpr, varying)
            for eqn in _jax.body(jaxpr).eqns:
                total.add(self._of_equation(eqn, _operands(eqn, where), differs=differs))
            self._known[key] = jaxpr, total  # keep the jaxpr alive: its id is the key
        return self._known[key][1]

    def _of_equation(self, eqn: Equation, varying: list[Varying], *, differs: bool) -> _Cost:
        subs = list(_jax.sub_jaxprs(eqn))
        if primitives.is_nested_map(eqn) or not any(self.axis in where for where in varying):
            return _Cost()  # all lanes run it at once, or one for all of them
        if not subs:
            return self._of_leaf(eqn, varying, differs=differs)
        apart = self.axis in self.analysis.predicate(eqn, varying)
        if apart and not self.is_local(eqn):
            return _Cost()  # all lanes run it at once
        differs = differs or apart
        parts = zip(subs, self.analysis.operands(eqn, varying), strict=True)
        costs = [self._cost(sub, operands, differs=differs) for sub, operands in parts]
        total = _Cost()
        if eqn.primitive.name == "cond":
            total.add(max(costs, key=lambda cost: cost.other + cost.differs))
        else:
            times = {"while": TRIPS, "scan": eqn.params.get("length")}.get(eqn.primitive.name) or 1
            for cost in costs:
                total.add(cost, times)
            if eqn.primitive.name == "while" and differs:  # vectorized, each iteration selects the old or the new carry
                total.add(_priced(sum(_elements(x) for x in eqn.outvars), differs=True), times)
        return total

    def _of_leaf(self, eqn: Equation, varying: Sequence[Varying], *, differs: bool) -> _Cost:
        size = sum(map(_elements, eqn.outvars))
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                summed = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
                alone = [
                    _elements(x) / summed for x, where in zip(eqn.invars, varying, strict=True) if self.axis in where
                ]
                # A product with a matrix that all lanes share is faster for many rows.
                width = alone[0] if len(alone) == 1 else size
                return _priced(2 * size * summed / PER_ELEMENT, differs=differs, width=width)
            case "conv_general_dilated":
                kernel, numbers = eqn.invars[1], eqn.params["dimension_numbers"]
                products = size * _elements(kernel) / max(1, kernel.aval.shape[numbers.rhs_spec[0]])
                if products >= LARGE_CONVOLUTION and all(self.axis in where for where in varying):
                    return _priced(VECTORIZED_CONVOLUTION * 2 * products / PER_ELEMENT, differs=True)
                return _priced(2 * products / PER_ELEMENT, differs=differs)
            case name if name in _INDEXED and any(self.axis in where for where in varying[1:]):
                return _priced(OWN_INDEX + size, differs=differs)
        return _priced(max(size, *map(_elements, eqn.invars), 1), differs=differs)


def few_of(lanes: int) -> Lanes:
    """Returns how many of so many lanes with small values to run at once, if possible a number that divides them."""
    if FEW is None or lanes <= 2 * FEW:
        return VECTORIZED
    return next((k for k in (FEW, FEW * 3 // 4, FEW // 2) if lanes % k == 0), FEW)


def _operands(eqn: Equation, where: Mapping[Atom, Varying]) -> list[Varying]:
    """The mapped axes over which each operand of an equation varies."""
    return [NOWHERE if _jax.is_literal(atom) else where[atom] for atom in eqn.invars]


def _priced(elements: float, *, differs: bool, width: float | None = None) -> _Cost:
    cost = OPERATION + elements
    if not differs:
        return _Cost(other=cost)
    return _Cost(small=cost) if (elements if width is None else width) < SMALL else _Cost(large=cost)


def _elements(atom: Atom) -> int:
    return math.prod(getattr(atom.aval, "shape", ()))
