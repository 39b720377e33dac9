"""Times several ways to do the same work, interleaved, and compares them by ratio."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Ratio:
    """How many times longer one way takes than another, round by round.

    Attributes:
        median: Of all rounds.
        low: The first quartile.
        high: The third quartile.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} (quartiles {self.low:.2f} to {self.high:.2f})"


def interleaved(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """The seconds that each way takes, in each of so many rounds.

    In each round every way runs once, in an order of chance, so that what else the machine does, and what a way
    leaves behind for the next, falls on all alike. Everything runs twice before, uncounted.
    """
    names, chance = list(ways), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for k in range(-2, rounds):
        for name in chance.sample(names, len(names)):
            start = time.perf_counter()
            jax.block_until_ready(ways[name]())
            if k >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], numerator: str, denominator: str) -> Ratio:
    """How many times longer the first takes than the second."""
    each = [a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True)]
    low, median, high = statistics.quantiles(each, n=4)
    return Ratio(median, low, high)
