"""Other libraries on the same work and the same two cores, with pools and processes already started."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import ddp
import replicax
from measure import HAND, OURS, Absent, Case, Way, over
from numpy_twins import SWINGS, call_price, pendulum
from ways import ROWS, WHOLE, by_hand, place
from workloads import AXIS, LANES, RATE, Layers, data, mlp, train

TRAINING = "torch's DistributedDataParallel, on the same MLP and data"
MAPS = "plain maps of a NumPy function that has a JAX twin, NumPy in and out"

DDP = "torch DDP (gloo, 2 processes)"
JOBLIB = "joblib, 2 processes"
POOL = "multiprocessing, 2 processes"
NUMPY = "NumPy, 1 process"
PARAJAX = "parajax"
SEQUENTIAL = "jit(lax.map), one device"
STEPS = 10
CORES = 2
SIZES = (784, 512, 512, 10)


def cases(_quick: bool) -> list[Case]:
    """Cases: training against torch; maps of NumPy functions against joblib, multiprocessing and parajax."""
    others = tuple(over(OURS, name, most=None) for name in (JOBLIB, POOL, PARAJAX))
    found = [
        Case(
            f"{STEPS} training steps of an MLP, 512 images",
            TRAINING,
            CORES,
            _training,
            (over(OURS, DDP, most=None),),
            seconds=(15.0, 3.0),
            tolerance=1e-3,
        )
    ]
    maps: tuple[tuple[str, Any], ...] = (
        (f"{SWINGS:,} steps of 20,000 pendulums", _swings),
        ("prices of 4,000,000 options", _prices),
    )
    found += [Case(title, MAPS, CORES, prepare, others, seconds=(10.0, 2.0), tolerance=2e-3) for title, prepare in maps]
    return found


def _training(stack: ExitStack) -> Mapping[str, Way | Absent]:
    """Each call starts from the same parameters. Two replicas on two devices, like torch's two processes."""
    layers, (images, labels) = mlp(SIZES), data(512, SIZES[0], SIZES[-1])
    # Each torch process gets every other image.
    rows = place(jax.tree.map(lambda x: np.stack([x[0::2], x[1::2]]), (images, labels)))
    state, axes = place(layers, WHOLE), (None, 0, 0)
    ours = replicax.pmap(train, axis_name=AXIS, in_axes=axes, out_axes=None)
    both = partial(train, axis=(AXIS, LANES))
    hand = by_hand(both, (WHOLE, ROWS, ROWS), WHOLE, in_axes=axes, out_axes=None, lanes=LANES)
    theirs = jax.pmap(train, AXIS, in_axes=axes, out_axes=None)
    return {
        OURS: partial(_steps, ours, state, rows),
        DDP: _ddp(stack, layers, images, labels),
        HAND: partial(_steps, hand, state, rows),
        "jax.pmap": partial(_steps, theirs, state, rows),
    }


def _ddp(stack: ExitStack, layers: Layers, images: np.ndarray, labels: np.ndarray) -> Way | Absent:
    if not ddp.installed():
        return Absent("not installed")
    workers = ddp.Workers(stack, layers, images, labels, RATE)

    def way() -> Any:
        workers.train(STEPS)
        return workers.layers

    return way


def _steps(step: Callable[..., Any], state: Layers, rows: Any) -> Layers:
    for _ in range(STEPS):
        state, _ = step(state, *rows)
    return state


def _swings(stack: ExitStack) -> Mapping[str, Way | Absent]:
    return _maps(stack, _pendulum, pendulum, np.linspace(-3, 3, 20_000, dtype=np.float32))


def _pendulum(angle: jax.Array) -> jax.Array:
    def step(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        angle, speed = state
        speed = speed * 0.999 - 0.01 * jnp.sin(angle)
        return angle + 0.01 * speed, speed

    return lax.fori_loop(0, SWINGS, step, (angle, jnp.zeros_like(angle)))[0]


def _prices(stack: ExitStack) -> Mapping[str, Way | Absent]:
    return _maps(stack, _call_price, call_price, np.linspace(50, 150, 4_000_000, dtype=np.float32))


def _call_price(spot: jax.Array) -> jax.Array:
    d = (jnp.log(spot / 100) + 0.05) / 0.2
    discount = 100 * np.exp(-0.03)

    def normal(d: jax.Array) -> jax.Array:
        return 0.5 + 0.5 * jnp.tanh(0.7978846 * (d + 0.044715 * d * d * d))

    return spot * normal(d) - discount * normal(d - 0.2)


def _maps(
    stack: ExitStack, twin: Callable[..., Any], function: Callable[..., Any], array: np.ndarray
) -> Mapping[str, Way | Absent]:
    """Maps a NumPy array to a NumPy array in each way. Each process, or device, gets one half.

    Args:
        stack: Closes the pools at the end.
        twin: The JAX function of one row.
        function: The NumPy function of many rows.
        array: The rows.
    """
    pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(CORES))
    mapped = jax.jit(partial(lax.map, twin))
    return {
        OURS: _to_numpy(replicax.pmap(twin), array),
        POOL: lambda: np.concatenate(pool.map(function, np.split(array, CORES), chunksize=1)),
        JOBLIB: _joblib(stack, function, array),
        PARAJAX: _parajax(twin, array),
        SEQUENTIAL: _to_numpy(mapped, array) if len(array) < 100_000 else Absent("takes seconds"),
        HAND: _to_numpy(by_hand(twin), array),
        NUMPY: partial(function, array),
    }


def _to_numpy(program: Callable[..., Any], array: np.ndarray) -> Way:
    return lambda: np.asarray(program(array))


def _joblib(stack: ExitStack, function: Callable[..., Any], array: np.ndarray) -> Way | Absent:
    if importlib.util.find_spec("joblib") is None:
        return Absent("not installed")
    joblib: Any = importlib.import_module("joblib")
    # joblib keeps its processes between calls, and passes large arrays through shared memory.
    parallel = stack.enter_context(joblib.Parallel(n_jobs=CORES))
    task = joblib.delayed(function)
    return lambda: np.concatenate(parallel(task(part) for part in np.split(array, CORES)))


def _parajax(twin: Callable[..., Any], array: np.ndarray) -> Way | Absent:
    if importlib.util.find_spec("parajax") is None:
        return Absent("not installed")
    parajax: Any = importlib.import_module("parajax")
    return _to_numpy(parajax.parallelize(jax.vmap(twin)), array)
