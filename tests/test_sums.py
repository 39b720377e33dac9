"""A psum of matrix products is one product per device: correct, and without a product per replica."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from replicax import pmap


def rows(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def outer_product(x, y):
    return x[:, None] @ y[None]  # jnp.outer would not use dot_general


def outer(x, y):
    return lax.psum(outer_product(x, y).T, "i")


def with_decay(x, y):
    """Scaled products, and other summands."""
    w = jnp.ones((3, 3)) * x[0]
    return lax.pmean(-2.0 * outer_product(x, y) + outer_product(y, x) / 3.0 - w, "i")


def of_batches(x, y):
    a, b = jnp.stack([x, y, x * y, x - y]), jnp.stack([y, x, x + y, y])
    a, b = a.reshape(2, 2, 3), b.reshape(2, 2, 3)
    return lax.psum((jnp.einsum("stx,sty->xy", a, b), jnp.einsum("sxt,syt->xy", a, b)), "i")


def used_twice(x, y):
    product = outer_product(x, y)
    return product + lax.psum(product, "i")


def of_one_that_is_equal(x, y):
    return lax.psum(x @ (lax.pmean(y, "i")[:, None] * jnp.ones((1, 3))), "i")


def in_a_loop(x, y):
    def step(carry, _):
        gradient = jax.grad(lambda w: jnp.sum(jnp.tanh(w @ x) * y))(carry)
        return carry - 0.1 * lax.pmean(gradient, "i"), jnp.sum(gradient)

    return lax.scan(step, jnp.eye(3), None, length=3)


@jax.jit
def layer(w, x):
    return jnp.tanh(w @ x)


@jax.jit
def two_layers(w, x):
    return layer(w, layer(w, x)), x  # the same jit twice, inside another jit


def in_jits(x, y):
    gradient = jax.grad(lambda w: jnp.sum(two_layers(w, x)[0] * y))(jnp.eye(3))
    return lax.pmean(gradient, "i"), two_layers(gradient, x)[1]


def over_both(x, y, inner_map=pmap):
    inner = inner_map(lambda a: lax.psum(outer_product(a * x, y), ("i", "j")), axis_name="j")
    return inner(jnp.stack([x, y, x * y]))


def by_batch(x, y):
    return lax.psum(jnp.einsum("bi,bj->bij", jnp.stack([x, y]), jnp.stack([y, y])), "i")


def of_integers(x, y):
    a, b = outer_product(x * 10, y * 10), outer_product(y * 9, x * 9)
    return lax.psum(a.astype(jnp.int32) @ b.astype(jnp.int32), "i")


def of_bfloat16(x, y):
    return lax.psum(outer_product(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)).astype(jnp.float32), "i")


FUNCTIONS = [
    outer,
    with_decay,
    of_batches,
    used_twice,
    of_one_that_is_equal,
    in_a_loop,
    in_jits,
    over_both,
    by_batch,
    of_integers,
    of_bfloat16,
]


@pytest.mark.few(
    "outer-24",
    "with_decay-31",
    "of_batches-24",
    "used_twice-29",
    "of_one_that_is_equal-31",
    "in_a_loop-29",
    "in_jits-31",
    "over_both-29",
    "by_batch-24",
    "of_integers-24",
    "of_bfloat16-24",
)
@pytest.mark.parametrize("n", [24, 29, 31])
@pytest.mark.parametrize("f", FUNCTIONS)
def test_values(f, n):
    x, y = rows(n, 3), rows(n, 3)[::-1]
    oracle = partial(f, inner_map=jax.vmap) if f is over_both else f
    expected = jax.jit(jax.vmap(oracle, axis_name="i"))(x, y)
    tolerance = 0.05 if f is of_bfloat16 else 1e-5
    for got, want in zip(jax.tree.leaves(pmap(f, "i")(x, y)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=10 * tolerance)
        assert got.dtype == want.dtype


@pytest.mark.few("31")
@pytest.mark.parametrize("n", [24, 29, 31])
def test_derivatives_from_outside(n):
    x, y = rows(n, 3), rows(n, 3)[::-1]
    for got, want in zip(
        jax.jit(jax.grad(lambda *args: jnp.sum(pmap(with_decay, "i")(*args) ** 2), (0, 1)))(x, y),
        jax.jit(jax.grad(lambda *args: jnp.sum(jax.vmap(with_decay, axis_name="i")(*args) ** 2), (0, 1)))(x, y),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.few("inf-31", "nan-29")
@pytest.mark.parametrize("n", [29, 31])
@pytest.mark.parametrize("value", [np.inf, np.nan, -np.inf])
def test_what_padding_copies_does_not_spread(value, n):
    """The last replica's operand, which the padding lanes copy, is not finite."""
    x, y = np.ones((n, 3), np.float32), np.ones((n, 3), np.float32)
    x[-1, 0] = value
    np.testing.assert_array_equal(pmap(outer, "i")(x, y), jax.vmap(outer, axis_name="i")(x, y))


@pytest.mark.few("<lambda>0-61", "<lambda>1-61")
@pytest.mark.parametrize("n", [64, 61])
@pytest.mark.parametrize("model", [lambda w, x: jnp.tanh(x @ w), jax.jit(lambda w, x: jnp.tanh(x @ w))])
def test_no_replica_has_a_gradient_of_its_own(n, model):
    def step(w, x):
        return lax.pmean(jax.grad(lambda w: jnp.sum(model(w, x) ** 2))(w), "i")

    text = pmap(step, "i", in_axes=(None, 0), out_axes=None).lower(rows(17, 19), rows(n, 17)).compile().as_text()
    assert "f32[17,19]" in text
    assert "f32[8,17,19]" not in text
    assert "f32[8,19,17]" not in text
