"""Steps of data-parallel training of four small models, for the benchmarks of ``deterministic=True`` and its tests."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

#: The name of the mapped axis.
AXIS = "i"

#: Examples of a replica in a step, and the number of classes.
BATCH, CLASSES = 32, 10

OPTIMIZER = optax.adam(3e-3)

Params = Any

#: Computes the logits of a batch, from the parameters, the examples, and a random key.
Model = Callable[[Params, jax.Array, jax.Array], jax.Array]


def mlp(params: Params, x: jax.Array, key: jax.Array) -> jax.Array:
    """An MLP on vectors of 64 numbers, with 100,000 parameters."""
    del key
    return _layers(params, x.reshape(len(x), -1)[:, :64])


def convnet(params: Params, x: jax.Array, key: jax.Array) -> jax.Array:
    """Two convolutions of images of 16 x 16 pixels, and a dense layer."""
    del key
    kernels, last = params
    x = x.reshape(-1, 1, 16, 16)
    for w in kernels:
        x = jax.nn.relu(lax.conv_general_dilated(x, w, (2, 2), "SAME"))
    return _layers(last, x.reshape(len(x), -1))


def attention(params: Params, x: jax.Array, key: jax.Array) -> jax.Array:
    """A block of a transformer on sequences of 16 vectors, with dropout."""
    into, out, last = params
    x = x.reshape(-1, 16, 16) @ into[0]
    normal = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    q, k, v = (jnp.reshape(normal @ w, (*x.shape[:2], 4, -1)) for w in into[1:])
    weights = jax.nn.softmax(jnp.einsum("bthc,bshc->bhts", q, k) * q.shape[-1] ** -0.5)
    weights = jnp.where(jax.random.bernoulli(key, 0.9, weights.shape), weights / 0.9, 0)
    x = x + jnp.einsum("bhts,bshc->bthc", weights, v).reshape(x.shape) @ out
    return _layers(last, x.mean(1))


def recurrent(params: Params, x: jax.Array, key: jax.Array) -> jax.Array:
    """A gated recurrent unit on sequences of 16 vectors."""
    del key
    (gates, candidate), last = params

    def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        update, reset = jnp.split(jax.nn.sigmoid(jnp.concatenate([x, h], 1) @ gates), 2, 1)
        new = jnp.tanh(jnp.concatenate([x, reset * h], 1) @ candidate)
        return (1 - update) * h + update * new, None

    h, _ = lax.scan(step, jnp.zeros((len(x), candidate.shape[1])), x.reshape(-1, 16, 16).swapaxes(0, 1))
    return _layers(last, h)


MODELS: dict[str, Model] = {model.__name__: model for model in (mlp, convnet, attention, recurrent)}


def _layers(params: Params, x: jax.Array) -> jax.Array:
    """Dense layers."""
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def parameters(model: str) -> Params:
    """The first parameters."""
    random = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return random.normal(size=shape, scale=np.prod(shape[:-1]) ** -0.5).astype(np.float32)

    def layers(*sizes: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(array(a, b), np.zeros(b, np.float32)) for a, b in itertools.pairwise(sizes)]

    match model:
        case "mlp":
            return layers(64, 256, 256, 64, CLASSES)
        case "convnet":
            kernels = [array(b, a, 3, 3) * np.float32(b**0.5) for a, b in ((1, 16), (16, 32))]
            return kernels, layers(4 * 4 * 32, CLASSES)
        case "attention":
            return [array(16, 64), *(array(64, 64) for _ in range(3))], array(64, 64), layers(64, 128, CLASSES)
        case _:
            return (array(80, 128), array(80, 64)), layers(64, CLASSES)


def examples(replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples ``(replicas, BATCH, 256)`` float32 and classes ``(replicas, BATCH)`` int32, which can be learned."""
    random = np.random.default_rng(replicas)
    x = random.normal(size=(replicas, BATCH, 256)).astype(np.float32)
    return x, np.argmax(x[..., :CLASSES], -1).astype(np.int32)


def step(
    model: Model, params: Params, state: Any, x: jax.Array, y: jax.Array, number: jax.Array
) -> tuple[Params, Any, jax.Array]:
    """One step of a replica. Returns the new parameters, the new state of the optimizer, and the mean loss."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), number), lax.axis_index(AXIS))

    def loss_of(params: Params) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(params, x, key), y))

    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, state = OPTIMIZER.update(lax.pmean(gradient, AXIS), state, params)
    return optax.apply_updates(params, updates), state, lax.pmean(loss, AXIS)


def training(model: str, replicas: int) -> tuple[Callable[..., Any], Sequence[Any]]:
    """The step of a model, and its arguments. The first two, and the last, are equal in all replicas."""
    params = parameters(model)
    run = functools.partial(step, MODELS[model])
    return run, (params, OPTIMIZER.init(params), *examples(replicas), np.int32(0))


#: The options of ``pmap`` for these steps.
OPTIONS: dict[str, Any] = {"axis_name": AXIS, "in_axes": (None, None, 0, 0, None), "out_axes": None}
