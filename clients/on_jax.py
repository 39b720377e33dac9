"""Programs that use only JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, pmap

PACKAGES = ["jax"]
devices = jax.local_devices()


@partial(pmap, axis_name="batch", donate_argnums=0)
def step(w, x, y):
    loss, grads = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2))(w)
    return w - 0.1 * lax.pmean(grads, "batch"), lax.pmean(loss, "batch")


def train(n):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(n, 4, 3)), np.arange(3.0)
    state = jnp.zeros((n, 3))
    for _ in range(100):
        state, loss = step(state, x, x @ w)
        loss.block_until_ready()  # many unfinished steps can occupy all threads of XLA's CPU client
    np.testing.assert_allclose(state, np.tile(w, (n, 1)), atol=0.05)


def eight():
    """a training step on 8 devices"""
    train(8)


def twelve():
    """a training step for 12 replicas"""
    train(12)


def four_to_eight():
    """a state made on 4 devices handed to 8"""
    four = pmap(lambda i: {"w": jnp.full(3, i)}, devices=devices[:4])(jnp.arange(4.0))
    eight = jax.tree.map(lambda w: jnp.concatenate([w, w]), four)
    total = pmap(lambda s: lax.psum(s["w"], "i"), axis_name="i")
    np.testing.assert_array_equal(total(eight), np.full((8, 3), 12))
    on_eight = pmap(lambda w, s: w * s["w"], in_axes=(0, None))(jnp.arange(8.0), four)
    np.testing.assert_array_equal(on_eight[7], np.tile(np.arange(4.0)[:, None] * 7, (1, 3)))


def nested():
    """a map inside a map"""
    x = np.arange(8.0).reshape(2, 4)

    def inner(x):
        return x / lax.psum(x, ("rows", "columns")) + lax.psum(x, "columns")

    ours = pmap(pmap(inner, axis_name="columns"), axis_name="rows")(x)
    theirs = jax.vmap(jax.vmap(inner, axis_name="columns"), axis_name="rows")(x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def removed():
    """device_put_replicated and device_put_sharded"""
    w = jax.device_put_replicated({"w": np.ones(3)}, devices)
    x = jax.device_put_sharded([np.full(3, i) for i in range(8)], devices)
    np.testing.assert_array_equal(pmap(lambda w, x: w["w"] * x)(w, x)[:, 0], np.arange(8))


def any_replica():
    """out_axes=None for what differs"""
    assert float(pmap(lambda x: x + 1, out_axes=None)(np.arange(8.0))) == 1


CASES = [eight, twelve, four_to_eight, nested, removed, any_replica]
