"""The MLP training in torch's DistributedDataParallel: two processes over gloo, with one thread each.

``Workers`` starts the processes and keeps them running. Each process imports this file and trains on half of the batch.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

PROCESSES = 2
PATIENCE = 120.0  # seconds for a process to answer

Layers = list[tuple[np.ndarray, np.ndarray]]


def installed() -> bool:
    """Whether torch is installed, with ``distributed``."""
    return importlib.util.find_spec("torch") is not None and importlib.import_module("torch.distributed").is_available()


class Workers:
    """Processes that train for a given number of steps, always from the same parameters."""

    def __init__(self, stack: ExitStack, layers: Layers, images: np.ndarray, labels: np.ndarray, rate: float) -> None:
        context = multiprocessing.get_context("spawn")
        meeting = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "meeting"
        self._pipes: list[Connection] = []
        for rank in range(PROCESSES):
            ours, theirs = context.Pipe()
            part = images[rank::PROCESSES], labels[rank::PROCESSES]
            process = context.Process(target=_work, args=(theirs, rank, str(meeting), layers, *part, rate))
            process.start()
            theirs.close()
            stack.callback(process.join, PATIENCE)
            stack.callback(ours.close)  # runs before the join; a closed pipe ends the process
            self._pipes.append(ours)
        self._answers()

    def train(self, steps: int) -> None:
        """Trains, and returns when all processes are done."""
        for pipe in self._pipes:
            pipe.send(steps)
        self._answers()

    def layers(self) -> Layers:
        """The parameters after the last training."""
        for pipe in self._pipes:
            pipe.send(None)
        return self._answers()[0]

    def _answers(self) -> list[Any]:
        if not all(pipe.poll(PATIENCE) for pipe in self._pipes):
            raise RuntimeError(f"a process of DistributedDataParallel has not answered for {PATIENCE:.0f} s")
        return [pipe.recv() for pipe in self._pipes]


def _work(pipe: Any, rank: int, meeting: str, layers: Layers, images: Any, labels: Any, rate: float) -> None:
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(1)
    if sys.platform == "linux":  # the host name may not resolve to a local address
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES)
    net = torch.nn.Sequential(*_modules(torch, layers))
    model = torch.nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    start = [p.detach().clone() for p in model.parameters()]
    x, y = torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64))
    pipe.send("ready")
    while True:
        try:
            steps = pipe.recv()
        except EOFError:
            break
        if steps is None:
            flat = [p.detach().numpy() for p in model.parameters()]
            pipe.send([(w.T.copy(), b.copy()) for w, b in zip(flat[::2], flat[1::2], strict=True)])
            continue
        with torch.no_grad():
            for p, first in zip(model.parameters(), start, strict=True):
                p.copy_(first)
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        pipe.send("done")
    torch.distributed.destroy_process_group()


def _modules(torch: Any, layers: Layers) -> Sequence[Any]:
    modules: list[Any] = []
    for w, b in layers:
        linear = torch.nn.Linear(*w.shape)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(w.T.copy()))
            linear.bias.copy_(torch.from_numpy(b))
        modules += [linear, torch.nn.ReLU()]
    return modules[:-1]
