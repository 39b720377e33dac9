"""Primitives for the lanes of a device: select a lane's row, batch over lanes, and pad rows."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from replicax._jax.interpreters import ad, batching, core, mlir, slicing
from replicax._layout.placement import Placement
from replicax._typing import Array, Aval, AxisName

# ---------------------------------------------------------------------------------------------------------------
# Lanes


def own_lane(x: Array, axis: AxisName) -> Array:
    """Returns row ``i`` of ``x`` in lane ``i`` of a vmapped axis. ``x`` has shape ``(lanes, ...)``.

    Under ``vmap`` this only renames a dimension. Indexing by ``lax.axis_index`` would be a gather.
    """
    return _own_lane_p.bind(x, axis=axis)


_own_lane_p = core.Primitive("own_lane")


def _own_lane_type(x: Aval, *, axis: AxisName) -> Aval:
    del axis
    return x.update(shape=x.shape[1:])


def _own_lane_batched(
    axis_data: batching.AxisData, args: Sequence[Array], dims: Sequence[int | None], *, axis: AxisName
) -> tuple[Array, int | None]:
    (x,), (dim,) = args, dims
    if axis_data.name != axis:
        return (own_lane(x, axis), None) if dim is None else (own_lane(jnp.moveaxis(x, dim, 1), axis), 0)
    return (x, 0) if dim is None else (jnp.diagonal(x, 0, *(dim, 0 if dim else 1)), x.ndim - 2)


_own_lane_p.def_abstract_eval(_own_lane_type)
batching.fancy_primitive_batchers[_own_lane_p] = _own_lane_batched


def each_lane(x: Array, axis: AxisName) -> Array:
    """Returns ``x`` as a value that ``vmap`` tracks as batched along ``axis``, even if it is equal in all lanes."""
    return _each_lane_p.bind(x, axis=axis)


_each_lane_p = core.Primitive("each_lane")


def _each_lane_type(x: Aval, *, axis: AxisName) -> Aval:
    del axis
    return x


def _each_lane_batched(
    axis_data: batching.AxisData, args: Sequence[Array], dims: Sequence[int | None], *, axis: AxisName
) -> tuple[Array, int | None]:
    (x,), (dim,) = args, dims
    if axis_data.name != axis:
        return each_lane(x, axis), dim
    return (jnp.broadcast_to(x, (axis_data.size, *x.shape)), 0) if dim is None else (x, dim)


_each_lane_p.def_abstract_eval(_each_lane_type)
batching.fancy_primitive_batchers[_each_lane_p] = _each_lane_batched


# ---------------------------------------------------------------------------------------------------------------
# Padding


def pad_rows(x: Array, dim: int, placement: Placement) -> Array:
    """Pads ``x`` along ``dim`` from one row per replica to one row per slot. Padding rows are copies.

    Without replicas, they are zeros. The cotangents of padding rows are dropped. Adding them could give NaN: an
    infinite derivative times zero.
    """
    return _pad_rows_p.bind(x, dim=dim, placement=placement)


_pad_rows_p = core.Primitive("pad_rows")


def _pad_rows(x: Array, *, dim: int, placement: Placement) -> Array:
    if placement.size == 0:
        return jnp.zeros((*x.shape[:dim], placement.slots, *x.shape[dim + 1 :]), x.dtype)
    parts = []
    for first, rows, copies in placement.pieces:
        if rows:
            parts.append(x if rows == placement.size else slicing.slice_in_dim(x, first, first + rows, axis=dim))
        if copies:
            last = max(first + rows - 1, 0)
            row = slicing.slice_in_dim(x, last, last + 1, axis=dim)
            parts.append(jnp.broadcast_to(row, (*x.shape[:dim], copies, *x.shape[dim + 1 :])))
    return jnp.concatenate(parts, dim)


def _pad_rows_type(x: Aval, *, dim: int, placement: Placement) -> Aval:
    shape = (*x.shape[:dim], placement.slots, *x.shape[dim + 1 :])
    return core.ShapedArray(shape, x.dtype, weak_type=x.weak_type)


def _pad_rows_transposed(ct: Array, x: ad.UndefinedPrimal, *, dim: int, placement: Placement) -> list[Array]:
    del x
    runs = [slicing.slice_in_dim(ct, first, first + count, axis=dim) for first, count in placement.runs]
    return [runs[0] if len(runs) == 1 else jnp.concatenate(runs, dim)]


def _pad_rows_batched(
    args: Sequence[Array], dims: Sequence[int], *, dim: int, placement: Placement
) -> tuple[Array, int]:
    (x,), (d,) = args, dims
    return pad_rows(x, dim + (d <= dim), placement), d


_pad_rows_p.def_impl(_pad_rows)
_pad_rows_p.def_abstract_eval(_pad_rows_type)
mlir.register_lowering(_pad_rows_p, mlir.lower_fun(_pad_rows, multiple_results=False))
ad.deflinear2(_pad_rows_p, _pad_rows_transposed)
batching.primitive_batchers[_pad_rows_p] = _pad_rows_batched
