"""The options for results of a map: ``out_axes``, and which value a result with ``out_axes=None`` has."""

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
    """Which value a result with ``out_axes=None`` has."""

    REQUIRE_EQUAL = auto()  #: the value of all replicas; an error if it may differ between them
    TAKE_FIRST = auto()  #: the value of each device's first replica (replica 0 if read), as in ``jax.pmap``


@dataclass(frozen=True)
class Outputs:
    """The options for the results of a map.

    Attributes:
        axes: ``out_axes``.
        policy: Which value a result with ``out_axes=None`` has.
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
    """Refuses results with ``out_axes=None`` that may differ between replicas, under ``OutputPolicy.REQUIRE_EQUAL``.

    Args:
        policy: The policy for results without a mapped axis.
        replica: The traced program.
        out_axes: The mapped axis of each result leaf.
        varying: The mapped axes over which each result leaf varies.
        axis: The mapped axis of the map.

    Raises:
        DivergentOutputError: lists every such result.
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
