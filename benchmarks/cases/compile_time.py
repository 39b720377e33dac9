"""Tracing and compilation: the time from a new function to its first result."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from first_result import WAYS, Program
from measure import HAND, OURS, Absent, Case, Measured, Way, growth, over
from ways import place
from workloads import AXIS, LANES, large, small

FIRST = "time to first result: at most 1.15 × that by hand"
FLAT = "time to first result: flat in N"
GROWTH = "time to first result: grows with D no faster than XLA's own"
CACHE = "the persistent compilation cache works across processes"

PMAP = "jax.pmap(vmap)"
EQUATIONS = 5000
REPLICAS = (8, 1000, 100_000)
DEVICES = (1, 16, 256)
PROCESSES = ("first process", "second process")


def cases(quick: bool) -> list[Case]:
    """Cases: a small and a large program, more replicas, more devices, and a second process."""
    limit = (over(OURS, HAND, most=1.15),)
    found = [
        Case("a small program", FIRST, count, partial(_first, small), limit, before=jax.clear_caches)
        for count in (1, 2, 8)
    ]
    found.append(
        Case(
            f"{EQUATIONS:,} equations, nested control flow",
            FIRST,
            2,
            partial(_first, partial(large, equations=EQUATIONS)),
            limit,
            before=jax.clear_caches,
            seconds=(40.0, 10.0),
            warm_up=1,
            tolerance=1e-3,
        )
    )
    most, least = f"N = {REPLICAS[-1]:,}", f"N = {REPLICAS[0]}"
    flat = (over(f"{OURS}, {most}", f"{OURS}, {least}", most=1.15),)
    found.append(
        Case(
            "a small program, more replicas",
            FLAT,
            8,
            _replicas,
            flat,
            before=jax.clear_caches,
            seconds=(10.0, 2.0),
            tolerance=None,
        )
    )
    wide, narrow = f"D = {DEVICES[-1]}", f"D = {DEVICES[0]}"
    ways = (f"{OURS}, {wide}", f"{OURS}, {narrow}"), (f"{HAND}, {wide}", f"{HAND}, {narrow}")
    words = f"growth from {narrow} to {wide}: {OURS} / {HAND}"
    grows = (growth(*ways, most=1.0, words=words),)
    found.append(
        Case(
            "a small program, more devices",
            GROWTH,
            max(DEVICES),
            _devices,
            grows,
            before=jax.clear_caches,
            seconds=(25.0, 8.0),
            warm_up=1,
            tolerance=None,
        )
    )
    first, second = (f"{OURS}, {each}" for each in PROCESSES)
    cached = over(second, first, most=0.5), over(second, f"{HAND}, {PROCESSES[1]}", most=1.15)
    found.append(
        Case(
            f"{EQUATIONS // 5:,} equations",
            CACHE,
            2,
            _cached,
            cached[:1] if quick else cached,
            seconds=(1.0, 1.0),
            warm_up=0,
            tolerance=None,
        )
    )
    return found


def _first(program: Program, _stack: ExitStack) -> Mapping[str, Way | Absent]:
    """Each call maps a new function. Before each call, JAX's caches are cleared."""
    x = np.linspace(0, 1, jax.device_count() * 4 * 16, dtype=np.float32)
    ways = {name: partial(_run, way, program, place(x.reshape(-1, 16)), None) for name, way in WAYS.items()}
    return ways | {PMAP: partial(_run, _pmapped, program, place(x.reshape(jax.device_count(), 4, 16)), None)}


def _pmapped(program: Program, _count: int | None) -> Program:
    both = partial(program, axis=(AXIS, LANES))
    return jax.pmap(jax.vmap(both, axis_name=LANES), axis_name=AXIS)


def _run(way: Callable[..., Program], program: Program, x: Any, count: int | None) -> Any:
    def fresh(row: jax.Array, axis: Any = AXIS) -> jax.Array:
        return program(row, axis)

    return way(fresh, count)(x)


def _replicas(_stack: ExitStack) -> Mapping[str, Way | Absent]:
    return {
        f"{name}, N = {n:,}": partial(_run, WAYS[name], small, place(np.ones((n, 4), np.float32)), None)
        for name in (OURS, HAND)
        for n in REPLICAS
    }


def _devices(_stack: ExitStack) -> Mapping[str, Way | Absent]:
    """Two replicas per device, with NumPy arguments, so that every program transfers its input itself."""
    return {
        f"{name}, D = {count}": partial(_run, WAYS[name], small, np.ones((2 * count, 4), np.float32), count)
        for name in (OURS, HAND)
        for count in DEVICES
    }


def _cached(stack: ExitStack) -> Mapping[str, Way | Absent]:
    """Runs new processes: the first with an empty cache, the second with a cache that a process has filled."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    ways: dict[str, Way | Absent] = {}
    for name in (OURS, HAND):
        full, empty = folder / f"{name} full", folder / f"{name} empty"
        _process(name, full, hits=False)
        ways[f"{name}, {PROCESSES[0]}"] = partial(_process, name, empty, hits=False)
        ways[f"{name}, {PROCESSES[1]}"] = partial(_process, name, full, hits=True)
    first = ways.pop(f"{OURS}, {PROCESSES[1]}")
    return {f"{OURS}, {PROCESSES[1]}": first} | ways


def _process(name: str, folder: Path, *, hits: bool) -> Measured:
    """Runs the program in a new process, and checks its cache hits.

    Raises:
        AssertionError: the first process had a cache hit, or the second process compiled.
    """
    if not hits:
        shutil.rmtree(folder, ignore_errors=True)
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "first_result.py"),
        name,
        str(folder),
        str(EQUATIONS // 5),
    ]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert said["misses"] == 0 if hits else said["hits"] == 0, f"{name}: {said}"
    assert said["hits" if hits else "misses"] > 0, f"{name}: {said}"
    return Measured(said["seconds"], said["sum"])
