"""How the lanes of a device run: how many at once, and where the program is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from replicax import _jax
from replicax._jax import Equation, Jaxpr
from replicax._typing import ArrayLike, Atom

#: How many lanes a device runs at once; None for all of them.
Lanes = int | None
VECTORIZED = None


class Auto(Enum):
    """The value of ``lanes`` with which replicax chooses the number."""

    AUTO = "auto"


AUTO = Auto.AUTO


@dataclass(frozen=True)
class LanePlan:
    """How a device runs its lanes.

    Attributes:
        lanes: The number of lanes of a device.
        at_once: The number of lanes that it runs at once.
        segments: The number of parts that run so many lanes at once; the program is cut at its collectives.
        cut: The number of collectives over the mapped axis, in the program of one replica, at which it is cut.
        uncut: The equations that could not be cut: with callbacks, or with collectives inside, such as loops whose
            predicate differs between replicas. They run on all lanes at once.
        inside: The number of collectives inside of these.
    """

    lanes: int
    at_once: int
    segments: int
    cut: int
    uncut: tuple[str, ...]
    inside: int

    def __add__(self, other: LanePlan) -> LanePlan:
        """Two parts of a program."""
        return LanePlan(
            self.lanes,
            self.at_once,
            self.segments + other.segments,
            self.cut + other.cut,
            self.uncut + other.uncut,
            self.inside + other.inside,
        )


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
