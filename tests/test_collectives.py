"""Each cell of the table collective × context × (N, D) equals the reference, or raises the same error as JAX."""

import pathlib
import re
from collections.abc import Callable
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import replicax
from collectives import (
    AXIS,
    CONTEXTS,
    REFUSED,
    VARIANTS,
    faults,
    interleaved,
    one_sided,
    refusal,
    render,
    rows,
    share,
    shift,
    size,
)
from replicax import CollectiveArgumentError, UnsupportedCollectiveError, pmap
from replicax.testing import check, lockstep
from replicax.testing._check import compare

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "collectives.md"


def cells():
    """Each context with 7 replicas on 3 devices, and in rotation with N < D, N = D or N > D; and a share of each."""
    for k, context in enumerate(CONTEXTS):
        for n, d in ((7, 3), ((3, 8), (4, 4), (8, 2))[k % 3]):
            yield pytest.param(context, (n, d), None, id=f"{context}-{n}on{d}", marks=pytest.mark.long)
        n, d = ((7, 3), (8, 2), (6, 4))[k % 3]
        yield pytest.param(context, (n, d), share(context), id=f"{context}-{n}on{d}-share")


@pytest.mark.parametrize(("context", "pair", "variants"), list(cells()))
def test_every_cell_equals_the_reference(context, pair, variants):
    """``make table`` runs every context with every pair."""
    n, d = pair
    assert faults(context, n, d, variants) == {}


def test_the_shares_of_the_contexts_are_the_table():
    assert sorted(variant for context in CONTEXTS for variant in share(context)) == sorted(VARIANTS)
    assert not [
        (variant, context) for context in CONTEXTS for variant in share(context) if (variant, context) in REFUSED
    ]


@pytest.mark.parametrize(("variant", "context"), REFUSED)
def test_what_jax_refuses_raises_what_jax_says(variant, context):
    _, message = REFUSED[variant, context]
    assert re.search(message, refusal(variant, context, 6, 4))


def test_the_table_stands_in_the_docs():
    assert render() in DOCS.read_text()


def on(d):
    return {"axis_name": AXIS, "devices": jax.devices()[:d]}


@pytest.mark.few("12on5")
@pytest.mark.parametrize("pair", [(8, 8), (8, 3), (12, 5), (1, 1)], ids="{0[0]}on{0[1]}".format)
def test_random_groups_and_permutations(pair):
    """Irregular groups need several permutations between devices."""
    n, d = pair
    order = [int(k) for k in np.random.default_rng(n).permutation(n)]
    thirds = [order[: n // 3], order[n // 3 :]] if n > 2 else [order]
    equal = [order[k :: n // 4] for k in range(n // 4)] if n % 4 == 0 else [order]

    def fun(x):
        table = jnp.stack([x * k for k in range(len(equal[0]))])
        return {
            "psum": lax.psum(x, AXIS, axis_index_groups=thirds),
            "pmax": lax.pmax(x, AXIS, axis_index_groups=thirds),
            "ppermute": lax.ppermute(x, AXIS, list(zip(order, order[::-1], strict=True))[: n // 2 + 1]),
            "all_gather": lax.all_gather(x, AXIS, axis_index_groups=equal),
            "psum_scatter": lax.psum_scatter(table, AXIS, axis_index_groups=equal),
            "all_to_all": lax.all_to_all(table, AXIS, 0, 0, axis_index_groups=equal),
        }

    check(fun, rows(n), reference=lockstep, **on(d))


@pytest.mark.few("8")
@pytest.mark.parametrize("n", [6, 8])
def test_jax_pmap_agrees_where_it_works(n):
    """``jax.pmap`` supports groups and partial permutations with one replica per device."""

    def fun(x):
        groups = interleaved()
        table = jnp.stack([x * k for k in range(len(groups[0]))])
        return {
            "psum": lax.psum(x, AXIS, axis_index_groups=[[0], list(range(1, n))]),
            "ppermute": lax.ppermute(x, AXIS, [(0, n - 1), (2, 2)]),
            "all_gather": lax.all_gather(x, AXIS, axis=1, axis_index_groups=groups),
            "psum_scatter": lax.psum_scatter(table, AXIS, axis_index_groups=groups),
            "all_to_all": lax.all_to_all(table, AXIS, 0, 1, axis_index_groups=groups),
        }

    for d in (8, 2, 1):
        check(fun, rows(n), reference=jax.pmap, **on(d))


DTYPES = ("bool", "int4", "int8", "uint16", "float8_e4m3fn", "bfloat16", "float16", "complex64")


EXTREMES = (np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 0.25, -0.5, 3.5, -2.0)
FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e5m2")


@pytest.mark.long
@pytest.mark.parametrize("groups", [None, [[0, 3, 6], [1, 4, 7, 2], [5]], [[0, 1], [2, 3], [4, 5], [6, 7]]])
@pytest.mark.parametrize("pair", [(8, 8), (8, 3)], ids="{0[0]}on{0[1]}".format)
def test_the_greatest_and_the_least_of_floats(pair, groups):
    """A NaN propagates, although XLA's reductions between CPU devices lose it."""
    n, d = pair
    extremes = np.stack([np.roll(EXTREMES, k)[:-2] for k in range(n)])
    with jax.enable_x64(True):
        given = {dtype: jnp.asarray(extremes, dtype) for dtype in FLOATS}

        def both(tree):
            return [reduce(tree, AXIS, axis_index_groups=groups) for reduce in (lax.pmax, lax.pmin)]

        ours, theirs = pmap(both, **on(d))(given), lockstep(both, axis_name=AXIS)(given)
        for which, dtype in product(range(2), FLOATS):
            assert ours[which][dtype].dtype == dtype
            got, want = (np.asarray(x[which][dtype], np.float64) for x in (ours, theirs))
            np.testing.assert_array_equal(got, want, dtype)


@pytest.mark.parametrize("n", [7, 8, 12])
def test_broadcasts_of_complex_constants(n):
    """XLA ends the process if it knows that all devices send complex zeros."""

    def fun(x):
        zeros = lax.ppermute(lax.complex(x, jnp.cos(x)), AXIS, [])
        return zeros, lax.pbroadcast(zeros, AXIS, 4)

    check(fun, rows(n), reference=lockstep, **on(8))


@pytest.mark.parametrize("reduce", [lax.pmax, lax.pmin])
@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]], [[0, 1, 2], [3]]])
@pytest.mark.parametrize("d", [1, 2, 4])
def test_no_maximum_has_a_derivative_on_any_number_of_devices(d, groups, reduce):
    mapped = pmap(lambda x: reduce(x, AXIS, axis_index_groups=groups), **on(d))
    for x in (np.arange(4.0), np.arange(4.0) * 1j):
        with pytest.raises(NotImplementedError, match=r"Differentiation rule for 'p(max|min)' not"):
            jax.jvp(mapped, (x,), (x,))


def test_a_softmax_that_no_derivative_goes_through_the_maximum_of():
    def softmax(x):
        shifted = jnp.exp(x - lax.pmax(lax.stop_gradient(x), AXIS))
        return shifted / lax.psum(shifted, AXIS)

    x = rows(8)
    every = lambda transform: transform(softmax, axis_name=AXIS)
    theirs, ours = jax.jit(jax.jacrev(every(jax.vmap)))(x), jax.jacrev(every(pmap))(x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.few("bool-1", "int4-4")
@pytest.mark.parametrize("d", [1, 4, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_data_of_every_dtype_moves(dtype, d):
    x = (np.arange(108).reshape(6, 6, 3) % 7 > (3 if dtype == "bool" else -1)).astype(np.int32)
    x = jnp.asarray(x * (np.arange(108).reshape(6, 6, 3) % 7)).astype(dtype)

    def fun(x):
        return {
            "ppermute": lax.ppermute(x, AXIS, [(0, 3), (3, 0), (1, 1)]),
            "pbroadcast": lax.pbroadcast(x, AXIS, 4),
            "all_to_all": lax.all_to_all(x, AXIS, 0, 1),
            "all_gather": lax.all_gather(x, AXIS, axis_index_groups=interleaved()),
        }

    check(fun, x, reference=lockstep, **on(d))


@pytest.mark.few("4")
@pytest.mark.parametrize("d", [1, 4, 6])
def test_keys_move(d):
    keys = jax.random.split(jax.random.key(0), 6)
    right = lambda k: jax.random.key_data(keys)[np.asarray(k)]

    def fun(key):
        return (
            lax.ppermute(key, AXIS, [(k, (k + 1) % 6) for k in range(6)]),
            lax.pbroadcast(key, AXIS, 2),
            lax.all_gather(key, AXIS, axis_index_groups=interleaved()),
        )

    moved, sent, gathered = map(jax.random.key_data, pmap(fun, **on(d))(keys))
    np.testing.assert_array_equal(moved, right((np.arange(6) - 1) % 6))
    np.testing.assert_array_equal(sent, right(np.full(6, 2)))
    np.testing.assert_array_equal(gathered, right([[k % 2, k % 2 + 2, k % 2 + 4] for k in range(6)]))


def test_equal_results_may_be_broadcast():
    """A full permutation of equal values is equal in all replicas. A partial permutation is not."""
    shift = [(k, (k + 1) % 6) for k in range(6)]
    out = pmap(lambda x: lax.ppermute(lax.psum(x, AXIS), AXIS, shift), AXIS, out_axes=None)(rows(6))
    np.testing.assert_allclose(out, rows(6).sum(0), rtol=1e-6)
    assert pmap(lambda x: lax.pbroadcast(x, AXIS, 3), AXIS, out_axes=None)(rows(6)).shape == (3,)
    for fun in (
        lambda x: lax.ppermute(lax.psum(x, AXIS), AXIS, shift[1:]),
        lambda x: lax.psum(x, AXIS, axis_index_groups=interleaved()),
    ):
        with pytest.raises(replicax.DivergentOutputError, match="may differ between"):
            pmap(fun, AXIS, out_axes=None)(rows(6))


def test_axes_of_two_maps_as_one():
    """A collective over a tuple of names sees the replicas of both maps as one axis."""
    x = np.arange(36.0, dtype=np.float32).reshape(2, 3, 6)
    shift = [(k, (k + 1) % 6) for k in range(6)]

    def fun(x):
        return {
            "ppermute": lax.ppermute(x, ("i", "j"), shift),
            "all_gather": lax.all_gather(x, ("i", "j")),
            "psum_scatter": lax.psum_scatter(x, ("i", "j")),
            "all_to_all": lax.all_to_all(x, ("i", "j"), 0, 0),
            "pbroadcast": lax.pbroadcast(x, ("i", "j"), 4),
            "psum": lax.psum(x, ("i", "j"), axis_index_groups=[[0], [5, 4, 3, 2, 1]]),
        }

    flat = x.reshape(6, 6)
    right = {
        "ppermute": np.roll(flat, 1, 0),
        "all_gather": np.broadcast_to(flat, (6, 6, 6)),
        "psum_scatter": flat.sum(0),
        "all_to_all": flat.T,
        "pbroadcast": np.broadcast_to(flat[4], (6, 6)),
        "psum": np.stack([flat[0], *[flat[1:].sum(0)] * 5]),
    }
    for devices in (None, jax.devices()[:1]):
        out = pmap(pmap(fun, "j"), "i", devices=devices)(x)
        compare(str, jax.tree.map(lambda y: y.reshape(6, *y.shape[2:]), out), jax.tree.map(jnp.asarray, right))


def root(x):
    """The root of an equation whose residual contains a collective."""
    residual = lambda y: y + 0.1 * lax.pmean(y, AXIS) - x
    solve = lambda g, y: lax.fori_loop(0, 20, lambda _, z: z - 0.5 * g(z), y)
    return lax.custom_root(residual, jnp.zeros_like(x), solve, lambda g, y: y / g(jnp.ones_like(y)))


@pytest.mark.long
@pytest.mark.parametrize("pair", [(5, 3), (8, 8), (6, 1)], ids="{0[0]}on{0[1]}".format)
def test_an_implicit_function(pair):
    n, d = pair
    check(root, rows(n), derivatives=True, rtol=1e-4, **on(d))


@pytest.mark.skipif(not hasattr(lax, "psum_scatter_start"), reason="JAX has it from 0.12 on")
@pytest.mark.parametrize("d", [1, 4, 6])
def test_a_collective_started_and_awaited(d):
    def fun(x):
        assert hasattr(lax, "psum_scatter_start")
        started = lax.psum_scatter_start(jnp.stack([x] * 6), AXIS, tiled=True)
        return jnp.sin(x) + started.done()

    check(fun, rows(6), reference=lockstep, **on(d))


BAD = {
    "psum: .* must contain each replica index from 0 to 5": lambda x: lax.psum(
        x, AXIS, axis_index_groups=[[0, 1], [2, 3]]
    ),
    "all_to_all: .* exactly once": lambda x: lax.all_to_all(
        jnp.stack([x] * 3), AXIS, 0, 0, axis_index_groups=[[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    ),
    "all_gather: the groups .* must have the same size": lambda x: lax.all_gather(
        x, AXIS, axis_index_groups=[[0], [1, 2, 3, 4, 5]]
    ),
    r"ppermute: .* Out of range: \[\[0, 6\]\]": lambda x: lax.ppermute(x, AXIS, [(0, 6)]),
    "no source and no destination twice": lambda x: lax.ppermute(x, AXIS, [(0, 1), (0, 2)]),
    "To send to several replicas, use all_gather": lambda x: lax.ppermute(x, AXIS, [(0, 1), (-6, 2)]),
    "must be a list of pairs": lambda x: lax.ppermute(x, AXIS, [(0, 1.5)]),
    "psum_scatter does not support bool": lambda x: lax.psum_scatter(jnp.stack([x] * 6) > 0, AXIS),
    "pbroadcast: source=6 must be a replica index from 0 to 5": lambda x: lax.pbroadcast(x, AXIS, 6),
    "input_offsets has 4 elements, which is not a multiple of the number of": lambda x: lax.ragged_all_to_all(
        x, x, *[jnp.zeros(4, jnp.int32)] * 4, axis_name=AXIS
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_that_no_collective_can_follow(message):
    with pytest.raises(CollectiveArgumentError, match=message) as caught:
        pmap(BAD[message], AXIS)(rows(6))
    assert isinstance(caught.value, ValueError)


@pytest.mark.few("4")
@pytest.mark.parametrize("d", [1, 4, 6])
def test_axes_counted_from_the_end(d):
    """JAX 0.10 is wrong for negative axes of an untiled all_to_all: replicax refuses them."""
    x = np.arange(72.0, dtype=np.float32).reshape(6, 2, 6)
    right = pmap(lambda x: lax.all_to_all(x, AXIS, 1, 0), AXIS)(x)
    counted = pmap(lambda x: lax.all_to_all(x, AXIS, -1, 0), **on(d))
    if jax.__version_info__ < (0, 11):
        with pytest.raises(CollectiveArgumentError, match="Count the axes from the front"):
            counted(x)
    else:
        np.testing.assert_array_equal(counted(x), right)
    check(lambda x: lax.all_to_all(x, AXIS, -1, -2, tiled=True), x, reference=lockstep, **on(d))
    check(lambda x: lax.all_gather(x, AXIS, axis=-1), x, **on(d))


def test_an_empty_group_is_no_group():
    groups = [[0, 1, 2, 3, 4, 5], []]
    for d in (3, 6):
        check(
            lambda x: lax.psum(x, AXIS, axis_index_groups=groups[:1]),
            rows(6),
            reference=lambda fun, **options: pmap(lambda x: lax.psum(x, AXIS, axis_index_groups=groups), **options),
            **on(d),
        )


def test_what_jax_refuses_is_explained():
    pairs = [[0, 1], [2, 3], [4, 5]]
    swap = lambda y: lax.all_to_all(y, AXIS, 0, 0, axis_index_groups=pairs)
    with pytest.raises(NotImplementedError) as caught:
        pmap(lambda x: jax.vmap(swap)(jnp.stack([x[:2]] * 3)), AXIS)(rows(6))
    assert "all_to_all with axis_index_groups" in "".join(caught.value.__notes__)
    for (variant, context), (reason, _) in REFUSED.items():
        if context == "grad inside" and not variant.startswith(("pmax", "pmin")):
            with pytest.raises((TypeError, ValueError)) as refused:
                pmap(lambda x: CONTEXTS[context](VARIANTS[variant], x), AXIS)(rows(6))  # noqa: B023
            assert "If this comes from the derivative of" in "".join(refused.value.__notes__), reason


def test_what_jax_has_in_shard_map_alone_is_refused_by_name():
    with pytest.raises(UnsupportedCollectiveError, match=r"pcast, .* only inside jax\.shard_map"):
        pmap(lambda x: lax.pcast(x, AXIS, to="varying"), AXIS)(rows(4))


def test_what_jax_has_on_gpus_alone_is_refused_by_name():
    with pytest.raises(UnsupportedCollectiveError, match=r"psend over the mapped axis 'i': .* only on GPUs"):
        pmap(one_sided, AXIS)(rows(4))


def named(x):
    return checkpoint_name(lax.pmean(jnp.sin(x), AXIS), "mean")


POLICIES = {
    "everything": jax.checkpoint_policies.everything_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "by name": jax.checkpoint_policies.save_only_these_names("mean"),
}

#: Higher-order functions that are not in the table, as differentiable functions of an array of shape (3,).
HIGHER_ORDER: dict[str, Callable[..., Any]] = {
    **{
        f"checkpoint, {name}": lambda x, policy=policy: jax.checkpoint(
            lambda y: jnp.cos(named(y) @ jnp.outer(y, y)), policy=policy
        )(x)
        for name, policy in POLICIES.items()
    },
    "map": lambda x: lax.map(lambda y: lax.psum(jnp.sin(y), AXIS), jnp.stack([x, 2 * x])),
    "map in batches": lambda x: lax.map(lambda y: lax.pmean(y, AXIS) * y, jnp.stack([x] * 5), batch_size=2),
    "associative_scan": lambda x: lax.associative_scan(
        lambda a, b: a * jnp.tanh(lax.pmean(b, AXIS)), jnp.stack([x, x + 1, x + 2])
    ),
    "custom_linear_solve": lambda x: lax.custom_linear_solve(
        lambda v: 3 * v + lax.pmean(v, AXIS) / 4,
        x,
        lambda mv, b: lax.fori_loop(0, 30, lambda _, v: v - (mv(v) - b) / 4, b),
        symmetric=True,
    ),
    "all of them": lambda x: lax.scan(
        lambda c, t: (
            lax.cond(
                size() > 0, jax.checkpoint(lambda y: jax.jit(lambda z: lax.pmean(jnp.sin(z), AXIS))(y) + t), jnp.cos, c
            ),
            lax.map(lambda y: lax.ppermute(y * c[0], AXIS, shift()), t),
        ),
        x,
        jnp.stack([x, 2 * x]),
    ),
}


@pytest.mark.few("checkpoint, by name-5on3", "custom_linear_solve-5on3")
@pytest.mark.parametrize("pair", [(5, 3), (4, 4)], ids="{0[0]}on{0[1]}".format)
@pytest.mark.parametrize("name", HIGHER_ORDER)
def test_higher_order_functions_with_collectives_inside(name, pair):
    n, d = pair
    check(HIGHER_ORDER[name], rows(n), derivatives=True, rtol=1e-4, **on(d))
