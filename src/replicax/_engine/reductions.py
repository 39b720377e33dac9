"""Sum, maximum and minimum over named axes and over array dimensions, for the rules of collectives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replicax._typing import Array, AxisName, DType, Function, IndexGroups


@dataclass(frozen=True)
class Reduction:
    """A reduction over named axes and over array dimensions.

    Attributes:
        name: The name of JAX's primitive.
        named: Reduces over lane axes.
        between: Reduces over device axes.
        local: Reduces over array dimensions.
        combine: Reduces two values.
        identity: The value of no replicas, of a shape and a dtype.
    """

    name: str
    named: Function
    between: Function
    local: Function
    combine: Function
    identity: Callable[[Sequence[int], DType], Array]


def _by_rank(
    reduce: Function, x: Array, names: AxisName | Sequence[AxisName], axis_index_groups: IndexGroups = None
) -> Array:
    """Returns the maximum or minimum over device axes. Floats are compared as integers, so that NaN is never lost.

    XLA's own reduction loses NaN values (CPU, JAX 0.10 to 0.12). Workaround: lost_nans.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return reduce(x, names, axis_index_groups=axis_index_groups)
    wide = x.astype(
        jnp.float64 if x.dtype.itemsize == 8 else jnp.float32
    )  # at least 32 bits: all platforms reduce 32-bit integers
    ranks = np.dtype(f"int{8 * wide.dtype.itemsize}")
    first = np.iinfo(ranks).max if reduce is lax.pmax else np.iinfo(ranks).min
    best = reduce(
        lax.select(jnp.isnan(wide), jnp.full(x.shape, first, ranks), _rank(wide, ranks)),
        names,
        axis_index_groups=axis_index_groups,
    )
    return lax.bitcast_convert_type(_rank(best, ranks), wide.dtype).astype(x.dtype)


def _rank(x: Array, ranks: DType) -> Array:
    """Converts floats to integers of the same order. The function is its own inverse.

    If the sign bit is set, all other bits are flipped.
    """
    bits = lax.bitcast_convert_type(x, ranks)
    return bits ^ (lax.shift_right_arithmetic(bits, ranks.type(8 * ranks.itemsize - 1)) & np.iinfo(ranks).max)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def without_derivative(name: str, x: Array) -> Array:
    """Returns ``x``, and raises if differentiated, because JAX has no derivative of this reduction."""
    del name
    return x


def _refuse(name: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    del primals, tangents
    raise NotImplementedError(f"Differentiation rule for '{name}' not implemented")


without_derivative.defjvp(_refuse)


def _bound(shape: Sequence[int], dtype: DType, *, least: bool) -> Array:
    """Returns the least or the greatest number of a dtype."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return jnp.full(shape, not least)
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.full(shape, -jnp.inf if least else jnp.inf, dtype)
    return jnp.full(shape, jnp.iinfo(dtype).min if least else jnp.iinfo(dtype).max, dtype)


SUM = Reduction(
    "psum", lax.psum, lax.psum, lambda x, axis: jnp.sum(x, axis, dtype=x.dtype), lambda a, b: a + b, jnp.zeros
)
MAX = Reduction(
    "pmax", lax.pmax, functools.partial(_by_rank, lax.pmax), jnp.max, lax.max, functools.partial(_bound, least=True)
)
MIN = Reduction(
    "pmin", lax.pmin, functools.partial(_by_rank, lax.pmin), jnp.min, lax.min, functools.partial(_bound, least=False)
)
