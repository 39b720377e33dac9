"""Primitives between arrays of one process and arrays over the devices of several processes.

A process of a map over several processes holds only its own rows. Inside the program, the rows of all processes are
one array. ``to_all`` and ``to_own`` convert between the two, outside of ``jit``. Each is the transpose of the
other, so that derivatives of a map sum over all replicas. JAX's ``multihost_utils.host_local_array_to_global_array``
cannot be transposed to arrays of other shapes, nor batched (JAX 0.12).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
from jax.sharding import NamedSharding

from replicax import _jax
from replicax._engine.primitives.places import with_dimension
from replicax._jax.interpreters import ad, batching, core
from replicax._typing import Array, Aval, Function


@dataclass(frozen=True)
class Boundary:
    """Where the rows of this process are in the array of all processes.

    Attributes:
        dim: The dimension of the rows; None if every process has the whole array.
        own: The sharding of the array of this process.
        every: The sharding of the array of all processes. Each device has the same shard in both arrays.
        own_rows: The number of rows of this process.
        rows: The number of rows of all processes.
        agree: Called with the boundary and the shape of each array that crosses it, to compare them between processes.
    """

    dim: int | None
    own: NamedSharding
    every: NamedSharding
    own_rows: int = 0
    rows: int = 0
    agree: Callable[[Boundary, tuple[int, ...]], None] | None = field(default=None, compare=False)

    def batched(self, at: int) -> Boundary:
        """Returns the boundary of arrays with one more dimension, ``at``."""
        dim = None if self.dim is None else self.dim + (at <= self.dim)
        return replace(self, dim=dim, own=with_dimension(self.own, at), every=with_dimension(self.every, at))

    def shape(self, shape: Sequence[int], rows: int) -> tuple[int, ...]:
        """Returns ``shape`` with another number of rows."""
        return tuple(rows if k == self.dim else n for k, n in enumerate(shape))


def to_all(x: Array, boundary: Boundary) -> Array:
    """Makes one array of the rows of all processes. No row leaves its device.

    Args:
        x: The rows of this process.
        boundary: Where they lie in the result.
    """
    return _to_all_p.bind(x, boundary=boundary)


def to_own(x: Array, boundary: Boundary) -> Array:
    """Returns the rows of this process, of an array of all processes.

    Args:
        x: The rows of all processes.
        boundary: Where the rows of this process lie in ``x``.
    """
    return _to_own_p.bind(x, boundary=boundary)


_to_all_p, _to_own_p = core.Primitive("to_all"), core.Primitive("to_own")


def _to_all_now(x: Array, *, boundary: Boundary) -> Array:
    if boundary.agree is not None:
        boundary.agree(boundary, x.shape)
    return _of_shards(jax.device_put(x, boundary.own), boundary.shape(x.shape, boundary.rows), boundary.every)


def _to_own_now(x: Array, *, boundary: Boundary) -> Array:
    if x.is_fully_addressable:  # such as zeros that JAX makes for a missing cotangent: equal in all processes
        if boundary.dim is not None:
            x = x[(*[slice(None)] * boundary.dim, _first_rows(x, boundary))]
        return jax.device_put(x, boundary.own)
    if boundary.agree is not None:
        boundary.agree(boundary, x.shape)
    return _of_shards(_moved(boundary.every)(x), boundary.shape(x.shape, boundary.own_rows), boundary.own)


def _of_shards(x: Array, shape: tuple[int, ...], sharding: NamedSharding) -> Array:
    return jax.make_array_from_single_device_arrays(shape, sharding, [shard.data for shard in x.addressable_shards])


@functools.lru_cache(maxsize=4096)
def _moved(sharding: NamedSharding) -> Callable[[Array], Array]:
    """``jax.device_put`` between shardings over the same devices of several processes."""
    return _jax.always_jit(lambda x: x, out_shardings=sharding)


def _first_rows(x: Array, boundary: Boundary) -> slice:
    found = boundary.every.addressable_devices_indices_map(x.shape).values()
    first = min(index[boundary.dim].indices(boundary.rows)[0] for index in found)
    return slice(first, first + boundary.own_rows)


def _register(primitive: core.Primitive, impl: Function, transpose: Function, rows: str) -> None:
    def type_of(x: Aval, *, boundary: Boundary) -> Aval:
        return core.ShapedArray(boundary.shape(x.shape, getattr(boundary, rows)), x.dtype, weak_type=x.weak_type)

    def batched(args: Sequence[Array], dims: Sequence[int], *, boundary: Boundary) -> tuple[Array, int]:
        return primitive.bind(args[0], boundary=boundary.batched(dims[0])), dims[0]

    primitive.def_impl(impl)
    primitive.def_abstract_eval(type_of)
    ad.deflinear2(primitive, lambda ct, _, *, boundary: [transpose(ct, boundary)])
    batching.primitive_batchers[primitive] = batched


_register(_to_all_p, _to_all_now, to_own, "rows")
_register(_to_own_p, _to_own_now, to_all, "own_rows")
