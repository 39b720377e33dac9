"""Moves arrays between the devices of this process and those of all processes of a map."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.blocks import on_data
from replicax._layout.layout import Layout, Splits
from replicax._runtime.agreement import agree_on_shape
from replicax._typing import Array
from replicax.errors import ProcessesError


def moved(arrays: Sequence[Array], wanted: Sequence[NamedSharding]) -> list[Array]:
    """Moves arrays from any devices: ``jax.device_put``, also from one process to all, and back."""
    if jax.process_count() == 1 or not arrays:
        return list(jax.device_put(list(arrays), list(wanted)))
    if not wanted[0].is_fully_addressable:
        return list(map(on_all, arrays, wanted))
    return list(jax.device_put([own_copy(x) if _jax.over_processes(x) else x for x in arrays], list(wanted)))


def own_copy(x: Array) -> Array:
    """Returns the copy that this process has of an array that is whole on each device.

    Raises:
        ProcessesError: The array is split over the processes.
    """
    value, _ = _jax.outermost_value(x)
    mesh = getattr(value.sharding, "mesh", None)
    if mesh is None or not value.sharding.is_fully_replicated:
        raise foreign_array(x)
    return on_data(lambda x: primitives.to_own(x, whole(mesh)), x)


def boundary(layout: Layout, axis: int | None, splits: Splits = ()) -> primitives.Boundary:
    """The boundary between the padded rows of this process and those of all processes of a layout."""
    own = layout.local
    return primitives.Boundary(
        axis,
        own.sharding(axis, splits),
        layout.sharding(axis, splits),
        own.padded_size,
        layout.padded_size,
        agree_on_shape,
    )


def whole(mesh: Mesh) -> primitives.Boundary:
    """The boundary between an array that is whole on each device of a mesh, and the copies of this process."""
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    here = NamedSharding(Mesh(np.asarray(own, dtype=object), ("devices",)), PartitionSpec())
    return primitives.Boundary(None, here, NamedSharding(mesh, PartitionSpec()), agree=agree_on_shape)


def on_all(x: Array, wanted: NamedSharding) -> Array:
    """Moves an array to a sharding over the devices of several processes.

    Args:
        x: An array over the same devices; or one of this process, equal in all processes.
        wanted: The sharding.

    Raises:
        ProcessesError: The array is over several processes, but not over these devices.
    """
    value, batched = _jax.outermost_value(x)
    if value.is_fully_addressable:
        return on_data(lambda x: primitives.to_all(x, whole(wanted.mesh)), x)
    if value.sharding.device_set != wanted.device_set:
        others = sorted(device.id for device in value.sharding.device_set)
        raise ProcessesError(
            f"An argument of shape {x.shape} is over the devices {others}, and the map is over the devices "
            f"{sorted(device.id for device in wanted.device_set)}. Over several processes, a global array must be over "
            f"all devices of the map: replicax.to_global(own_rows) makes one over all devices, and pmap(f, devices="
            f"x.sharding.mesh.devices.ravel()) maps over those of x."
        )
    here = value.sharding  # where the cotangent goes back to; under vmap, it is that of an array with another dimension
    return primitives.move(x, NamedSharding(wanted.mesh, PartitionSpec()) if batched else here, wanted)


def foreign_array(x: Array) -> ProcessesError:
    """The error for an array on devices of other processes, where one of this process is needed."""
    return ProcessesError(
        f"An argument of shape {x.shape} is split over the devices of several processes, but an array of this process "
        f"is needed here. replicax.to_local(x) returns this process's rows, and replicax.fetch(x) the whole array."
    )
