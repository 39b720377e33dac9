"""Runs a program over several processes on the rows of this process."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.blocks import on_data, real_rows
from replicax._engine.levels import pad_rows
from replicax._engine.spec import with_rows
from replicax._jax import cpp
from replicax._jax.aliases import Known
from replicax._layout.layout import Splits
from replicax._runtime.agreement import Running
from replicax._runtime.executable import Executable
from replicax._runtime.global_arrays import boundary, own_copy
from replicax._typing import Array, ArrayLike, Function


class OwnRows(Executable):
    """A program over several processes: takes and returns the rows of this process, on its devices."""

    @cached_property
    def _callable(self) -> Function:
        """The program, which takes padded rows of this process, and returns arrays over all processes."""
        return cpp.fast_call(self._own_compiled)

    @cached_property
    def _own_compiled(self) -> jax.stages.Compiled:
        return self._on_own_shards(self.compiled)

    def _on_own_shards(self, compiled: jax.stages.Compiled) -> jax.stages.Compiled:
        spec, own = self.spec, self.spec.layout.local
        types = [
            with_rows(x, axis, own.padded_size) for x, axis in zip(spec.inputs.types, spec.inputs.axes, strict=True)
        ]
        return _jax.on_own_shards(compiled, types, spec.own_in_shardings, own.sharding(None))

    def runner(self, compiled: jax.stages.Compiled) -> Function:
        """A compiled form of the program, as :meth:`run` calls it."""
        own = self._on_own_shards(compiled)
        return lambda *leaves: self._own_results(_called(own, leaves))

    @property
    def out_info(self) -> list[jax.ShapeDtypeStruct]:
        """The type and the sharding of each result leaf of this process."""
        types = self.spec.out_types(self.spec.layout.local.size)
        each = zip(types, self.spec.own_out_shardings, strict=True)
        return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x, where in each]

    def run(self, *leaves: Array) -> Sequence[Array]:
        """Runs the program on arrays that are already on ``own_in_shardings``."""
        with self._turn:
            compiled = self._callable
        try:
            if self._has_run:
                return self._own_results(_called(compiled, leaves))
            results, self.known = _called(functools.partial(_first_run, compiled), leaves)
        except _jax.NanError:
            raise FloatingPointError(_nan_in(self.spec.name)) from None
        except ValueError:
            # JAX 0.10 says, wrongly, that 4-bit arguments have another layout in memory.
            # Workaround: layouts_of_four_bits.
            results = _called(functools.partial(_jax.call_unchecked, self._own_compiled), leaves)
        self._has_run = True
        return self._own_results(results)

    @property
    def takes_parts_alone(self) -> bool:
        """Whether the results of this process are its parts of the program's results, without any other step."""
        return not self.spec.layout.local.axis.padding and not self.constant

    @cached_property
    def constant(self) -> dict[int, Array]:
        """The results that are empty (XLA replicates these) or float0, by position."""
        types, where = self.spec.out_types(self.spec.layout.local.padded_size), self.spec.layout.local.sharding(None)
        return {
            k: jax.device_put(_jax.zeros(x), where)
            for k, x in enumerate(types)
            if 0 in self.spec.out[k].shape or x.dtype == jax.dtypes.float0
        }

    @cached_property
    def staged(self) -> Function:
        """The program for ``grad``, ``vmap`` and the like outside of ``jit``: it takes and returns own rows."""
        spec, program = self.spec, jax.jit(self.spec.function)
        placement, axes = spec.layout.local.axis.placement, spec.inputs.axes

        def given(x: ArrayLike, axis: int | None, splits: Splits) -> Array:
            at = boundary(spec.layout, axis, splits)
            x = primitives.retype(own_copy(x) if axis is None and _jax.over_processes(x) else x, None)
            padded = x if axis is None else pad_rows(x, axis, placement)
            return on_data(lambda x: primitives.to_all(x, at), padded)

        def own(k: int, y: Array, axis: int | None, splits: Splits) -> Array:
            at = boundary(spec.layout, axis, splits)
            x = self.constant[k] if k in self.constant else on_data(lambda y: primitives.to_own(y, at), y)
            return x if axis is None else on_data(lambda x: real_rows(x, axis, placement), x)

        def on_own_rows(*leaves: ArrayLike) -> list[Array]:
            results = program(*map(given, leaves, axes, spec.in_splits))
            return list(map(own, itertools.count(), results, spec.out_axes, spec.out_splits))

        return on_own_rows

    def _own_results(self, results: Sequence[Array]) -> Sequence[Array]:
        """This process's rows of the results, without padding."""
        own = list(map(_jax.own_part, results))
        for k, x in self.constant.items():
            own[k] = x
        if _jax.looks_for_nans():
            _refuse_nans(self.spec.name, own)
        return own if not self.spec.layout.local.axis.padding else self._without_padding(own)

    @cached_property
    def _without_padding(self) -> Function:
        spec, own = self.spec, self.spec.layout.local

        def rows(results: Sequence[Array]) -> list[Array]:
            return [
                x if axis is None else on_data(functools.partial(real_rows, dim=axis, placement=own.axis.placement), x)
                for x, axis in zip(results, spec.out_axes, strict=True)
            ]

        return jax.jit(rows, out_shardings=list(spec.own_out_shardings))

    @cached_property
    def no_rows(self) -> list[Array | None]:
        """The padding that this process passes for each mapped argument if it has no replicas: zeros."""
        spec, rows = self.spec, self.spec.layout.local.padded_size
        each = zip(spec.inputs.types, spec.inputs.axes, spec.own_in_shardings, strict=True)
        found: list[Any] = []
        for x, axis, where in each:
            padded = with_rows(x, axis, rows)
            if padded.dtype == jax.dtypes.float0:
                found.append(np.zeros(padded.shape, padded.dtype))
            else:
                found.append(None if axis is None else jax.device_put(_jax.zeros(padded), where))
        return found


def _called(compiled: Function, leaves: Sequence[Array]) -> Any:
    Running.calls += 1
    try:
        return compiled(*leaves)
    finally:
        Running.calls -= 1


def _first_run(compiled: Function, *leaves: Array) -> tuple[Sequence[Array], Known | None]:
    return cpp.first_run(compiled, leaves)


def _refuse_nans(name: str, results: Sequence[Array]) -> None:
    if any(jax.numpy.issubdtype(x.dtype, jax.numpy.inexact) and bool(jax.numpy.isnan(x).any()) for x in results):
        raise FloatingPointError(_nan_in(name))


def _nan_in(name: str) -> str:
    return (
        f"invalid value (nan or inf) encountered in a result of {name}, in a replica of process {jax.process_index()}"
    )
