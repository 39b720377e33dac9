"""Programs whose replicas differ in work, and dense ones, for the benchmarks of ``lanes``."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Program = Callable[..., Any]
Arguments = Sequence[Any]

#: The name of the mapped axis.
AXIS = "i"


def escape_time(replicas: int) -> tuple[Program, Arguments]:
    """The number of iterations until each point of a row of the plane escapes, at most 1,000 (the Mandelbrot set)."""

    def program(c: jax.Array) -> jax.Array:
        def goes_on(state: tuple[jax.Array, jax.Array]) -> jax.Array:
            z, count = state
            return (jnp.abs(z) < 2) & (count < 1000)

        def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            z, count = state
            return z * z + c, count + 1

        return jax.lax.while_loop(goes_on, step, (jnp.complex64(0), jnp.int32(0)))[1]

    return program, [np.linspace(-2, 0.5, replicas).astype(np.complex64) + np.complex64(0.1j)]


def ensemble(replicas: int) -> tuple[Program, Arguments]:
    """Solves the Van der Pol oscillator with an adaptive step size, for a range of stiffnesses (diffrax)."""
    diffrax: Any = importlib.import_module("diffrax")  # importing it starts JAX, before the devices are simulated

    def program(mu: jax.Array) -> jax.Array:
        def field(_: jax.Array, y: jax.Array, mu: jax.Array) -> jax.Array:
            return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            0.0,
            10.0,
            0.01,
            jnp.array([2.0, 0.0]),
            args=mu,
            stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
            max_steps=100_000,
            throw=False,
        )
        return solution.ys[-1]

    return program, [np.geomspace(0.1, 100, replicas).astype(np.float32)]


def chains(replicas: int) -> tuple[Program, Arguments]:
    """Draws 50 samples with NUTS from a funnel, one chain a replica (blackjax)."""
    blackjax: Any = importlib.import_module("blackjax")

    def density(x: jax.Array) -> jax.Array:
        return -(x[0] ** 2) / 18 - jnp.sum(x[1:] ** 2) * jnp.exp(-x[0]) / 2 - x[0] * (x.size - 1) / 2

    def program(seed: jax.Array) -> jax.Array:
        kernel = blackjax.nuts(density, step_size=0.1, inverse_mass_matrix=jnp.ones(10))
        state = kernel.init(jnp.zeros(10))

        def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            state, _ = kernel.step(key, state)
            return state, state.position

        return jax.lax.scan(step, state, jax.random.split(jax.random.key(seed), 50))[1].mean(0)

    return program, [np.arange(replicas, dtype=np.uint32)]


def dense(replicas: int) -> tuple[Program, Arguments]:
    """The averaged gradient of an MLP."""
    sizes, batch = (256, 512, 512, 10), 64

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for k, w in enumerate(params):
            x = x @ w if k == len(params) - 1 else jnp.tanh(x @ w)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1))

    random = np.random.default_rng(0)
    params = [random.normal(size=s, scale=0.05).astype(np.float32) for s in itertools.pairwise(sizes)]
    x = random.normal(size=(replicas, batch, sizes[0])).astype(np.float32)
    y = random.integers(0, sizes[-1], (replicas, batch)).astype(np.int32)
    return lambda x, y: jax.grad(loss)(params, x, y), [x, y]


def convolutions(replicas: int) -> tuple[Program, Arguments]:
    """The averaged gradient of a small convolutional net."""

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for w in params:
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME"))
        return jnp.mean(x**2)

    random = np.random.default_rng(0)
    channels = (3, 16, 32)
    params = [random.normal(size=(b, a, 3, 3), scale=0.1).astype(np.float32) for a, b in itertools.pairwise(channels)]
    x = random.normal(size=(replicas, 16, 3, 16, 16)).astype(np.float32)
    return lambda x: jax.grad(loss)(params, x), [x]
