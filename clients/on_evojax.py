"""evojax: a population of policies on several devices."""

import tempfile
from contextlib import contextmanager

import jax
import numpy as np
from evojax.algo import PGPE
from evojax.policy import MLPPolicy
from evojax.sim_mgr import SimManager
from evojax.task.cartpole import CartPoleSwingUp
from evojax.trainer import Trainer

PACKAGES = ["evojax"]


class Short(CartPoleSwingUp):
    def __init__(self, test):
        super().__init__(test=test)
        self.max_steps = 20


def parts():
    train, test = Short(test=False), Short(test=True)
    policy = MLPPolicy(input_dim=train.obs_shape[0], hidden_dims=[8], output_dim=train.act_shape[0])
    solver = PGPE(pop_size=16, param_size=policy.num_params, optimizer="adam", seed=0)
    return train, test, policy, solver


def scores(**options):
    train, test, policy, solver = parts()
    manager = SimManager(
        n_repeats=2, test_n_repeats=1, pop_size=16, n_evaluations=8, policy_net=policy, train_vec_task=train,
        valid_vec_task=test, seed=0, obs_normalizer=None, use_for_loop=False, **options,
    )  # fmt: skip
    return manager.eval_params(params=solver.ask(), test=False)[0]


@contextmanager
def tree_map_put_back():
    """evojax calls jax.tree_map, which JAX 0.6 removed, wherever it has several devices."""
    vars(jax)["tree_map"] = jax.tree.map
    try:
        yield
    finally:
        del vars(jax)["tree_map"]


def as_shipped():
    """SimManager: rollouts of a population"""
    scores()


@tree_map_put_back()
def rollouts():
    """the same, jax.tree_map put back"""
    out = np.asarray(scores())
    assert out.shape == (16,)
    assert np.isfinite(out).all()
    return [float(x) for x in out]


@tree_map_put_back()
def training():
    """Trainer: PGPE on CartPole, jax.tree_map put back"""
    train, test, policy, solver = parts()
    trainer = Trainer(
        policy=policy, solver=solver, train_task=train, test_task=test, max_iter=3, log_interval=1, test_interval=3,
        n_repeats=2, n_evaluations=8, seed=0, log_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    score = float(trainer.run(demo_mode=False))
    assert np.isfinite(score)
    return [score]


CASES = [as_shipped, rollouts, training]
OF_ITS_OWN = {as_shipped: "module 'jax' has no attribute 'tree_map'"}
