"""Trains a classifier of handwritten digits, and goes on after the death of a process, with as many as are left.

    pip install 'replicax[examples]'
    replicax launch -n 4 --max-restarts 3 --min-processes 1 --heartbeat 10 examples/train_resumable.py

The number of replicas stays the same with any number of processes and devices, and with ``deterministic=True`` so does
every bit: the run ends with the parameters of one that nobody killed. It prints their fingerprint at the end. The
checkpoint (orbax) has the state of all replicas, and the position in the data (grain), which is one integer. Kill any
process, or stop the whole run with Ctrl-C or SIGTERM and start it again: it goes on from the last checkpoint.

With one process, on simulated CPU devices, first 8 and then 3:

    JAX_NUM_CPU_DEVICES=8 python examples/train_resumable.py --steps 50
    JAX_NUM_CPU_DEVICES=3 python examples/train_resumable.py --steps 100
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from grain.experimental import ElasticIterator
from sklearn.datasets import load_digits

import replicax

OPTIMIZER = optax.adam(1e-2)


def loss_of(params, key, images, labels):
    """The mean loss of a batch, with noise on the images."""
    images = images + 0.1 * jax.random.normal(key, images.shape)
    hidden = jnp.tanh(images @ params["hidden"])
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(hidden @ params["out"]), labels[:, None], axis=1))


def train_step(params, optimizer, key, images, labels):
    """One step of one replica: all have equal parameters, and each has a random key of its own."""
    key, now = jax.random.split(key)
    loss, gradient = jax.value_and_grad(loss_of)(params, now, images, labels)
    updates, optimizer = OPTIMIZER.update(jax.lax.pmean(gradient, "replica"), optimizer, params)
    return optax.apply_updates(params, updates), optimizer, key, jax.lax.pmean(loss, "replica")


def initial_state(replicas, mine):
    """The parameters, the state of the optimizer, and the keys of the replicas of this process."""
    random = np.random.default_rng(0)
    params = {
        "hidden": random.normal(size=(64, 32), scale=0.1).astype(np.float32),
        "out": random.normal(size=(32, 10), scale=0.1).astype(np.float32),
    }
    keys = np.stack([np.asarray(jax.random.PRNGKey(replica)) for replica in range(replicas)])
    return params, OPTIMIZER.init(params), keys[mine.start : mine.stop]


def as_global(params, optimizer, keys):
    """The state of all replicas, for a checkpoint."""
    shared = {"params": params, "optimizer": optimizer}
    return replicax.to_global(shared, axis=None) | {"keys": replicax.to_global(keys)}


def digest_of(params, optimizer):
    """A short hash of all bits."""
    every = replicax.testing.fingerprint((params, optimizer), axis=None)
    return hashlib.sha256(json.dumps(every).encode()).hexdigest()[:16]


def batches_of(replicas, batch, mine):
    """An iterator for each replica of this process: every replica reads its own part of each global batch."""
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target
    examples = grain.MapDataset.range(len(labels)).shuffle(seed=0).repeat().map(lambda k: (images[k], labels[k]))
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return [
        ElasticIterator(examples, replicas * batch, grain.ShardOptions(replica, replicas), read_options=reading)
        for replica in mine
    ]


def main():
    """Trains, from the last checkpoint if there is one."""
    parser = argparse.ArgumentParser(description="A training run that can be killed")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16, help="examples of a replica in a step")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--every", type=int, default=5, help="steps between two checkpoints")
    options = parser.parse_args()

    replicax.distributed.initialize()
    mine = replicax.distributed.replicas(options.replicas)  # the replicas of this process
    params, optimizer, keys = initial_state(options.replicas, mine)
    batches = batches_of(options.replicas, options.batch, mine)
    in_axes, out_axes = (None, None, 0, 0, 0), (None, None, 0, None)
    step = replicax.pmap(train_step, "replica", in_axes=in_axes, out_axes=out_axes, deterministic=True)
    policy = ocp.CheckpointManagerOptions(save_interval_steps=options.every, max_to_keep=2)
    with ocp.CheckpointManager(options.checkpoints.absolute(), options=policy) as manager:
        first = manager.latest_step() or 0
        if first:
            progress = manager.restore(first, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress
            if progress["replicas"] != options.replicas:
                sys.exit(f"{options.checkpoints} has a checkpoint of {progress['replicas']} replicas")
            like = ocp.args.StandardRestore(as_global(params, optimizer, keys))
            state = manager.restore(first, args=ocp.args.Composite(state=like)).state
            params, optimizer = replicax.to_local((state["params"], state["optimizer"]), axis=None)
            keys = replicax.to_local(state["keys"])
            for shard in batches:
                shard.set_state(progress["data"])
        for number in range(first + 1, options.steps + 1):
            images, labels = (np.stack(rows) for rows in zip(*map(next, batches), strict=True))
            params, optimizer, keys, loss = step(params, optimizer, keys, images, labels)
            loss = float(loss)  # waits for the step
            replicax.distributed.heartbeat(number)
            if jax.process_index() == 0:
                print(f"step {number} loss {loss:.7f}", flush=True)
            if manager.should_save(number):  # also once after SIGTERM
                state = ocp.args.StandardSave(as_global(params, optimizer, keys))
                progress = ocp.args.JsonSave({"replicas": options.replicas, "data": batches[0].get_state()})
                manager.save(number, args=ocp.args.Composite(state=state, progress=progress))
            if manager.reached_preemption(number):
                manager.wait_until_finished()
                print(f"stopped by SIGTERM, with a checkpoint of step {number}", flush=True)
                sys.exit(0)
        replicax.distributed.heartbeat(None)  # what follows may take longer than a step
        digest = digest_of(params, optimizer)
        if jax.process_index() == 0:
            print(f"fingerprint of the parameters and the optimizer: {digest}", flush=True)


if __name__ == "__main__":
    main()
