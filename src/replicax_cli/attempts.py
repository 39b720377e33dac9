"""Runs a gang, and runs it again when it fails."""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from replicax_cli import leftovers
from replicax_cli.gang import Gang, Outcome, Started, send_signal
from replicax_cli.output import reader, say
from replicax_cli.signals import Signals


@dataclass(frozen=True)
class Start:
    """What to start: see the attributes of :class:`Gang`."""

    command: Sequence[str]
    environments: Sequence[Mapping[str, str]]
    starter: str | None = None
    send: Callable[[Started, signal.Signals], None] = send_signal


#: What to start, from the number of the attempt and the slots of its processes, for as long as the attempt lasts.
Starter = Callable[[int, Sequence[int]], AbstractContextManager[Start]]


@dataclass(frozen=True)
class Limits:
    """The options of a launch.

    Attributes:
        max_restarts: How often all processes are restarted.
        min_processes: The number of processes down to which those that died are left out; None to replace them.
        grace: Seconds between a signal that is passed on and SIGKILL.
        logs: The folder for the output; None to print it.
        patience: Seconds for which a process may be stopped.
    """

    max_restarts: int
    min_processes: int | None
    grace: float
    logs: Path | None
    patience: float


def run(start: Starter, slots: Sequence[int], limits: Limits) -> int:
    """Runs a program on this host until it succeeds, or no restart is left.

    Args:
        start: What to start.
        slots: The numbers of the processes.
        limits: The options.

    Returns:
        The exit status.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="replicax-", ignore_cleanup_errors=True) as folder, Signals() as signals:
        guard = leftovers.start_guard(mark, folder)
        try:
            return repeat(
                lambda n, slots: _attempt(start, n, slots, limits, mark, Path(folder), signals), slots, limits
            )
        finally:
            guard.communicate()


def repeat(attempt: Callable[[int, Sequence[int]], Outcome], slots: Sequence[int], limits: Limits) -> int:
    """Makes attempts until one succeeds, or no restart is left.

    Args:
        attempt: Makes an attempt, from its number and the slots of its processes.
        slots: The slots of the first attempt.
        limits: The options.

    Returns:
        The exit status: that of the first process that failed in the last attempt, or 0.
    """
    for number in range(limits.max_restarts + 1):
        outcome = attempt(number, slots)
        if outcome.first is None or outcome.ended_by is not None or number == limits.max_restarts or reader.left:
            break
        slots = left(slots, outcome.lost, limits.min_processes)
        several = f", with {_count(slots)}" if len(slots) > 1 or limits.min_processes else ""
        say(f"restart {number + 1} of {limits.max_restarts}{several}")
    return _report(outcome)


def _attempt(
    start: Starter, attempt: int, slots: Sequence[int], limits: Limits, mark: str, folder: Path, signals: Signals
) -> Outcome:
    records = folder / str(attempt)
    records.mkdir()
    logs = limits.logs and limits.logs / f"attempt-{attempt}"
    with start(attempt, slots) as what:
        gang = Gang(
            what.command,
            what.environments,
            slots,
            mark,
            records,
            limits.grace,
            logs,
            patience=limits.patience,
            starter=what.starter,
            send=what.send,
        )
        return gang.run(signals)


def left(slots: Sequence[int], lost: frozenset[int], least: int | None) -> Sequence[int]:
    """The processes of the next attempt: without those that died, but at least ``least``."""
    if least is None:
        return slots
    alive = [slot for slot in slots if slot not in lost]
    dead = [slot for slot in slots if slot in lost]
    return sorted([*alive, *dead[: max(0, least - len(alive))]])


def _count(slots: Sequence[int]) -> str:
    return f"{len(slots)} process{'es' * (len(slots) != 1)}"


def _report(outcome: Outcome) -> int:
    """Prints the last lines of the process that failed first, and returns the exit status."""
    first = outcome.first
    if first is None:
        return 0
    if outcome.ended_by is None:
        lines = " Its last lines:" if first.last_lines else " It printed nothing."
        say(f"{first.who} failed first: {first.text}.{lines}")
        with contextlib.suppress(OSError):
            sys.stderr.buffer.write(first.last_lines)
            sys.stderr.buffer.flush()
    return first.status
