"""How many lanes a device runs at once."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

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
