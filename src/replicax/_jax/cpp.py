"""JAX's C++ fast path: programs that have run before run again without Python."""

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

from replicax._jax.aliases import ArrayType, Known
from replicax._jax.versions import VERSION
from replicax._messages import text_of
from replicax._typing import Array, PyTree


def entry(
    owner: Callable[..., Any],
    slow: Callable[..., tuple[PyTree, Known | None]],
    in_python: Callable[..., Any],
    name: str,
    static: tuple[Sequence[int], Sequence[str]],
    put: Callable[[object, jax.sharding.Sharding], Array],
) -> Callable[..., Any]:
    """Returns a callable that runs cached programs on the C++ fast path, as ``jax.jit`` does, and else calls ``slow``.

    The cache key of JAX covers the whole call: the tree structure of the arguments, their types and shardings, static
    arguments, JAX's settings, and the trace context. If this version of JAX has no such cache, every call runs
    ``slow``, and a warning says so.

    Args:
        owner: The cache entries belong to it and are freed with it. With jit disabled, JAX calls it instead.
        slow: Runs a call. Returns the result and the data to cache: see :func:`remember`.
        in_python: Runs the call again under ``jax_debug_nans`` if a result has a NaN, to find the operation.
        name: The name in profiles.
        static: The positions and the names of the static arguments.
        put: Moves an argument that is not a JAX array to the required sharding.
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


#: The cause that the warning names, if this process has issued the warning.
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
    """Runs a :func:`fast_call` on flat arguments. Returns its results, and the data that an :func:`entry` caches."""
    if not hasattr(call, "_cache_miss"):
        return call(*args), None
    results, known, forget = call._cache_miss(*args)
    return results, None if forget else known


def remember(known: Known, out: PyTree) -> Known | None:
    """Returns the data for an :func:`entry` to cache: ``known`` with the tree structure of the results.

    Args:
        known: The data of the program, from :func:`first_run`.
        out: A result, whose tree structure is used.
    """
    try:
        return known._replace(out_pytree_def=tree_util.dispatch_registry.flatten(out, None)[1])
    except (AttributeError, TypeError, ValueError) as error:
        _warn_of_slow_calls(text_of(error))
        return None


def forget(owner: Callable[..., Any]) -> None:
    """Clears the cache of every :func:`entry` of this owner."""
    made = entry(owner, owner, owner, "", ((), ()), owner)
    if hasattr(made, "_clear_cache"):
        made._clear_cache()


#: The class of concrete JAX arrays, except typed PRNG keys.
ArrayImpl = jaxlib.ArrayImpl


def names_no_argument(error: ValueError) -> bool:
    """Whether the C++ fast path refuses a call without naming the argument.

    The causes are a static argument that cannot be hashed or compared, and a buffer that is donated twice.
    """
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
    """Creates an array from NumPy blocks, one for each device.

    Args:
        aval: Its type.
        sharding: Its sharding.
        blocks: The block of each device.
        devices: The devices of this process.
        in_place: Whether JAX may read the blocks later without a copy. Otherwise they are copied now.
    """
    kinds = jaxlib.HostBufferSemantics
    how = kinds.ZERO_COPY if in_place else kinds.IMMUTABLE_ONLY_DURING_CALL
    return jaxlib.batched_device_put(aval, sharding, blocks, devices, True, host_buffer_semantics=how)


_entries = jaxlib.PjitFunctionCache(capacity=8192) if hasattr(jaxlib, "PjitFunctionCache") else None


#: ``jax.tree.flatten`` with less overhead.
flatten = tree_util.default_registry.flatten


def fast_call(compiled: jax.stages.Compiled) -> Callable[..., Any]:
    """Returns the program as ``jit`` calls it: in C++ if possible, without a Python frame around it."""
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
