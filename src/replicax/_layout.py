"""Where N replicas lie on D devices: plain values, computed without tracing anything."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True)
class LaneAxis:
    """The name of the lanes of a mapped axis; no collective of the user's can have it."""

    of: Hashable

    def __repr__(self) -> str:
        return f"lanes of {self.of!r}"


@dataclass(frozen=True)
class LogicalAxis:
    """A mapped axis of the user's, and the axes that it lies on.

    Attributes:
        name: What the user named.
        size: The number of replicas, N.
        devices: The number of devices, D'.
        lanes: The number of replicas that each device runs, L.
        device_axis: The mesh axis of size D', or None when D' is 1.
        lane_axis: The vmapped axis of size L, or None when L is 1.
    """

    name: Hashable
    size: int
    devices: int
    lanes: int
    device_axis: Hashable | None
    lane_axis: Hashable | None

    @property
    def padding(self) -> int:
        """How many lanes exist only to fill the last devices."""
        return self.devices * self.lanes - self.size

    @property
    def physical(self) -> tuple[tuple[Hashable, int], ...]:
        """The axes that it lies on, with their sizes: its lanes, then its devices, each if it has any."""
        axes = ((self.lane_axis, self.lanes), (self.device_axis, self.devices))
        return tuple((name, size) for name, size in axes if name is not None)


#: The mapped axes in scope, by the user's names.
LogicalAxes = Mapping[Hashable, LogicalAxis]


@dataclass(frozen=True)
class Layout:
    """N replicas on a mesh of D' devices, L lanes each: replica r is lane ``r % L`` of device ``r // L``.

    Attributes:
        axis: The mapped axis, and its device and lane axes.
        mesh: The D' devices, along one mesh axis; None for lanes inside a replica of an enclosing map.
    """

    axis: LogicalAxis
    mesh: Mesh | None

    @property
    def size(self) -> int:
        """The number of replicas, N."""
        return self.axis.size

    @property
    def padded_size(self) -> int:
        """D' · L: the length of a mapped axis once every device has all its lanes."""
        return self.axis.devices * self.axis.lanes

    def spec(self, axis: int | None) -> PartitionSpec:
        """How an array mapped along ``axis`` (None: broadcast) is split."""
        if axis is None or self.mesh is None:
            return PartitionSpec()
        return PartitionSpec(*[None] * axis, self.mesh.axis_names[0])

    def sharding(self, axis: int | None) -> NamedSharding:
        """Where a padded array mapped along ``axis`` lies: lanes in order, L on each device."""
        assert self.mesh is not None, "lanes inside a replica lie where the replica lies"
        return NamedSharding(self.mesh, self.spec(axis))

    def result_sharding(self, axis: int | None) -> NamedSharding:
        """Where a result of N rows lies.

        JAX has no uneven sharding. When D' divides N the rows lie where they were computed. Otherwise they are split
        into as many equal parts as both N and D' allow, g = gcd(N, D'), and each part lies on D'/g devices: the most
        even spread there is, on the same devices, so that a next call needs no transfer from the host and no copy
        between device sets. (N = 14 on 4 devices: 2 parts of 7, each on 2 devices; a prime N: whole on each.)
        """
        parts = math.gcd(self.size, self.axis.devices)
        if axis is None or self.mesh is None or not self.axis.padding or parts == 1:
            return self.sharding(axis if not self.axis.padding else None)
        name = mesh_axis_name(self.axis.name)
        mesh = Mesh(self.mesh.devices.reshape(parts, -1), (name, f"{name} copies"))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, name))


def mesh_axis_name(name: Hashable) -> str:
    """What the mesh calls the axis: the user's own name where it is one word, since XLA has to read it, too."""
    return name if isinstance(name, str) and name.isidentifier() else "replicas"


def layout(name: Hashable, size: int, devices: Sequence[Any], *, spread: bool = False) -> Layout:
    """The layout of ``size`` replicas on ``devices``.

    Each device runs L = ceil(N / D) lanes, on the smallest number of devices, D' = ceil(N / L), that this takes.
    With ``spread`` all D devices take part, however many of them only pad: under an outer trace a program has one
    set of devices, and there maps of different sizes have to meet. There, too, the mesh axis does not bear the
    user's name, which an enclosing ``vmap`` may have as well, and would take for its own.
    """
    lanes = -(-size // len(devices))
    used = len(devices) if spread else -(-size // lanes)
    mesh_axis = f"{mesh_axis_name(name)}_devices" if spread else mesh_axis_name(name)
    mesh = Mesh(np.asarray(devices[:used], dtype=object), (mesh_axis,))
    return Layout(_axis(name, size, used, lanes, mesh_axis), mesh)


def lanes_only(name: Hashable, size: int) -> Layout:
    """The layout of ``size`` replicas inside one replica of an enclosing map: all of them lanes."""
    return Layout(_axis(name, size, 1, size, None), None)


def _axis(name: Hashable, size: int, devices: int, lanes: int, mesh_axis: str | None) -> LogicalAxis:
    return LogicalAxis(
        name=name,
        size=size,
        devices=devices,
        lanes=lanes,
        device_axis=mesh_axis if devices > 1 else None,
        lane_axis=LaneAxis(name) if lanes > 1 else None,
    )
