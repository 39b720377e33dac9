"""The layout of N replicas on D devices, as frozen dataclasses. No tracing is needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from replicax._layout import placement as _placement
from replicax._layout.placement import Placement


@dataclass(frozen=True)
class LaneAxis:
    """The ``vmap`` axis name of the lanes of a mapped axis. No name that the user can write is equal to it."""

    of: Hashable
    level: int = 0

    def __repr__(self) -> str:
        return f"lanes of {self.of!r}"


@dataclass(frozen=True)
class LogicalAxis:
    """The user's mapped axis, and the device axis and lane axis that implement it.

    Attributes:
        name: The user's name.
        size: The number of replicas, N.
        devices: The number of devices along the device axis, D'.
        lanes: The number of lanes on each device, L.
        device_axis: The mesh axis of size D', or None if D' is 1.
        lane_axis: The vmapped axis of size L, or None if L is 1.
        placement: The replica that each slot (a lane of a device) runs.
        level: The number of enclosing maps. Axes with the same name at different levels are different axes.
        ordered: Whether replicas run one after the other, and sums are added in an order that depends on N alone.
    """

    name: Hashable
    size: int
    devices: int
    lanes: int
    device_axis: Hashable | None
    lane_axis: Hashable | None
    placement: Placement
    level: int = 0
    ordered: bool = False

    @property
    def padding(self) -> int:
        """The number of padding slots."""
        return self.placement.padding

    @property
    def physical(self) -> tuple[tuple[Hashable, int], ...]:
        """The name and size of the lane axis and of the device axis, without an axis that is None."""
        axes = ((self.lane_axis, self.lanes), (self.device_axis, self.devices))
        return tuple((name, size) for name, size in axes if name is not None)


@dataclass(frozen=True)
class DeviceAxis:
    """The mesh axis for the maps of one nesting level.

    Attributes:
        name: The name of the axis; None if it has one device.
        size: The number of devices along it.
    """

    name: Hashable | None
    size: int


#: The mapped axes in scope, by the user's name.
LogicalAxes = Mapping[Hashable, LogicalAxis]


class Scope(LogicalAxes):
    """The mapped axes that collectives in a program may name. An inner axis shadows an outer axis of the same name.

    Args:
        axes: The axes, from the outermost map to the innermost.
        levels: The mesh axes for nested maps, outermost first. Maps nested more deeply run only as lanes.
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
        """Returns the scope inside a nested map over ``size`` replicas."""
        where, *rest = self.levels or [DeviceAxis(None, 1)]
        inner = _axis(name, size, where.size, -(-size // where.size), where.name, len(self.axes))
        return Scope((*self.axes, inner), rest)

    @property
    def physical(self) -> dict[Hashable, int]:
        """All lane and device axes, with their sizes, including those of shadowed axes and of nested maps."""
        axes = {name: size for axis in self.axes for name, size in axis.physical}
        return axes | {level.name: level.size for level in self.levels if level.name is not None}

    @property
    def copies(self) -> tuple[Hashable, ...]:
        """The mesh axes for nested maps. Outside the nested maps, all devices along these axes run the same program."""
        return tuple(level.name for level in self.levels if level.name is not None)


@dataclass(frozen=True)
class Layout:
    """N replicas on a mesh of D' devices with L lanes each: replica r is lane ``r % L`` of device ``r // L``.

    Attributes:
        axis: The mapped axis, with its device and lane axes.
        mesh: The mesh: its first axis has D' devices, and its other axes are for nested maps.
        inner: The mesh axes for nested maps, outermost first.
        own: The part of this process, if the map is over several processes: its replicas on its devices.
        lent: Pairs of a slot and a device. The device belongs to a process without replicas, and all of its slots copy
            the replica of that slot.
    """

    axis: LogicalAxis
    mesh: Mesh
    inner: tuple[DeviceAxis, ...] = ()
    own: Layout | None = None
    lent: tuple[tuple[int, int], ...] = ()

    @property
    def local(self) -> Layout:
        """The part of this process: the layout itself, unless the map is over several processes."""
        return self.own or self

    @property
    def size(self) -> int:
        """The number of replicas, N."""
        return self.axis.size

    @property
    def padded_size(self) -> int:
        """The number of slots, D' * L: the length of a mapped axis after padding."""
        return self.axis.placement.slots

    @property
    def scope(self) -> Scope:
        """The scope of the program: it contains only the map's own axis."""
        return Scope([self.axis], self.inner)

    def spec(self, axis: int | None, inner: Splits = ()) -> PartitionSpec:
        """Returns the ``PartitionSpec`` of an array mapped along ``axis``.

        Args:
            axis: The mapped axis; None for an array that is not mapped.
            inner: The other split dimensions of the array, each with its mesh axis (of a nested map).
        """
        split = {} if axis is None else {axis: self.mesh.axis_names[0]}
        split |= dict(inner)
        return PartitionSpec(*(split.get(k) for k in range(max(split, default=-1) + 1)))

    def sharding(self, axis: int | None, inner: Splits = ()) -> NamedSharding:
        """Returns the sharding of a padded array that is mapped along ``axis``: L consecutive rows on each device."""
        return NamedSharding(self.mesh, self.spec(axis, inner))

    def result_sharding(self, axis: int | None, inner: Splits = (), *, on_mesh: bool = False) -> NamedSharding:
        """Returns the sharding of a result of N rows.

        JAX has no uneven sharding. If D' divides N, each row stays on the device that computes it. Otherwise the rows
        are split into g = gcd(N, D') equal parts, each replicated on D'/g devices: 14 rows on 4 devices become 2 parts
        of 7 rows, each on 2 devices. This is the most even split on the same devices, so the next call needs no
        transfer from the host and no copy to other devices. If g = 1, each device has all rows. The mapped axis is
        then split over a mesh axis of size 1, to distinguish the result from one without a mapped axis.

        Args:
            axis: The mapped axis; None for a result that is not mapped.
            inner: The other split dimensions of the result, each with its mesh axis (of a nested map).
            on_mesh: Whether the result must be on the layout's own mesh. If so, a padded result is replicated.
        """
        parts = math.gcd(self.size, self.axis.devices)
        if not self.axis.padding:
            return self.sharding(axis, inner)
        if axis is None or on_mesh:
            return self.sharding(None)
        name = mesh_axis_name(self.axis.name)
        mesh = Mesh(self.mesh.devices.reshape(parts, -1), (name, f"{name} copies"))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, name))


#: The split dimensions of an array, each with the mesh axis over which it is split.
Splits = Sequence[tuple[int, Hashable]]


def mesh_axis_name(name: Hashable) -> str:
    """Returns a mesh axis name that XLA can parse: the user's name if it is an identifier, else ``replicas``."""
    return name if isinstance(name, str) and name.isidentifier() else "replicas"


#: Devices, in an array of dtype object.
DeviceArray = NDArray[np.object_]

#: The nested maps of a program: for each level, outermost first, the names and sizes of the maps.
Nesting = Sequence[Sequence[tuple[Hashable, int]]]


def layout(
    name: Hashable,
    size: int,
    devices: Sequence[jax.Device],
    *,
    use_all_devices: bool = False,
    avoid_user_names: bool = False,
    nesting: Nesting = (),
    ordered: bool = False,
) -> Layout:
    """Returns the layout of ``size`` replicas on ``devices``.

    Each device runs L = ceil(N / D) lanes. The replicas need D' = ceil(N / L) devices. Nested maps use the others: at
    the first level, a nested map gets floor(D / D') devices. Deeper levels divide these in the same way.

    With ``use_all_devices``, all D devices participate, even if some have only padding. An outer ``jit`` has one set of
    devices, so maps of different sizes inside it must use the same devices.

    Args:
        name: The user's name of the mapped axis.
        size: The number of replicas, N.
        devices: The available devices.
        use_all_devices: Whether all devices must be used.
        avoid_user_names: Whether mesh axes must not have the user's names. An enclosing ``vmap`` may bind the same
            name, and would then capture collectives over the mesh axis.
        nesting: The nested maps.
        ordered: See :class:`LogicalAxis`.
    """
    levels = [[(name, size)], *nesting]
    counts = (_factored if use_all_devices else fewest_devices)([[n for _, n in at] for at in levels], len(devices))
    names = axis_names(levels, avoid_user_names=avoid_user_names)
    used = np.asarray(devices[: math.prod(counts)], dtype=object)
    inner = inner_axes(names[1:], counts[1:])
    lanes = -(-size // counts[0])
    axis = dataclasses.replace(_axis(name, size, counts[0], lanes, names[0], 0), ordered=ordered)
    return Layout(axis, mesh_of(used, names[0], inner), inner)


def axis_names(levels: Nesting, *, avoid_user_names: bool = False) -> list[str]:
    """Returns the name of the mesh axis of each level, the outermost map included."""
    names: list[str] = []
    for (first, _), *_ in levels:
        plain = f"{mesh_axis_name(first)}_devices" if avoid_user_names else mesh_axis_name(first)
        names.append(plain if plain not in names else f"{plain}_{len(names) + 1}")
    return names


def inner_axes(names: Sequence[str], counts: Sequence[int]) -> tuple[DeviceAxis, ...]:
    """Returns the mesh axes for nested maps. An axis of one device has no name."""
    return tuple(DeviceAxis(name if count > 1 else None, count) for name, count in zip(names, counts, strict=True))


def mesh_of(devices: DeviceArray, name: str, inner: Sequence[DeviceAxis]) -> Mesh:
    """Returns the mesh of these devices, with one axis for the outermost map and the named axes for nested maps."""
    named = [where for where in inner if where.name is not None]
    return Mesh(devices.reshape(-1, *[where.size for where in named]), (name, *[where.name for where in named]))


def replicas_of(name: Hashable, size: int) -> LogicalAxis:
    """Returns the axis of a nested map before the layout of the outer map is known: all replicas are lanes."""
    return _axis(name, size, 1, size, None, 0)


def fewest_devices(levels: Sequence[Sequence[int]], devices: int) -> list[int]:
    """Returns the number of devices of each level. The outermost level takes as many as it can use, then the next."""
    counts = []
    for sizes in levels:
        counts.append(max(-(-n // -(-n // devices)) for n in sizes))
        devices //= counts[-1]
    return counts


def _factored(levels: Sequence[Sequence[int]], devices: int) -> list[int]:
    """Returns the number of devices of each level if all devices must be used.

    This is the factorization with the fewest lanes per device. In a tie, the outer levels get more devices.
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
