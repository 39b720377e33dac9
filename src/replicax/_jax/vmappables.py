"""Vmappable types: types with their own rules for ``vmap``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src.interpreters import batching

from replicax._jax.aliases import ArrayType
from replicax._jax.jaxprs import is_literal
from replicax._jax.versions import body
from replicax._typing import Array


def is_vmappable(x: object) -> bool:
    """Whether the type of ``x`` has its own rules for ``vmap``."""
    return type(x) in batching.vmappables


def is_map_spec(x: object) -> bool:
    """Whether ``x`` is an axis entry of a vmappable type."""
    return type(x) in batching.spec_types and type(x) not in (batching.Sum, batching.Infer)


def vmap_rules(kind: type) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the rules of a vmappable type: from the batched value to one element, and back."""
    return batching.to_elt_handlers[kind], batching.from_elt_handlers[kind]


def passed_on(fun: Callable[..., Sequence[Array]], types: Sequence[ArrayType]) -> list[int | None]:
    """Returns, for each result of ``fun``, the position of the argument that it returns unchanged; None if computed."""
    jaxpr = body(jax.make_jaxpr(fun)(*types))
    position = {var: k for k, var in enumerate(jaxpr.invars)}
    return [None if is_literal(var) else position.get(var) for var in jaxpr.outvars]
