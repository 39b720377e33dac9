"""What ``deterministic=True`` costs, beside replicas that run one after the other with plain sums."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import jax

import replicax
from lane_workloads import dense
from measure import Case, Way, over
from training_workloads import MODELS, OPTIONS, training

TRAINING = "deterministic=True: at most 1.3 × sequential lanes, training steps of small models with adam"
OTHERS = "deterministic=True: other programs"

DETERMINISTIC = "deterministic=True"
ONE_BY_ONE = 'lanes="sequential"'

TITLES = {"mlp": "MLP", "convnet": "convolutional net", "attention": "attention with dropout", "recurrent": "GRU"}

#: Replicas and devices.
SIZES = [(8, 1), (16, 2), (23, 8)]


def cases(quick: bool) -> list[Case]:
    """Cases: training steps of four models, and gradients of a larger MLP."""
    sizes = SIZES[-1:] if quick else SIZES
    found = [
        _case(f"{TITLES[model]}, {replicas} on {devices}", TRAINING, devices, partial(_steps, model, replicas), 1.3)
        for model in MODELS
        for replicas, devices in sizes
    ]
    title = "gradients of an MLP with 400,000 parameters"
    sizes = [] if quick else [(64, 8), (23, 8)]
    return found + [_case(f"{title}, {n} on {d}", OTHERS, d, partial(_gradients, n), None) for n, d in sizes]


def _case(title: str, line: str, devices: int, ways: partial[Mapping[str, Way]], most: float | None) -> Case:
    limits = (over(DETERMINISTIC, ONE_BY_ONE, most=most),)
    return Case(title, line, devices, ways, limits, calls=3, seconds=(6.0, 2.0), tolerance=1e-2)


def _steps(model: str, replicas: int, stack: ExitStack) -> Mapping[str, Way]:
    del stack
    run, args = training(model, replicas)
    ways = {
        ONE_BY_ONE: replicax.pmap(run, **OPTIONS, lanes="sequential"),
        DETERMINISTIC: replicax.pmap(run, **OPTIONS, deterministic=True),
    }
    params, state, _ = ways[ONE_BY_ONE](*args)
    rows = replicax.pmap(lambda *x: x)(*args[2:4])
    return {name: partial(mapped, params, state, *rows, args[4]) for name, mapped in ways.items()}


def _gradients(replicas: int, stack: ExitStack) -> Mapping[str, Way]:
    del stack
    gradient, args = dense(replicas)
    rows = replicax.pmap(lambda *x: x)(*args)

    def averaged(*own: jax.Array) -> jax.Array:
        return jax.lax.pmean(gradient(*own), "i")

    return {
        ONE_BY_ONE: partial(replicax.pmap(averaged, "i", out_axes=None, lanes="sequential"), *rows),
        DETERMINISTIC: partial(replicax.pmap(averaged, "i", out_axes=None, deterministic=True), *rows),
    }
