"""Tracebacks and source locations: JAX and Python show the user's lines, not those of this package."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from jax._src import source_info_util, traceback_util
from jax._src.lib import _jax as jaxlib

from replicax._jax.aliases import Equation, Jaxpr, Traceback
from replicax._jax.versions import body

F = TypeVar("F", bound=Callable[..., Any])


def api_boundary(fun: F) -> F:
    """Marks a function that users call. Tracebacks of its errors leave out frames of replicax and of JAX."""
    return traceback_util.api_boundary(fun)


_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep

traceback_util.register_exclusion(_PACKAGE)

# JAX also records source lines with equations: skip this package there too.
source_info_util.register_exclusion(_PACKAGE)


@contextlib.contextmanager
def equation_context(eqn: Equation) -> Iterator[None]:
    """Operations bound inside get the source line of ``eqn``, and its name stack appended to theirs."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack):
        yield


def described_source(jaxpr: Jaxpr, description: str) -> Traceback:
    """Returns a traceback that JAX's errors quote as ``file:line (description)``, at the line of the jaxpr's function.

    JAX checks devices before replicax runs any code. Its error names only the source location of an equation.
    """
    found = re.search(r" at (.*):(\d+)$", body(jaxpr).debug_info.func_src_info or "")
    users = found is not None and source_info_util.is_user_filename(found[1])  # JAX skips its own files
    file, line = (found[1], int(found[2])) if found is not None and users else ("<replicax.pmap>", 1)
    code = compile("get()", file, "eval")
    code = code.replace(co_name=description, co_qualname=description, co_firstlineno=line)
    return eval(code, {"get": jaxlib.Traceback.get_traceback})


@contextlib.contextmanager
def source(traceback: Traceback | None) -> Iterator[None]:
    """Sets the source location of operations bound inside; None keeps their real location."""
    state = source_info_util._source_info_context
    before = state.context
    state.context = before.replace(traceback=traceback)
    try:
        yield
    finally:
        state.context = before
