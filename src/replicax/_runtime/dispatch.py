"""Finds the program for a call. Each program is built once per signature."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.nested import Recorded
from replicax._jax import cpp
from replicax._jax.aliases import Known
from replicax._runtime import agreement, cpu_threads, memory
from replicax._runtime.arguments import Call, check_types, refuse_static, split
from replicax._runtime.build import build, shape_of, signature_of
from replicax._runtime.call_path import Outcome, Path, Slow, Switch, table
from replicax._runtime.executable import Executable
from replicax._runtime.options import Options
from replicax._runtime.own_rows import OwnRows
from replicax._runtime.packing import may_be_packed, packed
from replicax._runtime.processes import TellingOthers
from replicax._runtime.run import cpp_cacheable, reads_host_memory, run, stage
from replicax._runtime.signature import Signature
from replicax._runtime.transfer import native
from replicax._typing import Args, ArrayLike, Function, Kwargs, PyTree

#: Seconds that a thread waits while another thread traces the same program. After that, the waiting thread traces the
#: program, too: the two threads may be in a deadlock. Tracing twice is harmless.
PATIENCE = 300.0

logger = logging.getLogger("replicax")

#: The paths with a C++ cache.
_WITH_TABLES = (Path.IN_PLACE, Path.COPY_HOST_LEAVES, Path.OWN_ROWS)


class Dispatcher:
    """The programs of one function with one set of options, by signature.

    It holds only a weak reference to the function, so that the programs are freed with the function.

    Args:
        fun: A weak reference to the function.
        options: The options of the map.

    Attributes:
        options: The options of the map.
        switch: Routes the calls of the function to the C++ fast path or the Python slow path.
    """

    def __init__(self, fun: Callable[[], Function], options: Options) -> None:
        self._fun = fun
        self.options = options
        self.switch = Switch()
        self._programs: dict[Hashable, Executable | Recorded] = {}
        self._signatures: dict[Hashable, Signature] = {}
        self._tracing: dict[Hashable, threading.RLock] = {}
        # The owners of the entries in JAX's C++ cache. The entries are freed with their owner.
        self._owners = {path: functools.partial(_without_jit, weakref.ref(self)) for path in _WITH_TABLES}
        _all.add(self)

    def __call__(self, fun: Function, args: Args, kwargs: Kwargs) -> PyTree:
        """Runs a call on the Python slow path."""
        return self.call(fun, args, kwargs).result

    @_jax.api_boundary
    def call(self, fun: Function, args: Args, kwargs: Kwargs, path: Path = Path.IN_PLACE) -> Outcome:
        """Runs a call on the Python slow path.

        Args:
            fun: The mapped function.
            args: The positional arguments.
            kwargs: The keyword arguments.
            path: The path whose C++ cache missed the call.

        Returns:
            The result, the data for the C++ cache, and the path on which such calls should start.
        """
        with _jax.own_mesh((args, kwargs)):
            program, leaves = self.resolve(fun, args, kwargs)
            known, start = None, None
            if isinstance(program, Recorded):
                results = program.staged(*leaves, *program.closed)
            elif not _jax.eager():
                results = stage(program, leaves)
            else:
                _jax.refuse_leaked_tracers([*leaves, *program.closed])
                names = functools.partial(_leaf_names, fun, self.options, args, kwargs)
                try:
                    results, known, start = _run(program, leaves, names, path)
                    if program.may_not_fit:
                        jax.block_until_ready(results)  # on CPUs, XLA says only here that memory did not suffice
                        program.may_not_fit = False
                except jax.errors.JaxRuntimeError as error:
                    if not (memory.ran_out(error) and memory.may_run_again(program, leaves)):
                        raise
                    if not self._use_fewer_lanes(program, error, split(fun, self.options.static, args, kwargs)):
                        raise
                    return self.call(fun, args, kwargs, path)
            out = jax.tree.unflatten(program.out_tree, results)
        return Outcome(out, known and cpp.remember(known, out), start)

    def resolve(
        self, fun: Function, args: Args, kwargs: Kwargs, *, abstract: bool = False
    ) -> tuple[Executable | Recorded, list[ArrayLike]]:
        """The program for a call, built on the first call of a signature, and the argument leaves.

        With ``abstract``, a ``jax.ShapeDtypeStruct`` is allowed in place of an array.
        """
        with TellingOthers(self.options, fun):
            call = split(fun, self.options.static, args, kwargs)
            leaves, key = _key(call, abstract=abstract)
        try:
            program = None if jax.config.jax_disable_jit else self._programs.get(key)
        except Exception:
            refuse_static(call)
            raise
        if program is None:
            program = self._build(key, call, leaves)
        return program, leaves

    def _build(self, key: Hashable, call: Call, leaves: Sequence[ArrayLike]) -> Executable | Recorded:
        """Builds a program under a lock per signature, unless another thread has built it in the meantime."""
        turn = self._tracing.setdefault(key, threading.RLock())
        self.switch.trace(bool(self._tracing))
        in_turn = turn.acquire(timeout=PATIENCE)
        try:
            program = None if jax.config.jax_disable_jit else self._programs.get(key)
            if program is None:
                with TellingOthers(self.options, call.fun):
                    signature = signature_of(self.options, call, leaves)
                earlier = list(self._signatures.values())
                program = build(self.options, call, signature, use_all_devices=_needs_all_devices(leaves))
                if jax.config.jax_explain_cache_misses:
                    logger.warning(signature.explain(call.name, earlier))
                if isinstance(program, Executable) and cpu_threads.may_hang(program.spec.layout.mesh):
                    self.switch.bound()
                if program.reusable and not jax.config.jax_disable_jit:  # disable_jit traces again on every call
                    self._signatures[key], self._programs[key] = signature, program
            return program
        finally:
            if in_turn:
                turn.release()
            self._tracing.pop(key, None)
            self.switch.trace(bool(self._tracing))

    def _use_fewer_lanes(self, program: Executable, error: BaseException, call: Call) -> bool:
        """Replaces a program that ran out of memory by one with fewer lanes at once. Returns whether there is one."""
        plan = program.spec.lanes
        at_once = memory.fewer(plan.lanes, plan.at_once)
        leaves, key = _key(call, abstract=False)
        signature, options = signature_of(self.options, call, leaves), dataclasses.replace(self.options, lanes=at_once)
        fewer: Any = build(options, call, signature, use_all_devices=_needs_all_devices(leaves))
        if fewer.spec.lanes.at_once >= plan.at_once:  # the program runs in one piece
            return False
        fewer.may_not_fit = at_once > 1
        self._programs[key] = fewer
        logger.warning(
            "%s: %d replicas at once on a device ran out of memory, and it runs %d at once now. To start with this, "
            "pass lanes=%d to pmap. XLA says: %s",
            call.name,
            plan.at_once,
            at_once,
            at_once,
            str(error).partition("\n")[0],
        )
        return True

    def describe(self, fun: Function, args: Args, kwargs: Kwargs) -> tuple[Executable | Recorded, Call, Signature]:
        """The program for concrete or abstract arguments, with its call and signature."""
        program, leaves = self.resolve(fun, args, kwargs, abstract=True)
        call = split(fun, self.options.static, args, kwargs)
        return program, call, signature_of(self.options, call, leaves)

    @_jax.api_boundary
    def eval_shape(self, fun: Function, args: Args, kwargs: Kwargs) -> PyTree:
        """The types of the results for concrete or abstract arguments."""
        with _jax.own_mesh():
            program, leaves = self.resolve(fun, args, kwargs, abstract=True)
            if isinstance(program, Executable) and _jax.eager():
                out = program.out_info
            else:
                out = jax.eval_shape(program.staged, *map(shape_of, [*leaves, *program.closed]))
        types = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False)) for x in out]
        return jax.tree.unflatten(program.out_tree, types)

    @_jax.api_boundary
    def explain(self, fun: Function, args: Args, kwargs: Kwargs) -> str:
        """Explains whether a call has a compiled program, and if not, how it differs from earlier calls."""
        call = split(fun, self.options.static, args, kwargs)
        leaves, key = _key(call, abstract=True)
        if key in self._signatures:
            return f"{call.name} is already compiled for such a call."
        return signature_of(self.options, call, leaves).explain(call.name, list(self._signatures.values()))

    def table(self, fun: Function, slow: Slow, path: Path) -> Function:
        """A callable that looks up calls in JAX's C++ cache and runs ``slow`` on a miss."""
        return table(self._owners[path], fun, self.options, slow)

    def forget(self) -> None:
        """Clears the C++ caches."""
        for owner in self._owners.values():
            cpp.forget(owner)

    def clear(self) -> None:
        """Frees all programs."""
        self.forget()
        self._programs.clear()
        self._signatures.clear()


def _run(
    program: Executable, leaves: Sequence[ArrayLike], names: Callable[[], Sequence[str]], path: Path
) -> tuple[Sequence[ArrayLike], Known | None, Path | None]:
    """Runs an eager call. Returns the results, the data for the C++ cache, and the path where such calls start."""
    if isinstance(program, OwnRows):
        results, placed = run(program, leaves, names)
        alone = path is Path.OWN_ROWS and program.takes_parts_alone
        may = alone and cpp_cacheable(program.spec, leaves, placed) and not reads_host_memory(program.spec, leaves)
        return results, program.known if may else None, Path.OWN_ROWS
    if pack := packed(program, leaves):
        return run(pack.executable, pack.leaves(leaves), pack.names(names))[0], None, Path.PACKED
    results, placed = run(program, leaves, names)
    if path is Path.OWN_ROWS:  # its C++ cache holds only calls with own rows
        return results, None, Path.IN_PLACE
    if may_be_packed(program, leaves) or not cpp_cacheable(program.spec, leaves, placed):
        return results, None, None
    if not reads_host_memory(program.spec, leaves):
        return results, program.known, Path.IN_PLACE
    return results, program.known if path is Path.COPY_HOST_LEAVES else None, Path.COPY_HOST_LEAVES


def _leaf_names(fun: Function, options: Options, args: Args, kwargs: Kwargs) -> Sequence[str]:
    return split(fun, options.static, args, kwargs).leaf_names()


def _key(call: Call, *, abstract: bool) -> tuple[list[ArrayLike], Hashable]:
    """The argument leaves, and the cache key: everything that the program depends on."""
    leaves, tree = jax.tree.flatten((call.dynamic, call.kwargs))
    try:
        types = _jax.type_key(leaves)
        if not abstract and jax.ShapeDtypeStruct in map(type, leaves):
            raise TypeError
    except (OverflowError, TypeError, ValueError):
        leaves = list(map(native, leaves))
        types = check_types(call, leaves, abstract=abstract)
    surroundings = _jax.eager(), _needs_all_devices(leaves), _jax.tracing_replica(), _over_processes(leaves)
    return leaves, (tree, types, call.static, _jax.trace_context(), surroundings)


def _needs_all_devices(leaves: Sequence[ArrayLike]) -> bool:
    """Whether the program must span all devices: other operations share its jaxpr, or an argument type names a mesh."""
    return not _jax.eager() and (_jax.staging() or any(primitives.split_over(x) is not None for x in leaves))


def _over_processes(leaves: Sequence[ArrayLike]) -> tuple[bool, ...]:
    """Whether each argument is an array over several processes."""
    return tuple(map(_jax.over_processes, leaves)) if jax.process_count() > 1 else ()


def _without_jit(dispatcher: weakref.ref[Dispatcher], /, *args: PyTree, **kwargs: PyTree) -> PyTree:
    """The callable that C++ runs under ``jax.disable_jit``."""
    found: Any = dispatcher()
    return found(found._fun(), args, kwargs)


# ---------------------------------------------------------------------------------------------------------------
# One dispatcher per function and options


_all: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


def _forget_all() -> None:
    """Clears the C++ caches, so that all calls run in Python, which refuses those over several processes."""
    for each in list(_all):
        each.forget()


agreement.on_abort.append(_forget_all)

_dispatchers: dict[int, tuple[weakref.ref[Any], dict[Hashable, Dispatcher]]] = {}


def dispatcher(fun: Function, options: Options) -> Dispatcher:
    """The dispatcher of ``fun``. Maps of the same function with equal options share it; it is freed with ``fun``."""
    owner = getattr(fun, "__self__", None) if hasattr(fun, "__func__") else fun
    try:
        reference = weakref.ref(owner, functools.partial(_forget, id(owner)))
        itself: Any = weakref.WeakMethod(fun) if hasattr(fun, "__func__") else weakref.ref(fun)
        key = (getattr(fun, "__func__", None), options)
        hash(key)
    except TypeError:  # no weak references, or unhashable options: not shared
        return Dispatcher(lambda: fun, options)
    _, known = _dispatchers.setdefault(id(owner), (reference, {}))
    return known.setdefault(key, Dispatcher(itself, options))


def _forget(owner: int, _: object) -> None:
    _dispatchers.pop(owner, None)
