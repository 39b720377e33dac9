"""Where N replicas lie on D devices: plain values, computed without tracing anything."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from replicax._layout import placement as _placement
from replicax._layout.placement import Placement


@dataclass(frozen=True)
class LaneAxis:
    """The name of the lanes of a mapped axis; no collective of the user's can have it."""

    of: Hashable
    level: int = 0

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
        placement: Which replica each of a device's lanes runs.
        level: How many maps it is nested in; axes of one name at different levels are different axes.
    """

    name: Hashable
    size: int
    devices: int
    lanes: int
    device_axis: Hashable | None
    lane_axis: Hashable | None
    placement: Placement
    level: int = 0

    @property
    def padding(self) -> int:
        """How many lanes exist only to fill devices."""
        return self.placement.padding

    @property
    def physical(self) -> tuple[tuple[Hashable, int], ...]:
        """The axes that it lies on, with their sizes: its lanes, then its devices, each if it has any."""
        axes = ((self.lane_axis, self.lanes), (self.device_axis, self.devices))
        return tuple((name, size) for name, size in axes if name is not None)


@dataclass(frozen=True)
class DeviceAxis:
    """An axis of the mesh that the maps of one level lie on.

    Attributes:
        name: Its name; None where there is but one device.
        size: The number of devices along it.
    """

    name: Hashable | None
    size: int


#: The mapped axes in scope, by the user's names.
LogicalAxes = Mapping[Hashable, LogicalAxis]


class Scope(LogicalAxes):
    """The mapped axes that a program may name, each hiding an outer one of its name.

    Args:
        axes: The axes, from the outermost map to the innermost.
        levels: The mesh axes for the maps inside, outermost first; maps further inside are lanes alone.
    """

    def __init__(self, axes: Sequence[LogicalAxis], levels: Sequence[DeviceAxis] = ()) -> None:
        self.axes = tuple(axes)
        self.levels = tuple(levels)
        self._by_name = {axis.name: axis for axis in axes}

    def __getitem__(self, name: Hashable) -> LogicalAxis:
        return self._by_name[name]

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def enter(self, name: Hashable, size: int) -> Scope:
        """The scope inside a map over ``size`` replicas."""
        where, *rest = self.levels or [DeviceAxis(None, 1)]
        inner = _axis(name, size, where.size, -(-size // where.size), where.name, len(self.axes))
        return Scope((*self.axes, inner), rest)

    @property
    def physical(self) -> dict[Hashable, int]:
        """All lanes and devices that the axes lie on, hidden ones and those of maps inside too, with their sizes."""
        axes = {name: size for axis in self.axes for name, size in axis.physical}
        return axes | {level.name: level.size for level in self.levels if level.name is not None}

    @property
    def copies(self) -> tuple[Hashable, ...]:
        """The mesh axes for maps inside: all devices along them run the same program out here."""
        return tuple(level.name for level in self.levels if level.name is not None)


@dataclass(frozen=True)
class Layout:
    """N replicas on a mesh of D' devices, L lanes each: replica r is lane ``r % L`` of device ``r // L``.

    Attributes:
        axis: The mapped axis, and its device and lane axes.
        mesh: The devices: D' along the first axis, and those of maps inside along further ones.
        inner: The mesh axes of maps inside, outermost first.
    """

    axis: LogicalAxis
    mesh: Mesh
    inner: tuple[DeviceAxis, ...] = ()

    @property
    def size(self) -> int:
        """The number of replicas, N."""
        return self.axis.size

    @property
    def padded_size(self) -> int:
        """D' · L: the length of a mapped axis once every device has all its lanes."""
        return self.axis.placement.slots

    @property
    def scope(self) -> Scope:
        """The mapped axes of the program: the map's own."""
        return Scope([self.axis], self.inner)

    def spec(self, axis: int | None, inner: Splits = ()) -> PartitionSpec:
        """How an array mapped along ``axis`` (None: broadcast) is split.

        Args:
            axis: The mapped axis.
            inner: Which further axes of the array are split over which mesh axes of maps inside.
        """
        split = {} if axis is None else {axis: self.mesh.axis_names[0]}
        split |= dict(inner)
        return PartitionSpec(*(split.get(k) for k in range(max(split, default=-1) + 1)))

    def sharding(self, axis: int | None, inner: Splits = ()) -> NamedSharding:
        """Where a padded array mapped along ``axis`` lies: lanes in order, L on each device."""
        return NamedSharding(self.mesh, self.spec(axis, inner))

    def result_sharding(self, axis: int | None, inner: Splits = (), *, on_mesh: bool = False) -> NamedSharding:
        """Where a result of N rows lies; with ``on_mesh`` on the layout's own mesh, and so whole where it is padded.

        JAX has no uneven sharding. When D' divides N the rows lie where they were computed. Otherwise they are split
        into as many equal parts as both N and D' allow, g = gcd(N, D'), and each part lies on D'/g devices: the most
        even spread there is, on the same devices, so that a next call needs no transfer from the host and no copy
        between device sets. (N = 14 on 4 devices: 2 parts of 7, each on 2 devices; a prime N: whole on each, and
        still split along a mesh axis, of size 1, by which one tells its rows from a result without a mapped axis.)
        """
        parts = math.gcd(self.size, self.axis.devices)
        if not self.axis.padding:
            return self.sharding(axis, inner)
        if axis is None or on_mesh:
            return self.sharding(None)
        name = mesh_axis_name(self.axis.name)
        mesh = Mesh(self.mesh.devices.reshape(parts, -1), (name, f"{name} copies"))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, name))


#: Axes of an array, each with the mesh axis that it is split over.
Splits = Sequence[tuple[int, Hashable]]


def mesh_axis_name(name: Hashable) -> str:
    """What the mesh calls the axis: the user's own name where it is one word, since XLA has to read it, too."""
    return name if isinstance(name, str) and name.isidentifier() else "replicas"


#: The maps inside a program by level: for each level, outermost first, the names and sizes of the maps at it.
Nesting = Sequence[Sequence[tuple[Hashable, int]]]


def layout(
    name: Hashable,
    size: int,
    devices: Sequence[jax.Device],
    *,
    use_all_devices: bool = False,
    avoid_user_names: bool = False,
    nesting: Nesting = (),
) -> Layout:
    """The layout of ``size`` replicas on ``devices``.

    Each device runs L = ceil(N / D) lanes, on the smallest number of devices, D' = ceil(N / L), that this takes.
    What is left of the devices goes to the maps inside: floor(D / D') for each replica's first level, and so on.

    With ``use_all_devices`` all D devices take part, however many of them only pad: what an outer ``jit`` records has
    one set of devices, and there maps of different sizes have to meet.

    Args:
        name: The user's name of the mapped axis.
        size: The number of replicas, N.
        devices: The devices that may be used.
        use_all_devices: Whether all have to be.
        avoid_user_names: Whether the mesh axes leave the user's names alone, which an enclosing ``vmap`` may have as
            well, and would take for its own.
        nesting: The maps inside.
    """
    levels = [[(name, size)], *nesting]
    counts = (_factored if use_all_devices else _filled)([[n for _, n in level] for level in levels], len(devices))
    names: list[str] = []
    for (first, _), *_ in levels:
        plain = f"{mesh_axis_name(first)}_devices" if avoid_user_names else mesh_axis_name(first)
        names.append(plain if plain not in names else f"{plain}_{len(names) + 1}")
    used = np.asarray(devices[: math.prod(counts)], dtype=object)
    inner = tuple(DeviceAxis(n if d > 1 else None, d) for n, d in zip(names[1:], counts[1:], strict=True))
    in_mesh = [0, *[k + 1 for k, where in enumerate(inner) if where.name is not None]]
    mesh = Mesh(used.reshape([counts[k] for k in in_mesh]), tuple(names[k] for k in in_mesh))
    lanes = -(-size // counts[0])
    return Layout(_axis(name, size, counts[0], lanes, names[0], 0), mesh, inner)


def replicas_of(name: Hashable, size: int) -> LogicalAxis:
    """A mapped axis that lies nowhere yet: that of a map inside, before the outer map is laid out."""
    return _axis(name, size, 1, size, None, 0)


def _filled(levels: Sequence[Sequence[int]], devices: int) -> list[int]:
    """How many devices each level gets: as many as it has use for, from the outermost."""
    counts = []
    for sizes in levels:
        counts.append(max(-(-n // -(-n // devices)) for n in sizes))
        devices //= counts[-1]
    return counts


def _factored(levels: Sequence[Sequence[int]], devices: int) -> list[int]:
    """How many devices each level gets of a number that has to be used up: so that each runs the fewest lanes.

    Of splits with as few lanes, the one with more devices in outer levels.
    """
    if len(levels) == 1:
        return [devices]
    splits = [[d, *_factored(levels[1:], devices // d)] for d in range(devices, 0, -1) if devices % d == 0]
    return min(splits, key=lambda counts: math.prod(-(-max(s) // d) for s, d in zip(levels, counts, strict=True)))


def _axis(name: Hashable, size: int, devices: int, lanes: int, mesh_axis: Hashable, level: int) -> LogicalAxis:
    return LogicalAxis(
        name=name,
        size=size,
        devices=devices,
        lanes=lanes,
        device_axis=mesh_axis if devices > 1 else None,
        lane_axis=LaneAxis(name, level) if lanes > 1 else None,
        placement=_placement.placement(size, devices, lanes),
        level=level,
    )
