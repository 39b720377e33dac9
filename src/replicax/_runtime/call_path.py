"""Routes each call of a map to JAX's C++ fast path or to the Python slow path.

The paths:

- In place: JAX's C++ cache finds the program and runs it without Python. For several devices, C++ calls
  :func:`replicax._runtime.transfer.put` for each NumPy array.
- Copy host leaves: Python copies the small NumPy arrays first. Then as in place, with a separate C++ cache. On a single
  device, C++ aliases the memory of a NumPy array, and may read it after the call has returned.
- Own rows: like in place, for maps over several processes. The program returns arrays over all processes, and Python
  takes this process's part of them.
- Packed: Python transfers many small NumPy arrays as one: see :mod:`replicax._runtime.packing`.
- Slow path: only Python, for the first call of a signature, and for arrays that must be moved or padded.

A call starts on the path that the last calls of the map used. A wrong guess only costs time: on a cache miss, the call
takes the slow path, which selects the right path.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import Generic, NamedTuple, NoReturn, TypeAlias, TypeVar

import numpy as np
from numpy import ndarray

from replicax import _jax
from replicax._jax import cpp
from replicax._jax.aliases import Known
from replicax._runtime import cpu_threads
from replicax._runtime.arguments import function_name
from replicax._runtime.options import Options
from replicax._runtime.packing import MANY
from replicax._runtime.taken import TakenArrays
from replicax._runtime.transfer import copy_small, put
from replicax._typing import Args, Function, Kwargs, PyTree

R = TypeVar("R")


class Path(Enum):
    """The path on which calls start."""

    IN_PLACE = auto()
    COPY_HOST_LEAVES = auto()
    PACKED = auto()
    OWN_ROWS = auto()


class Outcome(NamedTuple):
    """The outcome of a call on the slow path.

    Attributes:
        result: The result of the call.
        known: The data for the C++ cache; None if only Python can run such a call.
        start: The path on which such calls should start; None to keep the current one.
    """

    result: PyTree
    known: Known | None = None
    start: Path | None = None


#: ``slow_path(args, kwargs, path)``; ``path``: the path whose C++ cache missed the call.
SlowPath: TypeAlias = Callable[[Args, Kwargs, Path], Outcome]

#: ``slow(args, kwargs)`` returns the result of a call, and the data for the C++ cache.
Slow: TypeAlias = Callable[[Args, Kwargs], tuple[PyTree, Known | None]]

#: After this many consecutive calls that do not need Python, calls start in C++ again.
IN_A_ROW = 3


class Switch:
    """Sets ``__call__`` of all callables of one dispatcher. During tracing, ``__call__`` is the slow path.

    On a cache miss, JAX's C++ cache blocks other threads until the first thread has traced. That is a deadlock if the
    tracing thread waits for a blocked thread.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._takers: weakref.WeakSet[PathTaker[PyTree]] = weakref.WeakSet()
        self._tracing = self._bounded = False

    def add(self, taker: PathTaker[PyTree]) -> None:
        """Registers a callable."""
        with self._lock:
            self._takers.add(taker)
            self.point(taker)

    def trace(self, tracing: bool) -> None:
        """Sets whether a program is being traced."""
        with self._lock:
            self._tracing = tracing
            self.point(*self._takers)

    def bound(self) -> None:
        """Wraps all calls in :func:`replicax._runtime.cpu_threads.bounded`, which limits the calls in flight."""
        with self._lock:
            self._bounded = True
            self.point(*self._takers)

    def point(self, *takers: PathTaker[PyTree]) -> None:
        """Sets ``__call__`` of these callables."""
        with self._lock:
            for taker in takers:
                call = taker._slow_path if self._tracing else taker._paths[taker._start]
                taker.__call__ = cpu_threads.bounded(call, taker._slow_path) if self._bounded else call


class PathTaker(Generic[R]):
    """Callable returned by pmap; routes calls to the C++ fast path or the Python slow path.

    ``__call__`` is a slot, so that Python calls the function of the current path without an extra frame.

    Attributes:
        _paths: The function of each path.
        _slow_path: The function of the slow path.
        _start: The path on which calls start.
        _over_processes: The arguments of :func:`_own_rows`.
        _copies: Whether an earlier call needed copies of NumPy arrays.
    """

    __slots__ = ("__call__", "__weakref__", "_copies", "_over_processes", "_paths", "_slow_path", "_start", "_switch")

    __call__: Callable[..., R]

    def __init__(self, table: Callable[..., Function], slow_path: SlowPath, switch: Switch) -> None:
        """Creates the functions of the paths.

        Args:
            table: ``table(slow, path)`` returns a callable with a C++ cache, which runs ``slow`` on a miss.
            slow_path: Runs a call in Python.
            switch: Sets ``__call__``.
        """
        self._switch, self._start, self._copies = switch, Path.IN_PLACE, False
        self._slow_path = _jax.api_boundary(lambda *args, **kwargs: slow_path(args, kwargs, Path.IN_PLACE).result)
        itself = weakref.ref(self)
        self._over_processes = table, functools.partial(_run_and_learn, itself, slow_path, Path.OWN_ROWS)
        copied = table(
            functools.partial(_run_and_learn, itself, slow_path, Path.COPY_HOST_LEAVES), Path.COPY_HOST_LEAVES
        )
        in_place = table(functools.partial(_missed, itself, slow_path, copied), Path.IN_PLACE)
        maybe_packed = functools.partial(_maybe_packed, itself, slow_path, in_place)
        self._paths = {
            Path.IN_PLACE: in_place,
            Path.COPY_HOST_LEAVES: _starting(itself, in_place, copied, _copies),
            Path.PACKED: _starting(itself, in_place, _jax.api_boundary(maybe_packed)),
        }
        switch.add(self)

    def _begin(self, start: Path) -> None:
        """Makes calls start on this path from now on."""
        if start is Path.OWN_ROWS and start not in self._paths:
            self._paths[start] = _own_rows(*self._over_processes)
        if start is not self._start:
            self._start, self._copies = start, self._copies or start is Path.COPY_HOST_LEAVES
            self._switch.point(self)


def _run_and_learn(
    taker: weakref.ref[PathTaker[R]], slow_path: SlowPath, path: Path, args: Args, kwargs: Kwargs
) -> tuple[R, Known | None]:
    """Runs the slow path and sets the start of later calls. Returns the result and the data for the C++ cache."""
    outcome = slow_path(args, kwargs, path)
    if outcome.start is not None and (found := taker()) is not None:
        found._begin(outcome.start)
    return outcome.result, outcome.known


def _maybe_packed(
    taker: weakref.ref[PathTaker[R]], slow_path: SlowPath, in_place: Function, *args: PyTree, **kwargs: PyTree
) -> R:
    """Runs a call that may be packed: on the slow path if it has many arrays, else in place."""
    if len(cpp.flatten((args, kwargs), None)[0]) < MANY:
        return in_place(*args, **kwargs)
    return _run_and_learn(taker, slow_path, Path.PACKED, args, kwargs)[0]


def _missed(
    taker: weakref.ref[PathTaker[R]],
    slow_path: SlowPath,
    copied: Function,
    args: Args,
    kwargs: Kwargs,
) -> tuple[R, Known | None]:
    """Runs a call that missed the in-place C++ cache."""
    if (found := taker()) is not None and found._copies and has_host_leaves(args, kwargs):
        if starts_with_host_leaf(args, kwargs):
            found._begin(Path.COPY_HOST_LEAVES)
        args, kwargs = _copies(args, kwargs)
        return copied(*args, **kwargs), None
    return _run_and_learn(taker, slow_path, Path.IN_PLACE, args, kwargs)


def _own_rows(table: Callable[..., Function], slow: Slow) -> Function:
    """Runs calls of a map over several processes, and returns this process's part of the results.

    Args:
        table: ``table(slow, path)`` returns a callable with a C++ cache, whose results are over all processes.
        slow: Runs a call in Python, and returns its final result.
    """
    ran = threading.local()

    def in_python(args: Args, kwargs: Kwargs) -> tuple[PyTree, Known | None]:
        result, known = slow(args, kwargs)
        ran.in_python = True
        return result, known

    over_processes = table(in_python, Path.OWN_ROWS)

    def call(*args: PyTree, **kwargs: PyTree) -> PyTree:
        ran.in_python = False
        result = over_processes(*args, **kwargs)
        return result if ran.in_python else _jax.own_parts(result)

    return call


def _copies(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Copies the small NumPy arrays in the arguments, because the caller may change them before the program runs."""
    if kwargs or len(args) != 1:
        return tuple(map(copy_small, args)), {name: copy_small(tree) for name, tree in kwargs.items()}
    return (copy_small(args[0]),), kwargs  # faster, for the common case


def _starting(
    taker: weakref.ref[PathTaker[R]],
    in_place: Function,
    with_host_leaves: Function,
    prepare: Callable[[Args, Kwargs], tuple[Args, Kwargs]] | None = None,
) -> Function:
    """Runs calls in place, or by ``with_host_leaves`` after ``prepare`` if an argument starts with a NumPy array."""
    others = 0

    def call(*args: PyTree, **kwargs: PyTree) -> PyTree:
        nonlocal others
        if prepare is not None and len(args) == 1 and not kwargs:  # the most common call, in fewer steps
            x = args[0]
            if type(x[0] if type(x) is list and x else x) is ndarray:
                others = 0
                return with_host_leaves(copy_small(x))
        if starts_with_host_leaf(args, kwargs):
            others = 0
            if prepare is not None:
                args, kwargs = prepare(args, kwargs)
            return with_host_leaves(*args, **kwargs)
        others += 1
        if others >= IN_A_ROW and (found := taker()) is not None:
            others = 0
            found._begin(Path.IN_PLACE)
        return in_place(*args, **kwargs)

    return call


def starts_with_host_leaf(args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> bool:
    """Fast approximation of :func:`has_host_leaves`: looks only at the first leaf of each argument."""
    for x in (*args, *kwargs.values()) if kwargs else args:
        kind = type(x)
        while (kind is list or kind is tuple or kind is dict) and x:
            x = x[0] if kind is not dict else next(iter(x.values()))
            kind = type(x)
        if kind is ndarray:
            return True
    return False


def has_host_leaves(args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> bool:
    """Whether any leaf of the arguments is a NumPy array or scalar."""
    return any(isinstance(x, ndarray | np.generic) for x in cpp.flatten((args, kwargs), None)[0])


def table(owner: Function, fun: Function, options: Options, slow: Slow) -> Function:
    """A callable that looks up calls of ``fun`` in JAX's C++ cache.

    Args:
        owner: The owner of the cache entries, which are freed with it.
        fun: The mapped function.
        options: The options of ``pmap``.
        slow: Runs a call on a cache miss. Returns the result and the data for the cache.
    """
    donates = bool(options.donated.positions or options.donated.names)
    static = options.static.positions, options.static.names

    @_jax.api_boundary
    def in_python(*args: PyTree, **kwargs: PyTree) -> PyTree:
        return slow(args, kwargs)[0]

    entry = cpp.entry(owner, slow, _refuse_nan if donates else in_python, function_name(fun), static, put)
    if donates:
        return _donating(entry, in_python)
    return _explaining(entry, in_python) if any(static) else entry


def _explaining(entry: Function, in_python: Function) -> Function:
    """Wraps a C++ entry for static arguments. C++ errors do not name the argument, so Python raises the error again."""

    def explaining(*args: PyTree, **kwargs: PyTree) -> PyTree:
        try:
            return entry(*args, **kwargs)
        except ValueError as error:
            if not cpp.names_no_argument(error):
                raise
        return in_python(*args, **kwargs)

    return explaining


def _donating(entry: Function, in_python: Function) -> Function:
    """Wraps a C++ entry for donated arguments. Calls that pass an array twice run in Python, because XLA may abort.

    For arrays that were donated before, see :class:`replicax._runtime.taken.TakenArrays`. Workaround: donated_twice.
    """

    def donating(*args: PyTree, **kwargs: PyTree) -> PyTree:
        leaves = cpp.flatten((args, kwargs), None)[0]
        if len(set(map(id, leaves))) < len(leaves):
            return in_python(*args, **kwargs)
        try:
            result = entry(*args, **kwargs)
        except ValueError as error:
            if not cpp.names_no_argument(error):
                raise
            result = in_python(*args, **kwargs)
        TakenArrays.delete(leaves)
        return result

    return donating


def _refuse_nan(*_: object, **__: object) -> NoReturn:
    """JAX calls this under jax_debug_nans to run a program again, which is impossible after a donation."""
    raise FloatingPointError(
        "invalid value (nan or inf) encountered in the result of a map, under jax_debug_nans or jax_debug_infs. The "
        "map cannot run again to find the operation, because its arguments were donated. Leave out donate_argnums."
    )
