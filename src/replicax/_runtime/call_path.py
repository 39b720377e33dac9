"""How a call of a map runs: in C++ where it can, and in Python where something has to be seen to first.

Each signature has its path:

- in place: JAX's table of calls in C++ has the signature, and runs it without Python. NumPy arrays for several devices
  are moved by :func:`replicax._runtime.transfer.put`, which C++ calls for each.
- copy host leaves: the same, behind copies of small NumPy arrays, in a table of its own. On a single device C++ reads a
  NumPy array where it is, and maybe after the call has returned.
- packed: many small NumPy arrays travel as one, in Python: see :mod:`replicax._runtime.packing`.
- the slow path: Python alone: the first call of a signature, and arrays that have to be moved or padded.

A call starts where the last calls of the map ended up. That is a guess which costs time if it is wrong, and nothing
else: a call that its table does not have takes the slow path, which finds out.
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
    """Where calls start."""

    IN_PLACE = auto()
    COPY_HOST_LEAVES = auto()
    PACKED = auto()


class Outcome(NamedTuple):
    """What came of a call on the slow path.

    Attributes:
        result: The result.
        known: What C++ has to know to run such a call; None if only Python can run it.
        start: Where such calls should start; None where that makes no difference.
    """

    result: PyTree
    known: Known | None = None
    start: Path | None = None


#: ``slow_path(args, kwargs, copied)``; with ``copied`` the small NumPy arrays among the arguments are copies already.
SlowPath: TypeAlias = Callable[[Args, Kwargs, bool], Outcome]

#: ``slow(args, kwargs)``: the result of a call, and what C++ has to know to run such a call.
Slow: TypeAlias = Callable[[Args, Kwargs], tuple[PyTree, Known | None]]

#: After so many calls in a row that need nothing from Python, calls start in C++ again.
IN_A_ROW = 3


class Switch:
    """Has the callables of one dispatcher take the slow path while a program is traced, and bounds their calls.

    While one thread traces, C++ would have the others wait for it, which it may be waiting for.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._takers: weakref.WeakSet[PathTaker[PyTree]] = weakref.WeakSet()
        self._tracing = self._bounded = False

    def add(self, taker: PathTaker[PyTree]) -> None:
        """Lets calls of a new callable in."""
        with self._lock:
            self._takers.add(taker)
            self.point(taker)

    def trace(self, tracing: bool) -> None:
        """Takes note that a program is being traced, or that none is."""
        with self._lock:
            self._tracing = tracing
            self.point(*self._takers)

    def bound(self) -> None:
        """Has calls wait for earlier ones, as far as :mod:`replicax._runtime.cpu_threads` finds that they have to."""
        with self._lock:
            self._bounded = True
            self.point(*self._takers)

    def point(self, *takers: PathTaker[PyTree]) -> None:
        """Points callables to where their calls start."""
        with self._lock:
            for taker in takers:
                call = taker._slow_path if self._tracing else taker._paths[taker._start]
                taker.__call__ = cpu_threads.bounded(call, taker._slow_path) if self._bounded else call


class PathTaker(Generic[R]):
    """A callable whose calls start on one of the paths.

    ``__call__`` is a slot, so that Python finds on the object what to call, and calls it without a frame.

    Attributes:
        _paths: What a call that starts on each of the paths runs.
        _slow_path: What a call in Python alone runs.
        _start: Where calls start.
        _copies: Whether calls have been found that need copies of NumPy arrays.
    """

    __slots__ = ("__call__", "__weakref__", "_copies", "_paths", "_slow_path", "_start", "_switch")

    __call__: Callable[..., R]

    def __init__(self, table: Callable[..., Function], slow_path: SlowPath, switch: Switch) -> None:
        """Makes the paths.

        Args:
            table: Makes a callable that runs in C++ what it has run before, of what it is to run otherwise, and of
                whether that gets copies of small NumPy arrays.
            slow_path: Runs a call in Python.
            switch: Tells when calls have to take it.
        """
        self._switch, self._start, self._copies = switch, Path.IN_PLACE, False
        self._slow_path = _jax.api_boundary(lambda *args, **kwargs: slow_path(args, kwargs, False).result)
        itself = weakref.ref(self)
        copied = table(functools.partial(_run_and_learn, itself, slow_path, True), copied=True)
        in_place = table(functools.partial(_missed, itself, slow_path, copied), copied=False)
        maybe_packed = functools.partial(_maybe_packed, itself, slow_path, in_place)
        self._paths = {
            Path.IN_PLACE: in_place,
            Path.COPY_HOST_LEAVES: _starting(itself, in_place, copied, _copies),
            Path.PACKED: _starting(itself, in_place, _jax.api_boundary(maybe_packed)),
        }
        switch.add(self)

    def _begin(self, start: Path) -> None:
        """Has calls start there from now on."""
        if start is not self._start:
            self._start, self._copies = start, self._copies or start is Path.COPY_HOST_LEAVES
            self._switch.point(self)


def _run_and_learn(
    taker: weakref.ref[PathTaker[R]], slow_path: SlowPath, copied: bool, args: Args, kwargs: Kwargs
) -> tuple[R, Known | None]:
    """Takes the slow path; the result, and what C++ has to know."""
    outcome = slow_path(args, kwargs, copied)
    if outcome.start is not None and (found := taker()) is not None:
        found._begin(outcome.start)
    return outcome.result, outcome.known


def _maybe_packed(
    taker: weakref.ref[PathTaker[R]], slow_path: SlowPath, in_place: Function, *args: PyTree, **kwargs: PyTree
) -> R:
    """A call that may be packed; not one of few arrays."""
    if len(cpp.flatten((args, kwargs), None)[0]) < MANY:
        return in_place(*args, **kwargs)
    return _run_and_learn(taker, slow_path, False, args, kwargs)[0]


def _missed(
    taker: weakref.ref[PathTaker[R]],
    slow_path: SlowPath,
    copied: Function,
    args: Args,
    kwargs: Kwargs,
) -> tuple[R, Known | None]:
    """A call that the table of calls in place does not have."""
    if (found := taker()) is not None and found._copies and has_host_leaves(args, kwargs):
        if starts_with_host_leaf(args, kwargs):
            found._begin(Path.COPY_HOST_LEAVES)
        args, kwargs = _copies(args, kwargs)
        return copied(*args, **kwargs), None
    return _run_and_learn(taker, slow_path, False, args, kwargs)


def _copies(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """The arguments with copies of small NumPy arrays, whose owner may change them before the program has run."""
    if kwargs or len(args) != 1:
        return tuple(map(copy_small, args)), {name: copy_small(tree) for name, tree in kwargs.items()}
    return (copy_small(args[0]),), kwargs  # the same with fewer steps


def _starting(
    taker: weakref.ref[PathTaker[R]],
    in_place: Function,
    with_host_leaves: Function,
    prepare: Callable[[Args, Kwargs], tuple[Args, Kwargs]] | None = None,
) -> Function:
    """Runs calls that begin with NumPy arrays so, once they are prepared, and others in place."""
    others = 0

    def call(*args: PyTree, **kwargs: PyTree) -> PyTree:
        nonlocal others
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
    """Whether an argument is a NumPy array, or a tree that begins with one: a glance, for speed."""
    for x in (*args, *kwargs.values()) if kwargs else args:
        kind = type(x)
        while (kind is list or kind is tuple or kind is dict) and x:
            x = x[0] if kind is not dict else next(iter(x.values()))
            kind = type(x)
        if kind is ndarray:
            return True
    return False


def has_host_leaves(args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> bool:
    """Whether there is a NumPy array or scalar anywhere in the arguments."""
    return any(isinstance(x, ndarray | np.generic) for x in cpp.flatten((args, kwargs), None)[0])


def table(owner: Function, fun: Function, options: Options, slow: Slow) -> Function:
    """JAX's table of calls in C++, for calls of ``fun``.

    Args:
        owner: What the entries belong to, and are freed with.
        fun: The function.
        options: What the user asked of ``pmap``.
        slow: Takes a call that the table does not have; the result, and what C++ has to know.
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
    """Runs calls with static arguments, which C++ refuses without their names: that is left to Python."""

    def explaining(*args: PyTree, **kwargs: PyTree) -> PyTree:
        try:
            return entry(*args, **kwargs)
        except ValueError as error:
            if not cpp.names_no_argument(error):
                raise
        return in_python(*args, **kwargs)

    return explaining


def _donating(entry: Function, in_python: Function) -> Function:
    """Runs calls that donate, but those with an array twice: XLA ends the process, or prints all that it knows of it.

    For arrays that were taken see :class:`replicax._runtime.taken.TakenArrays`. Workaround: donated_twice.
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
    """What JAX calls where a program has returned a NaN, was told to look for any, and its arguments are gone."""
    raise FloatingPointError(
        "invalid value (nan or inf) encountered in the result of a map, under jax_debug_nans or jax_debug_infs. What "
        "was donated to it is gone, so that it cannot be run again to show where. Leave out donate_argnums to see."
    )
