"""The compiled forms of a program, built from its ``ProgramSpec`` on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.levels import own_rows, pad_rows
from replicax._engine.spec import ProgramSpec
from replicax._jax import cpp
from replicax._jax.aliases import Known
from replicax._runtime.global_arrays import moved
from replicax._typing import Array, Axes, Function, PyTreeDef


class Executable:
    """Runs a program. Each form of it (eager, padding, staged) is compiled on first use.

    Args:
        spec: The program.

    Attributes:
        spec: The program.
        closed: The arrays that the function closes over. The program takes them after the arguments.
        out_tree: The pytree structure of the result.
        known: The data that the C++ fast path needs to run the program; None before the first run, or if only Python
            can run it.
        pad: Adds padding rows to arguments that are on the devices of the layout.
        packings: Programs with packed arguments, by the types of the arguments.
        may_not_fit: Whether the program may need more memory than there is.
    """

    def __init__(self, spec: ProgramSpec) -> None:
        self.spec = spec
        self.closed: tuple[Array, ...] = spec.closed
        self.out_tree: PyTreeDef = spec.out_tree
        self.known: Known | None = None
        self.packings: dict[Hashable, Any] = {}
        self.may_not_fit = False
        self._has_run = False
        self._turn = threading.RLock()
        self.pad = Padding(spec)

    @property
    def reusable(self) -> bool:
        """Whether later calls may reuse the program. A program that closes over a tracer serves only its own call."""
        return not self.spec.replica.closes_over_tracers

    @cached_property
    def traced(self) -> jax.stages.Traced:
        """The traced program for arguments on ``in_shardings``."""
        return self._jitted.trace(*self.spec.padded_types)

    @cached_property
    def compiled(self) -> jax.stages.Compiled:
        """The program, compiled once. ``jit`` would compile again for each combination of argument meshes."""
        return self.traced.lower().compile()

    @cached_property
    def _callable(self) -> Function:
        """The compiled program, as it is called."""
        return cpp.fast_call(self.compiled)

    @cached_property
    def _jitted(self) -> jax.stages.Wrapped:
        spec = self.spec
        return jax.jit(
            spec.function,
            in_shardings=spec.in_shardings,
            out_shardings=spec.out_shardings,
            donate_argnums=spec.donated_in_place,
            compiler_options=dict(_jax.SAME_BITS) if spec.layout.axis.ordered else None,
        )

    @cached_property
    def closed_in_place(self) -> list[Array]:
        """:attr:`closed`, replicated over the devices of the layout. Arrays are immutable, so they are moved once."""
        return moved(self.spec.closed, [self.spec.layout.local.sharding(None)] * len(self.spec.closed))

    def run(self, *leaves: Array) -> Sequence[Array]:
        """Runs the program eagerly on arrays that are already on ``in_shardings``."""
        if jax.config.jax_disable_jit or _jax.looks_for_nans():
            return self._jitted(*leaves)  # jit runs the Python function again under these settings
        with self._turn:
            compiled = self._callable
        try:
            if self._has_run:
                return compiled(*leaves)
            results, self.known = cpp.first_run(compiled, leaves)
        except ValueError:
            # An argument has a different memory layout. JAX 0.10 also reports this, wrongly, for 4-bit dtypes.
            # Workaround: layouts_of_four_bits.
            results = self._jitted(*leaves)
        self._has_run = True
        return results

    def runner(self, compiled: jax.stages.Compiled) -> Function:
        """A compiled form of the program, as :meth:`run` calls it."""
        return compiled

    @property
    def out_info(self) -> list[jax.ShapeDtypeStruct]:
        """The type and the sharding of each result leaf."""
        return self.traced.out_info

    @cached_property
    def staged(self) -> jax.stages.Wrapped:
        """The program for an enclosing trace: includes the padding, and lets XLA choose the output shardings."""
        return jax.jit(_padding_by_itself(self.spec))


class Padding:
    """Adds padding rows to arguments. Each combination of arguments has a program of its own.

    Args:
        spec: The program that the arguments are for.
    """

    def __init__(self, spec: ProgramSpec) -> None:
        self._spec = spec
        self._programs: dict[tuple[tuple[int, ...], bool], jax.stages.Wrapped] = {}

    def __call__(self, which: tuple[int, ...], leaves: list[Array]) -> list[Array]:
        """Adds the padding rows to arguments that are on the devices of the layout."""
        axes = [axis for i in which if (axis := self._spec.inputs.axes[i]) is not None]
        only_rows = all(map(_splits_only_rows, leaves, axes))
        if (which, only_rows) not in self._programs:
            self._programs[which, only_rows] = jax.jit(
                _taking_rows(self._spec, axes) if only_rows else _adding_rows(self._spec, axes),
                out_shardings=[self._spec.own_in_shardings[i] for i in which],
            )
        return list(self._programs[which, only_rows](leaves))


def _splits_only_rows(x: Array, axis: int) -> bool:
    """Whether no dimension but the mapped axis is split."""
    sizes = enumerate(zip(x.shape, x.sharding.shard_shape(x.shape), strict=True))
    return all(k == axis or whole == part for k, (whole, part) in sizes)


def _adding_rows(spec: ProgramSpec, axes: Sequence[int]) -> Callable[[list[Array]], list[Array]]:
    where = spec.layout.local.axis.placement
    # If Explicit axes of a mesh shard the rows, an array with the padded row count may have no valid type.
    return lambda xs: [pad_rows(primitives.retype(x, None), a, where) for x, a in zip(xs, axes, strict=True)]


def _taking_rows(spec: ProgramSpec, axes: Sequence[int]) -> Callable[[list[Array]], list[Array]]:
    """Each device selects its rows from a replicated array.

    Without shard_map, XLA communicates even if the arrays are replicated already. Without replication, XLA (JAX 0.12)
    may abort the process if a device holds other rows than it needs. Workaround: rows_split_unevenly.
    """
    where = spec.layout.local
    name = where.mesh.axis_names[0]

    def rows(xs: list[Array]) -> list[Array]:
        first = lax.axis_index(name) * where.axis.lanes
        return [own_rows(x, axis, first, where.axis.placement) for x, axis in zip(xs, axes, strict=True)]

    outs = list(map(where.spec, axes))
    taken = jax.shard_map(rows, mesh=where.mesh, in_specs=PartitionSpec(), out_specs=outs, check_vma=False)
    everywhere = where.sharding(None)
    return lambda xs: taken([primitives.pin(primitives.retype(x, None), everywhere) for x in xs])


def _padding_by_itself(spec: ProgramSpec) -> Callable[..., tuple[Array, ...]]:
    where, placement, in_axes = spec.layout, spec.layout.axis.placement, spec.inputs.axes

    def placed(x: Array, axis: int | None) -> Array:
        if axis is None or not placement.padding:
            return x
        # Replicated, because XLA splits N rows unevenly and then communicates more. Workaround: rows_split_unevenly.
        return primitives.pin(x, where.sharding(None))

    def padded_first(*args: Array) -> tuple[Array, ...]:
        typed = [primitives.split_over(x) for x in args]
        args = tuple(
            x if axis is None else placed(pad_rows(placed(x, axis), axis, placement), axis)
            for x, axis in zip([primitives.retype(x, None) for x in args], in_axes, strict=True)
        )
        results = map(placed, spec.function(*args), spec.out_axes)
        return tuple(
            primitives.retype(y, _like_the_arguments(axis, typed, in_axes))
            for y, axis in zip(results, spec.out_axes, strict=True)
        )

    padded_first.__name__ = padded_first.__qualname__ = spec.name
    return padded_first


def _like_the_arguments(
    axis: int | None, typed: Sequence[jax.sharding.NamedSharding | None], in_axes: Axes
) -> jax.sharding.NamedSharding | None:
    """The sharding in the type of a result: the mapped axis is sharded as in the mapped arguments, if they agree."""
    said = [(where, a) for where, a in zip(typed, in_axes, strict=True) if where is not None]
    if not said:
        return None
    mesh = said[0][0].mesh
    rows = {where.spec[a] if a < len(where.spec) else None for where, a in said if a is not None}
    if axis is None or len(rows) != 1:
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*[None] * axis, rows.pop()))
