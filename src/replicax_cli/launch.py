"""``replicax launch``: starts the processes of a program on this host, and restarts them."""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from replicax_cli import allocation, attempts, devices, jobs, program, worker
from replicax_cli.attempts import Start
from replicax_cli.gang import Started
from replicax_cli.output import say

DESCRIPTION = """\
Starts the processes of a program on this host. Call replicax.distributed.initialize() in the program to connect them.
If a process fails, the others are ended, and all are restarted up to --max-restarts times. The exit status is that of
the first process that failed, or 128 + n if signal n killed it. In a process that srun, mpirun or torchrun started, the
program runs as that process.
"""


class NoSuchAddressError(ValueError):
    """``--host`` is not an address of this host."""


def add_to(commands: Any) -> None:
    """Adds the subcommand to a parser."""
    parser = commands.add_parser(
        "launch",
        help="start the processes of a program, and restart them when one fails",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="replicax launch [OPTIONS] SCRIPT [ARG ...]\n       replicax launch [OPTIONS] -m MODULE [ARG ...]",
    )
    add = parser.add_argument
    add("-n", "--processes", type=_positive, metavar="N", help="the number of processes (default: 1)")
    add("--devices-per-process", type=_positive, metavar="K",
        help="devices of each process: CPU devices are simulated (default: 1), GPUs are taken from those of this host "
        "(default: an equal share)")  # fmt: skip
    add("--max-restarts", type=_natural, metavar="N", help="how often all processes are restarted (default: 0)")
    add("--min-processes", type=_positive, metavar="M",
        help="restart without the processes that died, as long as M are left (default: restart all)")  # fmt: skip
    add("--heartbeat", type=_seconds, metavar="S",
        help="seconds between two calls of replicax.distributed.heartbeat, after which a process counts as stuck "
        "(default: 60)")  # fmt: skip
    add("--grace", type=_seconds, metavar="S",
        help="seconds between a signal, which is passed on, and SIGKILL (default: 30)")  # fmt: skip
    add("--log-dir", type=Path, metavar="DIR",
        help="write the output to DIR/attempt-0/process-0.log and so on, instead of printing it")  # fmt: skip
    add("--host", metavar="ADDRESS",
        help="the address on which process 0 listens for the others (default: 127.0.0.1)")  # fmt: skip
    add("--engine", choices=["ray"], help="start the processes on a Ray cluster instead of this host")
    add("--print", choices=[*jobs.FORMATS], dest="format",
        help="print a job file or a command for another engine, and start nothing")  # fmt: skip
    add("-m", nargs=argparse.REMAINDER, dest="module", metavar="MODULE", help="a module to run, and its arguments")
    add("program", nargs=argparse.REMAINDER, metavar="SCRIPT", help="a Python script to run, and its arguments")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Runs the subcommand, and returns the exit status."""
    command = options.program if options.module is None else ["-m", *options.module]
    command = command[1:] if command[:1] == ["--"] else command
    _check_program(options, command)
    if options.format:
        return _print_job(options, command)
    if options.min_processes and options.min_processes > (options.processes or 1):
        _refuse(options, f"--min-processes {options.min_processes} is more than -n {options.processes or 1}")
    if options.engine == "ray":
        return int(importlib.import_module("replicax_cli.on_ray").run(options, command))
    found = allocation.find(os.environ)
    if found is not None and (found.processes > 1 or options.processes is None):
        _become(options, command, found)
    if options.log_dir is not None:
        try:
            options.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return fail(f"--log-dir {options.log_dir} cannot be created: {error.strerror}")
    start = _by_srun if allocation.in_batch_script(os.environ) else _on_this_host
    try:
        return start(options, command)
    except (devices.TooFewDevicesError, NoSuchAddressError) as error:
        return fail(str(error))


def _check_program(options: argparse.Namespace, command: Sequence[str]) -> None:
    """Refuses a program that cannot start, once, before any process starts."""
    if not command or (command[0] == "-m" and len(command) < 2):
        _refuse(options, "the program is missing. Example: replicax launch -n 2 train.py")
    if command[0] == "-m" or options.format:
        return
    if command[0].startswith("-"):
        _refuse(options, f"unknown option {command[0]}")
    path = Path(command[0])
    if not path.exists():
        raise SystemExit(fail(f"there is no script {command[0]!r}"))
    if not (path.is_file() or path.is_dir()):
        raise SystemExit(fail(f"{command[0]!r} is not a file, and several processes cannot read the same pipe"))
    if path.is_file() and path.suffix == ".py":
        try:
            program.code_of(str(path))
        except (SyntaxError, ValueError) as error:  # ValueError: it contains null bytes
            traceback.print_exception(error.with_traceback(None))
            raise SystemExit(fail(f"{command[0]} is not valid Python; no process was started", 1)) from None


def _become(options: argparse.Namespace, command: Sequence[str], found: allocation.Allocation) -> NoReturn:
    """Replaces this process by the program, as one process of another engine."""
    if options.processes not in (None, found.processes):
        raise SystemExit(
            fail(f"{found.engine} has started {found.processes} processes, but -n is {options.processes}. Remove -n.")
        )
    for name in ("max_restarts", "min_processes", "grace", "log_dir", "host"):
        if getattr(options, name) is not None:
            option = "--" + name.replace("_", "-")
            raise SystemExit(
                fail(f"{option} has no effect here, because {found.engine} starts the processes. Set it there.")
            )
    own = devices.share_on_node(options.devices_per_process, os.environ)
    words = [*_python(), worker.__file__, *command]
    os.execve(words[0], words, {**os.environ, **own, **heartbeat_of(options)})


def _print_job(options: argparse.Namespace, command: Sequence[str]) -> int:
    for name in ("min_processes", "log_dir", "host", "engine"):
        if getattr(options, name) is not None:
            return fail(f"--{name.replace('_', '-')} cannot be combined with --print {options.format}")
    job = jobs.Job(
        options.processes or 1,
        tuple(command),
        options.devices_per_process,
        options.max_restarts or 0,
        30.0 if options.grace is None else options.grace,
        options.heartbeat,
    )
    try:
        print(jobs.FORMATS[options.format](job))
    except ValueError as error:
        return fail(str(error))
    return 0


def _on_this_host(options: argparse.Namespace, command: Sequence[str]) -> int:
    count = options.processes or 1
    shares = devices.shares(count, options.devices_per_process, os.environ)

    @contextmanager
    def start(attempt: int, slots: Sequence[int]) -> Iterator[Start]:
        with free_port(options.host or "127.0.0.1") as address:
            shared = {
                "REPLICAX_COORDINATOR": address,
                "REPLICAX_PROCESSES": str(len(slots)),
                "REPLICAX_ATTEMPT": uuid.uuid4().hex,
                "REPLICAX_RESTART": str(attempt),
                **heartbeat_of(options),
            }
            own = [{**shares[slot], "REPLICAX_PROCESS": str(k)} for k, slot in enumerate(slots)]
            environments = [{**os.environ, **shared, **each} for each in own]
            yield Start([*_python(), worker.__file__, *command], environments)

    return attempts.run(start, range(count), limits_of(options))


def _by_srun(options: argparse.Namespace, command: Sequence[str]) -> int:
    """In the script of a Slurm job, ``srun`` starts the processes, and this process restarts it."""
    for name in ("min_processes", "host"):
        if getattr(options, name) is not None:
            return fail(f"--{name.replace('_', '-')} has no effect in a Slurm job, where srun starts the processes")
    if shutil.which("srun") is None:
        return fail("this is a Slurm job, but srun is not on the PATH")
    count = [] if options.processes is None else [f"--ntasks={options.processes}"]
    own = devices.simulated(options.devices_per_process)

    @contextmanager
    def start(attempt: int, slots: Sequence[int]) -> Iterator[Start]:
        del slots
        shared = {
            "JAX_COORDINATOR_PORT": str(random.randrange(50_000, 60_000)),  # on another host: nobody can reserve it
            "REPLICAX_ATTEMPT": uuid.uuid4().hex,
            "REPLICAX_RESTART": str(attempt),
            **own,
            **heartbeat_of(options),
        }
        srun = ["srun", "--label", "--kill-on-bad-exit=1", *count, *_python(), worker.__file__, *command]
        yield Start(srun, [{**os.environ, **shared}], "srun", _to_the_job)

    return attempts.run(start, range(1), limits_of(options))


def _python() -> list[str]:
    """This interpreter, with its options, such as ``-O`` and ``-W error``."""
    options: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    return [sys.executable, *options]


def _to_the_job(srun: Started, number: signal.Signals) -> None:
    """Sends a signal to the processes of the Slurm job. When ``srun`` itself gets SIGTERM, it kills them at once."""
    del srun
    name = number.name.removeprefix("SIG")
    subprocess.run(["scancel", f"--signal={name}", os.environ["SLURM_JOB_ID"]], check=False)


def limits_of(options: argparse.Namespace) -> attempts.Limits:
    """The limits among the options."""
    return attempts.Limits(
        options.max_restarts or 0,
        options.min_processes,
        30.0 if options.grace is None else options.grace,
        options.log_dir,
        60.0 if options.heartbeat is None else options.heartbeat,
    )


def heartbeat_of(options: argparse.Namespace) -> dict[str, str]:
    """The environment variable for ``replicax.distributed.heartbeat``."""
    return {} if options.heartbeat is None else {"REPLICAX_HEARTBEAT": str(options.heartbeat)}


@contextmanager
def free_port(host: str) -> Iterator[str]:
    """Reserves a port until the end of the context: only a socket with SO_REUSEPORT, as gRPC's, can listen on it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as reserved:
        if hasattr(socket, "SO_REUSEPORT"):
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            reserved.bind((host, 0))
        except OSError as error:
            raise NoSuchAddressError(f"--host {host} is not an address of this host: {error.strerror}") from None
        port = reserved.getsockname()[1]
        yield f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _positive(text: str) -> int:
    return _number(text, 1)


def _natural(text: str) -> int:
    return _number(text, 0)


def _number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return number


def _refuse(options: argparse.Namespace, text: str) -> NoReturn:
    parser: argparse.ArgumentParser = options.parser
    parser.error(text)


def fail(text: str, status: int = 2) -> int:
    """Prints why nothing was started, and returns the exit status."""
    say(text)
    return status
