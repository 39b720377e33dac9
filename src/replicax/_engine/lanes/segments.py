"""A program that is cut at its collectives into segments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from replicax import _jax
from replicax._jax import Equation, Jaxpr
from replicax._typing import ArrayLike, Atom


@dataclass
class Segment:
    """A part of a program.

    Attributes:
        before: Equations that run before the segment: on all lanes at once, or once for all lanes.
        eqns: The equations of one lane.
        sums: Reductions of values of this segment.
        results: The variables that are read outside of the segment, stacked over lanes.
    """

    before: list[Equation] = field(default_factory=list)
    eqns: list[Equation] = field(default_factory=list)
    sums: list[Equation] = field(default_factory=list)
    results: list[Atom] = field(default_factory=list)

    def reads(self) -> list[Atom]:
        """The variables that the equations of one lane read, and do not define."""
        own = {var for eqn in self.eqns for var in eqn.outvars}
        read = (atom for eqn in self.eqns for atom in eqn.invars if not _jax.is_literal(atom))
        return list(dict.fromkeys(atom for atom in read if atom not in own))


@dataclass(frozen=True)
class Cut:
    """A program that is cut at its collectives.

    Attributes:
        segments: Its segments.
        stacked: The variables that have one value for each lane. Other variables are equal in all lanes.
        reduced: The number of collectives that a segment reduces in its carry.
        whole: The equations that communicate, and run on all lanes at once.
        inside: Those of them whose jaxprs are cut, by their ``id``.
    """

    segments: list[Segment]
    stacked: set[Atom]
    reduced: int
    whole: list[Equation]
    inside: dict[int, CutEquation]


@dataclass(frozen=True)
class Part:
    """A jaxpr that is cut.

    Attributes:
        jaxpr: The open jaxpr.
        consts: The values of its constants.
        mapped: Whether each argument is stacked.
        cut: Its segments.
    """

    jaxpr: Jaxpr
    consts: Sequence[ArrayLike]
    mapped: Sequence[bool]
    cut: Cut

    @property
    def stacked(self) -> list[bool]:
        """Whether each result is stacked."""
        return [not _jax.is_literal(atom) and atom in self.cut.stacked for atom in self.jaxpr.outvars]


@dataclass(frozen=True)
class CutEquation:
    """An equation whose jaxprs are cut.

    Attributes:
        eqn: The equation.
        mapped: Whether each operand is stacked.
        parts: Its jaxprs.
        stacked: Whether each result is stacked.
    """

    eqn: Equation
    mapped: Sequence[bool]
    parts: Sequence[Part]
    stacked: Sequence[bool]


def variables(atoms: Iterable[Atom]) -> Iterator[Atom]:
    """The atoms that are not literals."""
    return (atom for atom in atoms if not _jax.is_literal(atom))


def read_by(eqns: Iterable[Equation]) -> Iterator[Atom]:
    """The variables that the equations read."""
    return (atom for eqn in eqns for atom in variables(eqn.invars))
