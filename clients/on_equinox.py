"""equinox: filter_pmap."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

PACKAGES = ["equinox"]


def models(n):
    return eqx.filter_vmap(lambda key: eqx.nn.MLP(2, 1, 8, 1, key=key))(jax.random.split(jax.random.key(0), n))


def ensemble(n):
    model, x = models(n), np.random.default_rng(0).normal(size=(n, 5, 2)).astype(np.float32)

    def apply(model, x):
        return jax.vmap(model)(x), "text", jnp.sum(x)

    ours, text, _ = eqx.filter_pmap(apply, axis_name="i")(model, x)
    assert text == "text"
    np.testing.assert_allclose(ours, eqx.filter_vmap(apply)(model, x)[0], rtol=1e-5)


def eight():
    """filter_pmap of 8 models"""
    ensemble(8)


def twelve():
    """filter_pmap of 12 models"""
    ensemble(12)


def train(n):
    model = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
    optimizer = optax.adam(1e-2)
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    x = np.random.default_rng(0).normal(size=(n, 5, 2)).astype(np.float32)
    y = np.sin(x.sum(-1, keepdims=True))

    def step(model, state, x, y):
        def loss_of(model):
            return jnp.mean((jax.vmap(model)(x) - y) ** 2)

        loss, grads = eqx.filter_value_and_grad(loss_of)(model)
        grads, loss = lax.pmean(grads, "batch"), lax.pmean(loss, "batch")
        updates, state = optimizer.update(grads, state)
        return eqx.apply_updates(model, updates), state, loss

    mapped = eqx.filter_pmap(step, in_axes=(None, None, 0, 0), out_axes=None, axis_name="batch")
    losses = []
    for _ in range(20):
        model, state, loss = mapped(model, state, x, y)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert np.shape(model.layers[0].weight) == (8, 2)


def training():
    """a training step, out_axes=None"""
    train(8)


def training_twelve():
    """a training step of 12 replicas"""
    train(12)


def lowered():
    """filter_pmap(...).lower(...).compile()"""
    model, x = models(8), np.ones((8, 2), np.float32)
    mapped = eqx.filter_pmap(lambda model, x: model(x))
    np.testing.assert_allclose(mapped.lower(model, x).compile()(model, x), mapped(model, x))


CASES = [eight, twelve, training, training_twelve, lowered]
