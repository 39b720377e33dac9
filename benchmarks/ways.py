"""Shared by the cases: the mesh, and programs that an expert writes without replicax."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ROWS = PartitionSpec("i")
WHOLE = PartitionSpec()


@cache
def mesh(count: int | None = None) -> Mesh:
    """The first ``count`` devices, or all, as a mesh with the axis "i"."""
    return Mesh(np.array(jax.devices()[:count]), ("i",))


def place(tree: Any, spec: PartitionSpec = ROWS) -> Any:
    """Puts the arrays of a tree on all devices: rows sharded, or replicated with ``WHOLE``."""
    return jax.block_until_ready(jax.device_put(tree, NamedSharding(mesh(), spec)))


def by_hand(
    f: Callable[..., Any],
    in_specs: Any = ROWS,
    out_specs: Any = ROWS,
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    lanes: str | None = None,
    count: int | None = None,
    **options: Any,
) -> Any:
    """``jit(shard_map(vmap(f)))`` over the first ``count`` devices.

    Args:
        f: The program of one replica, with collectives over ``("i", lanes)``.
        in_specs: The ``in_specs`` of ``shard_map``.
        out_specs: The ``out_specs`` of ``shard_map``.
        in_axes: The ``in_axes`` of ``vmap``.
        out_axes: The ``out_axes`` of ``vmap``.
        lanes: The ``axis_name`` of ``vmap``.
        count: The number of devices; None for all.
        options: The options of ``jax.jit``.
    """
    mapped = jax.vmap(f, in_axes=in_axes, out_axes=out_axes, axis_name=lanes)
    sharded = jax.shard_map(mapped, mesh=mesh(count), in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(sharded, **options)
