"""Shared parts of definitions, which compute a collective from the stacked operands of all replicas.

A definition implements a collective as JAX documents it, with ``jax.numpy``, so that it can be differentiated.
Definitions share no code with the rules, because tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from replicax._typing import IndexGroups


def groups_in(size: int, axis_index_groups: IndexGroups) -> list[list[int]]:
    """Returns the replicas of each group."""
    return [list(range(size))] if axis_index_groups is None else [list(group) for group in axis_index_groups]


def in_each_group(
    size: int,
    x: jax.Array,
    axis_index_groups: IndexGroups,
    results: Callable[[jax.Array], Sequence[jax.Array] | jax.Array],
) -> jax.Array:
    """Applies ``results`` to each group. Returns the results of all replicas, as ``(replicas, ...)``.

    Args:
        size: The number of replicas.
        x: ``(replicas, ...)``: the operands.
        axis_index_groups: The groups; None for one group of all replicas.
        results: Function of the operands ``(group, ...)`` of one group. Returns the result of each member.
    """
    rows: list[Any] = [None] * size
    for group in groups_in(size, axis_index_groups):
        for replica, result in zip(group, results(x[np.asarray(group)]), strict=True):
            rows[replica] = result
    return jnp.stack(rows)
