"""Nested maps equal nested vmaps, however the devices are split over the levels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from layouts import PAIRS, every_pair
from replicax import pmap
from replicax.testing._check import compare, gradient

#: ((replicas of each level), devices): all, some or none of the levels span several devices; padding at each level.
TWO_LEVELS = [((2, 4), 8), ((4, 3), 8), ((1, 5), 3), ((3, 2), 8), ((5, 2), 2), ((9, 2), 8), ((2, 7), 5), ((3, 3), 1)]
THREE_LEVELS = [((2, 2, 2), 8), ((2, 3, 1), 8), ((1, 2, 3), 5), ((3, 2, 2), 2)]

two_levels = pytest.mark.parametrize(("sizes", "d"), TWO_LEVELS, ids=[f"{s}on{d}" for s, d in TWO_LEVELS])
three_levels = pytest.mark.parametrize(("sizes", "d"), THREE_LEVELS, ids=[f"{s}on{d}" for s, d in THREE_LEVELS])


def rows(*shape):
    return np.random.default_rng(sum(shape)).uniform(0.5, 1.5, shape).astype(np.float32)


def all_gather_both(mapped, x):
    """``all_gather`` over two axes at once, for which vmap has no rule."""
    if mapped is not jax.vmap:
        return lax.all_gather(x, ("j", "i"))
    gathered = lax.all_gather(lax.all_gather(x, "i"), "j")
    return gathered.reshape(-1, *x.shape)


def ring(name):
    return [(k, (k + 1) % lax.axis_size(name)) for k in range(lax.axis_size(name))]


def collectives(mapped):
    """Collectives over each axis and over both, of values of both levels, with mapped axes other than 0."""

    def inner(y, w, x):
        z = jnp.sin(y * w)
        other = {
            "both": lax.psum(z, ("i", "j")),
            "both, the other way": all_gather_both(mapped, z[0]),
            "inner": z + lax.pmean(z, "j") * lax.axis_index("j"),
            "outer": lax.pmax(y, "i") - lax.all_gather(z, "i")[0],
            "index": lax.axis_index(("i", "j")),
            "around": lax.ppermute(z, "j", ring("j")),
            "around outside": lax.pshuffle(z, "i", list(range(lax.axis_size("i")))[::-1]),
            "scattered": lax.psum_scatter(jnp.tile(z, lax.axis_size("j")), "j", tiled=True),
            "key": jax.random.key_data(jax.random.fold_in(jax.random.key(0), lax.axis_index("j"))),
        }
        return other, x * lax.psum(z, "j")

    def outer(x, w):
        rest, last = mapped(inner, axis_name="j", in_axes=(1, None, None), out_axes=(0, 1))(x.T, w, x.sum())
        return rest, last * lax.psum(x.sum(), "i"), lax.axis_index("i")

    return mapped(outer, axis_name="i", in_axes=(1, None), out_axes=(0, 1, 0))


def control_flow(mapped):
    """Inner maps, loops and branches that differ between outer replicas or between inner replicas."""

    def inner(y, limit):
        def step(state):
            total, k = state
            return total + lax.psum(y, "j") * lax.axis_index("i"), k + 1

        total, k = lax.while_loop(lambda s: (s[1] < limit + lax.axis_index("j")) & (s[0] < 50).all(), step, (y, 0))
        return lax.cond(limit > 1, lambda: total + lax.ppermute(y, "j", ring("j")), lambda: total * 2), k

    def outer(x):
        over = mapped(inner, axis_name="j", in_axes=(0, None))
        me = lax.axis_index("i")
        first, count = over(x, me + 1)
        summed, _ = lax.scan(lambda c, r: (c + over(x * r, 1)[0], None), first, jnp.arange(2.0))
        looped = lax.while_loop(lambda c: c[0].sum() < 20.0 * (me + 1), lambda c: (c[0] + over(c[0], me)[0],), (x,))[0]
        branch = lax.cond(me % 2 == 0, lambda: over(x, 2)[0], lambda: mapped(jnp.sin)(x))
        return summed, count, looped, branch

    return mapped(outer, axis_name="i")


def closures(mapped):
    """Inner maps that close over outer values, have a size known only in the trace, and reuse or omit an axis name."""

    def outer(x, table):
        y = jnp.cos(x).sum()
        kept = mapped(lambda r: r * y + table, axis_name="i")(jnp.concatenate([x, x]))
        hidden = mapped(lambda r: lax.psum(r, "i") * lax.axis_index("i"), axis_name="i")(x)
        twice = mapped(mapped(lambda r: r * 2 + y))(x)
        first = mapped(lambda r: (lax.psum(r, "k"), r), axis_name="k", out_axes=(None, -1))(x)
        alone = mapped(lambda: lax.axis_index("k"), axis_name="k", axis_size=3, in_axes=())()
        jitted = jax.jit(mapped(lambda r: lax.pmean(r, "k"), axis_name="k"))(x)
        rowwise = jax.vmap(
            mapped(lambda r, s: lax.psum(r * s, ("k", "v")), axis_name="k", in_axes=(0, None)), axis_name="v"
        )
        return kept, hidden, twice, first, alone, jitted, rowwise(x, y * x[:, 0]), lax.psum(kept, "i")

    return mapped(outer, axis_name="i", in_axes=(0, None))


def derivatives_inside(mapped):
    """Derivatives in outer replicas through inner maps, and derivatives inside inner replicas."""

    def inner(y, w):
        own = jax.grad(lambda v: (jnp.tanh(v * w) * lax.psum(y, "i")).sum())(y)
        return jnp.sin(y * w) * lax.psum(own, "j") + lax.pmean(y * w, ("i", "j"))

    def outer(x, w):
        over = mapped(inner, axis_name="j", in_axes=(0, None))

        def loss(x, w):
            hidden = over(x, w)
            return (over(hidden, w[::-1]) ** 2).sum() + lax.psum(hidden.sum(), "i")

        value, (dx, dw) = jax.value_and_grad(loss, (0, 1))(x, w)
        checkpointed = jax.grad(jax.checkpoint(loss), 1)(x, w)
        _, pushed = jax.jvp(loss, (x, w), (x, w))
        return value, dx, dw, checkpointed, pushed, jax.jacfwd(loss, 1)(x, w)

    return mapped(outer, axis_name="i", in_axes=(0, None))


def on_devices(d):
    """``pmap`` with ``devices`` passed to the outermost map only."""
    outermost = [True]

    def mapped(fun, **options):
        def call(*args):
            where = {"devices": jax.devices()[:d]} if outermost[0] else {}
            before, outermost[0] = outermost[0], False
            try:
                return pmap(fun, **where, **options)(*args)
            finally:
                outermost[0] = before

        return call

    return mapped


def given(program, sizes):
    x = rows(*sizes, 2)
    return {collectives: (np.moveaxis(x, 0, 1), rows(2)), control_flow: (x,)}.get(program, (x, rows(2)))


@pytest.mark.few("collectives-(2, 7)on5", "closures-(3, 2)on8")
@two_levels
@pytest.mark.parametrize("program", [collectives, control_flow, closures, derivatives_inside])
def test_two_levels_equal_vmap(program, sizes, d):
    args = given(program, sizes)
    compare(str, program(on_devices(d))(*args), jax.jit(program(jax.vmap))(*args), rtol=2e-4)


def smooth(mapped, *, rules=True):
    """A differentiable program with parts of all programs above."""

    @jax.custom_vjp
    def clipped(x):
        return x * 1.5

    clipped.defvjp(lambda x: (x * 1.5, None), lambda _, ct: (jnp.clip(ct, -0.7, 0.7),))

    def inner(y, w):
        return jnp.sin(y * w) * lax.psum(y, ("i", "j")), lax.pmean(jnp.cos(w) * y, "j")

    def outer(x, w):
        over = mapped(inner, axis_name="j", in_axes=(0, None), out_axes=(1, None))
        clip = clipped if rules else jnp.sinh
        shared = clip(x * w)
        rest, alike = over(shared, w)
        carried, _ = lax.scan(lambda c, _: (c + over(c, w)[0].T, None), x, None, length=2)
        raw = mapped(jnp.tanh)(x)  # its argument and result stay sharded
        return clip(rest.T).sum() + lax.pmean(carried, "i"), clip(alike), raw

    return mapped(outer, axis_name="i", in_axes=(0, None))


@pytest.mark.few(1)
@two_levels
def test_derivatives_from_outside_equal_vmap(sizes, d):
    args = rows(*sizes, 2), rows(2)
    expected = gradient(smooth(jax.vmap), args, {}, jax.jit)
    compare(str, gradient(smooth(on_devices(d)), args, {}, lambda fun: fun), expected, rtol=1e-3)


OUTSIDE = {
    "jit": jax.jit,
    "jvp": lambda f: lambda x, w: jax.jvp(f, (x, w), (w * x, w)),
    "hessian": lambda f: jax.hessian(lambda w, x: sum(map(jnp.sum, f(x, w)))),
    "vmap": lambda f: jax.vmap(f, in_axes=(None, 0), axis_name="j"),
    "scan": lambda f: jax.jit(lambda x, w: lax.scan(lambda c, r: (c + f(c, r)[2], f(c, r)[1]), x, w)),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda w, x: sum(map(jnp.sum, f(x, w)))), in_axes=(0, None)),
}


@pytest.mark.few("jvp-sizes1-8", "scan-sizes0-8")
@pytest.mark.parametrize(("sizes", "d"), [((2, 4), 8), ((3, 2), 8), ((2, 3), 5)])
@pytest.mark.parametrize("outside", OUTSIDE)
def test_transformations_from_outside_equal_vmap(outside, sizes, d):
    x, w = rows(*sizes, 2), rows(2)
    others = {"hessian": (w, x), "vmap of grad": (rows(3, 2), x), "vmap": (x, rows(3, 2)), "scan": (x, rows(3, 2))}
    args = others.get(outside, (x, w))
    ours, theirs = (OUTSIDE[outside](smooth(mapped, rules=outside != "jvp")) for mapped in (on_devices(d), jax.vmap))
    compare(str, ours(*args), jax.jit(theirs)(*args), rtol=1e-3)


@pytest.mark.long
@three_levels
def test_three_levels_equal_vmap(sizes, d):
    def nested(mapped):
        def innermost(z, y, w):
            return z * lax.psum(y.sum(), ("i", "k")) + lax.pmean(z, "j") * w, lax.axis_index(("k", "i", "j"))

        def inner(y, w):
            over = mapped(innermost, axis_name="k", in_axes=(0, None, None))
            return over(y * lax.axis_index("j"), y, lax.psum(w, "j"))

        def outer(x, w):
            out, index = mapped(inner, axis_name="j", in_axes=(0, None))(x, w + lax.axis_index("i"))
            return out, index, mapped(mapped(jnp.sin))(x), lax.psum(x, "i")

        return mapped(outer, axis_name="i", in_axes=(0, None))

    args = rows(*sizes, 2), rows(2)
    compare(str, nested(on_devices(d))(*args), jax.jit(nested(jax.vmap))(*args))
    expected = gradient(nested(jax.vmap), args, {}, jax.jit)
    compare(str, gradient(nested(on_devices(d)), args, {}, lambda fun: fun), expected, rtol=1e-3)


def small(mapped, depth):
    """A program of two or three levels that compiles fast."""

    def innermost(z, x):
        return z * lax.psum(x, "i") + lax.pmean(z, ("j", "k"))

    def inner(y, x):
        z = y + lax.axis_index(("j", "i"))
        z = mapped(innermost, axis_name="k", in_axes=(0, None))(jnp.stack([z, y]), x) if depth == 3 else z
        return z - lax.psum(z, "j")

    return mapped(lambda x: mapped(inner, axis_name="j", in_axes=(0, None))(x, x.sum()), axis_name="i")


@functools.cache
def case(n):
    """Adds a level of another size outside or inside, sometimes a third. Returns x, the depth and vmap's result."""
    turn = [replicas for replicas, _ in PAIRS].index(n)
    m, depth = (1, 2, 3, 5, 8)[turn % 5], 2 + turn // 2 % 2
    x = rows(n, m) if turn % 2 else rows(m, n)
    return x, depth, jax.jit(small(jax.vmap, depth))(x)


@pytest.mark.few(5)
@every_pair
def test_every_pair_of_replicas_and_devices(n, d):
    x, depth, expected = case(n)
    compare(str, small(on_devices(d), depth)(x), expected, rtol=1e-4)


# Placement and transfers ----------------------------------------------------------------------------------------


def test_devices_are_factored_over_the_levels():
    def shape(n, m, d):
        out = pmap(lambda x: pmap(lambda y: y + 1, "j")(x), "i", devices=jax.devices()[:d])
        return dict(out(rows(n, m)).sharding.mesh.shape)

    assert shape(2, 4, 8) == {"i": 2, "j": 4}
    assert shape(2, 3, 8) == {"i": 2, "j": 3}
    assert shape(4, 4, 8) == {"i": 4, "j": 2}
    assert shape(5, 4, 8) == {"i": 5}
    assert shape(1, 12, 8) == {"i": 1, "j": 6}
    assert shape(16, 2, 8) == {"i": 8}


def test_maps_of_maps_send_each_device_its_part_and_nothing_between_them():
    double = pmap(pmap(lambda x: jnp.sin(x) * 2, "j"), "i")
    x = rows(2, 4, 1000)
    text = double.lower(x).compile().as_text()
    assert not [op for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if op in text]
    out = double(x)
    assert {shard.data.shape for shard in out.addressable_shards} == {(1, 1, 1000)}
    assert out.sharding.num_devices == 8


COMMUNICATES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")

#: Programs of two and three levels whose values only pass from one inner map to the next.
STAY_APART = {
    "three levels": lambda mapped: mapped(mapped(mapped(jnp.sin, axis_name="k"), axis_name="j"), axis_name="i"),
    "one after the other": lambda mapped: mapped(
        mapped(lambda z: mapped(jnp.cos)(mapped(jnp.sin, axis_name="k")(z)), axis_name="j"), axis_name="i"
    ),
    "from level to level": lambda mapped: mapped(lambda x: mapped(mapped(jnp.cos))(mapped(mapped(jnp.sin))(x))),
    "in jit": lambda mapped: mapped(jax.jit(lambda x: jax.jit(mapped(jax.jit(mapped(jnp.sin))))(x))),
    "under other axes": lambda mapped: mapped(
        lambda x: mapped(mapped(jnp.sin, out_axes=1), in_axes=1, out_axes=2)(x), in_axes=1, out_axes=3
    ),
}


@pytest.mark.few("in jit", "under other axes")
@pytest.mark.parametrize("program", STAY_APART)
def test_what_goes_from_map_to_map_stays_on_its_devices(program):
    """At any depth and through jit, each device gets only its part and keeps its part of the result."""
    x = rows(2, 2, 2, 100)
    mapped = STAY_APART[program](pmap)
    text = mapped.lower(x).compile().as_text()
    assert not [op for op in COMMUNICATES if f" {op}" in text]
    out = mapped(x)
    compare(str, out, jax.jit(STAY_APART[program](jax.vmap))(x))
    assert {shard.data.size for shard in out.addressable_shards} == {100}
    squares = lambda f: lambda x: (f(x) ** 2).sum()
    ours, right = (jax.grad(squares(STAY_APART[program](mapped))) for mapped in (pmap, jax.vmap))
    compare(str, ours(x), jax.jit(right)(x))


@pytest.mark.long
@pytest.mark.parametrize(
    ("sizes", "d"), [((2, 2, 2), 8), ((2, 3, 2), 8), ((3, 2, 3), 6), ((1, 2, 4), 8), ((4, 4, 4), 8)]
)
def test_a_part_at_two_depths_is_joined_where_it_is_wanted_whole(sizes, d):
    """Used whole by the outer program, a map over another axis, a broadcast argument, and a collective."""

    def program(mapped):
        def outer(x):
            twice = mapped(mapped(lambda z: jnp.sin(z) + lax.axis_index("k"), axis_name="k"), axis_name="j")(x)
            across = mapped(mapped(jnp.cos), in_axes=1)(twice)
            beside = mapped(lambda y, w: y * w.sum(), in_axes=(0, None), axis_name="j")(twice, twice)
            deep = mapped(lambda y, w: mapped(lambda z: z @ w.sum(0), axis_name="k")(y), in_axes=(0, None))(x, twice[0])
            other = mapped(mapped(jnp.tanh, in_axes=1))(twice)
            return twice, across, beside, deep, other, lax.psum(twice, "i")

        return mapped(outer, axis_name="i")

    x = rows(*sizes, 3)[..., None] * np.ones(3, np.float32) / 7
    ours = program(on_devices(d))
    compare(str, ours(x), jax.jit(program(jax.vmap))(x), rtol=1e-4)
    total = lambda f: lambda x: sum((y**2).sum() for y in f(x))
    compare(str, jax.grad(total(ours))(x), jax.jit(jax.grad(total(program(jax.vmap))))(x), rtol=1e-3)


def test_a_sum_over_both_levels_is_one_reduction():
    text = pmap(pmap(lambda x: lax.psum(x, ("i", "j")), "j"), "i").lower(rows(2, 4)).compile().as_text()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1
    assert "all-gather" not in text


def test_values_known_while_tracing():
    def outer(x):
        with jax.ensure_compile_time_eval():
            table = pmap(lambda y: y + lax.psum(y, "j"), "j")(np.arange(3))
        assert isinstance(table, jax.Array)
        assert not isinstance(table, jax.core.Tracer)
        return x + table

    np.testing.assert_allclose(pmap(outer, "i")(rows(2, 3)), rows(2, 3) + np.arange(3, 6))


@pytest.mark.few("closures")
@pytest.mark.parametrize("program", [closures, derivatives_inside])
def test_jax_finds_no_fault_with_what_is_traced(program):
    with jax.enable_checks(True):
        text = str(jax.make_jaxpr(program(on_devices(8)))(*given(program, (2, 4))))
    assert "shard_map" in text


def test_effects_happen_once_for_each_replica():
    seen = []

    def inner(y):
        jax.debug.callback(lambda y: seen.append(("inner", float(y))), y)
        return y

    def outer(x):
        jax.debug.callback(lambda x: seen.append(("outer", float(x))), x.sum())
        read = jax.experimental.io_callback(lambda x: x * 2, jax.ShapeDtypeStruct((), np.float32), x.sum())
        return pmap(inner, "j")(x) + read

    x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    np.testing.assert_allclose(pmap(outer, "i")(x), x + 2 * x.sum(1, keepdims=True))
    jax.effects_barrier()
    assert sorted(seen) == [*(("inner", float(v)) for v in range(6)), ("outer", 3.0), ("outer", 12.0)]


def test_a_permutation_in_a_loop_that_outer_replicas_leave_apart():
    """XLA's permutation waits for all devices."""

    def nested(mapped):
        def outer(x):
            step = mapped(lambda y: lax.ppermute(y, "j", ring("j")) + 1, axis_name="j")
            done = lax.axis_index("i") * 3 + 2
            return lax.while_loop(lambda s: s[1] < done, lambda s: (step(s[0]), s[1] + 1), (x, 0))[0]

        return mapped(outer, axis_name="i")

    x = rows(2, 4)
    np.testing.assert_allclose(nested(pmap)(x), nested(jax.vmap)(x))
