"""The placement: which replica each lane of each device runs, and which lanes are padding.

A *slot* is a lane of a device: slot s is lane ``s % lanes`` of device ``s // lanes``. Replicas are on slots in order.
Slots without a replica are padding: they run a copy of a neighbouring replica.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


@dataclass(frozen=True)
class Placement:
    """The map from replicas to slots.

    Attributes:
        size: The number of replicas.
        devices: The number of devices.
        lanes: The number of slots on each device.
        runs: The ranges of consecutive slots with replicas, each as (first slot, number of replicas).
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
        """The number of padding slots."""
        return self.slots - self.size

    @property
    def padding_is_last(self) -> bool:
        """Whether replica r is on slot r, for every r."""
        return len(self.runs) == 1 and self.runs[0][0] == 0

    @cached_property
    def slot_of(self) -> Slots:
        """The slot of each replica, as ``(replicas,)`` int64."""
        return np.concatenate([np.arange(first, first + count) for first, count in self.runs])

    @cached_property
    def is_replica(self) -> NDArray[np.bool_]:
        """Whether each slot has a replica, as ``(slots,)`` bool."""
        real = np.zeros(self.slots, np.bool_)
        real[self.slot_of] = True
        return real

    @cached_property
    def replica_at(self) -> Slots:
        """The replica that each slot runs, as ``(slots,)`` int64. Padding copies the previous replica, or replica 0."""
        return np.maximum(np.cumsum(self.is_replica) - 1, 0)

    @cached_property
    def devices_with_replicas(self) -> Slots:
        """The devices with at least one replica, as int64 indices."""
        return np.flatnonzero(self.is_replica.reshape(self.devices, self.lanes).any(1))

    @property
    def pieces(self) -> list[tuple[int, int, int]]:
        """The rows that fill the slots, in order, as ranges of rows of an array ``(replicas, ...)``.

        A range is (first row, number of rows, further copies of its last row). A first range without rows copies row 0.
        """
        found, row = ([(0, 0, self.runs[0][0])] if self.runs[0][0] else []), 0
        ends = [first for first, _ in self.runs[1:]] + [self.slots]
        for (first, count), end in zip(self.runs, ends, strict=True):
            found.append((row, count, end - first - count))
            row += count
        return found


def placement(size: int, devices: int, lanes: int) -> Placement:
    """Returns the placement with replicas on the first slots, and padding on the last ones."""
    return Placement(size, devices, lanes, ((0, size),))
