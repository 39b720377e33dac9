"""flax: a translation model like its WMT example, which uses the device count."""

import collections
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import jax_utils
from flax.training import common_utils
from flax.training.train_state import TrainState

PACKAGES = ["flax", "optax"]
COUNTS_DEVICES = True

VOCABULARY, LENGTH, WIDTH, STEPS, PER_DEVICE = 16, 6, 16, 30, 4


class Translator(nn.Module):
    """Reads a sequence and writes it in reverse order."""

    @nn.compact
    def __call__(self, source, target, train):
        embed = nn.Embed(VOCABULARY, WIDTH)
        position = self.param("position", nn.initializers.normal(0.5), (LENGTH, WIDTH))
        memory = embed(source) + position
        memory = nn.LayerNorm()(memory + nn.SelfAttention(2, use_bias=False)(memory))
        x = embed(jnp.pad(target, ((0, 0), (1, 0)))[:, :-1]) + position
        x = nn.LayerNorm()(x + nn.SelfAttention(2, use_bias=False)(x, mask=nn.make_causal_mask(target)))
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2, use_bias=False)(x, memory))
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(nn.Dense(2 * WIDTH)(x)))
        return nn.Dense(VOCABULARY)(x)


def metrics_of(logits, targets, weights):
    loss = -jnp.sum(common_utils.onehot(targets, VOCABULARY) * nn.log_softmax(logits), axis=-1)
    right = jnp.equal(jnp.argmax(logits, axis=-1), targets)
    sums = {"loss": jnp.sum(loss * weights), "accuracy": jnp.sum(right * weights), "denominator": jnp.sum(weights)}
    return sums["loss"] / sums["denominator"], jax.lax.psum(sums, axis_name="batch")


def train_step(state, batch, dropout_rng, schedule):
    dropout_rng = jax.random.fold_in(dropout_rng, state.step)
    weights = jnp.where(batch["targets"] > 0, 1, 0).astype(jnp.float32)

    def loss_fn(params):
        rngs = {"dropout": dropout_rng}
        logits = state.apply_fn({"params": params}, batch["inputs"], batch["targets"], True, rngs=rngs)
        return metrics_of(logits, batch["targets"], weights)

    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    metrics["learning_rate"] = schedule(state.step)
    return state.apply_gradients(grads=jax.lax.pmean(grads, axis_name="batch")), metrics


def eval_step(params, batch):
    logits = Translator().apply({"params": params}, batch["inputs"], batch["targets"], False)
    return metrics_of(logits, batch["targets"], jnp.where(batch["targets"] > 0, 1.0, 0.0))[1]


def predict_step(inputs, params, length):
    """Greedy decoding. The length is a static argument."""
    target = jnp.zeros((inputs.shape[0], LENGTH), jnp.int32)
    for i in range(length):
        logits = Translator().apply({"params": params}, inputs, target, False)
        target = target.at[:, i].set(jnp.argmax(logits[:, i], axis=-1))
    return target


def sum_over_hosts(tree):
    """A sum over one device per host."""
    by_host = collections.defaultdict(list)
    for device in jax.devices():
        by_host[device.process_index].append(device)
    first = [devices[0] for devices in by_host.values()]
    total = jax.pmap(lambda x: jax.lax.psum(x, "i"), "i", devices=first)(jax.tree.map(lambda x: x[None], tree))
    return jax.tree.map(lambda x: x[0], total)


def on_host(x):
    devices, batch, *rest = x.shape
    return np.array(x).reshape((devices * batch, *rest))


def batches(size):
    rng = np.random.default_rng(0)
    while True:
        words = rng.integers(2, VOCABULARY, (size, LENGTH))
        words[:, 4:] *= rng.random((size, 1)) < 0.5  # some sentences are shorter
        yield {"inputs": words, "targets": words[:, ::-1].copy()}


def training():
    """WMT-like: training, evaluation, decoding"""
    n = jax.local_device_count()
    size = PER_DEVICE * n
    if size % jax.device_count():
        raise ValueError("The batch size is not a multiple of the number of devices.")
    rng, init_rng = jax.random.split(jax.random.PRNGKey(0))
    example = jnp.ones((1, LENGTH), jnp.int32)
    params = jax.jit(functools.partial(Translator().init, train=False))(init_rng, example, example)["params"]
    schedule = optax.linear_schedule(0.0, 1e-2, 10)
    state = TrainState.create(apply_fn=Translator().apply, params=params, tx=optax.adamw(schedule))
    state = jax_utils.replicate(state)

    p_train_step = jax.pmap(functools.partial(train_step, schedule=schedule), axis_name="batch", donate_argnums=(0,))
    p_eval_step = jax.pmap(eval_step, axis_name="batch")
    p_predict_step = jax.pmap(predict_step, axis_name="batch", static_broadcasted_argnums=(2,))

    dropout_rngs = common_utils.shard_prng_key(rng)
    data, train_metrics = batches(size), []
    for _ in range(STEPS):
        batch = common_utils.shard(jax.tree.map(np.asarray, next(data)))
        state, metrics = p_train_step(state, batch, dropout_rng=dropout_rngs)
        train_metrics.append(metrics)
    train_metrics = common_utils.get_metrics(train_metrics)
    rate = train_metrics.pop("learning_rate").mean()
    losses = train_metrics["loss"] / train_metrics["denominator"]
    assert losses.shape == (STEPS,)
    assert losses[-1] < 0.9 * losses[0]

    held_out = common_utils.shard(next(data))
    evaluated = common_utils.get_metrics([p_eval_step(state.params, held_out)])
    evaluated = jax.tree.map(jnp.sum, evaluated)
    written = on_host(p_predict_step(held_out["inputs"], state.params, LENGTH))
    assert written.shape == (size, LENGTH)
    right = sum_over_hosts({"right": np.sum(written == on_host(held_out["targets"]))})["right"]

    final = jax_utils.unreplicate(state)
    assert int(final.step) == STEPS
    assert final.params["position"].shape == (LENGTH, WIDTH)
    norms = [float(jnp.linalg.norm(x)) for x in jax.tree.leaves(final.params)]
    return [*map(float, losses), float(rate), *(float(evaluated[k]) for k in sorted(evaluated)), float(right), *norms]


CASES = [training]
