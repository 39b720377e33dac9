"""The interface of the rewriter, for modules that the rewriter imports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from replicax._engine.communication import Communication
from replicax._engine.varying import Analysis, Varying
from replicax._jax import Jaxpr
from replicax._layout.layout import Scope
from replicax._typing import ArrayLike


class Runner(Protocol):
    """Rewrites one traced program for the mapped axes in scope.

    Attributes:
        scope: The mapped axes in scope.
        analysis: The analysis of which values vary.
        communication: The analysis of the communication.
    """

    scope: Scope
    analysis: Analysis
    communication: Communication

    def run(
        self, jaxpr: Jaxpr, consts: Sequence[ArrayLike], args: Sequence[ArrayLike], varying: Sequence[Varying]
    ) -> list[ArrayLike]:
        """Runs a jaxpr on the values of one replica."""
