"""Classifies JAX's errors by their text, where the class alone is not enough."""

from __future__ import annotations

import os
import re

import jax
from jax._src import api_util

from replicax._messages import text_of

#: What a compiled program raises under ``jax_debug_nans``; ``jit`` turns it into a ``FloatingPointError``.
NanError: type[Exception] = getattr(api_util, "InternalFloatingPointError", FloatingPointError)


def unbound_axis_name(error: NameError) -> str | None:
    """Returns the axis name that JAX reports as unbound, or None if ``error`` has another cause."""
    found = re.search(r"unbound axis name: (.*?)(?:\. |\.?$)", text_of(error))
    return found and found.group(1)


def raised(error: BaseException) -> bool:
    """Whether JAX's own code raised the exception, not the user's code."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_code.co_filename.startswith(_JAX)


_JAX = os.path.dirname(jax.__file__) + os.sep


def is_about_shard_map_types(error: AssertionError) -> bool:
    """Whether JAX failed on a type with varying mesh axes (``ManualAxisType``), because no mesh is in scope."""
    return text_of(error).startswith("ManualAxisType(")


def is_about_explicit_meshes(error: Exception) -> bool:
    """Whether ``shard_map`` reports that it has no mesh, or that its arguments are on a mesh with ``Explicit`` axes."""
    said = text_of(error)
    misplaced = "in_specs passed to shard_map" in said and "does not match the specs of the input" in said
    return misplaced or said.startswith("The context mesh cannot be empty") or "sharded on `Explicit` axes is" in said
