"""Which results a map returns, and what one without a mapped axis is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import jax
from jax.tree_util import keystr

from replicax._engine.replica import Replica
from replicax._engine.varying import Varying
from replicax._layout.axes import Spec
from replicax._layout.layout import LogicalAxis
from replicax._messages import report
from replicax._typing import Axes
from replicax.errors import DivergentOutputError


class OutputPolicy(Enum):
    """What a result with ``out_axes=None`` is."""

    REQUIRE_EQUAL = auto()  #: the value of all replicas, which must be equal
    TAKE_FIRST = auto()  #: each device's first replica's, read as replica 0's: what ``jax.pmap`` returns


@dataclass(frozen=True)
class Outputs:
    """Which results a map returns.

    Attributes:
        axes: ``out_axes``.
        policy: What a result is whose ``out_axes`` is None.
    """

    axes: Spec
    policy: OutputPolicy = OutputPolicy.REQUIRE_EQUAL


def check_outputs(
    policy: OutputPolicy,
    replica: Replica,
    out_axes: Axes,
    varying: Sequence[Varying],
    axis: LogicalAxis,
) -> None:
    """Refuses results that may differ between replicas and have no mapped axis, if the policy asks for equal ones.

    Raises:
        DivergentOutputError: naming each.
    """
    if policy is not OutputPolicy.REQUIRE_EQUAL:
        return
    paths = jax.tree_util.tree_leaves_with_path(replica.out)
    faults = [
        f"result{keystr(path)} of shape {aval.shape}"
        for (path, aval), out_axis, where in zip(paths, out_axes, varying, strict=True)
        if out_axis is None and axis in where
    ]
    if faults:
        raise DivergentOutputError(
            report(
                "out_axes=None requires a result that is equal in all replicas, but these may differ between them:",
                faults,
                "Write an int in out_axes to get the value of each replica, or make them equal first, for example "
                "with jax.lax.pmean or jax.lax.psum over the mapped axis.",
            )
        )
