"""The state of tracing: current traces, axes and meshes in scope, settings."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax._src import config, core
from jax._src.interpreters import ad, batching
from jax._src.interpreters import partial_eval as pe

from replicax._typing import ArrayLike, Function, PyTree

AxisName = Hashable


def eager() -> bool:
    """Whether this call is outside of all JAX transformations."""
    return bool(core.trace_state_clean())


def staging() -> bool:
    """Whether an enclosing ``jit``, ``scan`` or similar transformation records this call."""
    trace: Any = core.trace_ctx.trace
    while (parent := getattr(trace, "parent_trace", None)) is not None and not isinstance(trace, pe.DynamicJaxprTrace):
        trace = parent
    return isinstance(trace, pe.DynamicJaxprTrace)


@contextlib.contextmanager
def _at_once(known: PyTree) -> Iterator[None]:
    """Under ``jax.ensure_compile_time_eval``, evaluates now if ``known`` has no tracers, else records as usual.

    Otherwise JAX would evaluate the index of a mapped axis during tracing, when the index has no value yet.
    Workaround: index_at_once.
    """
    eager_if_known: Any = _NOTHING
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(known)):
        eager_if_known = core.eval_context()
    with eager_if_known, config.eager_constant_folding(False), own_mesh(known):
        yield


def own_mesh(known: PyTree = None) -> contextlib.AbstractContextManager[Any]:
    """Hides the mesh that the user has set with ``jax.set_mesh``, because a map has its own mesh."""
    if config.eager_constant_folding.value:
        return _at_once(known)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or jax.sharding.AxisType.Manual in mesh.axis_types:
        return _NOTHING
    if not eager():
        return jax.sharding.use_abstract_mesh(NO_MESH)
    return jax.set_mesh(jax.sharding.Mesh(np.empty((), dtype=object), ()))


_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

NO_MESH = jax.sharding.AbstractMesh((), ())


def trace_context() -> Hashable:
    """Returns the settings and scopes in JAX's compilation cache keys (x64 mode, precision, axes in scope, …)."""
    return config.trace_context()


def axis_env(sizes: Mapping[AxisName, int]) -> contextlib.AbstractContextManager[None]:
    """Adds mapped axes with the given sizes to the scope while a function is traced."""
    return core.extend_axis_env_nd(list(sizes.items()))


def tracing_replica() -> bool:
    """Whether a replica of an enclosing ``replicax.pmap`` is being traced."""
    return _tracing.get() and not eager()


@contextlib.contextmanager
def replica_traced() -> Iterator[None]:
    """Marks the code inside as traced for a replica. Maps in it are recorded, and lowered with the outer map."""
    before = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(before)


_tracing: ContextVar[bool] = ContextVar("_tracing", default=False)


def axes_in_scope() -> tuple[AxisName, ...]:
    """Returns the names of the mapped axes that enclosing transformations bind."""
    return tuple(core.get_axis_env().axis_sizes)


def outermost_value(x: ArrayLike) -> tuple[ArrayLike, bool]:
    """Returns the value under all ``grad``, ``jvp`` and ``vmap`` tracers, and whether ``vmap`` made one of them."""
    batched = False
    while isinstance(x, ad.JVPTracer | ad.LinearizeTracer | batching.BatchTracer):
        batched |= isinstance(x, batching.BatchTracer)
        x = x.val if isinstance(x, batching.BatchTracer) else x.primal
    return x, batched


def over_processes(x: ArrayLike) -> bool:
    """Whether ``x`` is an array over several processes, under ``grad``, ``jvp`` and ``vmap``."""
    value, _ = outermost_value(x)
    sharding = None if isinstance(value, core.Tracer) else getattr(value, "sharding", None)
    return sharding is not None and not sharding.is_fully_addressable


def on_own_devices(x: ArrayLike) -> bool:
    """Whether ``x`` is an array that is committed to devices of this process, under ``grad``, ``jvp`` and ``vmap``."""
    value, _ = outermost_value(x)
    known = isinstance(value, jax.Array) and not isinstance(value, core.Tracer)
    return known and bool(value.committed) and value.is_fully_addressable


def always_jit(fun: Function, **options: Any) -> Function:
    """Like ``jax.jit``, under ``jax.disable_jit`` too, which ignores ``out_shardings`` and so moves nothing."""
    jitted = jax.jit(fun, **options)

    @functools.wraps(fun)
    def call(*args: Any) -> Any:
        with jax.disable_jit(False):
            return jitted(*args)

    return call


def looks_for_nans() -> bool:
    """Whether ``jax_debug_nans`` or ``jax_debug_infs`` is set."""
    return bool(config.debug_nans.value or config.debug_infs.value)


def refuse_leaked_tracers(values: Sequence[object]) -> None:
    """Raises JAX's error about a leaked tracer if no trace is active and a value is a tracer."""
    if any(issubclass(kind, core.Tracer) for kind in set(map(type, values))):
        core.check_eval_args(values)


def settings() -> dict[str, Any]:
    """Returns JAX's settings that programs depend on, by name."""
    names = (name for name in config.trace_context_names() if name != "axis_env_state")
    return {name: value for name, value in zip(names, config.trace_context(), strict=False) if name.startswith("jax_")}
