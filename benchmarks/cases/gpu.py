"""replicax against ``jit(vmap)`` on one GPU, if the machine has one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import jax

import replicax
from measure import OURS, Absent, Case, Way, over
from workloads import AXIS, data, mean_loss, mlp

LINE = "lanes against vmap on one GPU"
VMAP = "jit(vmap)"


def cases(_quick: bool) -> list[Case]:
    """Cases: a training step, and per-example gradients."""
    limit = (over(OURS, VMAP, most=1.02),)
    return [
        Case("a training step of an MLP, 64 replicas", LINE, 0, partial(_gradients, 64, 64), limit, tolerance=1e-2),
        Case("per-example gradients, N = 10,003", LINE, 0, partial(_gradients, 10_003, 1), limit, tolerance=1e-2),
    ]


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
