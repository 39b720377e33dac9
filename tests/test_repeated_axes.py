"""A collective that names an axis twice is refused, as in ``jax.vmap``, because XLA would abort the process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from replicax import CollectiveArgumentError, pmap
from replicax.testing import check

N, TWICE = 4, ("i", "i")
ALL = range(N * N)
ones, zeros = jnp.ones(N * N), jnp.zeros(N * N, int)

COLLECTIVES = {
    "psum": lambda x: lax.psum(x, TWICE),
    "psum over groups": lambda x: lax.psum(x, TWICE, axis_index_groups=[list(ALL)]),
    "pmean": lambda x: lax.pmean({"a": x, "b": 1.0}, TWICE),
    "pmax": lambda x: lax.pmax(x, TWICE),
    "pmin": lambda x: lax.pmin(x, TWICE),
    "pmin over three": lambda x: lax.pmin(x, ("i", "i", "i")),
    "ppermute": lambda x: lax.ppermute(x, TWICE, [(k, (k + 1) % N**2) for k in ALL]),
    "pshuffle": lambda x: lax.pshuffle(x, TWICE, list(ALL)),
    "pbroadcast": lambda x: lax.pbroadcast(x, TWICE, 0),
    "all_gather": lambda x: lax.all_gather(x, TWICE),
    "all_gather, tiled": lambda x: lax.all_gather(x, TWICE, tiled=True),
    "psum_scatter": lambda x: lax.psum_scatter(x * ones[:, None], TWICE),
    "all_to_all": lambda x: lax.all_to_all(x * ones[:, None], TWICE, 0, 0),
    "pswapaxes": lambda x: lax.pswapaxes(x * ones[:, None], TWICE, 0),
    "ragged_all_to_all": lambda x: lax.ragged_all_to_all(
        ones, ones, zeros, zeros + 1, zeros, zeros + 1, axis_name=TWICE
    ),
}

summed = jax.custom_vjp(lambda x: x * 2)
summed.defvjp(lambda x: (x * 2, None), lambda _, ct: (lax.psum(ct, TWICE),))

#: Programs with such a collective in different places.
PLACES = {
    "jit": jax.jit(COLLECTIVES["psum"]),
    "scan": lambda x: lax.scan(lambda c, _: (lax.pmax(c, TWICE), None), x, None, 2)[0],
    "branch": lambda x: lax.cond(x[0] > 0, COLLECTIVES["psum"], lambda x: x, x),
    "grad": jax.grad(lambda x: lax.psum(x, TWICE).sum()),
    "rule": jax.grad(lambda x: summed(x).sum()),
    "product": lambda x: lax.psum(jnp.dot(x, x * jnp.ones((3, 3))), TWICE),
    "map inside": lambda x: pmap(lambda y: lax.psum(y, ("i", "j", "i")), "j")(x),
    "map inside of the same name": lambda x: pmap(COLLECTIVES["psum"], "i")(x[:, None]),
}


def rows():
    return np.arange(3.0 * N, dtype=np.float32).reshape(N, 3)


@pytest.mark.few(24)
@pytest.mark.parametrize("d", [1, 3, 8])
@pytest.mark.parametrize("name", [*COLLECTIVES, *PLACES])
def test_an_axis_that_is_named_twice_is_refused(name, d):
    fun = {**COLLECTIVES, **PLACES}[name]
    with pytest.raises(CollectiveArgumentError, match=r"the mapped axis 'i' more than once.*Name each axis once"):
        pmap(fun, "i", devices=jax.devices()[:d])(rows())


def test_it_is_refused_in_the_users_words():
    for name, called in (("psum", "psum, or pmean,"), ("psum_scatter", "psum_scatter"), ("pmax", "pmax")):
        with pytest.raises(CollectiveArgumentError, match=rf"^{called} names the mapped axis 'i' more"):
            pmap(COLLECTIVES[name], "i")(rows())


def test_it_is_refused_in_a_rule_that_jax_calls_later():
    mapped = pmap(summed, "i")
    np.testing.assert_array_equal(mapped(rows()), 2 * rows())
    for run in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        with pytest.raises(CollectiveArgumentError, match="more than once"):
            run(lambda x: mapped(x).sum())(rows())


@pytest.mark.parametrize("name", [*COLLECTIVES])
def test_vmap_refuses_it(name):
    with pytest.raises((ValueError, TypeError, AssertionError, RuntimeError, NotImplementedError)):
        jax.vmap(COLLECTIVES[name], axis_name="i")(jnp.asarray(rows()))


@pytest.mark.few("3")
@pytest.mark.parametrize("d", [1, 3, 8])
def test_what_jax_defines(d):
    """``axis_index`` and ``axis_size`` support repeated axes."""
    options = {"axis_name": "i", "devices": jax.devices()[:d]}
    check(lambda x: (x, lax.axis_index(TWICE), lax.axis_size(TWICE), lax.psum(1, TWICE)), rows(), **options)


@pytest.mark.few("3")
@pytest.mark.parametrize("d", [1, 3, 8])
def test_a_map_inside_hides_the_axis_of_its_name(d):
    def nested(mapped):
        def inner(y):
            return y - lax.pmean(y, "i"), lax.all_gather(y, "i"), lax.axis_index("i")

        return mapped(lambda x: (mapped(inner)(x), lax.psum(x, "i"), lax.axis_index("i")))

    ours = nested(lambda fun: pmap(fun, "i", devices=jax.devices()[:d] if fun.__name__ == "<lambda>" else None))
    right = nested(lambda fun: jax.vmap(fun, axis_name="i"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours(rows()), right(rows()))
