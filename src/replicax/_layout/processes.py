"""The layout of a map over several processes. Each process runs its own replicas, on its own devices."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import jax
import numpy as np

from replicax._layout.layout import (
    LaneAxis,
    Layout,
    LogicalAxis,
    Nesting,
    axis_names,
    fewest_devices,
    inner_axes,
    mesh_of,
)
from replicax._layout.placement import Placement


@dataclass(frozen=True)
class Share:
    """What one process contributes to a map.

    Attributes:
        process: The index of the process.
        devices: Its devices.
        replicas: Its number of replicas.
    """

    process: int
    devices: tuple[jax.Device, ...]
    replicas: int = 0


def by_process(devices: Sequence[jax.Device]) -> list[Share]:
    """Returns the devices of each process, in order of the processes."""
    processes = sorted({device.process_index for device in devices})
    return [Share(p, tuple(device for device in devices if device.process_index == p)) for p in processes]


def replicas_of_processes(size: int, devices: Sequence[int]) -> list[range]:
    """Returns the replicas of each process, if ``size`` replicas are split in proportion to their devices.

    Args:
        size: The number of replicas of all processes.
        devices: The number of devices of each process.
    """
    ends = [0, *(size * end // sum(devices) for end in accumulate(devices))]
    return list(map(range, ends, ends[1:]))


def layout_over_processes(
    name: Hashable,
    shares: Sequence[Share],
    here: int,
    nesting: Nesting = (),
    *,
    use_all_devices: bool = False,
    avoid_user_names: bool = False,
    ordered: bool = False,
) -> Layout:
    """Returns the layout of a map over several processes.

    All devices run the same number of lanes, L: the largest of ceil(replicas / devices) of the processes. Each process
    uses ceil(replicas / L) of its devices, and at least one. The replicas are numbered by process. The padding of a
    process comes after its replicas.

    Args:
        name: The user's name of the mapped axis.
        shares: The replicas and devices of each process, in order. At least one has replicas.
        here: The index of this process.
        nesting: The nested maps.
        use_all_devices: Whether all devices must be used.
        avoid_user_names: Whether mesh axes must not have the user's names, see :func:`replicax._layout.layout.layout`.
        ordered: See :class:`replicax._layout.layout.LogicalAxis`.
    """
    lanes = max(-(-share.replicas // len(share.devices)) for share in shares)
    used = [len(share.devices) if use_all_devices else max(1, -(-share.replicas // lanes)) for share in shares]
    left = min(len(share.devices) // count for share, count in zip(shares, used, strict=True))
    counts = fewest_devices([[n for _, n in level] for level in nesting], left)
    each = math.prod(counts)
    names = axis_names([[(name, 0)], *nesting], avoid_user_names=avoid_user_names)
    inner = inner_axes(names[1:], counts)
    firsts = [0, *accumulate(used)]

    def part(devices: Sequence[jax.Device], runs: tuple[tuple[int, int], ...], own: Layout | None) -> Layout:
        placement = Placement(sum(count for _, count in runs), len(devices) // each, lanes, runs)
        axis = LogicalAxis(
            name=name,
            size=placement.size,
            devices=placement.devices,
            lanes=lanes,
            device_axis=names[0] if placement.devices > 1 else None,
            lane_axis=LaneAxis(name) if lanes > 1 else None,
            placement=placement,
            ordered=ordered,
        )
        mesh = mesh_of(np.asarray(devices, dtype=object), names[0], inner)
        return Layout(axis, mesh, inner, own, () if own is None else _lent(placement, shares, used))

    devices = [share.devices[: count * each] for share, count in zip(shares, used, strict=True)]
    k = [share.process for share in shares].index(here)
    runs = [(f * lanes, share.replicas) for f, share in zip(firsts, shares, strict=False) if share.replicas]
    own = part(devices[k], ((0, shares[k].replicas),), None)
    return part(list(chain.from_iterable(devices)), tuple(runs), own)


def _lent(placement: Placement, shares: Sequence[Share], used: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The slot that each device of the processes without replicas copies, as the placement says, and the device."""
    owners = np.repeat([share.replicas > 0 for share in shares], used)
    without = np.flatnonzero(~owners)
    copied = placement.slot_of[placement.replica_at[without * placement.lanes]]
    return tuple(zip(copied.tolist(), without.tolist(), strict=True))
