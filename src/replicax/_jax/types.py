"""The types of values."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax._src import ad_util, config, core
from jax._src.lax import lax as lax_internal
from jax._src.lib import _jax as jaxlib
from jax._src.state.types import AbstractRef

from replicax._jax.aliases import ArrayType, Equation
from replicax._typing import Array, ArrayLike


def typeof(x: object) -> ArrayType:
    """Returns the type of an array or scalar, as JAX would trace it now.

    Raises:
        TypeError: ``x`` is not an array.
        ValueError: ``x`` cannot be converted to an array.
    """
    is_type = isinstance(x, jax.ShapeDtypeStruct | core.AbstractValue)
    aval = core.shaped_abstractify(x) if is_type else core.typeof(x)  # shaped_abstractify accepts too many types
    if not isinstance(aval, core.ShapedArray):
        raise TypeError(f"{type(x).__name__} is not an array")  # x is a jax.Ref
    if isinstance(x, jax.Array) and not config.enable_x64.value and aval.dtype.name in _WIDE:
        return aval.update(dtype=_WIDE[aval.dtype.name])  # x was created while 64-bit types were enabled
    return aval


_WIDE = {
    wide: np.dtype(narrow)
    for wide, narrow in (
        ("float64", "float32"),
        ("complex128", "complex64"),
        ("int64", "int32"),
        ("uint64", "uint32"),
    )
}


def array_type(shape: tuple[int, ...], dtype: np.dtype[np.generic], x64: bool) -> ArrayType:
    """Returns the type of a JAX array converted from a NumPy array, with or without 64-bit types."""
    return core.ShapedArray(shape, dtype if x64 else _WIDE.get(dtype.name, dtype))


def type_key(leaves: Sequence[ArrayLike]) -> Hashable:
    """Returns a hashable key of the types of all leaves: shapes, dtypes, and the positions of weak types.

    For NumPy arrays and concrete JAX arrays, it does not call :func:`typeof` on each leaf.

    Raises:
        TypeError: A leaf is not an array, as in :func:`typeof`.
        ValueError: A leaf cannot be converted to an array, as in :func:`typeof`.
    """
    kinds = set(map(type, leaves))
    try:
        if kinds <= _USUAL:
            dtypes = [x.dtype for x in leaves]
            narrow = {dtype: _PLAIN[dtype] for dtype in set(dtypes)}
            if not config.enable_x64.value and any(dtype != own for dtype, own in narrow.items()):
                dtypes = [narrow[dtype] for dtype in dtypes]
            on_host = jaxlib.ArrayImpl not in kinds
            weak = () if on_host else [k for k, x in enumerate(leaves) if type(x) is jaxlib.ArrayImpl and x.weak_type]
            return tuple([x.shape for x in leaves]), tuple(dtypes), tuple(weak)
    except KeyError:
        pass
    avals = list(map(typeof, leaves))
    weak = [k for k, aval in enumerate(avals) if getattr(aval, "weak_type", False)]
    return tuple(aval.shape for aval in avals), tuple(aval.dtype for aval in avals), tuple(weak)


_USUAL = {np.ndarray, jaxlib.ArrayImpl}

#: The usual dtypes, each with its dtype when 64-bit types are disabled.
_PLAIN = {
    dtype: np.dtype(_WIDE.get(dtype.name, dtype))
    for dtype in map(np.dtype, ("bool", *np.typecodes["AllInteger"], "float16", "float32", "float64", "F", "D"))
}


def without_sharding(aval: ArrayType) -> ArrayType:
    """Returns the type as it is without a mesh in scope."""
    where = getattr(aval, "sharding", None)
    if where is None or where.mesh.empty:
        return aval
    return core.ShapedArray(aval.shape, aval.dtype, weak_type=aval.weak_type)


def without_axis(x: Array, axis: int | None) -> ArrayType:
    """Returns the type of one slice of ``x`` along the axis."""
    shape = x.shape if axis is None else (*x.shape[:axis], *x.shape[axis + 1 :])
    return core.ShapedArray(shape, x.dtype, weak_type=core.typeof(x).weak_type)


def operands(eqn: Equation, args: Sequence[ArrayLike]) -> list[Array]:
    """Returns the operands of an equation as arrays. A jaxpr may pass Python scalars."""
    return [as_array(x, atom.aval) for x, atom in zip(args, eqn.invars, strict=True)]


def as_array(x: ArrayLike, aval: ArrayType) -> Array:
    """Returns an operand of an equation as an array. A jaxpr may pass Python scalars."""
    if isinstance(x, jax.Array | np.ndarray):
        return cast("Array", x)  # JAX's functions also accept NumPy arrays
    return lax_internal._convert_element_type(x, aval.dtype, weak_type=aval.weak_type)


def as_type(x: ArrayLike, aval: ArrayType) -> Array:
    """Returns ``x``, weakly typed if and only if ``aval`` is."""
    if getattr(core.typeof(x), "weak_type", False) == getattr(aval, "weak_type", False):
        return x
    return lax_internal._convert_element_type(x, aval.dtype, weak_type=aval.weak_type)


def plain_type(x: ArrayLike | ArrayType) -> ArrayType:
    """Returns the type of an array, without its sharding."""
    aval = x if isinstance(x, core.ShapedArray) else core.typeof(x)
    return aval.update(sharding=None) if isinstance(aval, core.ShapedArray) else aval


def is_array_type(x: object) -> bool:
    """Whether ``x`` is an array, a scalar or a tracer. False for bools and for JAX's symbolic zeros."""
    if isinstance(x, bool | ad_util.Zero | ad_util.SymbolicZero | jax.ShapeDtypeStruct):
        return False
    try:
        core.typeof(x)
    except (OverflowError, TypeError):
        return False
    except ValueError:
        if is_unconverted(x):
            return False
        raise
    return True


def is_unconverted(x: object) -> bool:
    """Whether the user must convert ``x`` to an array: a masked array, or an object with ``__jax_array__``."""
    return is_masked(x) or (hasattr(type(x), "__jax_array__") and not isinstance(x, jax.Array | core.Tracer))


def is_masked(x: object) -> bool:
    """Whether ``x`` is a masked array of NumPy."""
    return isinstance(x, np.ma.MaskedArray | Masked)


@dataclasses.dataclass(frozen=True, eq=False)
class Masked:
    """Wraps a masked array, so that the C++ fast path does not accept it as an array and ignore its mask."""

    array: np.ma.MaskedArray[Any, Any]

    def __jax_array__(self) -> Array:
        raise TypeError("a masked array")


def holds_references(eqn: Equation) -> bool:
    """Whether an equation takes or returns a ``jax.Ref``."""
    return any(isinstance(atom.aval, AbstractRef) for atom in (*eqn.invars, *eqn.outvars))


def makes_references(eqn: Equation) -> bool:
    """Whether an equation returns a ``jax.Ref``."""
    return any(isinstance(var.aval, AbstractRef) for var in eqn.outvars)


def is_reference(x: object) -> bool:
    """Whether ``x`` is a ``jax.Ref``, or a tracer of one."""
    return isinstance(x, core.Ref | core.Tracer) and isinstance(core.typeof(x), AbstractRef)
