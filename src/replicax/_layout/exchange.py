"""Which items devices hand each other, and how groups of replicas lie on devices: plain tables, computed in NumPy.

An *item* is what one collective moves as a whole, such as one lane's operand. Every device holds equally many, and
the items of all devices are numbered through: item ``k`` of device ``d`` is number ``d · items + k``. A table has a
row for each device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from replicax._layout.layout import LogicalAxis

Table = NDArray[np.int64]
DeviceGroups = tuple[tuple[int, ...], ...]

#: In place of an item's number: zeros.
NOTHING = -1


@dataclass(frozen=True, eq=False)
class Shift:
    """One permutation of devices, and what each of them sends along it.

    Attributes:
        pairs: The devices that send, and where to; every device sends once and receives once, at most.
        send: ``(devices, width)``: which of its own items a device sends.
    """

    pairs: tuple[tuple[int, int], ...]
    send: Table


@dataclass(frozen=True, eq=False)
class Exchange:
    """How every device gets the items it wants, each sent once to each device that lacks it.

    Attributes:
        shifts: What devices send each other.
        take: ``(devices, wanted)``: where a device finds what it wants among its own items, then those of each shift
            in turn, then (if ``zeros``) one of zeros.
        zeros: Whether any device wants zeros.
    """

    shifts: tuple[Shift, ...]
    take: Table
    zeros: bool


def exchange(wants: Table, items: int) -> Exchange:
    """The exchange in which each device sends the least.

    What device a has for device b is one weighted edge. Edges are put together to permutations of devices, heavy
    ones first and those of one rotation next to each other, so that a rotation stays one permutation; within a
    permutation, a pair of devices takes part for as many items as it has.

    Args:
        wants: ``(devices, wanted)``: numbers of items, or :data:`NOTHING`.
        items: How many items each device has.
    """
    lacks = _lacking(wants, items)
    devices = len(wants)
    known = [[np.arange(d * items, (d + 1) * items)] for d in range(devices)]
    place = [[np.arange(items)] for _ in range(devices)]
    at, shifts = items, []
    for pairs in _matchings({pair: len(ids) for pair, ids in lacks.items()}, devices):
        sent = 0
        for count in sorted({len(lacks[pair]) for pair in pairs}):
            taking_part = [pair for pair in pairs if len(lacks[pair]) >= count]
            first, _ = taking_part[0]
            send = np.tile(lacks[taking_part[0]][sent:count] - first * items, (devices, 1))
            for src, dst in taking_part:
                ids = lacks[src, dst][sent:count]
                send[src] = ids - src * items
                known[dst].append(ids)
                place[dst].append(np.arange(at, at + count - sent))
            shifts.append(Shift(tuple(taking_part), send))
            at, sent = at + count - sent, count
    take = np.full(wants.shape, at, np.int64)  # where the item of zeros lies
    for device, row in enumerate(wants):
        ids, places = np.concatenate(known[device]), np.concatenate(place[device])
        order = np.argsort(ids)
        there = row != NOTHING
        take[device, there] = places[order][np.searchsorted(ids[order], row[there])]
    return Exchange(tuple(shifts), take, bool((wants == NOTHING).any()))


def _lacking(wants: Table, items: int) -> dict[tuple[int, int], Table]:
    """For each pair of devices, the items that the second wants and the first has."""
    lacks = {}
    for dst, row in enumerate(wants):
        ids = np.unique(row[row != NOTHING])
        owners = ids // items
        for src in np.unique(owners[owners != dst]):
            lacks[int(src), dst] = ids[owners == src]
    return lacks


def _matchings(weights: dict[tuple[int, int], int], devices: int) -> list[list[tuple[int, int]]]:
    """Pairs of devices put together to permutations, first fit."""
    sends, receives = [0] * devices, [0] * devices  # as bits: the permutations that a device sends or receives in
    matchings: dict[int, list[tuple[int, int]]] = {}
    for src, dst in sorted(weights, key=lambda pair: (-weights[pair], (pair[1] - pair[0]) % devices, pair)):
        taken = sends[src] | receives[dst]
        free = ~taken & (taken + 1)
        sends[src] |= free
        receives[dst] |= free
        matchings.setdefault(free, []).append((src, dst))
    return list(matchings.values())


def wants_of(axis: LogicalAxis, wants: Table, items: int) -> Table:
    """What each device wants, given what each replica does; a padding lane wants what its replica wants.

    Args:
        axis: The mapped axis.
        wants: ``(replicas, wanted)``: numbers of the replicas' items, or :data:`NOTHING`.
        items: How many items each replica has.

    Returns:
        ``(devices, lanes · wanted)``.
    """
    if not axis.placement.padding_is_last:  # from numbers that go by replicas to those that go by slots
        owner, item = np.divmod(wants, items)
        wants = np.where(wants == NOTHING, NOTHING, axis.placement.slot_of[owner] * items + item)
    return wants[axis.placement.replica_at].reshape(axis.devices, -1)


# ---------------------------------------------------------------------------------------------------------------
# Groups


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of ``axis_index_groups``, which cover all replicas once.

    Attributes:
        groups: The replicas of each group, in its order.
        of: ``(replicas,)``: the group of each replica.
        rank: ``(replicas,)``: its place in the group.
    """

    groups: tuple[tuple[int, ...], ...]
    of: Table
    rank: Table

    @property
    def members(self) -> Table:
        """``(replicas, group)``: the members of each replica's group, which are equally many in all groups."""
        return np.asarray(self.groups)[self.of]

    def padded_members(self) -> Table:
        """``(replicas, largest group)``: the same for groups of any size, filled up with :data:`NOTHING`."""
        widest = max(map(len, self.groups))
        return np.array([[*group, *[NOTHING] * (widest - len(group))] for group in self.groups])[self.of]


def groups(axis_index_groups: Sequence[Sequence[int]], size: int) -> Groups:
    """The groups as tables; they have to cover ``range(size)`` once."""
    of, rank = np.zeros(size, np.int64), np.zeros(size, np.int64)
    sizes = np.array([len(group) for group in axis_index_groups], np.int64)
    members = np.fromiter(chain.from_iterable(axis_index_groups), np.int64, size)
    of[members] = np.repeat(np.arange(len(sizes)), sizes)
    rank[members] = ranks(sizes)
    return Groups(tuple(tuple(map(int, group)) for group in axis_index_groups), of, rank)


def ranks(counts: Table) -> Table:
    """0, 1, 2, … within each of several runs of these lengths, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def device_groups(axis: LogicalAxis, split: Groups) -> DeviceGroups | None:
    """The groups as groups of whole devices, lanes in order; None when they are none."""
    if axis.padding or any(len(group) % axis.lanes for group in split.groups):
        return None
    lane = np.arange(axis.lanes)
    found = []
    for group in split.groups:
        blocks = np.asarray(group).reshape(-1, axis.lanes)
        if (blocks[:, 0] % axis.lanes).any() or (blocks != blocks[:, :1] + lane).any():
            return None
        found.append(tuple(int(d) for d in blocks[:, 0] // axis.lanes))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Segments:
    """How a reduction over groups goes: each device reduces the lanes that it has of a group, a *segment* of them,
    and devices that share a group reduce their segments.

    On every device the segments of shared groups come first. Groups that share no device can have the same segment.

    Attributes:
        lanes: ``(devices, segments · widest)``: the lanes of each segment, filled up with the number of lanes.
        count: How many segments a device has.
        shared: Runs of segments, as (start, stop), and the groups of devices that reduce them together.
        own: ``(devices, lanes)``: the segment of each lane.
        of: ``(devices, groups)``: the segment that a device has for a group, or :data:`NOTHING`.
    """

    lanes: Table
    count: int
    shared: tuple[tuple[int, int, DeviceGroups], ...]
    own: Table
    of: Table


def segments(axis: LogicalAxis, split: Groups) -> Segments:
    """The segments of every device."""
    devices, many = axis.devices, len(split.groups)
    group_at = split.of[axis.placement.replica_at].reshape(devices, axis.lanes)
    group, device = np.divmod(np.unique(group_at * devices + np.arange(devices)[:, None]), devices)
    counts = np.bincount(group, minlength=many)
    start = np.cumsum(counts) - counts
    alone = np.flatnonzero(counts == 1)
    touched = {g: tuple(device[start[g] : start[g] + counts[g]].tolist()) for g in np.flatnonzero(counts > 1).tolist()}
    shared, runs = _shared_segments(touched, devices)
    of = np.full((devices, many), NOTHING)
    for g, on in touched.items():
        of[list(on), g] = shared[g]
    first = count = max((stop for _, stop, _ in runs), default=0)
    for d in range(devices):
        own = alone[device[start[alone]] == d]
        of[d, own] = first + np.arange(len(own))
        count = max(count, first + len(own))
    own = np.take_along_axis(of, group_at, axis=1)
    return Segments(lanes=_lanes_of(axis, own, count), count=count, shared=runs, own=own, of=of)


def _lanes_of(axis: LogicalAxis, own: Table, count: int) -> Table:
    """``(devices, count · widest)``: the lanes of each segment, given the segment of each lane."""
    device, lane = np.divmod(axis.placement.slot_of, axis.lanes)
    segment = device * count + own[device, lane]
    sizes = np.bincount(segment, minlength=axis.devices * count)
    order = np.argsort(segment, kind="stable")
    lanes = np.full((axis.devices * count, sizes.max()), axis.lanes, np.int64)
    lanes[segment[order], ranks(sizes)] = lane[order]
    return lanes.reshape(axis.devices, -1)


def _shared_segments(
    touched: Mapping[int, tuple[int, ...]], devices: int
) -> tuple[dict[int, int], tuple[tuple[int, int, DeviceGroups], ...]]:
    """The segment of each group that lies on several devices, first fit; and the runs of like segments."""
    slots: list[dict[int, tuple[int, ...]]] = []  # each: group -> the devices that it lies on
    taken: list[int] = []  # as bits: the devices of each slot
    begin: dict[tuple[int, ...], int] = {}  # before it, no slot is free for a group on these devices
    for g, on in touched.items():
        bits, k = sum(1 << d for d in on), begin.get(on, 0)
        while k < len(slots) and taken[k] & bits:
            k += 1
        if k == len(slots):
            slots.append({})
            taken.append(0)
        slots[k][g] = on
        taken[k] |= bits
        begin[on] = k + 1
    partitions: dict[DeviceGroups, list[dict[int, tuple[int, ...]]]] = {}
    for slot in slots:
        alone = set(range(devices)).difference(*slot.values())
        partitions.setdefault((*sorted(slot.values()), *((d,) for d in sorted(alone))), []).append(slot)
    segment, runs, start = {}, [], 0
    for partition, alike in partitions.items():
        runs.append((start, start + len(alike), partition))
        for k, slot in enumerate(alike):
            segment.update(dict.fromkeys(slot, start + k))
        start += len(alike)
    return segment, tuple(runs)
