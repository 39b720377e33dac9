"""Finds where two recorded runs part."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from replicax._typing import PyTree
from replicax.errors import MismatchError
from replicax.testing._fingerprint import Fingerprint, LeafBits, fingerprint


@dataclass(frozen=True)
class Divergence:
    """Where two runs part.

    Attributes:
        step: The index of the step, or its key if the runs are mappings.
        path: The path of the first array that differs, such as ``"['params']['w']"``; empty for a pytree that is one
            array. None if a run has no such step.
        replicas: The replicas that differ in this array. Empty if the arrays have no replica axis, or if they differ in
            more than their bits.
        reason: What differs, in words.
        others: The paths of the other arrays that differ in this step.
    """

    step: Hashable
    path: str | None
    replicas: tuple[int, ...]
    reason: str
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"step {self.step}" if self.path is None else f"step {self.step}, tree{self.path}"
        more = f" (and {len(self.others)} more in this step)" if self.others else ""
        return f"{where}: {self.reason}{more}"


def first_divergence(run_a: Any, run_b: Any, axis: int | None = 0) -> Divergence | None:
    """Finds the first step and array in which two runs differ in their bits.

    Args:
        run_a: The steps of a run, in order: an iterable, or a mapping from the number of the step to its state. Each
            state is a pytree of arrays, or the result of :func:`fingerprint`, which may have been written to JSON and
            read again. A generator is read only as far as needed.
        run_b: The steps of the other run: a mapping if ``run_a`` is a mapping. Of mappings, the steps in both are
            compared first, in the order of ``run_a``.
        axis: The axis of the replicas in pytrees of arrays, as in :func:`fingerprint`.

    Returns:
        The first difference, in the order of the steps and then of the arrays in the pytree: arrays with different bits
        or types, an array in one of the runs only, or a step in one of the runs only. None if the runs are equal.

    Raises:
        MismatchError: a run is one state or fingerprint instead of a sequence, or only one of the runs is a mapping,
            or neither run has a step.
        ReplicaxError: any error of :func:`fingerprint`.

    Example:
        >>> import numpy as np, replicax.testing
        >>> states = [{"w": np.float32([k, k, k])} for k in range(4)]
        >>> others = [*states[:2], {"w": np.float32([2, 2, 2.0000002])}, states[3]]
        >>> print(replicax.testing.first_divergence(states, others))
        step 2, tree['w']: the bits of replica 2 of 3 differ
    """
    compared = False
    for step, a, b in _steps(run_a, run_b):
        compared = True
        if a is _MISSING or b is _MISSING:
            return Divergence(step, None, (), f"only {'run_b' if a is _MISSING else 'run_a'} has this step")
        if (found := _compare(step, _recorded(a, axis), _recorded(b, axis))) is not None:
            return found
    if not compared:
        raise MismatchError("first_divergence: neither run has a step, so there is nothing to compare.")
    return None


_MISSING = object()


def _steps(run_a: Any, run_b: Any) -> Iterator[tuple[Hashable, Any, Any]]:
    """Yields each step and what the runs have there.

    Raises:
        MismatchError: the runs cannot be compared step by step.
    """
    for name, run in (("run_a", run_a), ("run_b", run_b)):
        if isinstance(run, Mapping):
            if run and _is_fingerprint(run):
                raise _no_run(name, "is one fingerprint", f"Pass the fingerprints of all steps, such as [{name}].")
            if strange := [key for key in run if not isinstance(key, int | np.integer)]:
                raise _no_run(
                    name,
                    f"is a mapping with the key {strange[0]!r:.60}",
                    f"The keys must be the numbers of the steps (JSON makes strings of them). For one state, pass "
                    f"[{name}].",
                )
        elif not isinstance(run, Iterable) or hasattr(run, "dtype"):
            raise _no_run(name, f"is {run!r:.60}", f"Pass the states of all steps, such as [{name}].")
    if isinstance(run_a, Mapping) != isinstance(run_b, Mapping):
        raise MismatchError(
            "first_divergence: one run is a mapping from steps to states, the other is not. Pass two mappings, or two "
            "sequences."
        )
    if not isinstance(run_a, Mapping):
        for step, (a, b) in enumerate(itertools.zip_longest(run_a, run_b, fillvalue=_MISSING)):
            yield step, a, b
        return
    both = [step for step in run_a if step in run_b]
    for step in dict.fromkeys([*both, *run_a, *run_b]):
        yield step, run_a.get(step, _MISSING), run_b.get(step, _MISSING)


def _no_run(name: str, what: str, advice: str) -> MismatchError:
    return MismatchError(f"first_divergence: {name} {what}, and not the states of a run. {advice}")


def _is_fingerprint(tree: PyTree) -> bool:
    """Whether a tree is a fingerprint, and not a pytree of arrays: a pytree of arrays contains no string."""
    return isinstance(tree, Mapping) and all(
        isinstance(leaf, Mapping) and isinstance(leaf.get("type"), str) for leaf in tree.values()
    )


def _recorded(tree: PyTree, axis: int | None) -> Fingerprint:
    return tree if _is_fingerprint(tree) else fingerprint(tree, axis)


def _compare(step: Hashable, a: Fingerprint, b: Fingerprint) -> Divergence | None:
    found = [
        (path, *difference)
        for path in dict.fromkeys([*a, *b])
        if (difference := _difference(a.get(path), b.get(path))) is not None
    ]
    if not found:
        return None
    path, replicas, reason = found[0]
    return Divergence(step, path, replicas, reason, tuple(other for other, *_ in found[1:]))


def _difference(a: LeafBits | None, b: LeafBits | None) -> tuple[tuple[int, ...], str] | None:
    """The replicas that differ, and a description; None for equal arrays."""
    if a is None or b is None:
        return (), f"only {'run_b' if a is None else 'run_a'} has this array"
    if _kind(a) != _kind(b):
        return (), f"{_kind(a)} in run_a, but {_kind(b)} in run_b"
    if "replicas" not in a:
        return None if a["bits"] == b["bits"] else ((), "the bits differ")
    differ = tuple(k for k, pair in enumerate(zip(a["replicas"], b["replicas"], strict=True)) if pair[0] != pair[1])
    return (differ, f"the bits of {_named(differ)} of {len(a['replicas'])} differ") if differ else None


def _kind(leaf: LeafBits) -> str:
    return f"{len(leaf['replicas'])} replicas of {leaf['type']}" if "replicas" in leaf else leaf["type"]


def _named(replicas: tuple[int, ...]) -> str:
    """``replica 3``, ``replicas 0, 1, 5`` or, if there are many, ``replicas 0, 1, 2, 3, 4, 5 and 10 more``."""
    shown = ", ".join(map(str, replicas[:_MOST]))
    more = f" and {len(replicas) - _MOST} more" if len(replicas) > _MOST else ""
    return f"replica{'s' * (len(replicas) > 1)} {shown}{more}"


#: The number of replicas that a message lists.
_MOST = 6
