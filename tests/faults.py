"""The faults of a training run, and what ``replicax launch`` makes of each. Prints the table of docs/launch.md."""

import dataclasses
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from launching import EXAMPLE, Launch

FAULTY = Path(__file__).with_name("faulty.py")

#: Seconds.
HEARTBEAT = 10

#: Steps between two checkpoints, and in all.
EVERY, STEPS = 5, 20


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: times in seconds."""

    fault: str
    detected: float
    recovered: float
    lost: int
    status: int


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, and the seconds in which it must be detected."""

    name: str
    process: int
    within: float

    @property
    def label(self):
        """The name in the table."""
        return f"{self.name}, {'coordinator' if self.process == 0 else 'another process'}"


AT_ONCE, BY_HEARTBEAT = 2.0, HEARTBEAT + 2.0

FAULTS = [
    Fault("killed", 1, AT_ONCE),
    Fault("killed", 0, AT_ONCE),
    Fault("stopped", 1, BY_HEARTBEAT),
    Fault("stopped", 0, BY_HEARTBEAT),
    Fault("endless loop", 1, BY_HEARTBEAT),
    Fault("endless loop", 0, BY_HEARTBEAT),
    Fault("exception", 1, AT_ONCE),
    Fault("exit status 3", 0, AT_ONCE),
    Fault("exit status 0 before the others", 1, BY_HEARTBEAT),
    Fault("killed while connecting", 1, AT_ONCE),
    Fault("killed while connecting", 0, AT_ONCE),
    Fault("killed while compiling", 1, AT_ONCE),
    Fault("killed while the others wait for it in a collective", 1, AT_ONCE),
    Fault("port taken", 0, AT_ONCE + 3),  # it imports JAX first
]


def train(folder, *, n=2, before=(), options=(), steps=STEPS, every=EVERY, more=()):
    """Starts the example, with checkpoints in a folder."""
    words = ["-n", n, "--heartbeat", HEARTBEAT, *options, *before, EXAMPLE]
    return Launch(*words, "--steps", steps, "--every", every, "--checkpoints", Path(folder, "checkpoints"), *more)


def steps_of(text):
    """The steps in the order in which they were printed."""
    return [int(line.split()[2]) for line in text.splitlines() if "] step " in line]


def measure(fault: Fault, folder) -> tuple[Row, Launch]:
    """Makes a fault in a run with one restart."""
    run = train(folder, options=("--max-restarts", 1), before=(FAULTY, fault.name, fault.process))
    at = run.when("FAULT")
    seen = run.when(" failed: ", after=at)
    again = run.when("] step ", after=seen)
    status = run.wait()
    steps = steps_of(run.text)
    lost = len(steps) - len(set(steps))
    return Row(fault.label, seen - at, again - at, lost, status), run


def terminated(folder) -> Row:
    """SIGTERM to the launcher: a checkpoint, and exit status 0; the next run goes on there."""
    run = train(folder, steps=1000, every=1000)
    at = run.when("step 12 ")
    run.process.send_signal(signal.SIGTERM)
    seen, status = run.when("got SIGTERM"), run.wait()
    last = steps_of(run.text)[-1]
    started = time.monotonic()
    run = train(folder, steps=last + 3)
    again = run.when("] step ") - started
    assert run.wait() == 0
    first = steps_of(run.text)[0]
    return Row("SIGTERM to the launcher", seen - at, again, last + 1 - first, status)


def launcher_killed(folder) -> Row:
    """SIGKILL to the launcher: its processes are killed, too; the next run goes on from the last checkpoint."""
    run = train(folder, steps=1000)
    run.when("step 12 ")
    processes = run.processes()
    run.process.kill()
    at = time.monotonic()
    status = run.wait()
    while any(Path("/proc", str(p)).exists() for p in processes):
        time.sleep(0.02)
    seen = time.monotonic() - at
    last = steps_of(run.text)[-1]
    run = train(folder, steps=last + 3)
    again = run.when("] step ") - at
    assert run.wait() == 0
    return Row("SIGKILL to the launcher", seen, again, last + 1 - steps_of(run.text)[0], status)


#: Faults that end the launcher, too.
ENDING: list[Callable[[str], Row]] = [terminated, launcher_killed]


def table(rows):
    """The rows as a table of Markdown."""

    lines = [
        "| fault | detected after | recovered after | steps lost | exit status |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        times = f"{row.detected:.1f} s | {row.recovered:.1f} s"
        lines.append(f"| {row.fault} | {times} | {row.lost} | {row.status} |")
    return "\n".join(lines)


def main():
    rows = []
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(fault, folder)[0])
            print(rows[-1], flush=True)
    for ending in ENDING:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(ending(folder))
            print(rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
