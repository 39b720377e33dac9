"""The order in which a deterministic map adds the values of its replicas: a binary tree that depends on N alone.

A *block* of level k holds 2**k replicas, from a multiple of 2**k on, or as many of them as there are. Its sum is the
sum of its left half plus the sum of its right half, or that of its left half if no replica is in the right half. The
sum of all replicas is that of the block that holds all.

A device adds its replicas as far as its blocks are whole: of the replicas 5 to 9 it has the sums of [5], [6, 7] and
[8, 9]. These are its *partial sums*, at most two of each level. The devices exchange them, and go on in the same tree.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from replicax._layout.placement import Placement

Table = NDArray[np.int64]


class Block(NamedTuple):
    """A block of replicas.

    Attributes:
        level: The block has up to ``2**level`` replicas.
        before: The number of blocks of this level before it.
    """

    level: int
    before: int


@dataclass(frozen=True, eq=False)
class Schedule:
    """How each device adds items that arrive one after the other, with a few slots for sums of earlier items.

    Attributes:
        slots: The number of slots. One more takes the items that are not added.
        merged: ``(devices, items, most)`` int64: the slots to which an item is added, in order.
        count: ``(devices, items)`` int64: the number of these slots.
        kept: ``(devices, items)`` int64: the slot that keeps the sum.
    """

    slots: int
    merged: Table
    count: Table
    kept: Table


@dataclass(frozen=True, eq=False)
class Tree:
    """How the sum over N replicas is computed, on the lanes of each device and between devices.

    Attributes:
        lanes: How each device adds its lanes.
        partials: ``(devices, most)`` int64: the slots that then have the device's partial sums.
        between: How the partial sums of all devices are added. All devices add the same ones, so it has one row.
        order: The partial sums in the order in which they are added, as indices into those of all devices.
        total: The slot that then has the sum.
    """

    lanes: Schedule
    partials: Table
    between: Schedule
    order: Table
    total: int


@functools.lru_cache(maxsize=1024)
def tree(placement: Placement) -> Tree:
    """Returns the tree over the replicas of a placement."""
    owners = placement.is_replica.reshape(placement.devices, placement.lanes)
    firsts = np.cumsum(owners.sum(1)) - owners.sum(1)
    rows = [
        [Block(0, int(first + k)) if real else None for k, real in zip(np.cumsum(own) - 1, own, strict=True)]
        for first, own in zip(firsts, owners, strict=True)
    ]
    adders = [_Adder(placement.size) for _ in rows]
    lanes = _schedule([list(map(adder.add, row)) for adder, row in zip(adders, rows, strict=True)])
    most = max(len(adder.sums) for adder in adders)
    partials = np.zeros((placement.devices, most), np.int64)
    for device, adder in enumerate(adders):
        partials[device, : len(adder.sums)] = [slot for _, slot in adder.sums]
    blocks = [block for adder in adders for block, _ in adder.sums]
    order = [d * most + k for d, adder in enumerate(adders) for k in range(len(adder.sums))]
    last = _Adder(placement.size)
    between = _schedule([list(map(last.add, blocks))])
    ((_, total),) = last.sums
    return Tree(lanes, partials, between, np.asarray(order, np.int64), total)


class _Step(NamedTuple):
    """What happens to one item: the slots to which it is added, and the slot that keeps the sum."""

    merged: tuple[int, ...]
    kept: int | None


class _Adder:
    """Adds blocks in the order of their replicas.

    Args:
        size: The number of all replicas.

    Attributes:
        sums: The blocks that wait for the block beside them, each with its slot.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.sums: list[tuple[Block, int]] = []

    def add(self, block: Block | None) -> _Step:
        """Adds a block; None for padding, which is not added."""
        if block is None:
            return _Step((), None)
        merged: list[int] = []
        for left in self._ascend(block):
            if left is not None:
                merged.append(self.sums.pop()[1])
            block = Block(block.level + 1, block.before // 2)
        taken = {slot for _, slot in self.sums}
        slot = next(k for k in range(len(taken) + 1) if k not in taken)
        self.sums.append((block, slot))
        return _Step(tuple(merged), slot)

    def _ascend(self, block: Block) -> Iterator[Block | None]:
        """Yields the block to the left that is added on each level, or None on a level without another half."""
        level, index = block
        waiting = len(self.sums)
        while True:
            left = Block(level, index - 1)
            if index % 2 and waiting and self.sums[waiting - 1][0] == left:
                waiting -= 1
                yield left
            elif index and index % 2 == 0 and (index + 1) << level >= self._size:
                yield None
            else:
                return
            level, index = level + 1, index // 2


def _schedule(steps: Sequence[Sequence[_Step]]) -> Schedule:
    """Returns the tables of these steps, for two items and two slots at least: see ``ordered.each_lane``."""
    if len(steps[0]) == 1:
        steps = [[*row, _Step((0,), 1)] for row in steps]
    every = [step for row in steps for step in row]
    slots = 1 + max((step.kept for step in every if step.kept is not None), default=0)
    most = max((len(step.merged) for step in every), default=0)
    merged = np.array([[(*s.merged, *[0] * (most + 1 - len(s.merged))) for s in row] for row in steps], np.int64)
    count = np.array([[len(s.merged) for s in row] for row in steps], np.int64)
    kept = np.array([[slots if s.kept is None else s.kept for s in row] for row in steps], np.int64)
    return Schedule(slots, merged, count, kept)
