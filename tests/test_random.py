"""Random numbers: a replica draws from its own key, on any number of devices.

``vmap`` draws the whole batch from the first key if keys are ``rbg`` or ``unsafe_rbg``. So the reference here computes
one replica at a time. ``jax.pmap`` is a second reference if there is a device per replica.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import random as extend

from replicax import pmap
from replicax.testing import check

PLACES = [(8, 8), (12, 8), (5, 3), (3, 1)]
IMPLS = ["rbg", "unsafe_rbg"]


def keys(n, impl):
    """One key per replica, each created separately."""
    return jnp.stack([jax.random.key(7 * r + 1, impl=impl) for r in range(n)])


def each(fun, *args):
    """Runs ``fun`` for one replica at a time."""
    results = [jax.jit(fun)(*(x[r] for x in args)) for r in range(len(args[0]))]
    return jax.tree.map(lambda *rows: jnp.stack(rows), *results)


def plain(tree):
    """Replaces the keys in a tree by their key data."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree)


def equal(ours, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), plain(ours), plain(right))


def everything(key, x):
    """All kinds of draws, also in loops and branches, and under a ``vmap`` in the program, as in plain JAX."""
    a, b = jax.random.split(key)
    folded = jax.random.fold_in(key, x.astype(jnp.int32))

    def step(key, _):
        key, own = jax.random.split(key)
        return key, jax.random.normal(own)

    return {
        "normal": jax.random.normal(key, (3,)) + x,
        "bits": jax.random.bits(a, (2, 2), "uint8"),
        "choice": jax.random.permutation(b, 6),
        "keys": (jax.random.split(key, 3), folded),
        "folded": jax.random.uniform(folded),
        "gamma": jax.random.gamma(key, 1 + x, (2,)),
        "scan": lax.scan(step, key, None, 3),
        "branch": lax.cond(x > 2, lambda k: jax.random.normal(k), lambda k: 2 * jax.random.uniform(k), key),
        "while": lax.while_loop(lambda c: c[1] < 2, lambda c: (step(c[0], None)[0], c[1] + x % 3 + 1), (key, 0.0)),
        "vmap": jax.vmap(lambda k: jax.random.normal(k, (2,)))(jax.random.split(key, 3)),
        "generator": lax.rng_bit_generator(jax.random.key_data(key), (5,)),
    }


@functools.cache
def everything_of_each(n, impl):
    return each(everything, keys(n, impl), np.arange(n, dtype=np.float32))


@pytest.mark.long
@pytest.mark.parametrize(
    ("n", "d", "impl", "how"),
    [(n, d, impl, ["call", "jit"][(k + j) % 2]) for k, (n, d) in enumerate(PLACES) for j, impl in enumerate(IMPLS)],
)
def test_each_replica_draws_from_its_own_key(n, d, impl, how):
    mapped = pmap(everything, devices=jax.devices()[:d])
    ours = (mapped if how == "call" else jax.jit(mapped))(keys(n, impl), np.arange(n, dtype=np.float32))
    equal(ours, everything_of_each(n, impl))


@pytest.mark.long
@pytest.mark.parametrize("impl", IMPLS)
def test_jax_pmap_draws_the_same(impl):
    equal(jax.pmap(everything)(keys(8, impl), np.arange(8, dtype=np.float32)), everything_of_each(8, impl))


@pytest.mark.few("rbg-5-3")
@pytest.mark.parametrize(("n", "d"), [(8, 3), (5, 3)])
@pytest.mark.parametrize("impl", IMPLS)
def test_keys_of_the_old_kind(impl, n, d):
    k = jnp.stack([jax.random.PRNGKey(r, impl=impl) for r in range(n)])
    with jax.default_prng_impl(impl):
        mapped = pmap(lambda k: jax.random.normal(jax.random.split(k)[0], (2,)), devices=jax.devices()[:d])
        equal(mapped(k), each(lambda k: jax.random.normal(jax.random.split(k)[0], (2,)), k))


@pytest.mark.few("rbg-3", "unsafe_rbg-8")
@pytest.mark.parametrize("d", [1, 3, 8])
@pytest.mark.parametrize("impl", IMPLS)
def test_maps_inside_maps(impl, d):
    k = keys(15, impl).reshape(3, 5)
    fun = lambda outer, inner: (jax.random.normal(outer, (2,)), jax.random.normal(inner) - jax.random.uniform(outer))
    one = lambda outer, inner: (*fun(outer, inner), lax.axis_index("j"))
    mapped = pmap(lambda row: pmap(one, "j", in_axes=(None, 0))(row[0], row), devices=jax.devices()[:d])
    right = each(fun, jnp.repeat(k[:, 0], 5), k.reshape(-1))
    equal(mapped(k)[:2], jax.tree.map(lambda y: y.reshape(3, 5, *y.shape[1:]), right))


DRAWS = {"normal": lambda k, x: x * jax.random.normal(k), "gamma": jax.random.gamma}


@pytest.mark.few("normal-5-3-rbg")
@pytest.mark.parametrize(("n", "d", "impl"), [(8, 8, "rbg"), (5, 3, "rbg"), (5, 3, "unsafe_rbg")])
@pytest.mark.parametrize("draw", DRAWS)
def test_derivatives(draw, n, d, impl):
    """Derivatives of the map and inside the map, through a checkpoint, which draws the numbers again."""
    k, x = keys(n, impl), np.linspace(0.5, 2, n, dtype=np.float32)
    noisy = jax.checkpoint(lambda k, x: jnp.sin(DRAWS[draw](k, x)))
    mapped = pmap(noisy, devices=jax.devices()[:d])
    right = each(jax.grad(noisy, 1), k, x)
    equal(jax.grad(lambda x: mapped(k, x).sum())(x), right)
    equal(jax.jit(jax.grad(lambda x: mapped(k, x).sum()))(x), right)
    equal(pmap(jax.grad(noisy, 1), devices=jax.devices()[:d])(k, x), right)


@pytest.mark.long
@pytest.mark.parametrize("d", [1, 3, 8])
def test_a_rule_of_the_users_that_draws(d):
    k, x = keys(5, "rbg"), np.arange(5, dtype=np.float32)
    dropped = jax.custom_vjp(lambda k, x: x * jax.random.normal(k))
    dropped.defvjp(
        lambda k, x: (x * jax.random.normal(k), k),
        lambda k, ct: (None, ct * jax.random.normal(jax.random.fold_in(k, 1))),
    )
    derivative = jax.grad(lambda x: pmap(dropped, devices=jax.devices()[:d])(k, x).sum())
    equal(derivative(x), each(jax.grad(dropped, 1), k, x))
    inside = lambda k, x: pmap(lambda x: dropped(k, x))(jnp.stack([x, 2 * x])).sum()
    derivative = jax.grad(lambda x: pmap(inside, devices=jax.devices()[:d])(k, x).sum())
    equal(derivative(x), 3 * each(jax.grad(dropped, 1), k, x))


@pytest.mark.few("8-8", "5-3")
@pytest.mark.parametrize(("n", "d"), [(8, 8), (8, 3), (5, 3)])
def test_one_key_for_all_is_one_draw(n, d):
    key = jax.random.key(3, impl="rbg")
    fun = lambda k, x: x + jax.random.normal(k)
    options = {"in_axes": (None, 0), "devices": jax.devices()[:d]}
    check(fun, key, np.arange(n, dtype=np.float32), **options)
    program = pmap(fun, **options).lower(key, np.zeros(n, np.float32)).as_text()
    assert program.count("stablehlo.while") == 0


@pytest.mark.few("rbg")
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_what_vectorizes_stays_vectorized(impl):
    """Threefry, which ``rbg`` also uses in ``split`` and ``fold_in``."""
    fun = lambda k: (jax.random.split(k), jax.random.fold_in(k, 1), *[jax.random.normal(k)] * (impl != "rbg"))
    program = pmap(fun, devices=jax.devices()[:2]).lower(keys(8, impl)).as_text()
    assert "rng_bit_generator" not in program
    check(fun, keys(8, impl), devices=jax.devices()[:2])


def test_an_implementation_of_the_users():
    known = extend.rbg_prng_impl
    mine = extend.define_prng_impl(
        key_shape=(4,), seed=known.seed, split=known.split, fold_in=known.fold_in, name="mine",
        random_bits=lambda key, width, shape: lax.rng_bit_generator(key, shape, dtype=f"uint{width}")[1] ^ 1,
    )  # fmt: skip
    fun = lambda k: jax.random.bits(k, (2,))
    equal(pmap(fun, devices=jax.devices()[:3])(keys(8, mine)), each(fun, keys(8, mine)))


@pytest.mark.few("3")
@pytest.mark.parametrize("d", [1, 3, 8])
def test_a_vmap_from_outside_keeps_its_meaning_for_each_replica(d):
    k = keys(16, "rbg").reshape(8, 2)
    fun = lambda k: jax.random.normal(k, (2,))
    mapped = jax.vmap(pmap(fun, devices=jax.devices()[:d]), in_axes=1, out_axes=1)
    equal(mapped(k), jnp.stack([jax.vmap(fun)(row) for row in k]))
