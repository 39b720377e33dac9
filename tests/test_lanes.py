"""``lanes``: a device runs its replicas one after the other, or a few at a time, with the results of ``vmap``."""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import replicax
from programs import COLLECTIVES, CONTROL
from replicax.errors import (
    NestedMapError,
    NotAFunctionError,
    OptionTypeError,
    ReplicaxError,
    UnsupportedTransformationError,
)
from replicax.testing import processes

LANES = ("sequential", 2, 3)

#: N, D: dividing, with padding, prime, and on one device.
LAYOUTS = [(8, 2), (11, 3), (13, 2), (6, 1), (64, 8)]

rng = np.random.default_rng(0)


def rows(n, *shape, dtype=np.float32):
    return rng.normal(size=(n, *shape)).astype(dtype)


def assert_same(ours, theirs, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------
# Values


def training(w, x):
    loss, gradient = jax.value_and_grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)
    return w - lax.pmean(gradient, "i"), lax.pmean(loss, "i")


def normalized(w, x):
    """A later segment reads values of an earlier one."""
    hidden = jnp.tanh(x @ w)
    centered = hidden - lax.pmean(hidden, "i")
    return centered / jnp.sqrt(lax.pmean(centered**2, "i") + 1), hidden


def neighbours(w, x):
    n = lax.axis_size("i")
    right = lax.ppermute(jnp.sin(x), "i", [(k, (k + 1) % n) for k in range(n)])
    return right * lax.axis_index("i"), lax.all_gather(right.sum(), "i") @ jnp.ones(n)


def own_work(w, x):
    """Loops and branches that replicas run differently, before and after a collective."""
    halved = lax.while_loop(lambda s: s[0] > 0.1, lambda s: (s[0] / 2, s[1] + 1), (jnp.abs(x[0, 0]), 0))
    total = lax.psum(halved[1], "i")
    return total, lax.cond(halved[1] > 2, lambda: jnp.sin(x), lambda: x @ w @ w.T), lax.pmax(x[0, 0], "i")


def in_a_loop(w, x):
    """Collectives in a loop that all replicas run alike."""
    mean = lax.fori_loop(0, 3, lambda _, y: y - 0.1 * lax.pmean(y, "i"), x)
    return mean, lax.psum(jnp.cos(mean).sum(), "i")


def in_loops_and_branches(w, x):
    """Carries that start equal in all replicas and end different, rows in and out, and a branch for all replicas."""

    def step(carry, row):
        own, same, count = carry
        own = own + jnp.tanh(row) * lax.psum(row, "i").mean()
        same = lax.cond(same > 0, lambda: -lax.pmax(own.sum(), "i"), lambda: lax.pmin(row.sum(), "i"))
        return (own, same, count + 1), (own.sum(), same, count)

    (own, same, count), rows = lax.scan(step, (jnp.zeros(5), jnp.float32(1), 0), x, reverse=True)

    def until(state):
        y, _ = state
        y = y / (1 + lax.pmean(jnp.abs(y), "i"))
        return y, lax.pmax(jnp.abs(y).max(), "i")

    shrunk, _ = lax.while_loop(lambda s: s[1] > 0.2, until, (own, jnp.float32(1)))
    return own, same, count, rows, shrunk


def in_a_branch_that_some_take(w, x):
    return lax.cond(x[0, 0] > 0, lambda: lax.psum(x, "i"), lambda: x), lax.fori_loop(
        0, lax.axis_index("i"), lambda _, y: y + lax.pmean(y, "i"), x
    )


@jax.custom_vjp
def averaged(x):
    return lax.pmean(jnp.sin(x), "i")


averaged.defvjp(lambda x: (averaged(x), x), lambda x, ct: (lax.pmean(ct, "i") * jnp.cos(x),))


def in_rules(w, x):
    return averaged(x)


def in_checkpoints(w, x):
    kept = jax.checkpoint(lambda x: jnp.sin(lax.pmean(jnp.sin(x @ w), "i") * x[:, :3]))(x)
    inner = jax.grad(lambda x: (jax.checkpoint(lambda x: lax.psum(x**2, "i") * x)(x)).sum())(x)
    return kept, inner


def with_refs(w, x):
    same, own = jax.new_ref(jnp.zeros(4)), jax.new_ref(x)
    same[...] = x.sum(1)
    own[...] = own[...] * lax.pmean(own[...], "i")
    return same[...], own[...], lax.fori_loop(0, 2, lambda _, y: y + lax.pmean(y, "i"), same[...])


def without_elements(w, x):
    return x[:, :0] * 2, lax.psum(x[:, :0], "i"), lax.scan(lambda c, y: (c, c * y), x, jnp.arange(0.0))[1]


def loops_inside_vmap(w, x):
    loop = lambda y: lax.while_loop(lambda c: c < 9, lambda c: c + 1 + lax.pmean(x[0, 0], "i") ** 2, y)
    return jax.vmap(loop)(jnp.array([1.0, 0.5]))


def with_dtypes(w, x):
    whole = jnp.round(x).astype(jnp.int32)
    half = (x * x).astype(jnp.bfloat16)
    turned = x + 1j * x
    return (
        lax.psum(whole * 2, "i"),
        lax.psum(half + half, "i").astype(jnp.float32),
        lax.psum(turned * turned, "i"),
        lax.pmin(whole - 1, "i"),
        lax.pmax(jnp.where(x > 1, jnp.nan, x) * 1, "i"),
        lax.psum((x > 0) & (x < 1), "i"),
    )


def with_keys(w, x):
    key = jax.random.fold_in(jax.random.key(1), lax.axis_index("i"))
    return x + jax.random.normal(key, x.shape), lax.psum(jax.random.uniform(key), "i")


PROGRAMS = {
    f.__name__: f
    for f in (
        training,
        normalized,
        neighbours,
        own_work,
        in_a_loop,
        in_loops_and_branches,
        in_a_branch_that_some_take,
        in_rules,
        in_checkpoints,
        with_refs,
        without_elements,
        loops_inside_vmap,
        with_dtypes,
        with_keys,
    )
}


@pytest.mark.few(7)
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(("n", "d"), LAYOUTS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_values_are_those_of_vmap(name, n, d, lanes):
    program, w, x = PROGRAMS[name], rows(5, 3), rows(n, 4, 5)
    mapped = replicax.pmap(program, "i", in_axes=(None, 0), devices=jax.devices()[:d], lanes=lanes)
    assert_same(
        mapped(w, x), jax.vmap(program, axis_name="i", in_axes=(None, 0))(w, x), 2e-2 if "dtypes" in name else 1e-5
    )


@pytest.mark.few(2)
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(("n", "d"), LAYOUTS[1:4])
@pytest.mark.parametrize("name", ["training", "normalized", "neighbours", "in_a_loop", "in_checkpoints"])
def test_derivatives_from_outside(name, n, d, lanes):
    program, w, x = PROGRAMS[name], rows(5, 3), rows(n, 4, 5)

    def scalar(mapped):
        return lambda w, x: sum(jnp.sum(jnp.sin(y / n)) for y in jax.tree.leaves(mapped(w, x)))

    mapped = replicax.pmap(program, "i", in_axes=(None, 0), devices=jax.devices()[:d], lanes=lanes)
    theirs = jax.vmap(program, axis_name="i", in_axes=(None, 0))
    assert_same(jax.grad(scalar(mapped), (0, 1))(w, x), jax.grad(scalar(theirs), (0, 1))(w, x), 1e-4)
    assert_same(jax.jit(jax.jacfwd(scalar(mapped)))(w, x), jax.jacfwd(scalar(theirs))(w, x), 1e-4)


@pytest.mark.few(4)
@pytest.mark.parametrize("lanes", LANES[::2])
@pytest.mark.parametrize("control", [name for name in CONTROL if name != "top"])
@pytest.mark.parametrize("collective", ["psum", "all_gather", "axis_index"])
def test_collectives_in_control_flow(collective, control, lanes):
    f = COLLECTIVES[collective]
    if collective == "all_gather":
        f = lambda x: COLLECTIVES["all_gather"](x).sum(0)
    program, x = (lambda x: CONTROL[control](f, x)), rows(11, 3)
    mapped = replicax.pmap(program, "i", devices=jax.devices()[:3], lanes=lanes)
    assert_same(mapped(x), jax.vmap(program, axis_name="i")(x), 1e-4)


@pytest.mark.parametrize("lanes", LANES)
def test_options_of_the_map(lanes):
    x, y = rows(3, 10, 4), rows(10)
    mapped = replicax.pmap(
        lambda x, y, scale: (scale * x + lax.psum(y, "i"), lax.pmean(x, "i")), "i",
        in_axes=(1, 0), out_axes=(1, None), static_broadcasted_argnums=2, donate_argnums=1,
        devices=jax.devices()[:4], lanes=lanes,
    )  # fmt: skip
    expected = jax.vmap(lambda x, y: 2 * x + lax.psum(y, "i"), axis_name="i", in_axes=(1, 0), out_axes=1)(x, y)
    donated = jax.device_put(y)
    ours = mapped(x, donated, 2)
    assert donated.is_deleted()
    assert_same(ours, (expected, x.mean(1)))
    assert_same(mapped.lower(x, y, 2).compile()(x, y), (expected, x.mean(1)))


@pytest.mark.parametrize("lanes", LANES)
def test_maps_inside(lanes):
    inner = replicax.pmap(lambda x: x - lax.psum(x, "j"), "j")
    program = lambda x: inner(jnp.sin(x)) + lax.pmean(x.sum(), "i")
    x = rows(6, 3)
    ours = replicax.pmap(program, "i", devices=jax.devices()[:2], lanes=lanes)(x)
    theirs = jax.vmap(lambda x: jnp.sin(x) - jnp.sin(x).sum() + lax.pmean(x.sum(), "i"), axis_name="i")(x)
    assert_same(ours, theirs)


def test_callbacks_in_the_order_of_replicas():
    seen = []

    def program(x):
        y = jnp.sin(x)
        jax.debug.callback(lambda x: seen.append(int(x)), lax.axis_index("i"))
        return y + lax.psum(y, "i")

    x = rows(7)
    ours = replicax.pmap(program, "i", devices=jax.devices()[:1], lanes="sequential")(x)
    jax.effects_barrier()
    assert seen == list(range(7))
    assert_same(ours, np.sin(x) + np.sin(x).sum())


def test_an_error_in_a_lane_names_its_replica():
    def check(x):
        if x > 4:
            raise ValueError("too large")
        return np.asarray(x)

    program = lambda x: jax.pure_callback(check, jax.ShapeDtypeStruct((), np.float32), 2 * x, vmap_method="sequential")
    mapped = replicax.pmap(program, devices=jax.devices()[:2], lanes="sequential")
    with pytest.raises(Exception, match="raised ValueError in replica 3: too large"):
        jax.block_until_ready(mapped(np.arange(4, dtype=np.float32)))


@pytest.mark.long
def test_over_processes():
    with processes(2, devices=2) as both:
        for results in both.run(over_processes):
            assert_same(results, results[::-1])


def over_processes():
    w, x = np.ones((5, 3), np.float32), np.arange(5 * 20, dtype=np.float32).reshape(5, 4, 5) / 100
    return [
        jax.tree.map(np.asarray, replicax.pmap(training, "i", in_axes=(None, 0), lanes=lanes)(w, x))[0]
        for lanes in ("vectorized", "sequential")
    ]


# ---------------------------------------------------------------------------------------------------------------
# What runs


def traced(program, x, lanes, d=2, **options):
    return replicax.pmap(program, "i", devices=jax.devices()[:d], lanes=lanes, **options).trace(x)


def primitives(jaxpr):
    return set(re.findall(r"\b(cond|select_n|while)\[", str(jaxpr)))


def test_each_lane_takes_one_branch():
    program = lambda x: lax.cond(x > 0, jnp.sin, jnp.cos, x)
    assert "cond" in primitives(traced(program, rows(8), "sequential").jaxpr)
    assert "cond" not in primitives(traced(program, rows(8), "vectorized").jaxpr)


def test_the_report_of_a_program():
    found = traced(lambda x: own_work(jnp.ones((5, 3)), x), rows(8, 4, 5), "sequential").lanes
    assert (found.lanes, found.at_once, found.segments, found.cut, found.uncut) == (4, 1, 1, 2, ())
    found = traced(lambda x: in_a_loop(None, x), rows(8, 4, 5), 2).lanes
    assert (found.lanes, found.at_once, found.segments, found.cut, found.uncut) == (4, 2, 2, 2, ())
    found = traced(lambda x: in_loops_and_branches(None, x), rows(8, 4, 5), 2).lanes
    assert (found.cut, found.uncut, found.inside) == (5, (), 0)
    found = traced(lambda x: in_a_branch_that_some_take(None, x), rows(8, 4, 5), 2).lanes
    assert (found.cut, len(found.uncut), found.inside) == (1, 2, 2)  # the index is cut
    assert traced(lambda x: x, rows(8), 100).lanes.at_once == 4
    assert traced(lambda x: x, rows(8), "vectorized").lanes.at_once == 4


SIZES = (64, 128, 128, 10)


def mlp(params, x, y):
    def loss(params):
        hidden = x
        for w in params[:-1]:
            hidden = jax.nn.relu(hidden @ w)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(hidden @ params[-1]), y[:, None], 1))

    value, gradient = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * lax.pmean(g, "i"), params, gradient), lax.pmean(value, "i")


def compiled(n, lanes, derived=False):
    params = [np.full(shape, 0.01, np.float32) for shape in itertools.pairwise(SIZES)]
    x, y = jax.ShapeDtypeStruct((n, 32, SIZES[0]), np.float32), jax.ShapeDtypeStruct((n, 32), np.int32)
    mapped = replicax.pmap(mlp, "i", in_axes=(None, 0, 0), out_axes=None, lanes=lanes)
    if derived:
        return jax.jit(jax.grad(lambda p, x, y: mapped(p, x, y)[1])).lower(params, x, y).compile()
    return mapped.lower(params, x, y).compile()


@pytest.mark.parametrize("derived", [False, True], ids=["step", "derivative"])
def test_temporaries_do_not_grow_with_the_replicas(derived):
    few, many = (compiled(n, "sequential", derived).memory_analysis().temp_size_in_bytes for n in (16, 512))
    assert many <= 1.25 * few
    assert compiled(512, "vectorized", derived).memory_analysis().temp_size_in_bytes > 4 * many


def test_gradients_are_added_up_and_communicated_once():
    text = compiled(64, "sequential").as_text()
    assert text.count(" all-reduce(") == 1  # XLA combines the sums of all parameters
    assert "f32[8,128,128]" not in text  # 8 lanes
    assert "f32[8,128,128]" in compiled(64, "vectorized").as_text()


# ---------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("lanes", [0, -1, 1.5, "some", True, None, (2,), np.array([2])])
def test_wrong_lanes(lanes):
    with pytest.raises(OptionTypeError, match=re.escape(f"got {lanes!r}")):
        replicax.pmap(lambda x: x, lanes=lanes)


def test_lanes_of_an_inner_map():
    inner = replicax.pmap(jnp.sin, lanes="sequential")
    with pytest.raises(
        NestedMapError, match=r"Nested pmap with explicit lanes argument\. sin is mapped inside another"
    ):
        replicax.pmap(inner)(rows(4, 3))
    assert issubclass(NestedMapError, ReplicaxError)


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def test_tune_finds_that_one_replica_in_many_does_all_the_work():
    def program(x):
        work = lambda x: lax.fori_loop(0, 300, lambda _, a: jnp.sin(a @ a), x)
        return lax.cond(x[0, 0] > 1, work, lambda x: x, x)

    x = np.zeros((64, 32, 32), np.float32)
    x[5] = 2
    lanes = replicax.tune(replicax.pmap(program, devices=jax.devices()[:2], donate_argnums=0), x, seconds=0.1)
    assert lanes == "sequential"
    assert_same(replicax.pmap(program, lanes=lanes)(x), jax.vmap(program)(x), 1e-3)


def test_tune_has_nothing_to_choose_with_one_replica_a_device():
    assert replicax.tune(replicax.pmap(jnp.sin), rows(8), seconds=0.01) == "vectorized"


@pytest.mark.long
def test_tune_over_processes():
    with processes(2, devices=1) as both:
        first, second = both.run(tuned)
    assert first == second


def tuned():
    return replicax.tune(replicax.pmap(lambda x: x - lax.psum(x, "i"), "i"), np.ones((4, 3), np.float32), seconds=0.1)


def test_wrong_calls_of_tune():
    unmapped: Any = lambda x: x
    with pytest.raises(NotAFunctionError, match=r"tune needs the callable that replicax\.pmap returns, got <function"):
        replicax.tune(unmapped, rows(4))
    with pytest.raises(OptionTypeError, match="tune: seconds is how long to measure, got -1"):
        replicax.tune(replicax.pmap(jnp.sin), rows(4), seconds=-1)
    with pytest.raises(UnsupportedTransformationError, match="tune measures calls, and cannot be called inside jit"):
        jax.jit(lambda x: replicax.tune(replicax.pmap(jnp.sin), x))(rows(4))
