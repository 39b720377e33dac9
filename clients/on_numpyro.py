"""numpyro: chains in parallel."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, Predictive

PACKAGES = ["numpyro"]
data = np.random.default_rng(0).normal(3.0, 1.0, size=50)


def model(data=None):
    mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
    with numpyro.plate("points", 50):
        numpyro.sample("data", dist.Normal(mean, 1.0), obs=data)


def draw(chains, method):
    mcmc = MCMC(
        NUTS(model), num_warmup=100, num_samples=100, num_chains=chains, chain_method=method, progress_bar=False
    )
    mcmc.run(jax.random.PRNGKey(0), data)
    return mcmc


def check(chains, method):
    mcmc = draw(chains, method)
    samples = mcmc.get_samples(group_by_chain=True)["mean"]
    assert samples.shape == (chains, 100)
    assert abs(samples.mean(1) - data.mean()).max() < 0.2
    reference = draw(chains, "vectorized").get_samples(group_by_chain=True)["mean"]
    np.testing.assert_allclose(samples[:, :5], reference[:, :5], rtol=1e-3)
    predicted = Predictive(model, mcmc.get_samples())(jax.random.PRNGKey(1))["data"]
    assert abs(predicted.mean() - data.mean()) < 0.2
    mcmc.print_summary()


def eight():
    """8 chains"""
    check(8, "parallel")


def eight_shown():
    """8 chains with progress bars"""
    mcmc = MCMC(NUTS(model), num_warmup=50, num_samples=50, num_chains=8, chain_method="parallel", progress_bar=True)
    mcmc.run(jax.random.PRNGKey(0), data)
    assert mcmc.get_samples()["mean"].shape == (400,)


def twelve():
    """12 chains, chain_method=jax.pmap"""
    check(12, jax.pmap)


def twelve_named():
    """12 chains, chain_method='parallel', which counts devices"""
    check(12, "parallel")


def mapped():
    """12 chains, a pmap around MCMC (its documentation)"""

    def do_mcmc(rng_key):
        mcmc = MCMC(NUTS(model), num_warmup=100, num_samples=50, num_chains=2, chain_method="vectorized",
                    progress_bar=False)  # fmt: skip
        mcmc.run(rng_key, data)
        return mcmc.get_samples(group_by_chain=True)

    samples = jax.pmap(do_mcmc)(jax.random.split(jax.random.PRNGKey(0), 6 * 2))["mean"]
    assert samples.shape == (12, 2, 50)
    assert abs(jnp.mean(samples, -1) - data.mean()).max() < 0.2


CASES = [eight, eight_shown, twelve, twelve_named, mapped]
