"""Types with rules of their own for ``vmap``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src.interpreters import batching

from replicax._jax.aliases import Array, ArrayType
from replicax._jax.jaxprs import is_literal
from replicax._jax.versions import body


def is_vmappable(x: object) -> bool:
    """Whether ``x`` is of a type with rules of its own for ``vmap``."""
    return type(x) in batching.vmappables


def is_map_spec(x: object) -> bool:
    """Whether ``x`` is what such a type takes in the place of an axis."""
    return type(x) in batching.spec_types and type(x) not in (batching.Sum, batching.Infer)


def vmap_rules(kind: type) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The rules of such a type: from the value of all to that of one, and back."""
    return batching.to_elt_handlers[kind], batching.from_elt_handlers[kind]


def passed_on(fun: Callable[..., Sequence[Array]], types: Sequence[ArrayType]) -> list[int | None]:
    """Which argument each result of ``fun`` is; None for one that it computes."""
    jaxpr = body(jax.make_jaxpr(fun)(*types))
    position = {var: k for k, var in enumerate(jaxpr.invars)}
    return [None if is_literal(var) else position.get(var) for var in jaxpr.outvars]
