"""Routing tables in NumPy: which items devices send each other, and on which devices each group of replicas is.

An *item* is the unit that one collective sends, for example the operand of one lane. All devices hold the same number
of items. Items are numbered over all devices: item ``k`` of device ``d`` is number ``d * items + k``. A table has one
row per device.
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

#: The item number that means zeros instead of an item.
NOTHING = -1


@dataclass(frozen=True, eq=False)
class Shift:
    """One permutation of devices, and the items that each device sends along it.

    Attributes:
        pairs: (source, destination) devices. Each device sends at most once and receives at most once.
        send: ``(devices, width)`` int64: for each device, the indices of the items that it sends among its own.
    """

    pairs: tuple[tuple[int, int], ...]
    send: Table


@dataclass(frozen=True, eq=False)
class Exchange:
    """How each device gets the items that it needs. Each item is sent at most once to each device.

    Attributes:
        shifts: The permutations, in order.
        take: ``(devices, wanted)`` int64: the index of each needed item in the concatenation of the device's own items,
            the items of each shift, and (if ``zeros``) one item of zeros.
        zeros: Whether any device needs zeros.
    """

    shifts: tuple[Shift, ...]
    take: Table
    zeros: bool


def exchange(wants: Table, items: int) -> Exchange:
    """Returns the exchange in which each device sends the fewest items.

    Pairs (a, b), where device a sends items to device b, are grouped greedily into permutations of devices: the pairs
    with the most items first, and in a tie in the order of b - a, so that a rotation stays one permutation. If the
    pairs of a permutation have different numbers of items, it becomes several shifts, each of fewer pairs.

    Args:
        wants: ``(devices, wanted)`` int64: item numbers, or :data:`NOTHING`.
        items: The number of items that each device holds.
    """
    lacks = _lacking(wants, items)
    devices = len(wants)
    known = [[np.arange(d * items, (d + 1) * items)] for d in range(devices)]
    place = [[np.arange(items)] for _ in range(devices)]
    at, shifts = items, []
    for pairs in _matchings({pair: len(ids) for pair, ids in lacks.items()}, devices):
        sent = 0
        for count in sorted({len(lacks[pair]) for pair in pairs}):
            participants = [pair for pair in pairs if len(lacks[pair]) >= count]
            first, _ = participants[0]
            send = np.tile(lacks[participants[0]][sent:count] - first * items, (devices, 1))
            for src, dst in participants:
                ids = lacks[src, dst][sent:count]
                send[src] = ids - src * items
                known[dst].append(ids)
                place[dst].append(np.arange(at, at + count - sent))
            shifts.append(Shift(tuple(participants), send))
            at, sent = at + count - sent, count
    take = np.full(wants.shape, at, np.int64)  # index of the item of zeros
    for device, row in enumerate(wants):
        ids, places = np.concatenate(known[device]), np.concatenate(place[device])
        order = np.argsort(ids)
        there = row != NOTHING
        take[device, there] = places[order][np.searchsorted(ids[order], row[there])]
    return Exchange(tuple(shifts), take, bool((wants == NOTHING).any()))


def _lacking(wants: Table, items: int) -> dict[tuple[int, int], Table]:
    """Returns, for each (source, destination) pair of devices, the items of the source that the destination needs."""
    lacks = {}
    for dst, row in enumerate(wants):
        ids = np.unique(row[row != NOTHING])
        owners = ids // items
        for src in np.unique(owners[owners != dst]):
            lacks[int(src), dst] = ids[owners == src]
    return lacks


def _matchings(weights: dict[tuple[int, int], int], devices: int) -> list[list[tuple[int, int]]]:
    """Groups (source, destination) pairs into permutations. A pair joins the first one with both devices free."""
    sends, receives = [0] * devices, [0] * devices  # bit masks: permutations in which a device sends or receives
    matchings: dict[int, list[tuple[int, int]]] = {}
    for src, dst in sorted(weights, key=lambda pair: (-weights[pair], (pair[1] - pair[0]) % devices, pair)):
        taken = sends[src] | receives[dst]
        free = ~taken & (taken + 1)
        sends[src] |= free
        receives[dst] |= free
        matchings.setdefault(free, []).append((src, dst))
    return list(matchings.values())


def wants_of(axis: LogicalAxis, wants: Table, items: int) -> Table:
    """Returns the items that each device needs, given the items that each replica needs.

    A padding lane needs the items of the replica that it copies.

    Args:
        axis: The mapped axis.
        wants: ``(replicas, wanted)`` int64: item k of replica r as ``r * items + k``, or :data:`NOTHING`.
        items: The number of items that each replica holds.

    Returns:
        ``(devices, lanes * wanted)`` int64.
    """
    if not axis.placement.padding_is_last:  # renumber the items by slot instead of by replica
        owner, item = np.divmod(wants, items)
        wants = np.where(wants == NOTHING, NOTHING, axis.placement.slot_of[owner] * items + item)
    return wants[axis.placement.replica_at].reshape(axis.devices, -1)


# ---------------------------------------------------------------------------------------------------------------
# Groups


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of ``axis_index_groups``. They cover each replica exactly once.

    Attributes:
        groups: The replicas of each group, in order.
        of: ``(replicas,)`` int64: the group of each replica.
        rank: ``(replicas,)`` int64: the replica's position in its group.
    """

    groups: tuple[tuple[int, ...], ...]
    of: Table
    rank: Table

    @property
    def members(self) -> Table:
        """The members of each replica's group, as ``(replicas, group)``. All groups must have the same size."""
        return np.asarray(self.groups)[self.of]

    def padded_members(self) -> Table:
        """Returns the members of each replica's group as ``(replicas, largest group)``, padded with :data:`NOTHING`."""
        widest = max(map(len, self.groups))
        return np.array([[*group, *[NOTHING] * (widest - len(group))] for group in self.groups])[self.of]


def groups(axis_index_groups: Sequence[Sequence[int]], size: int) -> Groups:
    """Converts groups to tables. The groups must cover ``range(size)`` exactly once."""
    of, rank = np.zeros(size, np.int64), np.zeros(size, np.int64)
    sizes = np.array([len(group) for group in axis_index_groups], np.int64)
    members = np.fromiter(chain.from_iterable(axis_index_groups), np.int64, size)
    of[members] = np.repeat(np.arange(len(sizes)), sizes)
    rank[members] = ranks(sizes)
    return Groups(tuple(tuple(map(int, group)) for group in axis_index_groups), of, rank)


def ranks(counts: Table) -> Table:
    """Returns ``[0, …, n - 1]`` for each ``n`` in ``counts``, concatenated."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def device_groups(axis: LogicalAxis, split: Groups) -> DeviceGroups | None:
    """Converts groups of replicas to groups of devices; None if a group is not whole devices with lanes in order."""
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
    """The plan of a reduction over groups. A *segment* is the lanes of one group on one device.

    Each device reduces its segments. Then the devices that share a group reduce the results. On every device, the
    segments of shared groups come first. Groups that share no device can have the same segment number.

    Attributes:
        lanes: ``(devices, segments * widest)`` int64: the lanes of each segment. The number L of lanes fills the rest.
        count: The number of segments on each device.
        shared: (start, stop, groups of devices that reduce these segments), for each range of shared segments.
        own: ``(devices, lanes)`` int64: the segment of each lane.
        of: ``(devices, groups)`` int64: the segment of each group on each device, or :data:`NOTHING`.
    """

    lanes: Table
    count: int
    shared: tuple[tuple[int, int, DeviceGroups], ...]
    own: Table
    of: Table


def segments(axis: LogicalAxis, split: Groups) -> Segments:
    """Returns the segments of every device."""
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
    """Returns the lanes of each segment, as ``(devices, count * widest)``, given the segment of each lane."""
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
    """Assigns to each group on several devices the first segment that is free on all of these devices.

    Returns:
        The segment of each group, and the ranges of segments that the same groups of devices reduce.
    """
    slots: list[dict[int, tuple[int, ...]]] = []  # for each segment: group -> its devices
    taken: list[int] = []  # bit mask of the devices of each segment
    begin: dict[tuple[int, ...], int] = {}  # the first segment that may be free on these devices
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
