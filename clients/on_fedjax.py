"""fedjax: federated clients on several devices."""

import fedjax
import jax
import jax.numpy as jnp
import numpy as np

PACKAGES = ["fedjax"]
rng = np.random.default_rng(0)


def clients(n):
    sizes = np.random.default_rng(1).integers(3, 9, size=n)
    for i, size in enumerate(sizes):
        x = rng.normal(size=(size, 2)).astype(np.float32)
        yield i, {"x": x, "y": x @ np.array([1.0, -2.0], np.float32)}


def per_client(backend, data):
    def init(shared, start):
        return {"w": shared["w"] + start, "steps": 0}

    def step(state, batch):
        grads = jax.grad(lambda w: jnp.mean((batch["x"] @ w - batch["y"]) ** 2))(state["w"])
        return {"w": state["w"] - 0.1 * grads, "steps": state["steps"] + 1}, {"norm": jnp.sum(grads**2)}

    def final(shared, state):
        return {"delta": shared["w"] - state["w"], "steps": state["steps"]}

    shared = {"w": jnp.ones(2)}
    with fedjax.for_each_client_backend(backend):
        run = fedjax.for_each_client(init, step, final, with_step_result=True)
        dataset = [
            (i, list(fedjax.ClientDataset(d).batch(batch_size=3, drop_remainder=True)), jnp.float32(i)) for i, d in data
        ]
        return {i: (out, steps) for i, out, steps in run(shared, dataset)}


def each_client():
    """for_each_client with the pmap backend, 11 clients"""
    data = list(clients(11))
    ours, theirs = per_client("pmap", data), per_client("jit", data)
    assert sorted(ours) == sorted(theirs) == list(range(11))
    for i in ours:
        # fedjax expects addressable_data to drop the mapped axis, as before JAX 0.8. Now an axis of length 1 remains.
        assert int(np.ravel(ours[i][0]["steps"])[0]) == int(theirs[i][0]["steps"])
        np.testing.assert_allclose(np.ravel(ours[i][0]["delta"]), np.ravel(theirs[i][0]["delta"]), rtol=1e-4, atol=1e-5)
        assert len(ours[i][1]) == len(theirs[i][1])


def averaging():
    """federated averaging"""
    average()


def averaging_with_tree_map():
    """federated averaging, jax.tree_map put back"""
    vars(jax)["tree_map"] = jax.tree.map
    try:
        return average()
    finally:
        del vars(jax)["tree_map"]


def average():
    def grad(params, batch, _):
        return jax.grad(lambda w: jnp.mean((batch["x"] @ w - batch["y"]) ** 2))(params)

    data = [(i, fedjax.ClientDataset(d), jax.random.PRNGKey(i)) for i, d in clients(11)]
    with fedjax.for_each_client_backend("pmap"):
        algorithm = fedjax.algorithms.fed_avg.federated_averaging(
            grad, fedjax.optimizers.sgd(0.1), fedjax.optimizers.sgd(1.0),
            fedjax.ShuffleRepeatBatchHParams(batch_size=3, num_epochs=1, seed=0),
        )  # fmt: skip
        state = algorithm.init(jnp.zeros(2))
        for _ in range(10):
            state, _ = algorithm.apply(state, data)
    np.testing.assert_allclose(np.ravel(state.params), [1, -2], atol=0.1)


CASES = [each_client, averaging, averaging_with_tree_map]
OF_ITS_OWN = {
    averaging: "module 'jax' has no attribute 'tree_map'",
    # fedjax expects addressable_data to return one client's model without the mapped axis, as before JAX 0.8.
    averaging_with_tree_map: "dot_general requires contracting dimensions to have the same shape, got (2,) and (1,)",
}
