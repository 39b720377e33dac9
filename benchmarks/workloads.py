"""Programs of one replica, and data, that several groups of cases share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

#: The weights and biases of each layer.
Layers = list[tuple[Any, Any]]

AXIS = "i"
LANES = "lanes"  # the vmap axis in programs by hand, next to "i" for devices
RATE = 0.05


def mlp(sizes: Sequence[int], seed: int = 0) -> Layers:
    """The layers of an MLP as NumPy arrays, scaled so that training is stable."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(0, m**-0.5, (m, n)).astype(np.float32), np.zeros(n, np.float32)) for m, n in pairwise(sizes)]


def data(rows: int, inputs: int, classes: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Random images and labels."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, inputs)).astype(np.float32), rng.integers(0, classes, rows).astype(np.int32)


def logits(layers: Layers, image: jax.Array) -> jax.Array:
    """The logits of one image, or of several."""
    for w, b in layers[:-1]:
        image = jax.nn.relu(image @ w + b)
    w, b = layers[-1]
    return image @ w + b


def losses(layers: Layers, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross entropy of each image, or of one image."""
    scores = jax.nn.log_softmax(logits(layers, images))
    return -jnp.take_along_axis(scores, labels[..., None], -1)[..., 0]


def mean_loss(layers: Layers, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross entropy of a batch, or the cross entropy of one image."""
    return losses(layers, images, labels).mean()


def train(layers: Layers, images: jax.Array, labels: jax.Array, axis: Any = AXIS) -> tuple[Layers, jax.Array]:
    """One step of gradient descent on one replica's part of the batch, with the mean gradient of all replicas."""
    loss, gradient = lax.pmean(jax.value_and_grad(mean_loss)(layers, images, labels), axis)
    return jax.tree.map(lambda w, g: w - RATE * g, layers, gradient), loss


ESCAPE_LIMIT = 20_000  # so large that the loop costs much more than the call


def escape_time(c: jax.Array) -> jax.Array:
    """The number of iterations of z → z² + c until z leaves the disc of radius 2, at most ESCAPE_LIMIT.

    Args:
        c: The real and imaginary parts, of shape (2,).

    Returns:
        The number of iterations, an int32 scalar.
    """

    def goes_on(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        rounds, x, y = state
        return (rounds < ESCAPE_LIMIT) & (x * x + y * y <= 4)

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        rounds, x, y = state
        return rounds + 1, x * x - y * y + c[0], 2 * x * y + c[1]

    return lax.while_loop(goes_on, step, (jnp.int32(0), jnp.float32(0), jnp.float32(0)))[0]


def plane(points: int) -> np.ndarray:
    """A grid of points in [−2, 1] × [−1.5, 1.5], of shape (points, 2)."""
    side = int(points**0.5)
    x, y = np.meshgrid(np.linspace(-2, 1, side), np.linspace(-1.5, 1.5, side))
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)


def small(x: jax.Array, axis: Any = AXIS) -> jax.Array:
    """A program with a few equations and one psum."""
    return jax.nn.softmax(jnp.sin(x) * 2 + 1) / lax.psum(x * x, axis)


def large(x: jax.Array, axis: Any = AXIS, *, equations: int) -> jax.Array:
    """A program with about this number of equations, in loops in branches in loops, and one pmean."""
    block = equations // 8

    def chain(x: jax.Array, count: int) -> jax.Array:
        for k in range(count // 6):  # 6 equations: gt, sin, mul, add, and two for where
            x = jnp.where(x > k, lax.sin(x) * 0.5, x + 0.01 * k)
        return x

    def inner(k: jax.Array, x: jax.Array) -> jax.Array:
        return lax.cond((k > 0) & (x.sum() > 0), lambda x: chain(x, block), lambda x: chain(-x, block), x)

    def outer(x: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = lax.fori_loop(0, 2, lambda _, x: inner(k, x), x)
        return chain(x, 2 * block), x.sum()

    x, sums = lax.scan(outer, x, jnp.arange(3))
    x = lax.switch(
        jnp.int32(sums[0] > 0),
        [lambda x: chain(x, block), lambda x: lax.fori_loop(0, 2, lambda _, x: chain(x, block), x)],
        x,
    )
    return chain(x, 2 * block) + lax.pmean(sums.sum(), axis)
