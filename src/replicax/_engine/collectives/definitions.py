"""What definitions have in common: a collective within each group of replicas, on the stacked operands of all.

Definitions are what JAX's documentation says of a collective, in the terms of NumPy (as ``jax.numpy``, so that the
reference can be differentiated), and share no code with the rules: each is held against the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from replicax._typing import IndexGroups


def groups_in(size: int, axis_index_groups: IndexGroups) -> list[list[int]]:
    """The replicas of each group."""
    return [list(range(size))] if axis_index_groups is None else [list(group) for group in axis_index_groups]


def in_each_group(
    size: int,
    x: jax.Array,
    axis_index_groups: IndexGroups,
    results: Callable[[jax.Array], Sequence[jax.Array] | jax.Array],
) -> jax.Array:
    """The results for each member of each group, given the members' operands in order."""
    rows: list[Any] = [None] * size
    for group in groups_in(size, axis_index_groups):
        for replica, result in zip(group, results(x[np.asarray(group)]), strict=True):
            rows[replica] = result
    return jnp.stack(rows)
