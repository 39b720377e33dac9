"""Times several ways to do the same work, interleaved, and computes ratios of their times."""

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

#: The seconds per call of each way, one entry per round.
Seconds = Mapping[str, Sequence[float]]

#: Wall-clock time, or the CPU time of the calling thread only. With several simulated devices, CPU time measures the
#: cost of a call more precisely: 1 µs more before the devices start adds 1 to 5 µs of wall-clock time, because their
#: threads sleep and wake. CPU time excludes other threads.
CLOCKS = {"wall": time.perf_counter, "caller": time.thread_time}

#: The two ways of nearly every case: replicax, and the program that an expert writes without it.
OURS = "replicax"
HAND = "by hand"  # jit(shard_map(vmap(f)))

MOST_ROUNDS = 2000


@dataclass(frozen=True)
class Ratio:
    """The ratio of the times of two ways, over all rounds.

    Attributes:
        median: The median.
        low: The first quartile.
        high: The third quartile.
        least: The lower end of the 95 % confidence interval of the median.
    """

    median: float
    low: float
    high: float
    least: float

    def __str__(self) -> str:
        return f"{self.median:.2f} (quartiles {self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Absent:
    """Replaces a way that cannot run here.

    Attributes:
        why: The reason in the table, such as "not installed".
    """

    why: str


@dataclass(frozen=True)
class Measured:
    """The return value of a way that measures itself, such as its time in another process or its memory.

    Attributes:
        amount: The measured value, in seconds or bytes.
        value: The result.
    """

    amount: float
    value: Any


@dataclass(frozen=True)
class Limit:
    """One measured number of a case, and its limit.

    Attributes:
        words: The formula of the number, for the table.
        ways: The ways in the formula. If one is absent, the number is skipped.
        of: Computes the number for each round.
        most: The limit; None for a comparison without a promise.
        clock: A key of ``CLOCKS``.
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
        title: The work.
        line: The promise, in a few words. The table groups cases by line.
        devices: The number of simulated devices of the process; 0 for the accelerator of the machine.
        prepare: Creates the ways when JAX has its devices. Its ``ExitStack`` is closed after the case.
        limits: The numbers for the table.
        calls: The number of calls that are timed together, with one wait for the last result.
        seconds: How long to measure, in normal and in quick runs.
        before: Runs before each way, untimed.
        warm_up: The number of rounds that are not counted; at most one if a round takes longer than a second.
        tolerance: The relative and absolute tolerance between results; None to skip the comparison.
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
    """The time of one way divided by that of another, or of the fastest of several (by median)."""

    def of(seconds: Seconds) -> list[float]:
        present = [name for name in others if name in seconds]
        fastest = min(present, key=lambda name: statistics.median(seconds[name]))
        return [a / b for a, b in zip(seconds[numerator], seconds[fastest], strict=True)]

    # If one of several other ways is absent, the rest are compared.
    return Limit(words or f"{numerator} / {' or '.join(others)}", (numerator, others[0]), of, most)


def added(numerator: str, other: str, allowance: float, *, words: str, clock: str = "wall") -> Limit:
    """The additional time of one way over another, divided by the allowance."""

    def of(seconds: Seconds) -> list[float]:
        return [(a - b) / allowance for a, b in zip(seconds[numerator], seconds[other], strict=True)]

    return Limit(words, (numerator, other), of, 1.0, clock)


def growth(numerator: tuple[str, str], other: tuple[str, str], *, most: float, words: str) -> Limit:
    """The growth of one way's time with its work, divided by the growth of another way's time."""

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
    """The seconds per call, by clock, by way and by round.

    In each round, every way runs once, in random order. So other load on the machine, and the after-effects of a way,
    affect all ways equally. Python's garbage collector runs between rounds, not during them.

    Args:
        ways: The ways to time.
        rounds: The number of rounds; None for as many as fit into ``seconds``, from ``fewest`` to 2,000.
        seconds: The time to spend.
        calls: The number of calls that are timed together, with one wait for the last result.
        before: Runs before each way, untimed.
        warm_up: The number of rounds that are not counted; at most one if a round takes longer than a second.
        fewest: The minimum number of rounds.
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
    """The median of all rounds, and their spread."""
    low, median, high = statistics.quantiles(each, n=4)
    # Order statistics: the number of rounds below the median is binomial, with standard deviation √n / 2.
    rank = math.floor(len(each) / 2 - 1.96 * math.sqrt(len(each)) / 2)
    return Ratio(median, low, high, sorted(each)[max(rank, 0)])


def verdict(measured: Ratio, most: float | None) -> str:
    """The verdict in the table: met or not met; faster or slower if there is no limit.

    "within noise": the median is above the limit, but its 95 % confidence interval reaches below the limit.
    """
    if measured.median <= (1.0 if most is None else most):
        return "faster" if most is None else "met"
    if measured.least <= (1.0 if most is None else most):
        return "even" if most is None else "within noise"
    return "slower" if most is None else "NOT MET"


def agree(ways: Mapping[str, Way], tolerance: float, before: Callable[[], object] | None = None) -> None:
    """Checks that all ways return the same results as the first way.

    If a way returns a function, the function is called for the value, outside the timing. The shapes of arrays may
    differ, for example if the replicas are split into devices and lanes.

    Raises:
        AssertionError: results differ.
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
        case: The case. This process must have its number of devices.
        quick: Whether to measure for the shorter time.

    Returns:
        One row of the table for each limit, as JSON data.
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
