"""The parts of JAX's compilation stages."""

from __future__ import annotations

from typing import Any

import jax


def stage_parts(lowered: jax.stages.Lowered) -> Any:
    """Returns the lowering inside a ``jax.stages.Lowered``, to create a ``Lowered`` that takes the user's arguments."""
    return lowered._lowering


def executable_parts(compiled: jax.stages.Compiled) -> tuple[Any, Any]:
    """Returns the executable inside a ``jax.stages.Compiled``, and the constants that it takes first."""
    return compiled._executable, compiled._params.const_args
