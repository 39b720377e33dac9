"""A replica's own index."""

from __future__ import annotations

from collections.abc import Hashable

import jax

from replicax._blocks import replica_index
from replicax._engine.collectives.arguments import Names, as_names
from replicax._engine.collectives.registry import collective, own
from replicax._layout import LogicalAxes


@collective("axis_index", result=own)
def axis_index(logical: LogicalAxes, *, axis_name: Names | Hashable) -> jax.Array:
    """The replica's index along one axis, or along several as one, the last varying fastest."""
    return replica_index(logical, as_names(axis_name))
