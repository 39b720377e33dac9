"""Type aliases and protocols used in annotations."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.typing
import numpy as np

# ---------------------------------------------------------------------------------------------------------------
# Arguments and results

#: A pytree of arrays, or of any objects before validation. JAX has no type for pytrees.
PyTree: TypeAlias = Any

#: The positional and the keyword arguments of a call.
Args: TypeAlias = tuple[PyTree, ...]
Kwargs: TypeAlias = dict[str, PyTree]

#: The structure of a pytree, and the path from its root to a leaf.
PyTreeDef: TypeAlias = jax.tree_util.PyTreeDef
KeyPath: TypeAlias = jax.tree_util.KeyPath

#: A function of pytrees.
Function: TypeAlias = Callable[..., Any]

# ---------------------------------------------------------------------------------------------------------------
# Arrays and their types

#: A concrete array or a tracer.
Array: TypeAlias = jax.Array

#: Anything that JAX accepts as an array: a ``jax.Array``, a NumPy array or a scalar.
ArrayLike: TypeAlias = jax.typing.ArrayLike

#: A NumPy array of any rank and dtype.
HostArray: TypeAlias = np.ndarray[Any, Any]

#: An array or a scalar that is the whole of a pytree.
OneArray: TypeAlias = Array | HostArray | np.generic | complex

Shape: TypeAlias = tuple[int, ...]
DType: TypeAlias = np.dtype[Any]


class ShapeAndDtype(Protocol):
    """An array or its abstract value."""

    @property
    def shape(self) -> Shape:
        """The length of each dimension."""

    @property
    def dtype(self) -> DType:
        """The element type."""


class Aval(ShapeAndDtype, Protocol):
    """The abstract value of a jaxpr variable: a ``jax.core.ShapedArray``."""

    @property
    def ndim(self) -> int:
        """The number of dimensions."""

    @property
    def weak_type(self) -> bool:
        """Whether the dtype is weak, as that of a Python scalar is."""

    def update(self, **changed: object) -> Aval:
        """Returns a copy with these attributes replaced."""

    def to_tangent_aval(self) -> Aval:
        """Returns the abstract value of a tangent of this value."""


class Atom(Protocol):
    """An operand of an equation: a jaxpr variable or a literal. Only a literal has a ``val``."""

    @property
    def aval(self) -> Aval:
        """The abstract value."""

    @property
    def val(self) -> ArrayLike:
        """The value of a literal."""


# ---------------------------------------------------------------------------------------------------------------
# Mapped axes and collectives

#: The name of a mapped axis or of a mesh axis.
AxisName: TypeAlias = Hashable

#: The mapped axis of each array; None for an array that is not mapped.
Axes: TypeAlias = Sequence[int | None]

#: ``axis_index_groups``: the replica indices of each group; None for a single group of all replicas.
IndexGroups: TypeAlias = Sequence[Sequence[int]] | None

#: The parameters of a primitive, by name.
Params: TypeAlias = Mapping[str, Any]
