"""JAX's table of calls, in C++: what has run is looked up, and runs again without Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax._src import traceback_util, tree_util
from jax._src.interpreters import pxla
from jax._src.lib import _jax as jaxlib

from replicax._jax.aliases import Array, ArrayType, Known, PyTree
from replicax._jax.versions import VERSION
from replicax._messages import text_of


def entry(
    owner: Callable[..., Any],
    slow: Callable[..., tuple[PyTree, Known | None]],
    in_python: Callable[..., Any],
    name: str,
    static: tuple[Sequence[int], Sequence[str]],
    put: Callable[[object, jax.sharding.Sharding], Array],
) -> Callable[..., Any]:
    """A callable that runs in C++ what it has run before, as what ``jax.jit`` returns does, and else calls ``slow``.

    JAX's table goes by all that a call consists of: the structure of the arguments, their types, where they lie, the
    static ones, the settings of JAX's, and what is being traced. Where JAX has it no more, ``slow`` runs every time,
    and a warning says so.

    Args:
        owner: What the entries belong to, and are freed with. It is called in place of all if jit is disabled.
        slow: Takes a call, and returns the result, and what to remember of it: see :func:`remember`.
        in_python: Called in its place, under ``jax_debug_nans``, where a result has a NaN: says where it comes from.
        name: What a profile calls it.
        static: The positions and the names of the static arguments.
        put: Moves an argument that is no array of JAX's to where it has to lie.
    """
    try:
        put_array = pxla.cc_shard_arg
        made = jaxlib.pjit(
            name,
            owner,
            traceback_util.api_boundary(lambda *args, **kwargs: (*slow(args, kwargs), False)),
            *static,
            pxla.JitGlobalCppCacheKeys(),
            tree_util.dispatch_registry,
            lambda x, where, how: put_array(x, where, how) if isinstance(x, jax.Array) else put(x, where),
            _entries,
        )
        made._fun = in_python
        return made
    except (AttributeError, TypeError) as error:
        _warn_of_slow_calls(text_of(error))
        return lambda *args, **kwargs: slow(args, kwargs)[0]


#: What the warning has said, once a process.
_said: list[str] = []


def _warn_of_slow_calls(missing: str) -> None:
    if _said:
        return
    _said.append(missing)
    warnings.warn(
        f"Calls of maps run in Python and are slower, because this version of replicax does not support the C++ fast "
        f"path of JAX {VERSION} ({missing}). Results are the same. Install the newest replicax, or report this to its "
        f"authors.",
        RuntimeWarning,
        stacklevel=3,
    )


def first_run(call: Callable[..., Any], args: Sequence[Array]) -> tuple[Sequence[Array], Known | None]:
    """Runs a :func:`fast_call` of flat arguments; its results, and what an :func:`entry` has to know to run it."""
    if not hasattr(call, "_cache_miss"):
        return call(*args), None
    results, known, forget = call._cache_miss(*args)
    return results, None if forget else known


def remember(known: Known, out: PyTree) -> Known | None:
    """What an :func:`entry` remembers: the program that ``first_run`` knows, its results in a tree as ``out``."""
    try:
        return known._replace(out_pytree_def=tree_util.dispatch_registry.flatten(out, None)[1])
    except (AttributeError, TypeError, ValueError) as error:
        _warn_of_slow_calls(text_of(error))
        return None


def forget(owner: Callable[..., Any]) -> None:
    """Makes every :func:`entry` of this owner forget what it has run."""
    made = entry(owner, owner, owner, "", ((), ()), owner)
    if hasattr(made, "_clear_cache"):
        made._clear_cache()


#: The class of JAX's arrays that are neither traced nor keys.
ArrayImpl = jaxlib.ArrayImpl


def names_no_argument(error: ValueError) -> bool:
    """Whether C++ refuses a static argument that has no hash or cannot be compared, or what is donated twice."""
    text = text_of(error)
    return text.startswith(("Non-hashable static", "static arguments should be comparable")) or _TWICE in text


_TWICE = "Attempt to donate the same buffer twice"


def put_blocks(
    aval: ArrayType,
    sharding: jax.sharding.Sharding,
    blocks: Sequence[npt.NDArray[np.generic]],
    devices: Sequence[jax.Device],
    *,
    in_place: bool,
) -> Array:
    """An array of the blocks of its devices, in NumPy.

    Args:
        aval: Its type.
        sharding: Where it lies.
        blocks: The block of each device.
        devices: The devices of this process.
        in_place: Whether the blocks may be read where they are, and later; otherwise they are copied now.
    """
    kinds = jaxlib.HostBufferSemantics
    how = kinds.ZERO_COPY if in_place else kinds.IMMUTABLE_ONLY_DURING_CALL
    return jaxlib.batched_device_put(aval, sharding, blocks, devices, True, host_buffer_semantics=how)


_entries = jaxlib.PjitFunctionCache(capacity=8192) if hasattr(jaxlib, "PjitFunctionCache") else None


#: ``jax.tree.flatten`` in fewer steps.
flatten = tree_util.default_registry.flatten


def fast_call(compiled: jax.stages.Compiled) -> Callable[..., Any]:
    """The program as ``jit`` calls it, in C++ where that is possible, without a frame of Python's around it."""
    try:
        made = compiled._executable.create_cpp_call(compiled._params)
    except (AttributeError, TypeError) as error:
        _warn_of_slow_calls(text_of(error))
        return compiled
    if made is None:  # JAX runs programs with callbacks in Python
        return compiled
    if not hasattr(made, "_cache_miss"):
        _warn_of_slow_calls(f"{type(made).__name__!r} has no '_cache_miss'")
    return made
