"""One attempt of a gang: processes that run one program together, and end together."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from replicax_cli import leftovers
from replicax_cli.output import Logged, Pumped, say
from replicax_cli.signals import ENDING, Signals

#: Seconds in which the processes may end by themselves once one has failed; then they get SIGTERM.
_AFTER_A_FAILURE = 1.0

#: Seconds after that until SIGKILL. Short, because no process can go on without the one that failed.
_AFTER_TERM = 1.0

#: Seconds for which a process may miss its heartbeat before the launcher kills it. Its own watchdog comes first.
LATE = 1.0

#: Seconds between two looks after which the launcher itself has not run.
_FROZEN = 2.0

#: The exit status of a process that makes no step, as that of ``timeout`` in coreutils.
NO_STEP = 124

#: What ``replicax.distributed.heartbeat`` writes: the time until which the next step must come, and the last step.
BEAT = struct.Struct("dq")


#: What ``srun`` says about a task that failed. Its own status is the highest, and tasks that it has ended count, too.
_TASK = re.compile(rb"srun: error: [^:\n]*: tasks? ([\d,-]+): (?:Exited with exit code (\d+)|([A-Z][a-z ]+))")


def _of_task(task: re.Match[bytes]) -> tuple[str, int]:
    """What happened to the task of ``srun`` that failed first, and its status."""
    which, code, ended = task.groups()
    if code is not None:
        return f"task {which.decode()} ended with exit status {int(code)}", int(code)
    number = next((n for n in signal.Signals if ended.decode().startswith(signal.strsignal(n) or "?")), signal.SIGKILL)
    return f"task {which.decode()} was killed by {number.name}", 128 + number


class Started(Protocol):
    """A process that was started: the methods of ``subprocess.Popen`` that a gang needs."""

    @property
    def pid(self) -> int:
        """The process id."""

    @property
    def returncode(self) -> int | None:
        """The exit status, once :meth:`poll` or :meth:`wait` has seen the end."""

    def poll(self) -> int | None:
        """The exit status; None if the process runs."""

    def wait(self) -> int:
        """Waits for the end, and returns the exit status."""

    def send_signal(self, sig: int) -> None:
        """Sends a signal."""

    def kill(self) -> None:
        """Sends SIGKILL."""


class Output(Protocol):
    """What becomes of the output of a process."""

    def finish(self, timeout: float) -> bool:
        """Waits until all is written, and returns whether it is."""

    def last_lines(self) -> bytes:
        """The last lines that the process has printed."""

    def first_match(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """The first match of a pattern in what ``srun`` has printed about its tasks."""


@dataclass(frozen=True)
class Failure:
    """How a process failed.

    Attributes:
        who: The name of the process.
        status: The exit status; 128 + n for signal n.
        text: What happened, for a message.
        last_lines: What the process printed last.
    """

    who: str
    status: int
    text: str
    last_lines: bytes


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        first: The failure that came first; None if all processes ended with status 0.
        lost: The slots of the processes that died by themselves, and not because another did.
        ended_by: The signal that the launcher got; None if it got none.
    """

    first: Failure | None
    lost: frozenset[int]
    ended_by: signal.Signals | None


@dataclass
class Process:
    """A process of a gang.

    Attributes:
        index: Its index.
        slot: Its number among the processes of the first attempt.
        popen: The process.
        output: What becomes of its output.
        files: The files in which it leaves records, without their suffixes.
        status: Its exit status, -n for signal n; None while it runs.
        no_step: Whether it ended because it made no step.
        stopped: Whether it was stopped, and the others waited for it.
        killed: Whether the launcher killed it.
        stopped_since: Since when the launcher has seen it stopped.
    """

    index: int
    slot: int
    popen: Started
    output: Output
    files: Path
    status: int | None = None
    no_step: bool = False
    stopped: bool = False
    killed: bool = False
    stopped_since: float | None = None

    def is_stopped(self) -> bool:
        """Whether the process is stopped, as by SIGSTOP. False where there is no ``/proc``."""
        try:
            return Path(f"/proc/{self.popen.pid}/stat").read_bytes().rpartition(b") ")[2][:1] == b"T"
        except OSError:
            return False

    def beat(self) -> tuple[float, int]:
        """The time until which the next step must come, and the last step."""
        try:
            return BEAT.unpack(self.files.with_suffix(".beat").read_bytes())
        except (OSError, struct.error):  # it does not call heartbeat
            return float("inf"), 0

    def left_at(self) -> float:
        """When the program ended, by its own record; 0 if it was killed."""
        try:
            return float(self.files.with_suffix(".left").read_text())
        except (OSError, ValueError):
            return 0.0

    def failure(self, who: str) -> Failure:
        """How the process, of some name, failed."""
        status = self.status or 0
        task = self.output.first_match(_TASK)
        if task is not None:
            text, status = _of_task(task)
        elif self.stopped:
            text, status = "stopped by SIGSTOP, so no process could go on", NO_STEP
        elif self.no_step:
            text = f"no step after step {self.beat()[1]} in the time that heartbeat sets"
            status = NO_STEP
        elif status < 0:
            text, status = f"killed by {_name(-status)}", 128 - status
        else:
            text = f"exit status {status}"
        return Failure(who, status, text, self.output.last_lines())


def send_signal(popen: Started, number: signal.Signals) -> None:
    """Sends a signal to a process."""
    popen.send_signal(number)


@dataclass(frozen=True)
class Gang:
    """What to start.

    Attributes:
        command: The command of each process.
        environments: The environment variables of each process.
        slots: The number of each process among those of the first attempt.
        mark: The mark of this attempt in the environment, see :mod:`replicax_cli.leftovers`.
        folder: Where processes leave records for the launcher.
        grace: Seconds between a signal that is passed on and SIGKILL.
        logs: The folder for their output; None to print it.
        patience: Seconds for which a process may be stopped, as by SIGSTOP.
        starter: The name of the one process that starts the others, such as ``srun``, and marks their lines itself.
        send: Sends a signal to a process; to its children, too, if it starts others.
    """

    command: Sequence[str]
    environments: Sequence[Mapping[str, str]]
    slots: Sequence[int]
    mark: str
    folder: Path
    grace: float
    logs: Path | None
    patience: float = field(default=60.0, kw_only=True)
    starter: str | None = field(default=None, kw_only=True)
    send: Callable[[Started, signal.Signals], None] = field(default=send_signal, kw_only=True)

    def run(self, signals: Signals) -> Outcome:
        """Starts the processes, waits until all have ended, and returns how."""
        running = _Running(self, signals)
        try:
            running.wait()
        finally:
            running.kill()
        return running.outcome()

    def start(self, index: int) -> Process:
        """Starts one process."""
        files = self.folder / str(index)
        environment = {**self.environments[index], "REPLICAX_RUN": str(files), "REPLICAX_PARENT": str(os.getpid())}
        marks = [*filter(None, [environment.get(leftovers.MARK)]), self.mark]
        environment[leftovers.MARK] = ":".join(marks)
        log = None if self.logs is None else Logged(self.logs / f"process-{index}.log")
        popen = subprocess.Popen(
            self.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log.file if log else subprocess.PIPE,
            stderr=subprocess.STDOUT if log else subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        output = log or Pumped("" if self.starter else f"[{index}] ")
        if isinstance(output, Pumped) and popen.stdout and popen.stderr:
            output.start(popen.stdout, sys.stdout.buffer)
            output.start(popen.stderr, sys.stderr.buffer)
        return Process(index, self.slots[index], popen, output, files)

    def who(self, index: int) -> str:
        """The name of a process in messages."""
        return self.starter or f"process {index}"


@dataclass
class _Running:
    """An attempt that runs.

    Attributes:
        gang: What was started.
        signals: The signals that the launcher gets.
        processes: The processes.
        failed: Those that failed, the first first.
        ended_by: The signal that the launcher got.
        term_at: When the processes get SIGTERM, after one has failed.
        kill_at: When the processes are killed.
    """

    gang: Gang
    signals: Signals
    processes: list[Process] = field(default_factory=list)
    failed: list[Process] = field(default_factory=list)
    ended_by: signal.Signals | None = None
    term_at: float = float("inf")
    kill_at: float = float("inf")

    def wait(self) -> None:
        """Waits until all processes have ended."""
        for index in range(len(self.gang.slots)):
            self.processes.append(self.gang.start(index))
        woke = time.monotonic()
        while self._alive():
            for number in self.signals.wait(self._pause()):
                self._pass_on(number)
            self._see_who_ended()
            now = time.monotonic()
            if now < woke + _FROZEN:  # else all processes may have been frozen, and may not have gone on yet
                _kill_late(self._alive())
                _kill_stopped_for(self._alive(), self.gang.patience)
            woke = now
            if now >= self.term_at:
                self.term_at = float("inf")
                self._send(signal.SIGTERM)
            if now >= self.kill_at:
                self._kill_alive()

    def kill(self) -> None:
        """Kills what still runs, with the children of all processes, and waits for the rest of the output."""
        self._kill_alive()
        for process in self.processes:
            process.popen.wait()
        leftovers.kill_marked(self.gang.mark)
        for process in self.processes:
            while not process.output.finish(0.2):  # as long as the reader of the output takes
                if any(number in ENDING for number in self.signals.wait(0)):
                    return

    def outcome(self) -> Outcome:
        """How the attempt ended."""
        own = [
            p
            for p in self.failed
            if p.stopped or (not p.no_step and (p is self.failed[0] or (p.status == -signal.SIGKILL and not p.killed)))
        ]
        first = self._failure(self.failed[0]) if self.failed else None
        return Outcome(first, frozenset(p.slot for p in own), self.ended_by)

    def _failure(self, process: Process) -> Failure:
        return process.failure(self.gang.who(process.index))

    def _alive(self) -> list[Process]:
        return [process for process in self.processes if process.status is None]

    def _pause(self) -> float:
        """Seconds until the next thing to do. Heartbeats are looked at twice a second."""
        return max(0.0, min(0.5, min(self.term_at, self.kill_at) - time.monotonic()))

    def _see_who_ended(self) -> None:
        _reap_strangers(self.processes)
        ended = [process for process in self._alive() if process.popen.poll() is not None]
        for process in ended:
            process.status = process.popen.returncode
            process.no_step = process.no_step or process.status == NO_STEP
        failed = [process for process in ended if process.status]
        # Of several that are seen at once: a process that was killed, then by the time at which the program ended.
        failed.sort(key=lambda p: (p.status == -signal.SIGABRT, p.left_at()))
        if failed and not self.failed:
            failed = [*self._kill_stopped(), *failed]
        self.failed += failed
        if failed and self.ended_by is None and self.kill_at == float("inf"):
            if self.gang.starter:  # it has said which process failed, and that is still being read
                failed[0].output.finish(_AFTER_A_FAILURE)
            say(f"{self.gang.who(failed[0].index)} failed: {self._failure(failed[0]).text}")
            self.term_at = time.monotonic() + _AFTER_A_FAILURE
            self.kill_at = self.term_at + min(_AFTER_TERM, self.gang.grace)

    def _kill_stopped(self) -> list[Process]:
        """Kills the processes that are stopped: others fail because they wait for them."""
        stopped = [process for process in self._alive() if process.is_stopped()]
        for process in stopped:
            process.stopped = True
            process.popen.kill()
            process.status = process.popen.wait()
        return stopped

    def _pass_on(self, number: signal.Signals) -> None:
        if number not in ENDING:
            self._send(number)
        elif self.ended_by is None:
            self.ended_by = number
            say(f"got {number.name}, passes it on, and kills what still runs after {self.gang.grace:g} s")
            self._send(number)
            self.kill_at = min(self.kill_at, time.monotonic() + self.gang.grace)
        elif number in (signal.SIGINT, signal.SIGQUIT):  # the second Ctrl-C
            say(f"got {number.name} again, kills all processes")
            self.kill_at = 0

    def _send(self, number: signal.Signals) -> None:
        for process in self._alive():
            self.gang.send(process.popen, number)

    def _kill_alive(self) -> None:
        for process in self._alive():
            process.killed = True
            process.popen.kill()
            process.status = process.popen.wait()
            if self.ended_by is not None:
                self.failed.append(process)
            if self.ended_by is not None and self.kill_at > 0:
                who = self.gang.who(process.index)
                say(f"{who} has not ended {self.gang.grace:g} s after {self.ended_by.name}: killed")


def _kill_late(processes: Sequence[Process]) -> None:
    """Kills the processes that miss their heartbeat, and do not end themselves."""
    for process in processes:
        if time.monotonic() > process.beat()[0] + LATE:
            process.no_step = True
            process.popen.kill()


def _kill_stopped_for(processes: Sequence[Process], patience: float) -> None:
    """Kills the processes that have been stopped for ``patience`` seconds."""
    now = time.monotonic()
    for process in processes:
        if not process.is_stopped():
            process.stopped_since = None
        elif process.stopped_since is None:
            process.stopped_since = now
        elif now > process.stopped_since + patience:
            process.stopped = True
            process.popen.kill()


def _reap_strangers(processes: Sequence[Process]) -> None:
    """Waits for children that are not processes of the gang: orphans are, where the launcher has process id 1."""
    own = {process.popen.pid for process in processes}
    while os.getpid() == 1:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in own:
            return
        os.waitpid(ended.si_pid, 0)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
