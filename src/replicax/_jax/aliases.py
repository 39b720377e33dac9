"""Names of JAX's types for annotations."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import jax
from jax._src import core
from jax._src.lib import _jax as jaxlib
from jax.extend import core as extend_core

#: The abstract value of an array: shape, dtype and weak type.
ArrayType: TypeAlias = core.ShapedArray

#: A jaxpr with or without its constants; JAX 0.10 has two classes: see ``versions.Closed``.
Jaxpr: TypeAlias = extend_core.Jaxpr
Equation: TypeAlias = extend_core.JaxprEqn
Literal: TypeAlias = extend_core.Literal
Atom: TypeAlias = extend_core.Var | extend_core.Literal

Client: TypeAlias = jaxlib.Client
Traceback: TypeAlias = jaxlib.Traceback


class Known(Protocol):
    """The data of a program in JAX's C++ fast path. JAX's own class is not public; only annotations need this one."""

    def _replace(self, *, out_pytree_def: jax.tree_util.PyTreeDef) -> Known: ...
