"""PyMC with blackjax's and numpyro's samplers: chains in parallel."""

import numpy as np
import pymc as pm
from pymc.sampling.jax import sample_blackjax_nuts, sample_numpyro_nuts

PACKAGES = ["pymc", "blackjax"]
data = np.random.default_rng(0).normal(3.0, 1.0, size=50)


def check(sample, chains):
    def means(method):
        with pm.Model():
            mean = pm.Normal("mean", 0.0, 10.0)
            pm.Normal("data", mean, 1.0, observed=data)
            drawn = sample(draws=100, tune=100, chains=chains, random_seed=1, chain_method=method, progressbar=False)
        return np.asarray(drawn.posterior["mean"])

    samples = means("parallel")
    assert samples.shape == (chains, 100)
    assert abs(samples.mean(1) - data.mean()).max() < 0.2
    np.testing.assert_allclose(samples[:, :3], means("vectorized")[:, :3], rtol=1e-3)


def eight():
    """8 chains, blackjax"""
    check(sample_blackjax_nuts, 8)


def twelve():
    """12 chains, blackjax"""
    check(sample_blackjax_nuts, 12)


def eight_numpyro():
    """8 chains, numpyro"""
    check(sample_numpyro_nuts, 8)


CASES = [eight, twelve, eight_numpyro]
