"""Runs ``replicax launch`` for tests, and reads its output line by line, with the time of each."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_resumable.py"

#: Variables of launchers, which this test run itself may have been started by.
OTHERS = ("SLURM_", "OMPI_", "REPLICAX_", "RANK", "WORLD_SIZE", "MASTER_", "LOCAL_RANK")


def environment(**more):
    """The environment without variables of launchers."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(OTHERS)}
    return kept | {"JAX_PLATFORMS": "cpu"} | more


class Launch:
    """A running ``replicax launch``.

    Attributes:
        lines: The lines of its output so far, each with the time at which it came.
    """

    def __init__(self, *words, env=None, **options):
        self.lines = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "replicax_cli", "launch", *map(str, words)],
            env=environment() if env is None else env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **options,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        output = self.process.stdout
        assert output is not None
        with output:
            for line in output:
                self.lines.append((time.monotonic(), line.decode(errors="replace").rstrip("\n")))

    def wait(self, timeout=120):
        """Waits for the end, and returns the exit status. Kills all at the end of the time."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)  # its guard ends the rest
            raise AssertionError(self.text) from None
        self._reader.join(10)
        return status

    @property
    def text(self):
        """All of the output."""
        return "\n".join(line for _, line in self.lines)

    def when(self, part, after=0.0, timeout=60):
        """Waits for a line with a text, not before some time, and returns its time."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            found = [at for at, line in list(self.lines) if part in line and at >= after]
            if found:
                return found[0]
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.02)
        raise AssertionError(f"no line with {part!r} in:\n{self.text}")

    def losses(self):
        """The loss of each step, as last printed."""
        words = [line.split() for _, line in list(self.lines) if "] step " in line]
        return {int(w[2]): float(w[4]) for w in words}

    def processes(self, index=None, restart=None):
        """The ids of the processes that it runs, of one index and attempt."""
        wanted = {f"REPLICAX_PROCESS={index}"} if index is not None else set()
        wanted |= {f"REPLICAX_RESTART={restart}"} if restart is not None else set()
        return [p for p, variables in children_of(self.process.pid) if wanted <= variables]


def children_of(parent):
    """The children of a process that a launcher started, with their environment."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            status = Path("/proc", name, "stat").read_text().rpartition(") ")[2].split()
            variables = set(Path("/proc", name, "environ").read_bytes().decode(errors="replace").split("\0"))
        except OSError:
            continue
        if int(status[1]) == parent and any(v.startswith("REPLICAX_LAUNCH=") for v in variables):
            yield int(name), variables


def with_variable(text):
    """The processes that have a variable in their environment, such as ``NAME=value``, and still run."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if text.encode() in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                found.append(int(name))
        except OSError:
            continue
    return found


def launch(*words, timeout=120, **options):
    """Runs a launch to its end, and returns its exit status and its output."""
    running = Launch(*words, **options)
    return running.wait(timeout), running.text
