"""flax: an ensemble with one model per device, like its ensembling guide, which uses the device count."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import jax_utils
from flax.training import common_utils, train_state

PACKAGES = ["flax", "optax"]
COUNTS_DEVICES = True

EPOCHS, BATCH, CLASSES = 3, 16, 4


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(CLASSES)(x.reshape((x.shape[0], -1)))


@functools.partial(jax.pmap, static_broadcasted_argnums=(1, 2))
def create_train_state(rng, rate, momentum):
    params = Cnn().init(rng, jnp.ones((1, 8, 8, 1)))["params"]
    return train_state.TrainState.create(apply_fn=Cnn().apply, params=params, tx=optax.sgd(rate, momentum))


@jax.pmap
def apply_model(state, images, labels):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        loss = optax.softmax_cross_entropy(logits, common_utils.onehot(labels, CLASSES)).mean()
        return loss, logits

    (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return grads, loss, jnp.mean(jnp.argmax(logits, -1) == labels)


@jax.pmap
def update_model(state, grads):
    return state.apply_gradients(grads=grads)


def dataset(size, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, size)
    images = rng.normal(size=(size, 8, 8, 1)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):  # makes the corner of this class brighter
        image[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 0.7
    return {"image": images, "label": labels}


def train_epoch(state, data, rng):
    size = data["image"].shape[1]
    orders = jax.random.permutation(rng, size)[: size // BATCH * BATCH].reshape((-1, BATCH))
    losses, accuracies = [], []
    for order in orders:
        grads, loss, accuracy = apply_model(state, data["image"][:, order, ...], data["label"][:, order, ...])
        state = update_model(state, grads)
        losses.append(jax.device_get(loss))
        accuracies.append(jax.device_get(accuracy))
    return state, np.mean(losses, axis=0), np.mean(accuracies, axis=0)


def training():
    """an ensemble, one model a device"""
    n = jax.local_device_count()
    train, test = (jax_utils.replicate(dataset(128, 0)), jax_utils.replicate(dataset(64, 1)))
    assert train["image"].shape == (n, 128, 8, 8, 1)
    rng, init_rng = jax.random.split(jax.random.PRNGKey(0))
    state = create_train_state(jax.random.split(init_rng, jax.device_count()), 0.1, 0.9)
    told: list[float] = []
    for _ in range(EPOCHS):
        rng, epoch_rng = jax.random.split(rng)
        state, loss, accuracy = train_epoch(state, train, epoch_rng)
        _, test_loss, test_accuracy = apply_model(state, test["image"], test["label"])
        for x in (loss, accuracy, test_loss, test_accuracy):
            assert x.shape == (n,)
            told.extend(map(float, x))
    assert min(told[-n:]) > 0.5
    assert len({*told[:n]}) == n, "the models differ"
    first = jax_utils.unreplicate(state)
    np.testing.assert_allclose(Cnn().apply({"params": first.params}, dataset(64, 1)["image"]).shape, (64, CLASSES))
    return [*told, *(float(jnp.linalg.norm(x)) for x in jax.tree.leaves(first.params))]


CASES = [training]
