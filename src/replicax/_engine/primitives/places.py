"""Primitives that move arrays between devices, or change the sharding in the type of an array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import jax

from replicax._jax import (
    NO_MESH,
)
from replicax._jax.interpreters import ad, batching, core, mlir
from replicax._typing import Array, ArrayLike, Aval

#: The sharding of an array; None for any sharding.
Where: TypeAlias = jax.sharding.Sharding | None
W = TypeVar("W", bound=Where)


# ---------------------------------------------------------------------------------------------------------------
# Moving between devices


def move(x: Array, here: Where, there: Where) -> Array:
    """Calls ``jax.device_put``. Under ``vmap``, the sharding still applies to the original dimensions.

    The cotangent is moved to ``here``. None means no move.
    """
    return _move_p.bind(x, here=here, there=there)


_move_p = core.Primitive("move")


def _move_batched(
    args: Sequence[Array],
    dims: Sequence[int],
    *,
    here: Where,
    there: Where,
) -> tuple[Array, int]:
    (x,), (dim,) = args, dims
    return move(x, with_dimension(here, dim), with_dimension(there, dim)), dim


def with_dimension(where: W, dim: int) -> W:
    """Returns the sharding of an array with one extra dimension, ``dim``, which is not split."""
    if not isinstance(where, jax.sharding.NamedSharding):
        return where
    spec = [*where.spec, *[None] * (dim - len(where.spec))]
    return jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec(*spec[:dim], None, *spec[dim:]))


def _move_now(x: Array, *, here: Where, there: Where) -> Array:
    del here
    return x if there is None else jax.device_put(x, there)


def _move_back(ct: Array, x: ad.UndefinedPrimal, *, here: Where, there: Where) -> list[Array]:
    del x
    return [move(ct, there, here)]


def _not_moved(ctx: mlir.LoweringRuleContext, x: mlir.ir.Value, **_: object) -> list[mlir.ir.Value]:
    """Lowers to a no-op: a compiled program has one set of devices."""
    del ctx
    return [x]


_move_p.def_impl(_move_now)
_move_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_move_p, _move_back)
batching.primitive_batchers[_move_p] = _move_batched
mlir.register_lowering(_move_p, _not_moved)


def pin(x: Array, where: jax.sharding.NamedSharding) -> Array:
    """Calls ``lax.with_sharding_constraint``. Under ``vmap``, the new dimension is not split. JAX lets XLA split it."""
    return _pin_p.bind(x, where=where)


_pin_p = core.Primitive("pin")


def _pin_back(ct: Array, x: ad.UndefinedPrimal, *, where: jax.sharding.NamedSharding) -> list[Array]:
    del x
    return [pin(ct, where)]


def _pin_batched(args: Sequence[Array], dims: Sequence[int], *, where: jax.sharding.NamedSharding) -> tuple[Array, int]:
    (x,), (dim,) = args, dims
    return pin(x, with_dimension(where, dim)), dim


def _pinned(x: Array, *, where: jax.sharding.NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x, where)


_pin_p.def_impl(_pinned)
_pin_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_pin_p, _pin_back)
batching.primitive_batchers[_pin_p] = _pin_batched
mlir.register_lowering(_pin_p, mlir.lower_fun(_pinned, multiple_results=False))


# ---------------------------------------------------------------------------------------------------------------
# Explicit sharding types


def split_over(x: ArrayLike) -> jax.sharding.NamedSharding | None:
    """Returns the sharding in the type of ``x`` if the mesh of the sharding has ``Explicit`` axes, else None."""
    where = getattr(core.typeof(x), "sharding", None)
    explicit = where is not None and jax.sharding.AxisType.Explicit in where.mesh.axis_types
    return where if explicit else None


class SplitBatchError(Exception):
    """The batch axis of an enclosing ``vmap`` is split over a mesh axis."""


def refuse_split_batches() -> None:
    """Raises :class:`SplitBatchError` under a ``vmap`` with ``spmd_axis_name``, or over an explicitly sharded axis."""
    trace: Any = core.trace_ctx.trace
    while trace is not None:
        if isinstance(trace, batching.BatchTrace):
            axis = trace.axis_data.spmd_name or trace.axis_data.explicit_mesh_axis
            if axis:
                raise SplitBatchError(axis[0] if isinstance(axis, tuple) and len(axis) == 1 else axis)
        trace = getattr(trace, "parent_trace", None)


def retype(x: Array, where: jax.sharding.NamedSharding | None) -> Array:
    """Returns ``x`` with the sharding ``where`` in its type, or with none if ``where`` is None.

    JAX cannot combine arrays with types on the user's mesh and arrays with types on the mesh of a map.
    """
    plain = getattr(core.typeof(x), "sharding", None)
    if plain is None or (where is None and plain.mesh.empty):
        return x
    return _retype_p.bind(x, where=where or jax.sharding.NamedSharding(NO_MESH, jax.sharding.PartitionSpec()))


_retype_p = core.Primitive("retype")


def _retype_type(x: Aval, *, where: jax.sharding.NamedSharding) -> Aval:
    spec = jax.sharding.PartitionSpec(*where.spec, *[None] * (x.ndim - len(where.spec)))
    return x.update(sharding=jax.sharding.NamedSharding(where.mesh, spec))


def _retype_now(x: Array, *, where: jax.sharding.NamedSharding) -> Array:
    del where
    return x


def _retype_back(ct: Array, x: ad.UndefinedPrimal, *, where: jax.sharding.NamedSharding) -> list[Array]:
    del where
    return [_retype_p.bind(ct, where=x.aval.sharding)]


def _retype_batched(
    axis_data: batching.AxisData,
    args: Sequence[Array],
    dims: Sequence[int | None],
    *,
    where: jax.sharding.NamedSharding,
) -> tuple[Array, int | None]:
    (x,), (dim,) = args, dims
    if dim is not None and axis_data.explicit_mesh_axis:
        raise SplitBatchError(axis_data.explicit_mesh_axis)
    if dim is not None and not where.mesh.empty:
        where = with_dimension(where, dim)
    return _retype_p.bind(x, where=where), dim


def _retype_lowered(
    ctx: mlir.LoweringRuleContext, x: mlir.ir.Value, *, where: jax.sharding.NamedSharding
) -> list[mlir.ir.Value]:
    del where
    return [mlir.lower_with_sharding_in_types(ctx, x, ctx.avals_out[0])]


_retype_p.def_impl(_retype_now)
_retype_p.def_abstract_eval(_retype_type)
ad.deflinear2(_retype_p, _retype_back)
batching.fancy_primitive_batchers[_retype_p] = _retype_batched
mlir.register_lowering(_retype_p, _retype_lowered)
