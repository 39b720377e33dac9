"""Primitives that convert between values that are equal on all devices of a mesh axis and per-device values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from replicax._jax.interpreters import ad, batching, core, mlir, parallel, slicing
from replicax._typing import Array, Aval, AxisName, Function

# ---------------------------------------------------------------------------------------------------------------
# Conversions between equal values and per-device values
#
# In the outer program, a value and its cotangent are equal on all devices. In a nested map, each device has its own
# part of the value and of the cotangent. share is the transpose of total, and own_part is the transpose of join_parts.
# JAX has the same pairs in shard_map with check_vma=True.


def share(x: Array, axis: AxisName) -> Array:
    """Converts ``x``, which is equal on all devices, to a per-device value. The cotangent is summed over devices."""
    return _share_p.bind(x, axis=axis)


def total(x: Array, axis: AxisName) -> Array:
    """Returns the sum of ``x`` over the devices. The result is equal on all devices."""
    return _total_p.bind(x, axis=axis)


def own_part(x: Array, axis: AxisName, dim: int) -> Array:
    """Returns this device's part along ``dim`` of ``x``, which is equal on all devices."""
    return _own_part_p.bind(x, axis=axis, dim=dim)


def join_parts(x: Array, axis: AxisName, dim: int) -> Array:
    """Concatenates the parts of all devices along ``dim``. The result is equal on all devices."""
    return _join_parts_p.bind(x, axis=axis, dim=dim)


def equal_parts(x: Array, axis: AxisName) -> Array:
    """Returns ``x``, which is equal on all devices. The first device gets the full cotangent, the others get zeros."""
    return _equal_parts_p.bind(x, axis=axis)


def lend_rows(x: Array, axis: AxisName, dim: int, lent: Sequence[tuple[int, int]]) -> Array:
    """Fills the blocks of some devices with a row of another device. The cotangents of these copies are dropped.

    Args:
        x: The block of this device, ``(..., lanes, ...)``.
        axis: The mesh axis.
        dim: The dimension of the lanes.
        lent: Pairs of a slot and the device that copies the row of that slot.
    """
    return _lend_rows_p.bind(x, axis=axis, dim=dim, lent=tuple(lent))


def _slice_of_device(x: Array, *, axis: AxisName, dim: int) -> Array:
    size = x.shape[dim] // parallel.axis_size(axis)
    return slicing.dynamic_slice_in_dim(x, parallel.axis_index(axis) * size, size, dim)


def _between(name: str, impl: Function, transposed: Function, *, factor: int = 0) -> core.Primitive:
    """Creates a primitive from one array to one array, over one mesh axis.

    Args:
        name: The name of the primitive.
        impl: Its implementation, in terms of JAX's functions.
        transposed: Its transpose, in terms of JAX's functions.
        factor: 1 if the primitive multiplies the size of dimension ``dim`` by the number of devices, -1 if it divides
            the size by this number, 0 if it keeps the shape.
    """
    primitive = core.Primitive(name)

    def type_of(x: Aval, *, axis: AxisName, dim: int = 0, **_: object) -> tuple[Aval, set[object]]:
        shape = list(x.shape)
        if factor:
            size = parallel.axis_size(axis)
            shape[dim] = shape[dim] * size if factor > 0 else shape[dim] // size
        return core.ShapedArray(shape, x.dtype, weak_type=x.weak_type), {core.NamedAxisEffect(axis)}

    def batched(
        axis_data: batching.AxisData, args: Sequence[Array], dims: Sequence[int | None], **params: Any
    ) -> tuple[Array, int | None]:
        del axis_data
        (x,), (d,) = args, dims
        if d is not None and "dim" in params:
            params["dim"] += d <= params["dim"]
        return primitive.bind(x, **params), d

    primitive.def_effectful_abstract_eval(type_of)
    mlir.register_lowering(primitive, mlir.lower_fun(impl, multiple_results=False))
    ad.deflinear2(primitive, lambda ct, _, **params: [transposed(ct, **params)])
    batching.fancy_primitive_batchers[primitive] = batched
    return primitive


def _as_it_is(x: Array, *, axis: AxisName) -> Array:
    del axis
    return x


def _gathered(x: Array, *, axis: AxisName, dim: int) -> Array:
    return parallel.all_gather(x, axis, axis=dim, tiled=True)


def _to_first(ct: Array, *, axis: AxisName) -> Array:
    own = share(ct, axis)
    return jnp.where(parallel.axis_index(axis) == 0, own, jnp.zeros_like(own))


def _lend_rows(x: Array, *, axis: AxisName, dim: int, lent: Sequence[tuple[int, int]]) -> Array:
    lanes, here = x.shape[dim], parallel.axis_index(axis)
    for slot, device in lent:
        row = slicing.slice_in_dim(x, slot % lanes, slot % lanes + 1, axis=dim)
        x = jnp.where(here == device, parallel.ppermute(row, axis, [(slot // lanes, device)]), x)
    return x


def _without_lent_rows(ct: Array, *, axis: AxisName, dim: int, lent: Sequence[tuple[int, int]]) -> Array:
    del dim
    copies = np.isin(np.arange(parallel.axis_size(axis)), [device for _, device in lent])
    return jnp.where(jnp.asarray(copies)[parallel.axis_index(axis)], jnp.zeros_like(ct), ct)


_share_p = _between("share", _as_it_is, total)
_total_p = _between("total", lambda x, *, axis: parallel.psum(x, axis), share)
_own_part_p = _between("own_part", _slice_of_device, join_parts, factor=-1)
_join_parts_p = _between("join_parts", _gathered, own_part, factor=1)
_equal_parts_p = _between("equal_parts", _as_it_is, _to_first)
_lend_rows_p = _between("lend_rows", _lend_rows, _without_lent_rows)
