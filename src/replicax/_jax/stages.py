"""What JAX's stages of compilation are made of."""

from __future__ import annotations

from typing import Any

import jax


def stage_parts(lowered: jax.stages.Lowered) -> Any:
    """What a ``jax.stages.Lowered`` is made of, to make another that goes by the user's arguments."""
    return lowered._lowering


def executable_parts(compiled: jax.stages.Compiled) -> tuple[Any, Any]:
    """What a ``jax.stages.Compiled`` is made of: the executable, and the constants that it takes first."""
    return compiled._executable, compiled._params.const_args
