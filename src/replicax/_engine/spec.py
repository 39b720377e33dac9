"""What a program is, before anything is compiled: a frozen value that reports and the call path read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jax
from jax.sharding import NamedSharding

from replicax import _jax
from replicax._engine.outputs import OutputPolicy
from replicax._engine.replica import Replica
from replicax._layout.layout import Layout, Splits
from replicax._typing import Array, DType, PyTreeDef, ShapeAndDtype


@dataclass(frozen=True)
class Inputs:
    """The argument leaves that a program takes.

    Attributes:
        types: The type of each, ``(replicas, ...)`` where it is mapped, before it is padded.
        axes: The mapped axis of each; None where every replica gets it whole.
        donated: The positions of those whose buffers the program may reuse.
    """

    types: tuple[jax.ShapeDtypeStruct | Array, ...]
    axes: tuple[int | None, ...]
    donated: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class ProgramSpec:
    """A function lowered for one signature: types of arguments, number of replicas, devices.

    Attributes:
        name: The name of the user's function.
        layout: Where the replicas lie.
        replica: The program of one replica, that it was lowered from.
        inputs: The arguments, and after them what the function closed over.
        out_axes: The mapped axis of each result leaf.
        out_tree: The structure of the result.
        in_splits: Which further axes of each argument leaf are split over the devices of maps inside.
        out_splits: The same of each result leaf.
        function: From padded argument leaves to result leaves of N rows, on the layout's devices; not compiled.
        closed: Arrays that the user's function closed over and that the program takes after its arguments: tracers
            of an enclosing trace, and arrays that lie on a mesh.
        one_mesh: Whether its results have to be on the mesh of its arguments: padded ones lie whole on each device.
        policy: What a result is whose ``out_axes`` is None.
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

    @cached_property
    def in_shardings(self) -> tuple[NamedSharding, ...]:
        """Where each (padded) argument leaf has to lie."""
        return tuple(map(self.layout.sharding, self.inputs.axes, self.in_splits))

    @cached_property
    def out_shardings(self) -> tuple[NamedSharding, ...]:
        """Where each result leaf lies."""
        own = jax.tree.leaves(self.replica.out)
        each = zip(own, self.out_axes, self.out_splits, strict=True)
        # XLA gives each device all of an array without elements, and JAX 0.10 would not know.
        # Workaround: arrays_without_elements.
        return tuple(
            self.layout.sharding(None)
            if 0 in aval.shape
            else self.layout.result_sharding(axis, splits, on_mesh=self.one_mesh)
            for aval, axis, splits in each
        )

    @cached_property
    def padded_types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The type of each argument leaf once every padding lane has its row."""
        return tuple(map(self._padded_type, self.inputs.types, self.inputs.axes))

    def _padded_type(self, x: ShapeAndDtype, axis: int | None) -> jax.ShapeDtypeStruct:
        aval = _jax.typeof(x)
        shape = list(aval.shape)
        if axis is not None:
            shape[axis] = self.layout.padded_size
        return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))

    @property
    def donated_in_place(self) -> tuple[int, ...]:
        """The donated leaves whose buffers the program can reuse: not a padded copy, which fits no result."""
        padded = self.layout.axis.padding
        return tuple(i for i in self.inputs.donated if self.inputs.axes[i] is None or not padded)

    @cached_property
    def dtypes(self) -> tuple[DType, ...]:
        """The dtype of each argument leaf."""
        return tuple(aval.dtype for aval in self.inputs.types)

    @cached_property
    def device_set(self) -> set[jax.Device]:
        """The devices that it runs on."""
        return self.layout.sharding(None).device_set
