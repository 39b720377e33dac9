"""The names of JAX's things in annotations."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import jax
from jax._src import core
from jax._src.lib import _jax as jaxlib
from jax.extend import core as extend_core

Array = jax.Array

#: Anything that ``jax.tree`` takes apart; JAX has no type of its own for it.
PyTree: TypeAlias = Any

#: What an equation takes and gives: arrays, tracers, and scalars of Python's.
ArrayLike = jax.typing.ArrayLike

#: A shape and a dtype, as JAX traces with them.
ArrayType: TypeAlias = core.ShapedArray

#: A jaxpr with its constants, or without; JAX 0.10 has two classes: see ``versions.Closed``.
Jaxpr: TypeAlias = extend_core.Jaxpr
Equation: TypeAlias = extend_core.JaxprEqn
Literal: TypeAlias = extend_core.Literal
Atom: TypeAlias = extend_core.Var | extend_core.Literal

Client: TypeAlias = jaxlib.Client
Traceback: TypeAlias = jaxlib.Traceback


class Known(Protocol):
    """What JAX's table of calls knows of a program; JAX's own class is not public, and only annotations need it."""

    def _replace(self, *, out_pytree_def: jax.tree_util.PyTreeDef) -> Known: ...
