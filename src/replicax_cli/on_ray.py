"""``replicax launch --engine ray``: runs a gang on a Ray cluster.

Ray finds room for all processes at once (a placement group), starts an actor for each, and replaces an actor when it or
its node dies. The launcher decides how the gang starts, fails and ends, by the same code as on one host. An actor only
runs the program in a process of its own, passes signals on, and sends back the output and the exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import queue
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from threading import Event, Thread
from typing import IO, Any, TextIO, cast

from replicax_cli import attempts, devices, gang, launch, leftovers, worker
from replicax_cli.output import Pumped, say
from replicax_cli.signals import ENDING, Signals

ray: Any = None
with contextlib.suppress(ModuleNotFoundError):
    ray = importlib.import_module("ray")

#: Variables that a node takes from the launcher. It keeps its own PATH, HOME, CUDA_VISIBLE_DEVICES and so on.
_OURS = ("JAX_", "XLA_", "NCCL_", "REPLICAX_")
#: The most bytes in a message of an actor, and how an actor sends messages: at most 16 are on their way.
_BLOCK, _STREAM = 1 << 16, {"num_returns": "streaming", "_generator_backpressure_num_objects": 16}
#: Seconds in which news of a failure may be overtaken by news of a later one, and in which an actor must answer.
_SETTLE, _ANSWER = 0.3, 5.0
#: Seconds after which the launcher says that it waits, and after which it goes on with --min-processes.
_SAY_WAITS, _GO_ON = 5.0, 20.0
#: How actors are started. A dead actor is replaced, but its call of ``run`` is not repeated: the whole gang runs again.
_SEAT = {"max_restarts": -1, "max_task_retries": 0, "max_concurrency": 8}
#: How Ray is started. Nothing goes through the object store; this is about the least that Ray allows.
_QUIET = {"log_to_driver": False, "logging_level": "ERROR"}
_LOCAL = {"include_dashboard": False, "object_store_memory": 80_000_000}
#: Starts the guard of ``leftovers`` as no child of an actor: when an actor exits, Ray kills its children first.
_START_GUARD = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"


@dataclass(frozen=True)
class _Ended:
    """How a program ended: its status, when by its own record (0 if it was killed), and after which step."""

    status: int
    left_at: float = 0.0
    step: int = 0


#: A block of stdout (0) or stderr (1), the end of the program, or None at the end of each of these three.
_Event = tuple[int, bytes] | _Ended | None


class _Seat:
    """An actor, on a node, which runs the program of one process, in one attempt after the other."""

    def __init__(self) -> None:
        self._port, self._started, self._mark = contextlib.ExitStack(), Event(), "of no process"
        self._process: gang.Process

    def place(self) -> tuple[str, str]:
        """The id and the address of the node."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def reserve(self, host: str) -> str:
        """Reserves a port for the coordinator until the next call, and returns the address."""
        self._port.close()
        return self._port.enter_context(launch.free_port(host))

    def run(self, command: Sequence[str], environment: Mapping[str, str], folder: str, mark: str) -> Iterator[_Event]:
        """Runs the program, in the working directory of the launcher if this node has it, and yields what happens."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray blocks it, and children inherit that
        self.end(self._mark)  # if Ray lost the connection to this actor, the program of the last attempt may still run
        self._mark, records = mark, tempfile.mkdtemp(prefix="replicax-")
        with _guard(mark, records):
            words, cwd = [sys.executable, worker.__file__, *command], folder if os.path.isdir(folder) else None
            own = _on_this_node(environment, mark) | {"REPLICAX_RUN": f"{records}/0"}
            popen = Popen(words, 0, None, DEVNULL, PIPE, PIPE, cwd=cwd, env=own, start_new_session=True)
            self._process = gang.Process(0, 0, popen, Pumped(""), Path(records, "0"))
            self._started.set()
            yield from _events(self._process, popen)
            self._started.clear()

    def send_signal(self, number: int) -> None:
        if self._started.wait(_ANSWER):
            self._process.popen.send_signal(number)

    def end(self, mark: str) -> None:
        """Kills what the program with a mark has left behind."""
        leftovers.kill_marked(mark)


def _guard(mark: str, folder: str) -> IO[bytes]:
    """Starts a process that kills those with a mark and removes the folder, once the result or this process ends."""
    read, write = os.pipe()
    guard = [sys.executable, "-I", "-S", leftovers.__file__, mark, folder]
    Popen([*guard[:3], "-c", _START_GUARD, *guard], stdin=read).wait()
    os.close(read)
    return os.fdopen(write, "wb")


def _on_this_node(environment: Mapping[str, str], mark: str) -> dict[str, str]:
    """The environment of this node, with the variables of the launcher that it lacks, or that are about JAX."""
    found = {**environment, **os.environ, **{k: v for k, v in environment.items() if k.startswith(_OURS)}}
    return found | {leftovers.MARK: ":".join(filter(None, [environment.get(leftovers.MARK), mark]))}


def _events(process: gang.Process, popen: Popen[bytes]) -> Iterator[_Event]:
    """Yields what a program prints, and how it ended, until nobody can print to its streams any more."""
    events: queue.Queue[_Event] = queue.Queue(maxsize=2)
    for source in (_blocks(0, popen.stdout), _blocks(1, popen.stderr), _end(process)):
        Thread(target=_put, args=(source, events), daemon=True).start()
    left = 3
    while left:
        with contextlib.suppress(queue.Empty):
            if (event := events.get(timeout=0.5)) is not None:
                yield event
            left -= event is None
        if process.popen.returncode is None and time.monotonic() > process.beat()[0] + gang.LATE:
            process.no_step = True
            process.popen.kill()


def _put(source: Iterator[_Event], events: queue.Queue[_Event]) -> None:
    for event in source:
        events.put(event)
    events.put(None)


def _blocks(number: int, source: IO[bytes] | None) -> Iterator[_Event]:
    while source and (block := os.read(source.fileno(), _BLOCK)):
        yield number, block


def _end(process: gang.Process) -> Iterator[_Event]:
    status = process.popen.wait()
    left_at = process.left_at() and process.left_at() + time.time() - time.monotonic()  # nodes share the time of day
    yield _Ended(gang.NO_STEP if process.no_step else status, left_at, process.beat()[1])


class _Remote:
    """A process on a node, with the interface of ``subprocess.Popen``. Its ``files`` are records on this host."""

    def __init__(self, seat: Any, mark: str, files: Path, settled: Event) -> None:
        self.pid, self.returncode = 0, cast("int | None", None)  # no id on this host
        self._seat, self._mark, self._files, self._settled = seat, mark, files, settled
        self._status, self._has_ended = 0, Event()

    def poll(self) -> int | None:
        """The exit status. A failure is shown once those that may have come before it have been heard of."""
        if self._has_ended.is_set() and (self._status == 0 or self._settled.is_set()):
            self.returncode = self._status
        return self.returncode

    def wait(self) -> int:
        """The exit status of a process that has ended or was killed. What it has left behind is killed, too."""
        if not self._has_ended.wait(_ANSWER):
            ray.kill(self._seat, no_restart=False)
            self._lose("does not answer")
        self._seat.end.remote(self._mark)
        self.returncode = self._status
        return self.returncode

    def send_signal(self, number: int) -> None:
        self._seat.send_signal.remote(int(number))

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def read(self, events: Any, sinks: Sequence[IO[bytes]]) -> None:
        """Reads what the actor yields, until the end."""
        try:
            for event in map(ray.get, events):
                if isinstance(event, _Ended):
                    self._note(event)
                else:
                    with contextlib.suppress(OSError):  # nobody reads it any more
                        sinks[event[0]].write(event[1])
        except ray.exceptions.RayTaskError as error:
            self._lose(f"cannot start the program: {error.cause!r}")
        except ray.exceptions.RayError:
            self._lose("has died, or its node")
        for sink in sinks:
            sink.close()

    def _lose(self, text: str) -> None:
        if not self._has_ended.is_set():
            say(f"the Ray actor of process {self._files.name} {text}")
            self._note(_Ended(-signal.SIGKILL))

    def _note(self, ended: _Ended) -> None:
        self._files.with_suffix(".left").write_text(str(ended.left_at))
        self._files.with_suffix(".beat").write_bytes(gang.BEAT.pack(float("inf"), ended.step))
        self._status = ended.status
        self._has_ended.set()
        if ended.status:
            self._settled.wait(_SETTLE)
            self._settled.set()
        os.kill(os.getpid(), signal.SIGCHLD)  # wakes the launcher


@dataclass(frozen=True)
class _Gang(gang.Gang):
    """A gang of actors. ``settled`` is set once no failure before the first one known is to be expected any more."""

    seats: Sequence[Any]
    settled: Event

    def start(self, index: int) -> gang.Process:
        """Starts one process."""
        run, mark = self.seats[index].run.options(**_STREAM), f"{self.mark}-{index}"
        events = run.remote(self.command, self.environments[index], os.getcwd(), mark)
        files, output, sinks = self.folder / str(index), Pumped(f"[{index}] "), []
        for target in (sys.__stdout__, sys.__stderr__):
            source, sink = os.pipe()
            output.start(os.fdopen(source, "rb"), cast(TextIO, target).buffer)
            sinks.append(os.fdopen(sink, "wb", buffering=0))
        remote = _Remote(self.seats[index], mark, files, self.settled)
        Thread(target=remote.read, args=(events, sinks), daemon=True).start()
        return gang.Process(index, self.slots[index], remote, output, files)


@dataclass
class _Seats:
    """The actors of a gang, in a placement group of its size. ``bundle`` is the resources of each."""

    bundle: Mapping[str, float]
    signals: Signals
    actors: Sequence[Any] = ()
    group: Any = None

    def fill(self, slots: list[int], least: int | None) -> tuple[list[int], list[Any]]:
        """The slots of the processes that have a place, at least ``least``, and the id and address of their nodes."""
        while True:
            if len(self.actors) != len(slots):
                self._create(len(slots))
            places = [actor.place.options(max_task_retries=-1).remote() for actor in self.actors]
            missing = self._wait(places, float("inf") if least in (None, len(slots)) else _GO_ON)
            if not missing:
                return slots, ray.get(places)
            lost = missing if len(missing) < len(slots) else [len(slots) - 1]
            slots = list(attempts.left(slots, frozenset(slots[index] for index in lost), least))
            say(f"there is no room for {len(places)} processes: goes on with {len(slots)}")

    def _create(self, count: int) -> None:
        if self.actors:
            ray.util.remove_placement_group(self.group)
        self.group = ray.util.placement_group([dict(self.bundle)] * count, strategy="PACK")
        place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        seat, options = ray.remote(_Seat), {"num_cpus": 1, "num_gpus": self.bundle.get("GPU", 0), **_SEAT}
        places = [place(self.group, index) for index in range(count)]
        self.actors = [seat.options(**options, scheduling_strategy=where).remote() for where in places]

    def _wait(self, places: Sequence[Any], patience: float) -> list[int]:
        """The indexes of the actors that have no place after ``patience`` seconds."""
        end, say_at = time.monotonic() + patience, time.monotonic() + _SAY_WAITS
        while (pending := ray.wait(places, num_returns=len(places), timeout=0)[1]) and time.monotonic() < end:
            for number in set(self.signals.wait(0.05)).intersection(ENDING):
                raise KeyboardInterrupt(number)
            if time.monotonic() > say_at:
                say_at, each = end, ", ".join(f"{count:g} {name}" for name, count in self.bundle.items())
                say(f"waits until the Ray cluster has room for {len(places)} processes with {each} each")
        return [index for index, place in enumerate(places) if place in pending]


def run(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Runs a program on a Ray cluster, and returns the exit status."""
    for name in ("host", "log_dir"):
        if getattr(options, name) is not None:
            return launch.fail(f"--{name.replace('_', '-')} cannot be combined with --engine ray")
    if ray is None:
        return launch.fail("--engine ray needs Ray. Install it: pip install 'replicax[ray]'")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what Ray prints
            _connect(options.processes or 1)
            return _run(options, command, _bundle(options))
    except ConnectionError as error:
        return launch.fail(str(error))
    except ray.exceptions.RayError as error:
        return launch.fail(f"Ray: {error}", 1)
    except KeyboardInterrupt as error:
        return 128 + int(error.args[0] if error.args else signal.SIGINT)
    finally:
        ray.shutdown()


def _connect(processes: int) -> None:
    """Connects to the cluster of ``RAY_ADDRESS`` or of this host, or starts one on this host."""
    address = os.environ.get("RAY_ADDRESS", "auto")
    if address.startswith("ray://"):
        raise ConnectionError("RAY_ADDRESS is a Ray client's. Run the launcher on the cluster, by ray job submit.")
    with contextlib.suppress(*[ConnectionError] * (address == "auto")):
        if address != "local":
            ray.init(address, **_QUIET)
    if not ray.is_initialized():  # as without Ray, there may be more processes than CPUs
        ray.init("local", num_cpus=max(os.cpu_count() or 1, processes), **_LOCAL, **_QUIET)


def _bundle(options: argparse.Namespace) -> dict[str, float]:
    """The resources of each process: GPUs, if the cluster has some and JAX shall use them."""
    gpus = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    if not any(gpus) or os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return {"CPU": 1}
    shares = [k for k in range(1, max(gpus) + 1) if sum(gpu // k for gpu in gpus) >= (options.processes or 1)]
    return {"CPU": 1, "GPU": options.devices_per_process or max(shares, default=1)}


def _run(options: argparse.Namespace, command: Sequence[str], bundle: Mapping[str, float]) -> int:
    limits, folder = launch.limits_of(options), tempfile.mkdtemp(prefix="replicax-")
    with _guard("of no process", folder), Signals() as signals:
        seats = _Seats(bundle, signals)

        def attempt(number: int, slots: Sequence[int]) -> gang.Outcome:
            placed, places = seats.fill(list(slots), limits.min_processes if number else None)
            own, records = _environments(options, number, seats, places), Path(folder, str(number))
            records.mkdir()
            what = _Gang(command, own, placed, uuid.uuid4().hex, records, limits.grace, None, seats.actors, Event())
            outcome = what.run(signals)
            return replace(outcome, lost=outcome.lost.union(set(slots).difference(placed)))

        return attempts.repeat(attempt, range(options.processes or 1), limits)


def _environments(options: argparse.Namespace, attempt: int, seats: _Seats, places: list[Any]) -> list[dict[str, str]]:
    """The environment of the launcher, with the variables that it sets for each process."""
    host = "127.0.0.1" if len({node for node, _ in places}) == 1 else places[0][1]
    shared = {
        "REPLICAX_COORDINATOR": ray.get(seats.actors[0].reserve.remote(host), timeout=30),
        "REPLICAX_PROCESSES": str(len(places)),
        "REPLICAX_ATTEMPT": uuid.uuid4().hex,
        "REPLICAX_RESTART": str(attempt),
        **launch.heartbeat_of(options),
        **({} if "GPU" in seats.bundle else devices.simulated(options.devices_per_process)),
    }
    return [{**os.environ, **shared, "REPLICAX_PROCESS": str(index)} for index in range(len(places))]
