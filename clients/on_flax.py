"""flax: jax_utils, TrainState, linen and nnx."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import jax_utils, nnx
from flax.training import common_utils
from flax.training.train_state import TrainState

PACKAGES = ["flax", "optax"]


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(nn.Dense(8)(x))
        return nn.Dense(3)(nn.relu(x))


class State(TrainState):
    batch_stats: dict[str, object]


@functools.partial(jax.pmap, axis_name="batch", donate_argnums=(0,))
def train_step(state, batch):
    def loss_of(params):
        logits, new = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats}, batch["x"], mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), new

    (loss, new), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    state = state.apply_gradients(grads=jax.lax.pmean(grads, "batch"), batch_stats=new["batch_stats"])
    return state, jax.lax.pmean({"loss": loss}, "batch")


def batches(n):
    rng = np.random.default_rng(0)
    for _ in range(30):
        x = rng.normal(size=(n * 4, 5)).astype(np.float32)
        yield {"x": x, "y": x[:, :3].argmax(1)}


def make_state():
    variables = Model().init(jax.random.key(0), jnp.ones((4, 5)), train=False)
    return State.create(
        apply_fn=Model().apply, params=variables["params"], batch_stats=variables["batch_stats"], tx=optax.adam(3e-2)
    )


def training():
    """TrainState, replicate, prefetch_to_device, unreplicate"""
    state = jax_utils.replicate(make_state())
    metrics = []
    for batch in jax_utils.prefetch_to_device(map(common_utils.shard, batches(8)), 2):
        state, metric = train_step(state, batch)
        metrics.append(metric)
    metrics = common_utils.get_metrics(metrics)
    assert metrics["loss"][-1] < 0.8 * metrics["loss"][0]
    assert int(jax_utils.unreplicate(state).step) == 30


def training_twelve():
    """the same step for 12 replicas"""
    state = jax.tree.map(lambda x: jnp.stack([x] * 12), make_state())
    losses = []
    for batch in batches(12):
        state, metric = train_step(state, jax.tree.map(lambda x: x.reshape(12, 4, *x.shape[1:]), batch))
        losses.append(float(metric["loss"][0]))
    assert losses[-1] < 0.8 * losses[0]


def padded():
    """pad_shard_unpad, on 21 rows"""
    state = make_state()
    x = next(batches(8))["x"][:21]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    predict = jax_utils.pad_shard_unpad(jax.pmap(lambda v, x: state.apply_fn(v, x, train=False)))
    ours = predict(jax_utils.replicate(variables), x)
    np.testing.assert_allclose(ours, state.apply_fn(variables, x, train=False), rtol=1e-4, atol=1e-5)


def cross_replica():
    """a mean of BatchNorm's statistics across replicas"""
    mean = jax.pmap(lambda x: jax.lax.pmean(x, "x"), "x")
    stats = jax_utils.replicate(make_state().batch_stats)
    assert jax.tree.all(jax.tree.map(np.allclose, mean(stats), stats))


def nnx_pmap():
    """nnx.pmap"""

    @nnx.pmap(in_axes=(None, 0), out_axes=0)
    def forward(model, x):
        return model(x)

    model, x = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.arange(16.0).reshape(8, 2)
    np.testing.assert_allclose(forward(model, x), model(x), rtol=1e-5)


CASES = [training, training_twelve, padded, cross_replica, nnx_pmap]
