"""replicax against ``jit(vmap)``, and the ways to run the replicas of a device, on one GPU, if the machine has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import jax

import replicax
from cases.lanes import AT_ONCE, ONE_BY_ONE
from lane_workloads import Arguments, Program, dense, escape_time
from measure import OURS, Absent, Case, Way, over
from workloads import AXIS, data, mean_loss, mlp

LINE = "lanes against vmap on one GPU"
WAYS = "lanes on one GPU: all at once, or one after the other"
VMAP = "jit(vmap)"


def cases(_quick: bool) -> list[Case]:
    """Cases: a training step, and per-example gradients; averaged gradients, and replicas that differ in work."""
    limit, ratio = (over(OURS, VMAP, most=1.02),), (over(ONE_BY_ONE, AT_ONCE, most=None),)
    return [
        Case("a training step of an MLP, 64 replicas", LINE, 0, partial(_gradients, 64, 64), limit, tolerance=1e-2),
        Case("per-example gradients, N = 10,003", LINE, 0, partial(_gradients, 10_003, 1), limit, tolerance=1e-2),
        Case("gradients of an MLP, 1,024", WAYS, 0, partial(_in_turn, _averaged, 1024), ratio, tolerance=1e-2),
        Case("escape times, 16", WAYS, 0, partial(_in_turn, escape_time, 16), ratio, tolerance=None),
    ]


def _averaged(replicas: int) -> tuple[Program, Arguments]:
    gradient, args = dense(replicas)
    return lambda x, y: jax.lax.pmean(gradient(x, y), AXIS), args


def _in_turn(
    workload: Callable[[int], tuple[Program, Arguments]], replicas: int, _stack: ExitStack
) -> Mapping[str, Way | Absent]:
    """All replicas at once, one after the other, and some numbers at a time."""
    program, args = workload(replicas)
    placed = jax.device_put(list(args), jax.devices()[0])
    ways = {ONE_BY_ONE: "sequential", AT_ONCE: "vectorized"} | {f"lanes={k}": k for k in (4, 16, 64) if k < replicas}
    maps = {way: replicax.pmap(program, AXIS, lanes=how, devices=jax.devices()[:1]) for way, how in ways.items()}
    return {way: partial(mapped, *placed) for way, mapped in maps.items()} | {
        VMAP: partial(jax.jit(jax.vmap(program, axis_name=AXIS)), *placed)
    }


def _gradients(replicas: int, rows: int, _stack: ExitStack) -> Mapping[str, Way | Absent]:
    """The mean gradient over all replicas, with ``rows`` rows each."""
    device = jax.devices()[0]
    layers, (images, labels) = mlp((784, 512, 512, 10)), data(replicas * rows, 784, 10)
    batch = images.reshape(replicas, rows, -1), labels.reshape(replicas, rows)
    state, batch = jax.device_put((layers, batch), device)

    def step(layers: object, images: jax.Array, labels: jax.Array) -> object:
        return jax.lax.pmean(jax.grad(mean_loss)(layers, images, labels), AXIS)

    ours = replicax.pmap(step, axis_name=AXIS, in_axes=(None, 0, 0), out_axes=None, devices=[device])
    theirs = jax.jit(jax.vmap(step, in_axes=(None, 0, 0), out_axes=None, axis_name=AXIS))
    return {OURS: partial(ours, state, *batch), VMAP: partial(theirs, state, *batch)}
