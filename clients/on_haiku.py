"""haiku: a small residual network like its ImageNet example, which uses the device count."""

import functools
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

PACKAGES = ["dm-haiku", "optax"]
COUNTS_DEVICES = True

CLASSES, STEPS, PER_DEVICE = 4, 20, 8


class TrainState(NamedTuple):
    params: hk.Params
    state: hk.State
    opt_state: optax.OptState


def forward(batch, is_training):
    def norm(x):
        return hk.BatchNorm(True, True, 0.9, cross_replica_axis="i")(x, is_training)

    x = jax.nn.relu(norm(hk.Conv2D(8, 3, with_bias=False)(batch["images"])))
    x = x + jax.nn.relu(norm(hk.Conv2D(8, 3, with_bias=False)(x)))
    return hk.Linear(CLASSES)(jnp.mean(x, axis=(1, 2)))


net = hk.transform_with_state(forward)
optimizer = optax.sgd(optax.cosine_decay_schedule(0.2, STEPS), momentum=0.9, nesterov=True)


def initial_state(rng, batch):
    params, state = net.init(rng, batch, is_training=True)
    return TrainState(params, state, optimizer.init(params))


def loss_fn(params, state, batch):
    logits, state = net.apply(params, state, None, batch, is_training=True)
    loss = optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch["labels"], CLASSES)).mean()
    decay = 0.5 * sum(jnp.sum(p**2) for name, p in params.items() if "norm" in name for p in p.values())
    return loss + 1e-4 * decay, (loss, state)


@functools.partial(jax.pmap, axis_name="i", donate_argnums=(0,))
def train_step(train_state, batch):
    params, state, opt_state = train_state
    grads, (loss, new_state) = jax.grad(loss_fn, has_aux=True)(params, state, batch)
    grads = jax.lax.pmean(grads, axis_name="i")
    updates, opt_state = optimizer.update(grads, opt_state)
    scalars = jax.lax.pmean({"train_loss": loss, "grad_norm": optax.global_norm(grads)}, axis_name="i")
    return TrainState(optax.apply_updates(params, updates), new_state, opt_state), scalars


@jax.jit
def eval_batch(params, state, batch):
    logits, _ = net.apply(params, state, None, batch, is_training=False)
    return jnp.sum(jnp.argmax(logits, axis=-1) == batch["labels"])


def load(seed, batch_dims):
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(9).normal(size=(CLASSES, 1, 1, 3))
    while True:
        labels = rng.integers(0, CLASSES, batch_dims)
        images = patterns[labels] + rng.normal(size=(*batch_dims, 8, 8, 3))
        yield {"images": images.astype(np.float32), "labels": labels}


def device_put_sharded(tree, devices):
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    shards = [jax.tree_util.tree_unflatten(treedef, [x[i] for x in leaves]) for i in range(leaves[0].shape[0])]
    return jax.device_put_sharded(shards, devices)


def double_buffer(batches):
    """Transfers the next batch ahead of its use."""
    batch, devices = None, jax.local_devices()
    for following in batches:
        following = device_put_sharded(following, devices)
        if batch is not None:
            yield batch
        batch = following


def training():
    """ImageNet-like: training, evaluation"""
    local_device_count = jax.local_device_count()
    data = double_buffer(load(0, [local_device_count, PER_DEVICE]))
    batch = next(data)
    rng = jax.random.PRNGKey(42)
    rng = jnp.broadcast_to(rng, (local_device_count, *rng.shape))
    train_state = jax.pmap(initial_state, axis_name="i")(rng, batch)
    step_count = jax.device_put_replicated(jnp.zeros((), jnp.int32), jax.local_devices())
    count = jax.pmap(lambda n: n + jax.lax.psum(1, "i"), axis_name="i")
    losses, norms = [], []
    for _ in range(STEPS):
        train_state, scalars = train_step(train_state, batch)
        step_count = count(step_count)
        scalars = jax.device_get(jax.tree.map(lambda x: x[0], scalars))
        losses.append(float(scalars["train_loss"]))
        norms.append(float(scalars["grad_norm"]))
        batch = next(data)
    assert losses[-1] < 0.7 * losses[0]
    params, state, _ = jax.tree.map(lambda x: x[0], train_state)
    right = sum(int(eval_batch(params, state, batch)) for batch, _ in zip(load(1, [32]), range(4), strict=False))
    means = [float(jnp.sum(x)) for x in jax.tree.leaves(state)]
    return [*losses, *norms, float(right), float(step_count[0]), *means]


CASES = [training]
