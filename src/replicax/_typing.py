"""Names for what goes through the package, as annotations have it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.typing
import numpy as np

# ---------------------------------------------------------------------------------------------------------------
# What users pass and get

#: A tree of whatever the user nests: arrays, mostly, and before they are checked anything else. JAX has no type of it.
PyTree: TypeAlias = Any

#: The positional arguments of a call, and those by keyword.
Args: TypeAlias = tuple[PyTree, ...]
Kwargs: TypeAlias = dict[str, PyTree]

#: How a tree nests, and the way from its root to a leaf.
PyTreeDef: TypeAlias = jax.tree_util.PyTreeDef
KeyPath: TypeAlias = jax.tree_util.KeyPath

#: A function of trees.
Function: TypeAlias = Callable[..., Any]

# ---------------------------------------------------------------------------------------------------------------
# Arrays and their types

#: A value of a program. Those of a traced program are instances, too: the class of tracers is a subclass.
Array: TypeAlias = jax.Array

#: An array, or what JAX takes for one: an array of NumPy's or a scalar.
ArrayLike: TypeAlias = jax.typing.ArrayLike

#: An array of NumPy's of any rank and dtype, in the memory of the host.
HostArray: TypeAlias = np.ndarray[Any, Any]

Shape: TypeAlias = tuple[int, ...]
DType: TypeAlias = np.dtype[Any]


class ShapeAndDtype(Protocol):
    """An array, wherever it lies, or the type of one."""

    @property
    def shape(self) -> Shape:
        """The length of each dimension."""

    @property
    def dtype(self) -> DType:
        """The type of the numbers."""


class Aval(ShapeAndDtype, Protocol):
    """The type of a value of a jaxpr, a ``ShapedArray`` of JAX's."""

    @property
    def ndim(self) -> int:
        """The number of dimensions."""

    @property
    def weak_type(self) -> bool:
        """Whether it comes from a scalar of Python's, and gives way to other dtypes."""

    def update(self, **changed: object) -> Aval:
        """The same type, but for what is given."""

    def to_tangent_aval(self) -> Aval:
        """The type of a tangent of such a value."""


class Atom(Protocol):
    """An operand of an equation: a variable of the jaxpr, or a literal, which alone has a ``val``."""

    @property
    def aval(self) -> Aval:
        """The type of the value."""

    @property
    def val(self) -> ArrayLike:
        """The value of a literal."""


# ---------------------------------------------------------------------------------------------------------------
# Mapped axes and collectives

#: What names a mapped axis, or an axis of a mesh.
AxisName: TypeAlias = Hashable

#: The mapped axis of each of several arrays; None for one that every replica gets whole.
Axes: TypeAlias = Sequence[int | None]

#: ``axis_index_groups``: the replicas of each group; None for one group of all.
IndexGroups: TypeAlias = Sequence[Sequence[int]] | None

#: The parameters of a primitive, each of a type of its own.
Params: TypeAlias = Mapping[str, Any]
