"""Throughput: the compiled program against the program by hand, on two devices, with arguments in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import replicax
from measure import HAND, OURS, Absent, Case, Way, over
from ways import ROWS, WHOLE, by_hand, mesh, place
from workloads import AXIS, LANES, Layers, data, escape_time, mean_loss, mlp, plane, train
from workloads import losses as losses_of

LINE = "throughput: within 2 % of the program by hand"
GRADIENTS = "per-example gradients with pmean: within 5 % of the hand-batched gradient"

PMAP = "jax.pmap(vmap)"
SHARDED = "jit(vmap), sharded input"
BATCHED, BATCHED_JIT = "hand-batched, shard_map", "hand-batched, jit"
DEVICES = 2
LONG = (10.0, 1.5)  # seconds
BOTH = (AXIS, LANES)
SIZES = (784, 512, 512, 10)
ROWS_OF_BATCH = 512


def cases(_quick: bool) -> list[Case]:
    """Cases: training, loops of different length per replica, collectives, memory, and per-example gradients."""
    limit = (over(OURS, HAND, most=1.02),)
    escape = (over(OURS, SHARDED, most=0.25), *limit)
    found = [
        Case("a training step of an MLP, 8 replicas", LINE, DEVICES, _training, limit, seconds=LONG, tolerance=1e-3),
        Case("escape times of 4,096 points, 4,096 replicas", LINE, DEVICES, _escape, escape, seconds=LONG),
        Case("100 × psum, ppermute, all_gather, 8 replicas", LINE, DEVICES, _collectives, limit, seconds=LONG),
        Case("4 arrays of 32 MB read, 2 written, 8 replicas", LINE, DEVICES, _memory_bound, limit, seconds=LONG),
    ]
    found += [
        Case(
            f"N = {n:,}, an MLP of {784 * 128 + 128 * 10 + 138:,} parameters",
            GRADIENTS,
            DEVICES,
            partial(_gradients, n),
            (over(OURS, BATCHED, BATCHED_JIT, most=1.05, words=f"{OURS} / the faster hand-batched"),),
            tolerance=1e-3,
            seconds=LONG,
        )
        for n in (1024, 10_003)
    ]
    return found


def _split(tree: Any) -> Any:
    """Reshapes rows to ``(devices, lanes, ...)`` for ``jax.pmap(vmap)``."""
    count = jax.device_count()
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)


def _training(_stack: ExitStack) -> Mapping[str, Way | Absent]:
    layers, batch = mlp(SIZES), data(ROWS_OF_BATCH, SIZES[0], SIZES[-1])
    batch = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
    state, rows = place(layers, WHOLE), place(batch)

    def averaged(layers: Layers, images: jax.Array, labels: jax.Array) -> tuple[Layers, jax.Array]:
        return train(layers, images, labels, LANES)

    axes = (None, 0, 0)
    both = partial(train, axis=BOTH)
    ours = replicax.pmap(train, axis_name=AXIS, in_axes=axes, out_axes=None)
    hand = by_hand(both, (WHOLE, ROWS, ROWS), WHOLE, in_axes=axes, out_axes=None, lanes=LANES)
    lanes = jax.vmap(both, axes, None, axis_name=LANES)
    return {
        OURS: partial(ours, state, *rows),
        HAND: partial(hand, state, *rows),
        PMAP: partial(jax.pmap(lanes, AXIS, in_axes=axes, out_axes=None), state, *place(_split(batch))),
        SHARDED: partial(jax.jit(jax.vmap(averaged, axes, None, axis_name=LANES)), state, *rows),
    }


def _escape(_stack: ExitStack) -> Mapping[str, Way | Absent]:
    """``jit(vmap)`` with sharded input communicates in every iteration: does any point go on? A map does not."""
    points = plane(4096)
    rows = place(points)
    return {
        OURS: partial(replicax.pmap(escape_time), rows),
        HAND: partial(by_hand(escape_time), rows),
        PMAP: partial(jax.pmap(jax.vmap(escape_time)), place(_split(points))),
        SHARDED: partial(jax.jit(jax.vmap(escape_time)), rows),
    }


def _talk(x: jax.Array, axis: Any = AXIS, size: int = 8) -> jax.Array:
    """Sums, shifts by one and gathers. Each depends on the previous one."""

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        x = x / (1 + lax.psum(x * x, axis))
        x = _shift(x, axis, size)
        return x + _gather(x, axis).mean(0), None

    return lax.scan(step, x, length=100)[0]


def _shift(x: jax.Array, axis: Any, size: int) -> jax.Array:
    """By hand: rotates the lanes by one, and sends the last lane to the first lane of the next device."""
    if isinstance(axis, str):
        return lax.ppermute(x, axis, [(r, (r + 1) % size) for r in range(size)])
    devices, lanes = axis
    count = lax.axis_size(devices)
    turned = lax.ppermute(x, lanes, [(k, (k + 1) % (size // count)) for k in range(size // count)])
    out = lax.psum(jnp.where(lax.axis_index(lanes) == 0, turned, 0), lanes)
    came = lax.ppermute(out, devices, [(d, (d + 1) % count) for d in range(count)])
    return jnp.where(lax.axis_index(lanes) == 0, came, turned)


def _gather(x: jax.Array, axis: Any) -> jax.Array:
    """By hand: lanes first, because vmap has no rule for ``all_gather`` over its axis and another one."""
    if isinstance(axis, str):
        return lax.all_gather(x, axis)
    devices, lanes = axis
    return lax.all_gather(lax.all_gather(x, lanes), devices).reshape(-1, *x.shape)


def _collectives(_stack: ExitStack) -> Mapping[str, Way | Absent]:
    x = np.linspace(0.1, 1, 8 * 1024, dtype=np.float32).reshape(8, -1)
    rows, both = place(x), partial(_talk, axis=BOTH)
    return {
        OURS: partial(replicax.pmap(_talk, axis_name=AXIS), rows),
        HAND: partial(by_hand(both, lanes=LANES), rows),
        PMAP: partial(jax.pmap(jax.vmap(both, axis_name=LANES), axis_name=AXIS), place(_split(x))),
        SHARDED: partial(jax.jit(jax.vmap(_talk, axis_name=AXIS)), rows),
    }


def _stream(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (a + c) / 2, jnp.maximum(b - a, d)


def _memory_bound(_stack: ExitStack) -> Mapping[str, Way | Absent]:
    """The first two arguments are donated for the results, because allocating new memory would dominate the time."""
    arrays = [np.full((8, 2**20), k, np.float32) for k in range(4)]

    def loop(program: Callable[..., Any], arrays: list[np.ndarray]) -> Way:
        state, rest = place(arrays[:2]), place(arrays[2:])

        def way() -> Any:
            nonlocal state
            state = program(*state, *rest)
            return state

        return way

    donated = (0, 1)
    return {
        OURS: loop(replicax.pmap(_stream, donate_argnums=donated), arrays),
        HAND: loop(by_hand(_stream, donate_argnums=donated), arrays),
        PMAP: loop(jax.pmap(jax.vmap(_stream), donate_argnums=donated), _split(arrays)),
        SHARDED: loop(jax.jit(jax.vmap(_stream), donate_argnums=donated), arrays),
    }


def _gradients(n: int, _stack: ExitStack) -> Mapping[str, Way | Absent]:
    """The mean of per-example gradients in a map, and the gradient of the mean loss of the batch, padded if needed.

    The arguments of each way are already in place; for the map, they are sharded like its results.
    """
    layers, (images, labels) = mlp((784, 128, 10)), data(n, 784, 10)

    def example(layers: Layers, image: jax.Array, label: jax.Array) -> Layers:
        return lax.pmean(jax.grad(mean_loss)(layers, image, label), AXIS)

    padding = -n % jax.device_count()
    weights = [] if padding == 0 else [np.pad(np.ones(n, np.float32), (0, padding))]
    batch = [np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for x in (images, labels)] + weights

    def loss(layers: Layers, images: jax.Array, labels: jax.Array, *weights: jax.Array) -> jax.Array:
        """The loss of one device's rows, or of all."""
        each = losses_of(layers, images, labels)
        return (weights[0] * each).sum() / n if weights else each.mean()

    def summed(layers: Layers, *rows: jax.Array) -> Layers:
        combine = lax.psum if padding else lax.pmean
        return combine(jax.grad(loss)(layers, *rows), AXIS)

    specs = (WHOLE, *(ROWS for _ in batch))
    sharded = jax.shard_map(summed, mesh=mesh(), in_specs=specs, out_specs=WHOLE, check_vma=False)
    state, rows = place(layers, WHOLE), place(batch)
    ours = replicax.pmap(example, axis_name=AXIS, in_axes=(None, 0, 0), out_axes=None)
    vmapped = jax.vmap(example, in_axes=(None, 0, 0), out_axes=None, axis_name=AXIS)
    lying = replicax.pmap(lambda *row: row)(images, labels)
    return {
        OURS: partial(ours, state, *lying),
        BATCHED: partial(jax.jit(sharded), state, *rows),
        BATCHED_JIT: partial(jax.jit(jax.grad(loss)), state, *rows),
        SHARDED: Absent("takes no rows that do not divide") if padding else partial(jax.jit(vmapped), state, *rows[:2]),
    }
