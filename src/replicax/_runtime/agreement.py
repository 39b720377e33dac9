"""Agreement between processes: before a program over several processes runs, they compare what they are about to run.

Each process writes a statement to JAX's key-value service, under a running number, and reads those of the other
processes. If a process does not join in time, the others raise. A thread in every process then ends the process if one
of its programs still waits for replicas of another process.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from replicax import _jax
from replicax._engine import primitives
from replicax._messages import report, text_of
from replicax.errors import ProcessesError

#: What a process states: any JSON value.
Statement = Mapping[str, Any]


class Settings:
    """Times in seconds, set by ``replicax.distributed.initialize``.

    Attributes:
        patience: How long a process waits for the others before the first run of a program.
        grace: How long a program may still run after another process has given up, before its process is ended.
    """

    patience = 30.0
    grace = 5.0


#: The exit status of a process that waited in vain for replicas of another process.
NOT_JOINED = 75

_numbers: dict[tuple[int, ...], itertools.count[int]] = {}
_lock = threading.RLock()


def exchange(processes: Sequence[int], statement: Statement, what: str) -> dict[int, Statement]:
    """Posts a statement, and returns the statements of all processes.

    Args:
        processes: The indices of the processes that take part, this one included.
        statement: What this process states.
        what: What this process does, for the message.

    Raises:
        ProcessesError: ``jax.distributed`` is not initialized, or a process does not join in time.
    """
    client, here = _jax.client(), jax.process_index()
    if client is None:
        raise ProcessesError(
            "A map over several processes needs the key-value service of jax.distributed. Call "
            "replicax.distributed.initialize() (or jax.distributed.initialize) in each process first."
        )
    _watch(client)
    _aborted(client)
    refuse_after_abort()
    group = tuple(processes)
    with _lock:
        number = next(_numbers.setdefault(group, itertools.count()))
        place = f"replicax/{'-'.join(map(str, group))}"
        client.key_value_set(f"{place}/{number}/{here}", json.dumps([what, statement]))
        deadline = time.monotonic() + Settings.patience
        found, doing, missing = {here: statement}, {here: what}, []
        for process in group:
            if process != here:
                text = _read(client, f"{place}/{number}/{process}", deadline)
                if text is None:
                    missing.append(process)
                else:
                    doing[process], found[process] = json.loads(text)
        if missing:
            _give_up(client, what, missing)
        if number >= _KEPT:  # everyone has read what came before the last exchange
            client.key_value_delete(f"{place}/{number - _KEPT}/{here}")
    raised = [
        f"process {process} {doing[process]}: {said[_RAISED]}" for process, said in found.items() if _RAISED in said
    ]
    if raised:
        raise ProcessesError(
            report(
                f"Process {here} {what}, and another process has raised an exception:",
                raised,
                "See the output of that process.",
            )
        )
    if any(said.keys() != statement.keys() and "error" not in said for said in found.values()):
        raise ProcessesError(
            report(
                "The processes do not make the same calls:",
                [f"process {process} {doing[process]}" for process in group],
                "All processes must call the same maps in the same order.",
            )
        )
    return {process: found[process] for process in group}


#: How many statements to keep in the service. Older ones have been read by all processes.
_KEPT = 64


def _read(client: Any, key: str, deadline: float) -> str | None:
    """The value of a key; None if no process sets it before the deadline. Raises if another process has given up."""
    while True:
        left = deadline - time.monotonic()
        try:
            return client.blocking_key_value_get(key, max(1, int(1000 * min(left, 1.0))))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in text_of(error):
                raise
        _aborted(client)
        refuse_after_abort()
        if left <= 1.0:
            return None


def _give_up(client: Any, what: str, missing: Sequence[int]) -> None:
    which = f"process {missing[0]} has" if len(missing) == 1 else f"processes {', '.join(map(str, missing))} have"
    message = report(
        f"Process {jax.process_index()} waited {Settings.patience:g} seconds, but {which} not joined:",
        [f"process {jax.process_index()} {what}"],
        "All processes must call the same maps in the same order, each with its own rows. If shapes, "
        "types or numbers of rows change, they must change at the same call in all processes. If the others are only "
        "slow to start, pass a longer time, as in replicax.distributed.initialize(timeout=300).",
    )
    client.key_value_set(_ABORT, message, allow_overwrite=True)
    _aborted(client)
    refuse_after_abort()


def tell(processes: Sequence[int], error: str, what: str) -> None:
    """Tells the other processes that this one has raised. Does not wait for them: they may have raised, too."""
    client = _jax.client()
    if client is None or _known:
        return
    group = tuple(processes)
    with _lock:
        number = next(_numbers.setdefault(group, itertools.count()))
        place = f"replicax/{'-'.join(map(str, group))}/{number}/{jax.process_index()}"
        client.key_value_set(place, json.dumps([what, {_RAISED: error}]))


_RAISED = "raised"


def agree_on_shape(boundary: primitives.Boundary, shape: tuple[int, ...]) -> None:
    """Compares an array that goes between own rows and all rows with those of the other processes, the first time.

    Raises:
        ProcessesError: They have other dimensions, such as that of a ``vmap`` of another size.
    """
    if (boundary, shape) in _agreed or jax.process_count() == 1:
        return
    processes = sorted({device.process_index for device in boundary.every.device_set})
    own = ["rows" if k == boundary.dim else str(size) for k, size in enumerate(shape)]
    text = f"({', '.join(own)})"
    every = exchange(processes, {"shape": text}, f"converts an array of shape {text} between own rows and global rows")
    if len({said["shape"] for said in every.values()}) > 1:
        raise ProcessesError(
            report(
                "The processes transform a map in different ways. The arrays have these shapes:",
                [f"process {process}: {said['shape']}" for process, said in every.items()],
                "All processes must vectorize over the same number of elements. jax.jacfwd, jacrev and hessian of own "
                "rows, or with respect to own rows, vectorize over these rows: give all processes equal numbers of "
                "rows, or call these functions inside the mapped function.",
            )
        )
    _agreed.add((boundary, shape))


_agreed: set[tuple[primitives.Boundary, tuple[int, ...]]] = set()


# ---------------------------------------------------------------------------------------------------------------
# Digests


def digest(*parts: object) -> str:
    """Returns a digest of texts and arrays, which is equal in all processes that have equal ones."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray | np.generic | jax.Array):
            host = np.asarray(
                jax.random.key_data(part) if jax.numpy.issubdtype(part.dtype, jax.dtypes.prng_key) else part
            )
            found.update(f"{host.dtype}{host.shape}".encode())
            found.update(np.ascontiguousarray(host).tobytes())
        else:
            found.update(without_addresses(str(part)).encode())
    return found.hexdigest()


def without_addresses(text: str) -> str:
    """Returns a printed program without what differs between equal ones: addresses, paths, the order of sets."""
    text = re.sub(r"0x[0-9a-f]+", "", text)
    text = re.sub(r"[^\s\"']*[/\\][^\s\"':]*\.py(:\d+)*", "", text)
    return re.sub(r"\{[^{}]*\}", lambda found: ", ".join(sorted(found.group()[1:-1].split(", "))), text)


# ---------------------------------------------------------------------------------------------------------------
# The watcher


_ABORT = "replicax/abort"

#: The message of the process that has given up, once this process knows it.
_known: list[str] = []

#: Functions to call once this process knows that message, such as functions that clear the C++ caches.
on_abort: list[Callable[[], None]] = []


def refuse_after_abort() -> None:
    """Raises if a process has given up: the processes are not at the same point any more.

    Raises:
        ProcessesError: A process has given up.
    """
    if _known:
        raise ProcessesError(_known[0])


_watching: list[threading.Thread] = []


class Running:
    """The programs over several processes that this process is running.

    Attributes:
        calls: How many calls have been started, and not returned.
    """

    calls = 0


def _watch(client: Any) -> None:
    """Starts the thread that ends this process if it waits for replicas of a process that has given up."""
    with _lock:
        if not _watching:
            _watching.append(threading.Thread(target=_end_if_aborted, args=(client,), name="replicax", daemon=True))
            _watching[0].start()


def _aborted(client: Any) -> str | None:
    if not _known:
        try:
            _known.append(client.key_value_try_get(_ABORT))
        except jax.errors.JaxRuntimeError:
            return None
        for call in on_abort:
            call()
    return _known[0]


def _end_if_aborted(client: Any) -> None:
    while (told := _aborted(client)) is None:
        time.sleep(1.0)
    print(
        f"replicax, process {jax.process_index()}: a process has given up waiting. {told}", file=sys.stderr, flush=True
    )
    since = time.monotonic()
    while time.monotonic() - since < Settings.grace:
        time.sleep(0.1)
        if not _waits():
            since = time.monotonic()
    print(
        f"replicax, process {jax.process_index()}: ended with exit status {NOT_JOINED}, because its program waits for "
        f"replicas that the other processes do not run.",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(NOT_JOINED)


def _waits() -> bool:
    """Whether a program has not finished: a call has not returned, or a result is not ready."""
    return Running.calls > 0 or any(not x.is_deleted() and not x.is_ready() for x in jax.live_arrays())
