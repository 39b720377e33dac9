"""``axis_index``."""

from __future__ import annotations

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from replicax._engine.blocks import replica_index
from replicax._engine.collectives.arguments import Names, as_names
from replicax._engine.collectives.registry import collective, per_replica
from replicax._engine.collectives.wire import nothing
from replicax._layout.layout import LogicalAxes


def _every_index(size: int, **_: object) -> jax.Array:
    return jnp.arange(size, dtype=jnp.int32)


@collective(
    "axis_index",
    names=("axis_index", "axis_size"),
    result=per_replica,
    definition=_every_index,
    wire=nothing,
    by_groups=True,
)
def axis_index(logical: LogicalAxes, *, axis_name: Names | Hashable) -> jax.Array:
    """Returns the replica's index along the given axes, treated as one axis. The last axis varies fastest."""
    return replica_index(logical, as_names(axis_name))
