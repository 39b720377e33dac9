"""Which replica each lane of each device runs, and which lanes are padding: a plain value, asked for by all others.

A *slot* is a lane of a device: slot s is lane ``s % lanes`` of device ``s // lanes``. Replicas lie on slots in their
own order. The slots without a replica are padding, and copy a replica beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


@dataclass(frozen=True)
class Placement:
    """Replicas on slots.

    Attributes:
        size: The number of replicas.
        devices: The number of devices.
        lanes: The number of slots on each.
        runs: The runs of slots that have replicas: the first slot of each, and how many replicas it has.
    """

    size: int
    devices: int
    lanes: int
    runs: tuple[tuple[int, int], ...]

    @property
    def slots(self) -> int:
        """The number of slots."""
        return self.devices * self.lanes

    @property
    def padding(self) -> int:
        """How many slots have no replica."""
        return self.slots - self.size

    @property
    def padding_is_last(self) -> bool:
        """Whether replica r is on slot r, for every r."""
        return len(self.runs) == 1 and self.runs[0][0] == 0

    @cached_property
    def slot_of(self) -> Slots:
        """``(replicas,)``: the slot of each replica."""
        return np.concatenate([np.arange(first, first + count) for first, count in self.runs])

    @cached_property
    def is_replica(self) -> NDArray[np.bool_]:
        """``(slots,)``: whether a slot has a replica."""
        real = np.zeros(self.slots, np.bool_)
        real[self.slot_of] = True
        return real

    @cached_property
    def replica_at(self) -> Slots:
        """``(slots,)``: the replica that each slot runs; padding copies the one before it, or the first."""
        return np.maximum(np.cumsum(self.is_replica) - 1, 0)

    @cached_property
    def devices_with_replicas(self) -> Slots:
        """The devices that do not only pad."""
        return np.flatnonzero(self.is_replica.reshape(self.devices, self.lanes).any(1))

    @property
    def pieces(self) -> list[tuple[int, int, int]]:
        """The slots in order, as rows of an array of all replicas: first row, rows, copies of the last one behind.

        A first piece of no rows copies row 0.
        """
        found, row = ([(0, 0, self.runs[0][0])] if self.runs[0][0] else []), 0
        ends = [first for first, _ in self.runs[1:]] + [self.slots]
        for (first, count), end in zip(self.runs, ends, strict=True):
            found.append((row, count, end - first - count))
            row += count
        return found


def placement(size: int, devices: int, lanes: int) -> Placement:
    """Replicas on the first slots, and padding on the last."""
    return Placement(size, devices, lanes, ((0, size),))
