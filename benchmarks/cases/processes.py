"""Maps over several processes, beside the same program by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from measure import HAND, OURS, Case, Limit, Measured, Way, over
from over_processes import BARE, GLOBAL, OF_GLOBAL_ARRAYS, WAYS, agreement_seconds, seconds
from replicax.testing import Processes, processes

WARM = "several processes: a warm call costs no more than by hand, with the conversions of arrays"
SAME = "several processes: a warm call of global arrays costs what the bare program costs"
MANY = "several processes: 100 arrays cost at most twice the bare program"
SUMS = "several processes: sums cost what they cost by hand"
AGREE = "several processes: agreement takes at most 50 ms for each signature"

#: The programs of each line: name, arrays, float32 numbers in each, calls timed together.
SUMMED = {"1 KB": (1, 256, 5), "1 MB": (1, 1 << 18, 2), "64 MB": (1, 1 << 24, 1), "100 arrays of 1 KB": (100, 256, 1)}


def cases(quick: bool) -> list[Case]:
    """Cases: a warm call with one array and with 100, sums of several sizes, a training step, and the agreement."""
    by_hand = (over(OURS, HAND, most=1.05), over(OURS, BARE, most=None))
    found = []
    for devices in (1, 2, 4):
        where = f"2 processes of {devices} device{'s' * (devices > 1)}"
        found.append(_case(f"one array, {where}", WARM, devices, "double", (1, 256, 20), by_hand))
        found.append(
            _case(f"100 arrays, {where}", MANY, devices, "double", (100, 16, 5), (over(OURS, BARE, most=2.0),))
        )
        for title, size in (("one global array", (1, 256, 20)), ("100 global arrays", (100, 16, 5))):
            calls = partial(_calls, devices, OF_GLOBAL_ARRAYS, "double", *size)
            found.append(Case(f"{title}, {where}", SAME, 1, calls, (over(GLOBAL, BARE, most=1.05),)))
    for title, size in SUMMED.items():
        if not (quick and title == "64 MB"):
            found.append(_case(f"psum of {title}", SUMS, 2, "psum", size, (over(OURS, HAND, most=1.02),)))
    found.append(
        _case("a step of 100 arrays, averaged", SUMS, 1, "step", (100, 256, 1), (over(OURS, HAND, most=1.02),))
    )
    for lanes in (1, 4):
        calls = partial(_calls, 1, WAYS, "training", 5, 4096, 2, lanes)
        title = f"training with averaged gradients, {lanes} replica{'s' * (lanes > 1)} a process"
        found.append(Case(title, SUMS, 1, calls, (over(OURS, HAND, most=1.02),)))
    limit = Limit("two exchanges / 50 ms", (OURS,), lambda taken: [each / 0.05 for each in taken[OURS]], 1.0)
    found.append(Case("two processes", AGREE, 1, _agreement, (limit,), tolerance=None))
    return found


def _case(
    title: str, line: str, devices: int, program: str, size: tuple[int, int, int], limits: tuple[Limit, ...]
) -> Case:
    return Case(title, line, 1, partial(_calls, devices, WAYS, program, *size), limits)


def _calls(devices: int, ways: Sequence[str], program: str, *how: Any) -> Mapping[str, Way]:
    *size, stack = how
    both = stack.enter_context(processes(2, devices=devices, timeout=300))
    return {way: _way(both, seconds, way, program, *size) for way in ways}


def _agreement(stack: ExitStack) -> Mapping[str, Way]:
    return {OURS: _way(stack.enter_context(processes(2)), agreement_seconds, 5)}


def _way(both: Processes, function: Callable[..., tuple[float, float]], *args: Any) -> Way:
    """A way that runs in both processes, and takes what the first measures."""
    return lambda: Measured(*both.run(function, *args)[0])
