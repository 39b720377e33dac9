"""Several processes on this machine, connected as on a cluster, to test maps over processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from replicax._devices import simulate_devices
from replicax._messages import as_int, report
from replicax.distributed import initialize
from replicax.errors import ProcessesError

R = TypeVar("R")


def processes(count: int, *, devices: int | Sequence[int] = 1, timeout: float = 60.0) -> Processes:
    """Starts processes on this machine, each with simulated CPU devices of its own, connected as on a cluster.

    Args:
        count: The number of processes.
        devices: The number of devices of each process: one int for all, or one for each.
        timeout: How long, in seconds, a run may take. Then all processes are ended.

    Returns:
        The processes, as a context manager that ends them.

    Raises:
        OptionTypeError: ``count`` or an entry of ``devices`` is not an int.
        ProcessesError: A process does not start.

    Example:
        The function must be importable, because the processes import it::

            with replicax.testing.processes(2, devices=4) as two:
                results = two.run(train_one_epoch, seed)
    """
    each = [devices] * as_int("count", count) if isinstance(devices, int) else list(devices)
    if len(each) != count or count < 1 or min(each) < 1:
        raise ProcessesError(
            f"processes({count}, devices={devices!r}) needs one number of devices, at least 1, for each process."
        )
    return Processes([as_int("devices", n) for n in each], timeout)


class Processes(AbstractContextManager["Processes"]):
    """Processes that run functions together, see :func:`processes`."""

    def __init__(self, devices: Sequence[int], timeout: float) -> None:
        self._timeout, spawn = timeout, multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._ends: list[Any] = []
        self._processes: list[Any] = []
        for index, count in enumerate(devices):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(there, address, len(devices), index, count), daemon=True)
            process.start()
            there.close()
            self._ends.append(here)
            self._processes.append(process)
        self._results("start", timeout)

    def run(self, function: Callable[..., R], *args: Any, timeout: float | None = None) -> list[R]:
        """Calls a function in every process, and returns its result of each.

        Args:
            function: An importable function. In it, ``jax.process_index()`` is the index of the process.
            args: Its arguments, the same in every process. They and the results must be picklable.
            timeout: How long, in seconds, the run may take; that of the processes when None.

        Raises:
            ProcessesError: The function has raised in a process, or a process has died or is not done in time. All
                processes are ended then.
        """
        if not self._processes:
            raise ProcessesError("These processes have been ended.")
        try:
            task = pickle.dumps((function, args))
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise ProcessesError(
                f"The processes cannot import {function!r}, or cannot get its arguments: {error}. Define the function "
                f"at the top level of a module."
            ) from error
        for end in self._ends:
            end.send_bytes(task)
        return self._results(getattr(function, "__name__", "function"), timeout or self._timeout)

    def close(self) -> None:
        """Ends the processes."""
        for end in self._ends:
            try:
                end.send_bytes(b"")
            except OSError:
                continue
        for process in self._processes:
            process.join(5)
        self._kill()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for end in self._ends:
            end.close()
        self._processes, self._ends = [], []

    def _results(self, what: str, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        found: dict[int, Any] = {}
        faults: dict[int, str] = {}
        while len(found) + len(faults) < len(self._ends):
            left = [end for k, end in enumerate(self._ends) if k not in found and k not in faults]
            ready: list[Any] = list(wait(left, max(0.0, deadline - time.monotonic())))
            if not ready:
                faults |= {self._ends.index(end): f"was not done after {timeout:g} seconds" for end in left}
                break
            for end in ready:
                k = self._ends.index(end)
                try:
                    fine, result = end.recv()
                except EOFError:
                    self._processes[k].join(5)
                    fine, result = False, f"ended with exit status {self._processes[k].exitcode}"
                (found if fine else faults)[k] = result
            if faults:  # the others may wait for replicas of this one
                deadline = min(deadline, time.monotonic() + _AFTER_A_FAULT)
        if faults:
            self._kill()
            listed = [f"process {k} {fault}" for k, fault in sorted(faults.items())]
            raise ProcessesError(report(f"{what} did not run in all processes:", listed, "All processes were ended."))
        return [found[k] for k in sorted(found)]


#: Seconds that the other processes have, once one has failed.
_AFTER_A_FAULT = 10.0


def _serve(connection: Connection, address: str, count: int, index: int, devices: int) -> None:
    """What a process does: calls the functions that it is sent."""
    try:
        simulate_devices(devices)
        if count > 1:
            sys.stdout, stdout = open(os.devnull, "w"), sys.stdout  # noqa: SIM115
            initialize(address, count, index)
            sys.stdout = stdout
        connection.send((True, None))
        while task := connection.recv_bytes():
            try:
                function, args = pickle.loads(task)
                answer = True, function(*args)
            except BaseException:
                answer = False, f"raised:\n{traceback.format_exc()}"
            connection.send(answer)
    except EOFError:
        pass
    os._exit(0)
