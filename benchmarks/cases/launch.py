"""Starting processes with ``replicax launch``, beside starting them by hand; and the cost of a heartbeat."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import replicax
from measure import HAND, OURS, Case, Limit, Way, over

START = "replicax launch: at most 1 s more than starting the processes by hand"
BEAT = "replicax.distributed.heartbeat costs nothing in a step"

PROCESSES = 2

#: A program that ends with its first result.
FIRST_RESULT = """
import numpy as np, jax, replicax
replicax.distributed.initialize()
mine = replicax.distributed.replicas(4)
rows = np.arange(4.0, dtype=np.float32)[mine.start : mine.stop]
assert np.asarray(replicax.pmap(lambda x: jax.lax.psum(x, "i"), "i")(rows))[0] == 6
"""


def cases(quick: bool) -> list[Case]:
    """Cases: two processes to their first result, and a step with and without a heartbeat."""
    del quick
    more = Limit(f"({OURS} - {HAND}) / 1 s", (OURS, HAND), _more, 1.0)
    return [
        Case("two processes to their first result", START, 1, _start, (more,), seconds=(40.0, 10.0), tolerance=None),
        Case("a small step", BEAT, 2, _step, (over(OURS, HAND, most=1.02),), calls=100, tolerance=None),
    ]


def _more(seconds: Mapping[str, Sequence[float]]) -> list[float]:
    return [ours - hand for ours, hand in zip(seconds[OURS], seconds[HAND], strict=True)]


def _start(stack: ExitStack) -> Mapping[str, Way]:
    script = Path(stack.enter_context(tempfile.TemporaryDirectory()), "first_result.py")
    script.write_text(FIRST_RESULT)
    launched = [sys.executable, "-m", "replicax_cli", "launch", "-n", str(PROCESSES), str(script)]
    return {
        OURS: partial(subprocess.run, launched, check=True, capture_output=True),
        HAND: partial(_by_hand, [sys.executable, str(script)]),
    }


def _by_hand(command: Sequence[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(PROCESSES)}
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(PROCESSES)
    ]
    assert [process.wait() for process in started] == [0] * PROCESSES


def _step(stack: ExitStack) -> Mapping[str, Way]:
    step = replicax.pmap(lambda x: jax.lax.psum(x * 2, "i"), "i")
    x = replicax.shard(np.ones((8, 256), np.float32), 2)
    number = iter(range(1 << 60))
    stack.callback(replicax.distributed.heartbeat, None)

    def without() -> Any:
        return float(step(x)[0, 0, 0])

    def with_heartbeat() -> Any:
        loss = without()
        replicax.distributed.heartbeat(next(number), timeout=3600)
        return loss

    return {OURS: with_heartbeat, HAND: without}
