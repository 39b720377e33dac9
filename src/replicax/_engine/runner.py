"""What rewrites and runs programs, as the parts of the rewriter see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from replicax._engine.communication import Communication
from replicax._engine.varying import Analysis, Varying
from replicax._jax import Jaxpr
from replicax._layout.layout import Scope


class Runner(Protocol):
    """Rewrites one traced program, for the mapped axes in scope.

    Attributes:
        scope: The mapped axes in scope.
        analysis: Where the values of the program vary.
        communication: What it communicates.
    """

    scope: Scope
    analysis: Analysis
    communication: Communication

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], varying: Sequence[Varying]) -> list[Any]:
        """Runs a jaxpr on the values of one replica."""
