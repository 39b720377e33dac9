"""Which lines of code JAX and Python show the user: theirs, not those of this package."""

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
    """A function that users call: the traceback of what it raises has their frames, and neither ours nor JAX's."""
    return traceback_util.api_boundary(fun)


_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep

traceback_util.register_exclusion(_PACKAGE)

# Source lines that JAX remembers are the user's, not those of this package.
source_info_util.register_exclusion(_PACKAGE)


@contextlib.contextmanager
def equation_context(eqn: Equation) -> Iterator[None]:
    """What is bound inside keeps the user's source line and name stack of ``eqn``."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack):
        yield


def described_source(jaxpr: Jaxpr, description: str) -> Traceback:
    """A traceback that JAX's errors quote as ``file:line (description)``, with where the jaxpr's function begins.

    JAX checks devices before it runs anything of ours, and says of an equation no more than where it comes from.
    """
    found = re.search(r" at (.*):(\d+)$", body(jaxpr).debug_info.func_src_info or "")
    users = found is not None and source_info_util.is_user_filename(found[1])  # JAX skips files of its own
    file, line = (found[1], int(found[2])) if found is not None and users else ("<replicax.pmap>", 1)
    code = compile("get()", file, "eval")
    code = code.replace(co_name=description, co_qualname=description, co_firstlineno=line)
    return eval(code, {"get": jaxlib.Traceback.get_traceback})


@contextlib.contextmanager
def source(traceback: Traceback | None) -> Iterator[None]:
    """What is bound inside comes from there; with None, from where it is bound."""
    state = source_info_util._source_info_context
    before = state.context
    state.context = before.replace(traceback=traceback)
    try:
        yield
    finally:
        state.context = before
