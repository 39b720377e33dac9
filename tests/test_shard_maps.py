"""``jax.shard_map`` and ``jax.pmap`` inside a map run as nested maps. Results equal ``jax.vmap``."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import replicax
from replicax import pmap


def close(ours, right):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), ours, right)


def rows(n, *shape):
    return np.random.default_rng(n).normal(size=(n, *shape)).astype(np.float32)


def mesh(kind=AxisType.Auto, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def sharded(fun, ins, outs, over, **options):
    return jax.shard_map(fun, mesh=over, in_specs=ins, out_specs=outs, **options)


def shift(x):
    return lax.ppermute(x, "a", [(k, (k + 1) % 4) for k in range(4)])


def layer(x, w):
    y = jax.nn.relu(x) @ w
    y, _ = lax.scan(lambda c, _: (c + shift(c) * 0.5, lax.pmean(c, "a")), y, None, 2)
    return y, lax.psum(y.sum(0, keepdims=True), "a"), lax.pmean(y, "a")


@jax.custom_vjp
def ruled(x):
    return lax.psum(x, "a") * x


ruled.defvjp(lambda x: (lax.psum(x, "a") * x, x), lambda x, ct: (ct * x * 2,))

index = lambda x: x * lax.psum(x, "a") + lax.axis_index("a")
plain = sharded(index, P("a"), P("a"), mesh(a=8))

#: Functions of one array of shape (8, 4).
SHARDED: dict[str, Callable[..., Any]] = {
    "one axis": plain,
    "one device": sharded(index, P("a"), P("a"), mesh(a=1)),
    "the second dimension": sharded(index, P(None, "a"), P(None, "a"), mesh(a=4)),
    "two axes": sharded(
        lambda x: x * lax.psum(x, "b") + lax.axis_index(("b", "a")), P(("b", "a")), P(("a", "b")), mesh(a=4, b=2)
    ),
    "two dimensions": sharded(lambda x: x * lax.pmean(x, ("a", "b")), P("a", "b"), P("a", "b"), mesh(a=4, b=2)),
    "what is equal": sharded(lambda x: (lax.psum(x, "a"), lax.pmean(x.sum(), "a")), P("a"), P(), mesh(a=8)),
    "unchecked": sharded(
        lambda x: (x * lax.psum(x, "a"), lax.psum(x, "a")), P("a"), (P("a"), P()), mesh(a=8), check_vma=False
    ),
    "gather": sharded(lambda x: lax.all_gather(x, "a", tiled=True).sum() * x, P("a"), P("a"), mesh(a=8)),
    "scatter": sharded(lambda x: lax.psum_scatter(x, "a", tiled=True), P(None, "a"), P("a"), mesh(a=4)),
    "all to all": sharded(lambda x: lax.all_to_all(x, "a", 1, 0, tiled=True), P("a"), P(None, "a"), mesh(a=4)),
    "cond": sharded(lambda x: lax.cond(lax.axis_index("a") < 2, jnp.sin, jnp.cos, x), P("a"), P("a"), mesh(a=8)),
    "checkpoint": jax.checkpoint(
        sharded(jax.checkpoint(lambda x: jnp.sin(x) * lax.psum(x, "a")), P("a"), P("a"), mesh(a=8))
    ),
    "jit": jax.jit(lambda x: sharded(jax.jit(index), P("a"), P("a"), mesh(a=8))(jnp.sin(x)) + 1),
    "scan around": lambda x: lax.scan(lambda c, _: (plain(c) / 9, None), x, None, 2)[0],
    "what comes after": lambda x: jnp.where(plain(x) > 0, plain(x), x) * jax.nn.gelu(jnp.median(plain(x), 0)),
    "vmap": jax.vmap(sharded(lambda x: x * lax.psum(x, "a"), P("a"), P("a"), mesh(a=8)), 1, 1),
    "grad": lambda x: jax.grad(lambda x: (plain(x) ** 2).sum())(x),
    "grad unchecked": lambda x: jax.grad(lambda x: sum((y**2).sum() for y in SHARDED["unchecked"](x)))(x),
    "a rule, unchecked": sharded(ruled, P("a"), P("a"), mesh(a=8), check_vma=False),
    "the axis of the map": sharded(
        lambda x: lax.psum(x, "i") * lax.psum(x, "a"), P("a"), P("a"), mesh(a=8), check_vma=False
    ),
    "pmap": lambda x: jax.pmap(lambda y: y * lax.psum(y, "p"), axis_name="p", out_axes=1)(x),
}


@pytest.mark.few("two axes-4", "what is equal-13")
@pytest.mark.parametrize(("case", "n"), [*((case, 13) for case in SHARDED), ("two axes", 4), ("pmap", 1)])
def test_shard_map_inside_a_map(n, case):
    fun = SHARDED[case]
    mapped, right = pmap(fun, "i"), jax.vmap(fun, axis_name="i")
    x = rows(n, 8, 4) / 4
    close(mapped(x), jax.jit(right)(x))
    derivative = lambda f: jax.grad(lambda x: sum(jnp.sin(y).sum() for y in jax.tree.leaves(f(x))))
    close(derivative(mapped)(x), jax.jit(derivative(right))(x))


def test_derivative_rules_in_a_shard_map_inside_a_map():
    inner = sharded(layer, (P("a"), P()), (P("a"), P(), P()), mesh(a=4, b=2))
    fun = lambda x: inner(x, jnp.ones((4, 3)))
    within = lambda x: jax.grad(lambda x: sum((y**2).sum() for y in fun(x)))(x)
    x = rows(13, 8, 4)
    close(pmap(fun)(x), jax.jit(jax.vmap(fun))(x))
    close(pmap(within)(x), jax.jit(jax.vmap(within))(x))
    for case in (fun, sharded(ruled, P("a"), P("a"), mesh(a=8))):
        with pytest.raises(replicax.NestedMapError, match=r"differentiated from outside.*check_vma=False in"):
            jax.grad(lambda x, case=case: sum(y.sum() for y in jax.tree.leaves(pmap(case)(x))))(x)


@pytest.mark.few("13")
@pytest.mark.parametrize("n", [4, 13])
def test_shard_map_over_a_mesh_with_explicit_axes_inside_a_map(n):
    fun = lambda x: (
        (sharded(lambda x: x * lax.psum(x, "a"), P(), P(), mesh(AxisType.Explicit, a=8))(x) + 1)[:, :2].sum() * x
    )
    close(pmap(fun)(rows(n, 8, 4)), jax.jit(jax.vmap(fun))(rows(n, 8, 4)))


def test_shard_map_that_is_no_map_is_refused():
    def passes_a_reference(x):
        ref = jax.new_ref(x)
        return sharded(lambda ref: ref[...] * 2, P("a"), P("a"), mesh(a=8))(ref)

    with pytest.raises(
        replicax.NestedMapError, match=r"passes_a_reference contains a jax.shard_map that cannot run inside"
    ):
        pmap(passes_a_reference)(rows(4, 8))


def test_a_collective_over_the_map_in_a_shard_map_that_looks_at_types():
    with pytest.raises(AssertionError) as caught:
        pmap(sharded(lambda x: lax.psum(x, "i"), P("a"), P("a"), mesh(a=8)), "i")(rows(4, 8))
    assert "Write check_vma=False in the jax.shard_map" in "".join(caught.value.__notes__)


def test_an_assertion_of_the_users_gets_no_note_about_shard_map():
    def fun(x):
        assert x.ndim == 5
        return x

    for program in fun, lambda x: lax.map(fun, x):
        with pytest.raises(AssertionError) as caught:
            pmap(program)(np.ones((8, 2)))
        assert "shard_map" not in "".join(getattr(caught.value, "__notes__", ()))


def test_a_mesh_with_explicit_axes_or_none_is_refused_in_our_words():
    explicit = jax.make_mesh((2,), ("k",), (jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    doubled = functools.partial(jax.shard_map, lambda x: 2 * x, in_specs=P("k"), out_specs=P("k"))
    message = r"jax\.shard_map in the mapped function.*Auto axes, as in mesh=jax\.make_mesh"
    with pytest.raises(replicax.NestedMapError, match=message):
        pmap(lambda x: doubled(mesh=explicit)(x))(np.ones((8, 2)))
    with jax.set_mesh(explicit), pytest.raises(replicax.NestedMapError, match=message):
        pmap(lambda x: doubled()(x))(np.ones((8, 2)))
    automatic = jax.make_mesh((2,), ("k",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    np.testing.assert_array_equal(pmap(lambda x: doubled(mesh=automatic)(x))(np.ones((8, 2))), np.full((8, 2), 2))
