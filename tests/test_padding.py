"""Padding changes no collective, result or side effect, and causes no endless loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.sharding import NamedSharding, PartitionSpec

from replicax import pmap
from replicax.testing import check

PADDED = [(9, 8), (13, 8), (5, 3), (7, 2), (19, 5)]


@pytest.mark.few("5-3")
@pytest.mark.parametrize(("n", "d"), PADDED)
def test_prints_and_callbacks_come_once_from_each_replica(n, d, capfd):
    seen, kept = [], []

    def fun(x):
        jax.debug.print("replica {}", lax.axis_index("i"))
        jax.debug.callback(lambda i: seen.append(int(i)), lax.axis_index("i"))
        lax.cond(x > 2, lambda: jax.debug.callback(lambda v: kept.append(float(v)), x), lambda: None)
        return lax.scan(lambda c, t: (c, jax.debug.callback(lambda i: seen.append(int(i)), t)), x, jnp.arange(2))[0]

    jax.block_until_ready(pmap(fun, axis_name="i", devices=jax.devices()[:d])(np.arange(n, dtype=np.float32)))
    jax.effects_barrier()
    assert sorted(seen) == sorted([*range(n), *[0, 1] * n])
    assert set(kept) >= {float(v) for v in range(3, n)}
    lines = capfd.readouterr().out.split("\n")
    assert sorted(line for line in lines if line) == sorted(f"replica {i}" for i in range(n))


@pytest.mark.few("14-4")
@pytest.mark.parametrize(("n", "d"), [*PADDED, (14, 4)])
def test_io_callbacks_come_once_from_each_replica(n, d):
    seen = []

    def count(x):
        seen.append(float(x))
        return np.float32(x + 1)

    def fun(x):
        return jax.experimental.io_callback(count, jax.ShapeDtypeStruct((), jnp.float32), x)

    out = pmap(fun, devices=jax.devices()[:d])(np.arange(n, dtype=np.float32))
    np.testing.assert_array_equal(out, np.arange(n) + 1)
    assert sorted(seen) == list(range(n))


@pytest.mark.parametrize("lanes", ["vectorized", "sequential"])
@pytest.mark.parametrize(("n", "d"), [(4, 1), (4, 2), (5, 2), (4, 4)])
def test_callbacks_come_once_from_each_replica_also_if_all_replicas_pass_the_same(n, d, lanes):
    seen = []

    def note(which, step):
        seen.append((which, int(step)))
        return np.float32(0)

    def fun(x):
        jax.debug.callback(functools.partial(note, "debug"), 7)

        def step(k, x):
            lax.cond(k == 1, lambda: jax.debug.callback(functools.partial(note, "branch"), k), lambda: None)
            return x + io_callback(functools.partial(note, "io"), jax.ShapeDtypeStruct((), jnp.float32), k)

        return lax.fori_loop(0, 2, step, x)

    x = np.arange(n, dtype=np.float32)
    np.testing.assert_array_equal(pmap(fun, devices=jax.devices()[:d], lanes=lanes)(x), x)
    jax.effects_barrier()
    assert sorted(seen) == sorted([("debug", 7), ("branch", 1), ("io", 0), ("io", 1)] * n)


def test_pure_callbacks_where_parts_of_a_result_lie_on_some_devices_each():
    def fun(x):
        like = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(lambda v: 2 * np.asarray(v), like, x, vmap_method="sequential")

    x = np.arange(14, dtype=np.float32)
    out = pmap(fun, devices=jax.devices()[:4])(x)
    np.testing.assert_array_equal(out, 2 * x)
    np.testing.assert_array_equal(pmap(jnp.negative, devices=jax.devices()[:4])(out), -2 * x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4", "bool"])
@pytest.mark.parametrize(
    ("n", "d", "row"),
    [(16, 6, (4,)), (16, 6, (2, 2, 2)), (22, 6, (8, 17)), (22, 7, (4, 4)), (21, 6, (3,)), (10, 4, (4,))],
)
def test_a_result_that_some_of_the_devices_split_is_an_argument_again(n, d, row, dtype):
    """XLA ends the process in some of these cases, if it must move the rows and pad them at once."""
    mapped = pmap(lambda x: x, devices=jax.devices()[:d])
    x = np.random.default_rng(0).normal(size=(n, *row)).astype(dtype)
    once = mapped(x)
    assert 1 < len({str(shard.index) for shard in once.addressable_shards}) < d
    np.testing.assert_array_equal(np.asarray(mapped(once)), x)


@pytest.mark.parametrize("n", [16, 17])
def test_an_argument_whose_columns_are_split(n):
    mesh = jax.make_mesh((6,), ("columns",), devices=jax.devices()[:6], axis_types=(jax.sharding.AxisType.Auto,))
    x = np.random.default_rng(0).normal(size=(n, 6)).astype(np.float32)
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "columns")))
    np.testing.assert_array_equal(pmap(lambda x: 2 * x, devices=jax.devices()[:6])(split), 2 * x)


@pytest.mark.few("9-8", "5-3")
@pytest.mark.parametrize(("n", "d"), PADDED)
def test_a_loop_that_zeros_would_never_leave(n, d):
    """If the padding held zeros, this loop would never end."""
    check(
        lambda x: lax.while_loop(lambda y: y < 10, lambda y: y * 2, x), np.arange(1.0, n + 1), devices=jax.devices()[:d]
    )


@pytest.mark.few("9-8", "5-3")
@pytest.mark.parametrize(("n", "d"), PADDED)
def test_padding_makes_no_nan(n, d):
    with jax.debug_nans(True):
        check(
            lambda x: jnp.log(x) / x + lax.psum(x, "i"), np.arange(1.0, n + 1), axis_name="i", devices=jax.devices()[:d]
        )


@pytest.mark.few("9-8", "5-3")
@pytest.mark.parametrize(("n", "d"), PADDED)
def test_padding_has_no_part_in_derivatives(n, d):
    """The last replica's slope is infinite. Its padding copies must not add a NaN."""
    x = np.arange(n, dtype=np.float32)[::-1].copy()
    ours = jax.grad(lambda x: pmap(jnp.sqrt, devices=jax.devices()[:d])(x).sum())(x)
    np.testing.assert_array_equal(ours, jax.grad(lambda x: jax.vmap(jnp.sqrt)(x).sum())(x))


def test_many_replicas_one_at_a_time_far_over_the_devices():
    check(lambda x: x - lax.pmean(x, "i"), np.random.default_rng(0).normal(size=(10_003, 2)), axis_name="i")


@pytest.mark.few("2", "8")
@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_a_map_is_linear_where_its_function_is(d):
    x, on = np.arange(3.0, dtype=np.float32), {"devices": jax.devices()[:d]}
    double = pmap(lambda g: 2 * g, **on)
    np.testing.assert_array_equal(jax.linear_transpose(double, x)(x)[0], 2 * x)
    halves = jax.lax.custom_linear_solve(double, x, lambda _, b: b / 2, lambda _, b: b / 2)
    np.testing.assert_array_equal(halves, x / 2)

    @jax.custom_jvp
    def square(x):
        return x * x

    square.defjvp(lambda p, t: (square(*p), pmap(lambda x, g: 2 * x * g, **on)(p[0], t[0])))
    np.testing.assert_array_equal(jax.grad(lambda x: square(x).sum())(x), 2 * x)
