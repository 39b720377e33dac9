"""brax: training on several devices."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from brax import envs
from brax.training.agents.apg import train as apg
from brax.training.agents.ars import train as ars
from brax.training.agents.es import train as es
from brax.training.agents.ppo import train as ppo
from brax.training.agents.sac import train as sac
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PACKAGES = ["brax"]


def rewards_of(agent, environment="fast", **options):
    """Trains a policy, and returns the reward at each evaluation."""
    rewards = []
    _, params, metrics = agent.train(
        envs.get_environment(environment),
        progress_fn=lambda _, metrics: rewards.append(float(metrics["eval/episode_reward"])),
        seed=2,
        num_eval_envs=32,
        **options,
    )
    assert params is not None
    assert all(np.isfinite(np.asarray(x)).all() for x in metrics.values()), metrics
    return rewards


def with_ppo():
    """PPO as shipped"""
    rewards = rewards_of(
        ppo, num_timesteps=2**14, episode_length=128, num_envs=64, learning_rate=3e-3, entropy_cost=1e-2,
        discounting=0.95, unroll_length=5, batch_size=64, num_minibatches=8, num_updates_per_batch=4,
        normalize_observations=True, num_evals=2, reward_scaling=10, normalize_advantage=False,
    )  # fmt: skip
    assert rewards[-1] > rewards[0] + 1, rewards  # how much it learns depends on the processor
    return rewards


def with_ppo_and_the_guide():
    """PPO with the device_put_replicated of JAX's migration guide"""

    def replicated(tree, devices):
        where = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec("x"))
        return jax.tree.map(lambda x: jax.device_put(jnp.stack([x] * len(devices)), where), tree)

    with mock.patch("jax.device_put_replicated", replicated, create=True):
        return with_ppo()


def with_ars():
    """ARS as shipped"""
    rewards = rewards_of(
        ars, "inverted_pendulum", num_timesteps=2**14, episode_length=64, number_of_directions=32, top_directions=8,
        num_evals=2,
    )  # fmt: skip
    assert rewards[-1] > 1, rewards
    return rewards


def with_es():
    """ES as shipped"""
    return rewards_of(es, num_timesteps=2**14, episode_length=128, population_size=32, num_evals=2)


def with_sac():
    """SAC as shipped"""
    rewards = rewards_of(
        sac, num_timesteps=2**13, episode_length=128, num_envs=64, learning_rate=3e-3, discounting=0.99,
        batch_size=64, normalize_observations=True, reward_scaling=10, grad_updates_per_step=32, num_evals=2,
        min_replay_size=1024,
    )  # fmt: skip
    assert rewards[-1] > rewards[0] + 1, rewards  # how much it learns depends on the processor
    return rewards


def with_apg():
    """APG as shipped"""
    return rewards_of(
        apg, episode_length=128, num_envs=64, num_evals=2, policy_updates=2, horizon_length=16, learning_rate=3e-4,
        normalize_observations=True,
    )  # fmt: skip


CASES = [with_ppo, with_ppo_and_the_guide, with_ars, with_es, with_sac, with_apg]
