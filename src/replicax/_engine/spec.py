"""The lowered program before compilation, as a frozen dataclass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jax
from jax.sharding import NamedSharding

from replicax import _jax
from replicax._engine.lanes import LanePlan
from replicax._engine.outputs import OutputPolicy
from replicax._engine.replica import Replica
from replicax._layout.layout import Layout, Splits
from replicax._typing import Array, DType, PyTreeDef, ShapeAndDtype


@dataclass(frozen=True)
class Inputs:
    """The argument leaves of a program.

    Attributes:
        types: The type of each leaf before padding, ``(replicas, ...)`` if it is mapped.
        axes: The mapped axis of each leaf; None if every replica gets the full array.
        donated: The positions of the leaves whose buffers the program may reuse.
    """

    types: tuple[jax.ShapeDtypeStruct | Array, ...]
    axes: tuple[int | None, ...]
    donated: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class ProgramSpec:
    """A function lowered for one signature: argument types, number of replicas, devices.

    Attributes:
        name: The name of the user's function.
        layout: The layout of the replicas on the devices.
        replica: The program of one replica.
        inputs: The arguments, followed by the closed-over arrays.
        out_axes: The mapped axis of each result leaf.
        out_tree: The structure of the result.
        in_splits: For each argument leaf, the dimensions that are split over the devices of nested maps.
        out_splits: The same for each result leaf.
        function: The function from padded argument leaves to result leaves of N rows, on the layout's devices. Not
            compiled.
        closed: The closed-over arrays that the program takes as additional last arguments: tracers of an enclosing
            trace, and arrays on a mesh.
        one_mesh: Whether results must be on the mesh of the arguments. If so, padded results are replicated.
        policy: Which value a result with ``out_axes=None`` has.
        lanes: How a device runs its lanes.
    """

    name: str
    layout: Layout
    replica: Replica
    inputs: Inputs
    out_axes: tuple[int | None, ...]
    out_tree: PyTreeDef
    in_splits: tuple[Splits, ...]
    out_splits: tuple[Splits, ...]
    function: Callable[..., tuple[Array, ...]]
    closed: tuple[Array, ...]
    one_mesh: bool
    policy: OutputPolicy
    lanes: LanePlan

    @cached_property
    def in_shardings(self) -> tuple[NamedSharding, ...]:
        """The sharding of each padded argument leaf, over all devices of the program."""
        return tuple(map(self.layout.sharding, self.inputs.axes, self.in_splits))

    @cached_property
    def own_in_shardings(self) -> tuple[NamedSharding, ...]:
        """The sharding of each padded argument leaf, as this process passes it: over its own devices."""
        return tuple(map(self.layout.local.sharding, self.inputs.axes, self.in_splits))

    @cached_property
    def out_shardings(self) -> tuple[NamedSharding, ...]:
        """The sharding of each result leaf, over all devices of the program."""
        if self.layout.own is not None:  # the results keep their padding, and each process drops its own
            return tuple(map(self._unless_empty(self.layout.sharding), self.out, self.out_axes, self.out_splits))
        return self.own_out_shardings

    @cached_property
    def own_out_shardings(self) -> tuple[NamedSharding, ...]:
        """The sharding of each result leaf, as this process gets it: over its own devices."""
        where = functools.partial(self.layout.local.result_sharding, on_mesh=self.one_mesh)
        return tuple(map(self._unless_empty(where), self.out, self.out_axes, self.out_splits))

    def _unless_empty(self, where: Callable[..., NamedSharding]) -> Callable[..., NamedSharding]:
        # XLA replicates an array without elements on each device. JAX 0.10 does not account for this.
        # Workaround: arrays_without_elements.
        return lambda aval, axis, splits: where(None) if 0 in aval.shape else where(axis, splits)

    @property
    def out(self) -> list[ShapeAndDtype]:
        """The type of each result leaf in one replica."""
        return jax.tree.leaves(self.replica.out)

    def out_types(self, rows: int) -> list[jax.ShapeDtypeStruct]:
        """The type of each result leaf of so many replicas."""
        shapes = [
            x.shape if axis is None else (*x.shape[:axis], rows, *x.shape[axis:])
            for x, axis in zip(self.out, self.out_axes, strict=True)
        ]
        return [jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(shapes, self.out, strict=True)]

    @cached_property
    def padded_types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The type of each argument leaf after padding."""
        rows = self.layout.padded_size
        return tuple(with_rows(x, axis, rows) for x, axis in zip(self.inputs.types, self.inputs.axes, strict=True))

    @property
    def donated_in_place(self) -> tuple[int, ...]:
        """The donated leaves whose buffers the program can reuse. No result has the size of a padded argument."""
        padded = self.layout.axis.padding
        return tuple(i for i in self.inputs.donated if self.inputs.axes[i] is None or not padded)

    @cached_property
    def dtypes(self) -> tuple[DType, ...]:
        """The dtype of each argument leaf."""
        return tuple(aval.dtype for aval in self.inputs.types)

    @cached_property
    def over_processes(self) -> bool:
        """Whether the program is over several processes."""
        return len({device.process_index for device in self.layout.mesh.devices.flat}) > 1

    @cached_property
    def device_set(self) -> set[jax.Device]:
        """The devices of this process that the program runs on."""
        return self.layout.local.sharding(None).device_set


def with_rows(x: ShapeAndDtype | Array, axis: int | None, rows: int) -> jax.ShapeDtypeStruct:
    """Returns the type of ``x`` with another number of rows along its mapped axis, None for no mapped axis."""
    aval = _jax.typeof(x)
    shape = list(aval.shape)
    if axis is not None:
        shape[axis] = rows
    return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))
