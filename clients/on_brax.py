"""brax: training on several devices."""

import numpy as np
from brax import envs
from brax.training.agents.apg import train as apg
from brax.training.agents.ars import train as ars
from brax.training.agents.es import train as es
from brax.training.agents.ppo import train as ppo
from brax.training.agents.sac import train as sac

PACKAGES = ["brax"]


def check(metrics, params):
    assert np.isfinite(metrics["eval/episode_reward"]), metrics
    assert metrics["eval/episode_reward"] > 100, metrics
    assert params is not None


def with_ppo():
    """PPO as shipped"""
    _, params, metrics = ppo.train(
        envs.get_environment("fast"), num_timesteps=2**13, episode_length=128, num_envs=64, learning_rate=3e-4,
        entropy_cost=1e-2, discounting=0.95, unroll_length=5, batch_size=64, num_minibatches=8,
        num_updates_per_batch=2, normalize_observations=True, seed=2, num_evals=2, reward_scaling=10,
    )  # fmt: skip
    check(metrics, params)


def with_ars():
    """ARS as shipped"""
    _, params, metrics = ars.train(
        envs.get_environment("fast"), num_timesteps=2**14, episode_length=128, number_of_directions=32,
        top_directions=8, num_evals=2, normalize_observations=True,
    )  # fmt: skip
    check(metrics, params)


def with_es():
    """ES as shipped"""
    _, params, metrics = es.train(
        envs.get_environment("fast"), num_timesteps=2**14, episode_length=128, population_size=32, num_evals=2,
    )  # fmt: skip
    check(metrics, params)


def with_sac():
    """SAC as shipped"""
    _, params, metrics = sac.train(
        envs.get_environment("fast"), num_timesteps=2**11, episode_length=128, num_envs=64, learning_rate=3e-4,
        discounting=0.99, batch_size=64, normalize_observations=True, reward_scaling=10, grad_updates_per_step=8,
        num_evals=2, min_replay_size=1024, seed=0,
    )  # fmt: skip
    check(metrics, params)


def with_apg():
    """APG as shipped"""
    _, params, metrics = apg.train(
        envs.get_environment("fast"), episode_length=128, num_envs=64, num_evals=2, policy_updates=2,
        horizon_length=16, learning_rate=3e-4, normalize_observations=True,
    )  # fmt: skip
    check(metrics, params)


CASES = [with_ppo, with_ars, with_es, with_sac, with_apg]
