"""What the cases share: the devices, and the ways that an expert writes without replicax."""

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
    """The first so many devices, or all, along one axis that is named "i"."""
    return Mesh(np.array(jax.devices()[:count]), ("i",))


def place(tree: Any, spec: PartitionSpec = ROWS) -> Any:
    """The arrays of a tree where the programs want them: their rows spread over the devices, or whole on each."""
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
    """``jit(shard_map(vmap(f)))``, over all devices or the first so many.

    Args:
        f: The program of one replica. Its collectives go over ``("i", lanes)``.
        in_specs: How the arguments lie.
        out_specs: How the results lie.
        in_axes: What ``vmap`` maps.
        out_axes: Likewise, of the results.
        lanes: The name of the axis that ``vmap`` maps.
        count: How many devices; all when None.
        options: Those of ``jax.jit``.
    """
    mapped = jax.vmap(f, in_axes=in_axes, out_axes=out_axes, axis_name=lanes)
    sharded = jax.shard_map(mapped, mesh=mesh(count), in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(sharded, **options)
