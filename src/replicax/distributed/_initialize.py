"""Connects the processes of a program."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from replicax import _jax
from replicax._runtime.agreement import Settings
from replicax.errors import ProcessesError
from replicax_cli.worker import flush_files


@dataclass(frozen=True)
class _Found:
    """How the processes find each other.

    Attributes:
        by: Who says so: the launcher, or the caller.
        address: The ``host:port`` of the coordinator.
        count: The number of processes.
        index: The index of this process.
        devices: The ids of the devices of this process on its host; None for all.
    """

    by: str
    address: str | None
    count: int | None
    index: int | None
    devices: Sequence[int] | None


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: int | Sequence[int] | None = None,
    heartbeat: int = 10,
    timeout: float = 30.0,
) -> None:
    """Connects the processes of a program, so that a map can use the devices of all of them.

    Call it once in each process, before the first array is created. Without arguments it recognizes Slurm, Open MPI,
    Kubernetes and TPU pods, as ``jax.distributed.initialize`` does, ``torchrun``, and ``replicax launch``. Without any
    of these it does nothing, and the program runs in one process. A second call only sets ``timeout``.

    The coordinator listens on the loopback interface if its address is a loopback address, else on the interface of
    its address. A process that ends with an exception or a nonzero exit status ends at once with that status: JAX would
    wait for the other processes first.

    Args:
        coordinator_address: The ``host:port`` of process 0.
        num_processes: The number of processes.
        process_id: The index of this process.
        local_device_ids: The ids of the devices that this process uses on its host; all when None.
        heartbeat: The time in seconds after which a dead process is noticed.
        timeout: How long, in seconds, a map waits for the other processes to call it too, before its first run.

    Raises:
        ProcessesError: JAX has already started in this process, or the processes cannot connect. If a process does not
            connect within five minutes, JAX ends the others.
    """
    Settings.patience = float(timeout)
    if jax.distributed.is_initialized():
        return
    ids = (local_device_ids,) if isinstance(local_device_ids, int) else local_device_ids
    given = _Found("the arguments", coordinator_address, num_processes, process_id, ids)
    found = _completed(given)
    if found.address is None or found.count is None or found.index is None:
        if (coordinator_address, num_processes, process_id) == (None, None, None):
            print("replicax: one process (no launcher found)", flush=True)
            return
        raise ProcessesError(
            "replicax.distributed.initialize needs coordinator_address, num_processes and process_id, because it does "
            "not recognize a launcher. Pass all three, or start the processes with torchrun, mpirun or srun."
        )
    if _jax.devices_are_known():
        raise ProcessesError(
            "replicax.distributed.initialize must run before JAX starts, but this process has already created an array "
            "or listed its devices. Call it right after the imports."
        )
    if found.index == 0:
        print(
            f"replicax: {found.count} process{'es' * (found.count != 1)}, found by {found.by}, coordinator "
            f"{found.address}",
            flush=True,
        )
    if (own := _own_address(found.address)) is not None:
        _jax.use_address(own)
    try:
        jax.distributed.initialize(
            found.address,
            found.count,
            found.index,
            local_device_ids=found.devices,
            heartbeat_timeout_seconds=heartbeat,
            coordinator_bind_address=_bind_address(found.address),
        )
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(
            f"Process {found.index} cannot connect to the coordinator at {found.address} ({found.count} processes, "
            f"found by {found.by}): {error}"
        ) from error
    _leave_with_own_status()
    _check_attempt(found)


def _check_attempt(found: _Found) -> None:
    """Refuses the coordinator of an earlier attempt, which may still listen on an address that is used again."""
    name, client = os.environ.get("REPLICAX_ATTEMPT"), _jax.client()
    if name is None:
        return
    if found.index == 0:
        client.key_value_set("replicax/attempt", name)
    elif (theirs := client.blocking_key_value_get("replicax/attempt", 30_000)) != name:
        raise ProcessesError(
            f"Process {found.index} belongs to attempt {name}, but the coordinator at {found.address} belongs to "
            f"attempt {theirs}: an earlier run still uses that port. End it, or choose another port."
        )


def _completed(given: _Found) -> _Found:
    """Adds what the environment says to the arguments."""
    said = os.environ
    own = [int(number) for number in said.get("JAX_LOCAL_DEVICE_IDS", "").split(",") if number]
    if given.address is None and {"REPLICAX_COORDINATOR", "REPLICAX_PROCESSES", "REPLICAX_PROCESS"} <= said.keys():
        count, index = int(said["REPLICAX_PROCESSES"]), int(said["REPLICAX_PROCESS"])
        return _Found("replicax launch", said["REPLICAX_COORDINATOR"], count, index, given.devices or own or None)
    if given.address is None and {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"} <= said.keys():
        # torchrun's own store is on this port if its agent owns it.
        port = int(said["MASTER_PORT"]) + (said.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
        several = int(said.get("LOCAL_WORLD_SIZE", "1")) > 1
        one = (int(said["LOCAL_RANK"]),) if several and "LOCAL_RANK" in said and _has_accelerators() else None
        count, index = int(said["WORLD_SIZE"]), int(said["RANK"])
        return _Found("torchrun", f"{said['MASTER_ADDR']}:{port}", count, index, given.devices or own or one)
    launcher, *rest = _jax.detected_cluster(given.address, given.count, given.index, given.devices or own or None)
    values: Any = rest
    return _Found(launcher or given.by, *values)


def _has_accelerators() -> bool:
    """Whether JAX may use something other than CPUs here."""
    return (jax.config.jax_platforms or "").split(",")[0] != "cpu"


def _own_address(coordinator: str) -> str | None:
    """The address of this host on the way to the coordinator; None if that is unknown."""
    host, _, port = coordinator.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((socket.gethostbyname(host), int(port)))  # sends nothing
            return str(probe.getsockname()[0])
    except (OSError, ValueError):
        return None


def _bind_address(address: str) -> str | None:
    """The address on which process 0 listens; None if the coordinator's address is not an interface of this host."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.gethostbyname(host)
        with socket.socket() as probe:
            probe.bind((found, 0))
    except OSError:  # an IPv6 address, or one that is translated on the way here
        return None
    return f"{found}:{port}"


# ---------------------------------------------------------------------------------------------------------------
# Ending


class _Exit(SystemExit):
    """A ``SystemExit`` that notes when its status is read, which Python does when it ends the process."""

    @property
    def code(self) -> object:  # type: ignore[override]
        _status[0] = self.args[0] if self.args else None
        return _status[0]


#: The status that this process is about to end with.
_status: list[object] = [None]


def _leave_with_own_status() -> None:
    """Makes this process end at once if its exit status is not 0. JAX would wait for all processes that live."""
    raised = sys.excepthook

    def leave(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        raised(kind, error, trace)
        _end(130 if issubclass(kind, KeyboardInterrupt) else 1)

    def leave_if_failed() -> None:
        status = _status[0]
        if status not in (None, 0):
            if not isinstance(status, int):
                print(status, file=sys.stderr)
            _end(status if isinstance(status, int) else 1)

    def exit_(status: object = None, /) -> None:
        raise _Exit(status)

    sys.excepthook = leave
    sys.exit = exit_  # type: ignore[assignment]
    atexit.register(leave_if_failed)


def _end(status: int) -> None:
    flush_files()
    os._exit(status & 0xFF)
