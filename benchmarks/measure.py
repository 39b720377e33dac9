"""Times several ways to do the same work, interleaved, and compares them by ratio."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

#: A way to do the work of a case: called without arguments, it returns the result.
Way = Callable[[], Any]

#: What each way took for one call, in seconds, round by round.
Seconds = Mapping[str, Sequence[float]]

#: By the clock on the wall, or the processor time of the calling thread alone. With several simulated devices the
#: latter is the finer one for what a call costs its caller: a microsecond more before the devices start shows as one to
#: five on the wall, by how their threads then sleep and wake. What other threads do, it does not see.
CLOCKS = {"wall": time.perf_counter, "caller": time.thread_time}

#: The two ways that nearly every case has: what is measured, and what an expert writes without it.
OURS = "replicax"
HAND = "by hand"  # jit(shard_map(vmap(f)))

MOST_ROUNDS = 2000


@dataclass(frozen=True)
class Ratio:
    """How many times longer one way takes than another, round by round.

    Attributes:
        median: Of all rounds.
        low: The first quartile.
        high: The third quartile.
        least: The lower end of the interval in which the true median lies with 95 % confidence.
    """

    median: float
    low: float
    high: float
    least: float

    def __str__(self) -> str:
        return f"{self.median:.2f} (quartiles {self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Absent:
    """In the place of a way: a peer that cannot run here.

    Attributes:
        why: As it stands in the table, such as "not installed".
    """

    why: str


@dataclass(frozen=True)
class Measured:
    """What a way returns that has measured itself: its time in another process, say, or the memory it took.

    Attributes:
        amount: What counts, in seconds or bytes.
        value: The result.
    """

    amount: float
    value: Any


@dataclass(frozen=True)
class Limit:
    """One number of a case, and how large it may be.

    Attributes:
        words: What is divided by what.
        ways: The ways that it is made of; where one is absent, so is the number.
        of: The number, round by round.
        most: The limit; None for a peer that nothing was promised about.
        clock: One of ``CLOCKS``.
    """

    words: str
    ways: tuple[str, ...]
    of: Callable[[Seconds], Sequence[float]]
    most: float | None
    clock: str = "wall"


@dataclass(frozen=True)
class Case:
    """The same work, done in several ways.

    Attributes:
        title: What is done.
        line: What was promised, in a few words; cases of one line stand together in the table.
        devices: How many simulated devices the process has; 0 for the machine's own accelerator.
        prepare: Makes the ways, once JAX has its devices. What it puts on the stack is undone in the end.
        limits: The numbers that go into the table.
        calls: How many calls of a way are timed together, with one wait for the last result.
        seconds: How long to measure, and in the quick form.
        before: Runs before each way, untimed.
        warm_up: How many rounds are not counted; no more than one where they take a second or longer.
        tolerance: How far the results of the ways may differ, relatively and absolutely; None: nothing to compare.
    """

    title: str
    line: str
    devices: int
    prepare: Callable[[ExitStack], Mapping[str, Way | Absent]]
    limits: tuple[Limit, ...]
    calls: int = 1
    seconds: tuple[float, float] = (5.0, 1.0)
    before: Callable[[], object] | None = None
    warm_up: int = 2
    tolerance: float | None = 1e-5


def over(numerator: str, *others: str, most: float | None, words: str = "") -> Limit:
    """The time of one way over that of another, or over that of the fastest of several (by their medians)."""

    def of(seconds: Seconds) -> list[float]:
        present = [name for name in others if name in seconds]
        fastest = min(present, key=lambda name: statistics.median(seconds[name]))
        return [a / b for a, b in zip(seconds[numerator], seconds[fastest], strict=True)]

    # A peer among several may be absent: the others are compared with.
    return Limit(words or f"{numerator} / {' or '.join(others)}", (numerator, others[0]), of, most)


def added(numerator: str, other: str, allowance: float, *, words: str, clock: str = "wall") -> Limit:
    """The time that one way takes longer than another, over what it may."""

    def of(seconds: Seconds) -> list[float]:
        return [(a - b) / allowance for a, b in zip(seconds[numerator], seconds[other], strict=True)]

    return Limit(words, (numerator, other), of, 1.0, clock)


def growth(numerator: tuple[str, str], other: tuple[str, str], *, most: float, words: str) -> Limit:
    """How many times longer one way takes when its work grows, over how many times longer another takes."""

    def of(seconds: Seconds) -> list[float]:
        rounds = zip(*(seconds[name] for name in (*numerator, *other)), strict=True)
        return [(large / small) / (their_large / their_small) for large, small, their_large, their_small in rounds]

    return Limit(words, (*numerator, *other), of, most)


def interleaved(
    ways: Mapping[str, Way],
    rounds: int | None = None,
    *,
    seconds: float = 5.0,
    calls: int = 1,
    before: Callable[[], object] | None = None,
    warm_up: int = 2,
    fewest: int = 5,
) -> dict[str, dict[str, list[float]]]:
    """The seconds that a call of each way takes, in each of so many rounds, by each clock.

    In each round every way runs once, in an order of chance, so that what else the machine does, and what a way
    leaves behind for the next, falls on all alike. Python's cyclic garbage is collected between rounds, not in them.

    Args:
        ways: What to time.
        rounds: How many; as many as fit into ``seconds``, from ``fewest`` to 2,000, when None.
        seconds: The time to spend.
        calls: How many calls are timed together, with one wait for the last result.
        before: Runs before each way, untimed.
        warm_up: How many rounds are not counted; no more than one where they take a second or longer.
        fewest: The least number of rounds.
    """
    names, chance = list(ways), random.Random(0)
    taken: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in names} for clock in CLOCKS}
    started, one_round, k = time.perf_counter(), 0.0, -warm_up
    gc.collect()
    gc.disable()
    try:
        while rounds is None or k < rounds:
            if one_round > 1:
                k = max(k, 0)
            if k >= 0 and rounds is None:
                left = seconds - (time.perf_counter() - started)
                rounds = max(fewest, min(MOST_ROUNDS, int(left / one_round) if one_round else fewest))
            at = time.perf_counter()
            for name in chance.sample(names, len(names)):
                if before is not None:
                    before()
                for clock, each in _time(ways[name], calls).items():
                    if k >= 0:
                        taken[clock][name].append(each)
            one_round = time.perf_counter() - at
            k += 1
            if one_round > 0.1 or k % 20 == 0:
                gc.collect()
    finally:
        gc.enable()
    return taken


def _time(way: Way, calls: int) -> dict[str, float]:
    start = {clock: now() for clock, now in CLOCKS.items()}
    for _ in range(calls):
        result = way()
    if isinstance(result, Measured):
        return dict.fromkeys(CLOCKS, result.amount)
    jax.block_until_ready(result)
    return {clock: (now() - start[clock]) / calls for clock, now in CLOCKS.items()}


def ratio(each: Sequence[float]) -> Ratio:
    """The median of all rounds, and how far they spread."""
    low, median, high = statistics.quantiles(each, n=4)
    # Order statistics: the number of rounds below the median is binomial, with standard deviation √n / 2.
    rank = math.floor(len(each) / 2 - 1.96 * math.sqrt(len(each)) / 2)
    return Ratio(median, low, high, sorted(each)[max(rank, 0)])


def verdict(measured: Ratio, most: float | None) -> str:
    """What the table says of a number: met or not met, or faster or slower where there is no limit.

    Within the noise is a median above the limit that may, to 95 %, truly be below it.
    """
    if measured.median <= (1.0 if most is None else most):
        return "faster" if most is None else "met"
    if measured.least <= (1.0 if most is None else most):
        return "even" if most is None else "within noise"
    return "slower" if most is None else "NOT MET"


def agree(ways: Mapping[str, Way], tolerance: float, before: Callable[[], object] | None = None) -> None:
    """Holds the ways' results against the first one's.

    A result that is a function is called for its value, which so need not be fetched while the clock runs. Arrays may
    have other shapes, as where the replicas are split into devices and lanes.

    Raises:
        AssertionError: They differ.
    """
    expected: list[Any] | None = None
    for name, way in ways.items():
        if before is not None:
            before()
        value = way()
        value = value.value if isinstance(value, Measured) else value
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(value() if callable(value) else value)]
        if expected is None:
            expected = leaves
        assert len(leaves) == len(expected), f"{name} returns {len(leaves)} arrays, the first way {len(expected)}"
        for ours, theirs in zip(leaves, expected, strict=True):
            np.testing.assert_allclose(ours.ravel(), theirs.ravel(), rtol=tolerance, atol=tolerance, err_msg=name)


def run(case: Case, *, quick: bool) -> list[dict[str, Any]]:
    """Checks and times one case.

    Args:
        case: What to run, in a process with the devices it asks for.
        quick: Whether to take the shorter time.

    Returns:
        One row of the table for each of its limits, as JSON holds it.
    """
    with ExitStack() as stack:
        prepared = case.prepare(stack)
        ways = {name: way for name, way in prepared.items() if not isinstance(way, Absent)}
        absent = {name: way.why for name, way in prepared.items() if isinstance(way, Absent)}
        if case.tolerance is not None:
            agree(ways, case.tolerance, case.before)
        seconds = interleaved(
            ways,
            seconds=case.seconds[quick],
            calls=case.calls,
            before=case.before,
            warm_up=case.warm_up,
            fewest=3 if quick else 5,
        )
    return [_row(case, limit, seconds, absent) for limit in case.limits]


def _row(case: Case, limit: Limit, clocks: Mapping[str, Seconds], absent: Mapping[str, str]) -> dict[str, Any]:
    row = blank(case, limit)
    missing = [absent[name] for name in limit.ways if name in absent]
    if missing:
        return row | {"verdict": "skipped", "why": missing[0]}
    measured, seconds = ratio(limit.of(clocks[limit.clock])), clocks["wall"]
    ours = next(iter(seconds))
    return row | {
        "ratio": asdict(measured),
        "verdict": verdict(measured, limit.most),
        "rounds": len(seconds[ours]),
        "ways": {
            name: {"seconds": statistics.median(each), "over_first": asdict(_over_first(seconds, name))}
            for name, each in seconds.items()
        },
        "absent": dict(absent),
    }


def _over_first(seconds: Seconds, name: str) -> Ratio:
    first = next(iter(seconds))
    return ratio([a / b for a, b in zip(seconds[name], seconds[first], strict=True)])


def blank(case: Case, limit: Limit) -> dict[str, Any]:
    """A row of the table without its numbers."""
    return {"line": case.line, "case": case.title, "devices": case.devices, "words": limit.words, "limit": limit.most}
