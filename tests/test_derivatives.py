"""Derivative rules of the user's: the same derivatives on any number of devices, and those of jax.pmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from replicax import pmap
from replicax.testing import check, lockstep

AXIS = "i"


def rows(n):
    return np.random.default_rng(n).uniform(0.1, 1, (n, 3)).astype(np.float32)


@jax.custom_vjp
def constant(x):
    return jnp.ones(())


constant.defvjp(lambda x: (constant(x), x), lambda x, ct: (jnp.cos(x) * ct,))


@jax.custom_vjp
def equal(x):
    return lax.pmean(x, AXIS) * np.float32([1, 2, 3])


equal.defvjp(lambda x: (equal(x), x), lambda x, ct: (ct * x,))


@jax.custom_jvp
def constant_forward(x):
    return jnp.ones(3)


@constant_forward.defjvp
def _(primals, tangents):
    return constant_forward(*primals), jnp.cos(primals[0]) * tangents[0]


@jax.custom_vjp
def weighted(x, w):
    return x * w


weighted.defvjp(lambda x, w: (x * w, (x, w)), lambda r, ct: (ct * r[1], jnp.ones(3)))

#: Rules for which what every replica gets is equal in all of them, and what it gives is not.
RULES = {
    "a constant, in reverse": constant,
    "a mean, in reverse": equal,
    "a constant, forwards": constant_forward,
    "an argument for all": lambda x: weighted(x, jnp.ones(3)),
}


@pytest.mark.parametrize("d", [1, 2, 3, 4])
@pytest.mark.parametrize("name", RULES)
def test_results_equal_in_all_replicas(name, d):
    check(
        lambda x: RULES[name](jnp.sin(x)),
        rows(4),
        axis_name=AXIS,
        devices=jax.devices()[:d],
        reference=jax.pmap,
        derivatives=True,
        rtol=1e-4,
    )


@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_a_constant_derivative_by_an_argument_for_all(d):
    check(
        weighted,
        rows(4),
        rows(1)[0],
        in_axes=(0, None),
        devices=jax.devices()[:d],
        reference=jax.pmap,
        derivatives=True,
    )


@pytest.mark.parametrize("d", [1, 2, 8])
def test_an_equal_result_of_a_rule_may_be_broadcast(d):
    out = pmap(equal, AXIS, out_axes=None, devices=jax.devices()[:d])(rows(8))
    np.testing.assert_allclose(out, rows(8).mean(0) * [1, 2, 3], rtol=1e-6)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_a_checkpointed_loop_differentiated_inside(d):
    def fun(x):
        loop = lambda y: lax.fori_loop(0, 2, lambda _, z: lax.pmean(jnp.sin(z), AXIS), y)
        return jax.grad(jax.checkpoint(lambda y: jnp.sum(jnp.cos(loop(y)))))(x)

    check(fun, rows(3), axis_name=AXIS, devices=jax.devices()[:d])


@pytest.mark.parametrize("d", [1, 2, 4])
def test_sums_of_complex_constants(d):
    """XLA ends the process where it folds one that is between devices, under jax.pmap as well."""

    def fun(x):
        ones = jnp.full((4, 3), 1 + 2j)
        return {
            "psum": x + lax.psum(ones[0], AXIS),
            "groups": x + lax.psum(ones[0], AXIS, axis_index_groups=[[0, 1, 2], [3]]),
            "psum_scatter": x + lax.psum_scatter(ones, AXIS),
            "inside": jax.grad(lambda y: jnp.real(lax.pmean(y, AXIS) + lax.all_gather(y, AXIS)).sum())(x),
        }

    check(fun, rows(4) * (1 + 1j), axis_name=AXIS, devices=jax.devices()[:d], reference=lockstep, derivatives=True)
