"""Arguments may be any arrays that JAX accepts, on any devices: they are moved, never refused."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from replicax import pmap
from replicax._runtime import run as _run
from replicax._runtime.executable import Executable
from replicax.testing import check

N = {"direct": 8, "lanes": 16, "fewer": 5, "padded": 13, "one": 1}


def everywhere(x):
    """The same array, by place: host or sharding."""
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("q",))
    reversed_mesh = Mesh(np.array(devices[::-1][:4]).reshape(2, 2), ("a", "b"))
    return {
        "numpy": x,
        "strided": np.repeat(x, 2, axis=0)[::2],
        "uncommitted": jnp.asarray(x),
        "one device": jax.device_put(x, devices[3]),
        "replicated": jax.device_put(x, NamedSharding(mesh, P())),
        "other devices": jax.device_put(x, NamedSharding(reversed_mesh, P(None, "b"))),
        "a result of another map": pmap(lambda row: row, devices=devices[2:5])(x),
    }


@pytest.mark.few("direct", "padded", "one")
@pytest.mark.parametrize("n", N.values(), ids=N)
def test_arguments_may_lie_anywhere(n):
    x = np.arange(n * 4, dtype=np.float32).reshape(n, 4)
    fun = functools.partial(pmap, axis_name="i")(lambda a: a + jax.lax.psum(a, "i"))
    for place, y in everywhere(x).items():
        np.testing.assert_array_equal(fun(y), x + x.sum(0), err_msg=place)
        np.testing.assert_array_equal(y, x, err_msg=f"{place}: the argument itself")


@pytest.mark.few(5)
@pytest.mark.parametrize("n", N.values(), ids=N)
@pytest.mark.parametrize("place", [0, 3, 6])
def test_broadcast_arguments_may_lie_anywhere(n, place):
    w = np.arange(3.0, dtype=np.float32)
    fun = pmap(lambda a, w: a * w, in_axes=(0, None))
    for y in (w, jnp.asarray(w), jax.device_put(w, jax.devices()[place])):
        np.testing.assert_array_equal(fun(np.ones((n, 3)), y), np.ones((n, 1)) * w)


@pytest.mark.few(14)
@pytest.mark.parametrize("n", N.values(), ids=N)
@pytest.mark.parametrize(
    "dtype",
    [
        *("bool", "int8", "uint16", "int32", "float16", "float32", "complex64", "int64", "float64"),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4),
    ],
    ids=str,
)
def test_every_dtype(n, dtype):
    x = (np.arange(n * 2).reshape(n, 2) % 3).astype(dtype)
    check(lambda a: (a, a.reshape(2, 1)), x)
    check(lambda a: (a, a.reshape(2, 1)), jnp.asarray(x))


@pytest.mark.long
@pytest.mark.parametrize("n", N.values(), ids=N)
def test_typed_keys(n):
    keys = jax.random.split(jax.random.key(7), n)
    check(lambda k: (jax.random.normal(k, (3,)), jax.random.split(k), k), keys)
    check(lambda x, k: jax.random.normal(k) + x, np.arange(n), jax.random.key(1), in_axes=(0, None))
    check(lambda k: jax.random.fold_in(k, jax.lax.axis_index("i")), keys, axis_name="i")
    check(lambda k: jax.lax.all_gather(k, "i"), keys, axis_name="i")
    for tiled in (False, True):
        check(
            lambda k, t=tiled: jax.lax.all_gather(jax.random.split(k, (2, 3)), "i", axis=1, tiled=t),
            keys,
            axis_name="i",
        )


@pytest.mark.parametrize("n", N.values(), ids=N)
def test_derivatives_of_ints(n):
    zeros = np.zeros((n, 2), jax.dtypes.float0)
    same, twice = pmap(lambda z, x: (z, 2 * x))(zeros, np.arange(n))
    assert (same.shape, same.dtype) == (zeros.shape, jax.dtypes.float0)
    np.testing.assert_array_equal(twice, 2 * np.arange(n))


@pytest.mark.few("direct", "padded")
@pytest.mark.parametrize("n", N.values(), ids=N)
def test_arrays_without_elements(n):
    check(lambda a: (a, a.sum(), jax.lax.psum(a, "i"), jax.lax.all_gather(a, "i")), np.ones((n, 0, 2)), axis_name="i")


@pytest.mark.few("direct", "padded")
@pytest.mark.parametrize("n", N.values(), ids=N)
def test_tangents_of_integers(n):
    """``float0`` arrays, which have no bytes: JAX's tangents of integers."""
    check(lambda a: (a, jnp.ones(3)), np.zeros((n, 2), jax.dtypes.float0))


@pytest.mark.few("padded")
@pytest.mark.parametrize("n", N.values(), ids=N)
def test_scalars_of_python(n):
    x = np.arange(n, dtype=np.float32)
    for scalar in (2, 2.5, True, 1j, np.float32(3), np.int8(4)):
        check(lambda a, s: a * s, x, scalar, in_axes=(0, None))


@pytest.mark.few("-1--1-padded")
@pytest.mark.parametrize("n", N.values(), ids=N)
@pytest.mark.parametrize(("in_axis", "out_axis"), [(0, 0), (1, 0), (0, 1), (1, 2), (-1, -1), (2, -2), (-3, -3)])
def test_any_axis_in_and_out(n, in_axis, out_axis):
    shape = [2, 3]
    shape.insert(in_axis % 3, n)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    check(
        lambda a: a * jax.lax.pmean(a.sum(), "i"), x, axis_name="i", in_axes=in_axis, out_axes=out_axis,
        derivatives=True,
    )  # fmt: skip


@pytest.mark.few("padded", "fewer")
@pytest.mark.parametrize("n", N.values(), ids=N)
def test_trees_and_prefixes(n):
    rng = np.random.default_rng(1)
    tree = {"a": rng.normal(size=(n, 2)), "b": (rng.normal(size=(3, n)), rng.normal(size=4), None)}

    def fun(tree, scale, *, offset):
        a, (b, c, none) = tree["a"], tree["b"]
        assert none is None
        return {"sum": a.sum() + b + c[0] * scale, "same": (jax.lax.psum(c, "i"), [a, offset])}

    check(
        fun, tree, 2.0, kwargs={"offset": np.arange(n)}, axis_name="i",
        in_axes=({"a": 0, "b": (1, None, None)}, None), out_axes={"sum": -1, "same": (None, 0)},
    )  # fmt: skip
    check(fun, tree, 2.0, kwargs={"offset": np.arange(n)}, axis_name="i", in_axes=[{"a": 0, "b": (1, None, 0)}, None])


@pytest.mark.few("fewer", "padded")
@pytest.mark.parametrize("n", N.values(), ids=N)
def test_nothing_mapped(n):
    check(lambda w: w * jax.lax.axis_index("i"), np.arange(3.0), axis_name="i", in_axes=None, axis_size=n)
    np.testing.assert_array_equal(pmap(lambda: jax.lax.axis_index("i"), axis_name="i", axis_size=n)(), np.arange(n))


@pytest.mark.few("direct", "padded")
@pytest.mark.parametrize("n", N.values(), ids=N)
def test_numpy_arguments_may_change_as_soon_as_the_call_returns(n):
    # Large and aligned, so that JAX would alias the memory.
    raw = np.zeros(n * 40_000 + 64, np.float32)
    x = raw[(-raw.ctypes.data // 4) % 16 :][: n * 40_000].reshape(n, 40_000)
    w = np.ones(50_000, np.float32)
    x[:] = 1
    fun = pmap(lambda a, w: (a, w[:7], a * 2 + w[0]), in_axes=(0, None))
    same, broadcast, result = fun(x, w)
    x[:], w[:] = 7, 7
    for out, expected in ((same, 1), (broadcast, 1), (result, 3)):
        np.testing.assert_array_equal(np.unique(out), expected)


@pytest.mark.few("fewer")
@pytest.mark.parametrize("n", N.values(), ids=N)
def test_closed_over_arrays_may_lie_anywhere(n):
    x = np.arange(n, dtype=np.float32)
    for place, closed in everywhere(np.arange(n * 4, dtype=np.float32).reshape(n, 4)).items():
        fun = lambda a, c=closed: (a * c[0], (c + a).sum(), jnp.asarray(c)[jax.lax.axis_index("i")])
        for ours, theirs in zip(pmap(fun, "i")(x), jax.jit(jax.vmap(fun, axis_name="i"))(x), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=place)


@pytest.mark.few("lanes", "padded")
@pytest.mark.parametrize("n", N.values(), ids=N)
def test_scalars_of_python_in_collectives(n):
    def fun(x):
        started_at_zero = jax.lax.while_loop(
            lambda c: jax.lax.psum(c[1], "i") < 50,
            lambda c: (c[0] + jax.lax.all_gather(c[0], "i").sum(0), c[1] + jax.lax.axis_index("i") + 1),
            (x, 0),
        )
        return jax.lax.all_gather(1.5, "i"), jax.lax.pmax(True, "i"), jax.lax.pmin(2, "i"), started_at_zero

    check(fun, np.arange(n, dtype=np.float32), axis_name="i")


def test_64_bit_arrays_made_while_they_were_enabled():
    for n in (8, 13):
        with jax.enable_x64(True):
            wide = pmap(lambda a: a * 2.5)(np.arange(float(n)))
            assert wide.dtype == np.float64
        out = pmap(lambda a: a * 2)(wide)
        assert out.dtype == np.float32
        np.testing.assert_array_equal(out, np.arange(n) * 5)


def test_the_result_is_one_array_over_the_devices():
    out = pmap(lambda a: 2 * a)(np.arange(8.0))
    assert out.sharding.device_set == set(jax.devices())
    assert [shard.data.shape for shard in out.addressable_shards] == [(1,)] * 8
    out = pmap(lambda a: 2 * a)(np.arange(24.0))
    assert [shard.data.shape for shard in out.addressable_shards] == [(3,)] * 8
    out = pmap(lambda a: 2 * a, devices=jax.devices()[3:5])(np.arange(4.0))
    assert [(s.device.id, s.data.shape) for s in out.addressable_shards] == [(3, (2,)), (4, (2,))]


def test_an_array_that_lies_right_is_not_moved_whatever_its_mesh_is_called():
    devices = np.array(jax.devices())
    for mesh, spec in ((Mesh(devices, ("mine",)), P("mine")), (Mesh(devices.reshape(4, 2), ("a", "b")), P(("a", "b")))):
        x = jax.device_put(np.arange(8.0, dtype=np.float32), NamedSharding(mesh, spec))
        mapped = pmap(lambda x: x + 1)
        program, leaves = mapped._dispatcher.resolve(lambda x: x + 1, (x,), {})
        assert isinstance(program, Executable)
        assert _run.place(program, leaves)[0] is x
        np.testing.assert_array_equal(mapped(x), np.arange(1.0, 9.0))
