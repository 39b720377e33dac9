"""``replicax.compat``: installs, uninstalls, and behaves like the functions of JAX that it replaces."""

import functools
import inspect
import pickle
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from replicax import DevicesError, DivergentOutputError, NotAnArrayError, OptionTypeError, ShardsError, compat, pmap

x8 = np.arange(8.0, dtype=np.float32)
stock = jax.pmap
NAMES = ("pmap", "device_put_replicated", "device_put_sharded")


def test_what_was_there_is_put_back():
    before = {name: vars(jax).get(name) for name in NAMES}
    assert before == {"pmap": stock, "device_put_replicated": None, "device_put_sharded": None}
    compat.uninstall()
    compat.install()
    compat.install()
    assert all(getattr(jax, name) is getattr(compat, name) for name in NAMES)
    compat.uninstall()
    assert {name: vars(jax).get(name) for name in NAMES} == before
    with pytest.raises(AttributeError, match="device_put_replicated is deprecated"):
        jax.device_put_replicated  # noqa: B018


def test_blocks_nest_and_end_after_an_error():
    @compat.installed()
    def twelve():
        return jax.pmap(lambda x: lax.psum(x, "i"), axis_name="i")(np.arange(12.0))

    def fails():
        with compat.installed():
            np.testing.assert_array_equal(twelve(), np.full(12, 66))
            assert jax.pmap is compat.pmap
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert jax.pmap is stock


def test_mocks_patch_over_it():
    with compat.installed():
        with mock.patch("jax.pmap", jax.vmap), mock.patch("jax.device_put_replicated", lambda x, devices: x):
            compat.install()
            assert jax.pmap is jax.vmap
            assert jax.device_put_replicated(1, []) == 1
        assert jax.pmap is compat.pmap
        assert jax.device_put_replicated is compat.device_put_replicated
        jax.pmap = None
    assert jax.pmap is stock


def test_modules_that_took_jaxs_own_are_named(monkeypatch):
    early = types.ModuleType("an_early_importer")
    vars(early).update(pmap=stock)
    monkeypatch.setitem(sys.modules, "an_early_importer", early)
    with (
        pytest.warns(RuntimeWarning, match=r"already.*: an_early_importer \(pmap\)\. Call .* before"),
        compat.installed(),
    ):
        pass


def test_the_signature_is_jaxs():
    ours, theirs = inspect.signature(compat.pmap).parameters, inspect.signature(stock).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    assert inspect.isfunction(compat.pmap)
    assert pickle.loads(pickle.dumps(compat.pmap)) is compat.pmap
    for call in (lambda f: f(axis_name="i"), lambda f: f(3)):
        for each in (stock, compat.pmap):
            with pytest.raises(TypeError):
                call(each)


def double(x):
    """Doubles."""
    return 2 * x


class Model:
    def __call__(self, x):
        return x


def test_the_ways_programs_use_it():
    @functools.partial(compat.pmap, axis_name="i", in_axes=[0, None], donate_argnums=[])
    def total(x, y):
        return lax.psum(x * y, "i")

    class Trainer:
        @functools.partial(compat.pmap, static_broadcasted_argnums=[0], axis_name="i")
        def step(self, x):
            return x - lax.pmean(x, axis_name="i")

        def __init__(self):
            self.predict = compat.pmap(self._predict, axis_name="i", devices=jax.local_devices())

        def _predict(self, x):
            return x + 1

    np.testing.assert_array_equal(total(x8, 2), np.full(8, 56))
    np.testing.assert_array_equal(Trainer().step(x8), x8 - 3.5)
    np.testing.assert_array_equal(Trainer().predict(x8), x8 + 1)
    np.testing.assert_array_equal(compat.pmap(fun=double, axis_name="i")(x8), 2 * x8)
    mapped = compat.pmap(double)
    assert (mapped.__name__, mapped.__doc__, mapped.__wrapped__) == ("double", "Doubles.", double)
    assert compat.pmap(functools.partial(functools.partial(double))).__name__ == "double"
    assert compat.pmap(Model()).__qualname__ == "Model"
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(compat.pmap(double, out_axes=None)))(x8), 0)


@pytest.mark.few("jit")
@pytest.mark.parametrize("outer", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_out_axes_none_does_not_ask_whether_replicas_agree(outer):
    def fun(x):
        return {"own": x + 1, "same": lax.psum(x, "i"), "all": x}

    axes = {"own": None, "same": None, "all": 0}
    theirs = outer(stock(fun, axis_name="i", out_axes=axes))(x8)
    ours = outer(compat.pmap(fun, axis_name="i", out_axes=axes))(x8)
    for name in axes:
        np.testing.assert_array_equal(ours[name], theirs[name])
        assert ours[name].sharding.is_equivalent_to(theirs[name].sharding, ours[name].ndim)
        for a, b in zip(ours[name].addressable_shards, theirs[name].addressable_shards, strict=True):
            np.testing.assert_array_equal(a.data, b.data)
    for n in (1, 5, 12, 13):
        rows = np.arange(n) + 3.0
        out = outer(compat.pmap(fun, axis_name="i", out_axes=axes))(rows)
        assert (float(out["own"]), float(out["same"])) == (4, float(rows.sum()))
    with pytest.raises(DivergentOutputError):
        outer(pmap(fun, axis_name="i", out_axes=axes))(x8)


def test_its_derivative_is_jaxs():
    def derivative(mapped):
        return jax.grad(lambda x: mapped(lambda x: x * x, out_axes=None)(x))(x8)

    np.testing.assert_array_equal(derivative(compat.pmap), derivative(stock))


def test_disable_jit_shows_values():
    seen = []
    with jax.disable_jit():
        out = compat.pmap(lambda x: (seen.append(x), lax.psum(x, "i"))[1], axis_name="i")(x8)
    np.testing.assert_array_equal(out, np.full(8, 28))
    assert len(seen) == 1


def rows_of(x):
    return {s.device: s.data for s in x.addressable_shards}


@pytest.mark.parametrize("order", [slice(None), slice(5, 2, -1), slice(0, 1)])
def test_device_put_replicated(order):
    devices = jax.devices()[order]
    host = np.arange(3, dtype=np.int8)
    tree = {"w": host, "b": (jnp.ones((2, 2)), 3.0, True), "none": None, "key": jax.random.key(0)}
    out = compat.device_put_replicated(tree, devices)
    host[:] = 9
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    np.testing.assert_array_equal(out["w"], np.tile(np.arange(3), (len(devices), 1)))
    np.testing.assert_array_equal(out["b"][0], np.ones((len(devices), 2, 2)))
    assert (out["w"].dtype, out["b"][1].dtype, out["b"][2].dtype) == (np.int8, np.float32, bool)
    assert jax.random.key_data(out["key"]).shape == (len(devices), 2)
    for leaf in jax.tree.leaves(out):
        assert [s.device for s in sorted(leaf.addressable_shards, key=lambda s: s.index[0].start or 0)] == devices
        assert all(s.data.shape[0] == 1 for s in leaf.addressable_shards)


def test_what_is_put_on_devices_stays_there():
    devices = jax.devices()
    tree = compat.device_put_replicated({"w": compat.pmap(lambda x: x)(x8)}, devices[:4])
    assert tree["w"].shape == (4, 8)
    out = compat.pmap(lambda t: jax.tree.map(lambda w: 2 * w, t), donate_argnums=0)(tree)
    np.testing.assert_array_equal(out["w"], np.tile(2 * x8, (4, 1)))
    assert out["w"].sharding.device_set == set(devices[:4])
    assert tree["w"].is_deleted()


def test_a_state_of_four_devices_goes_to_eight():
    state = compat.device_put_replicated({"w": jnp.ones(2)}, jax.devices()[:4])
    step = compat.pmap(lambda s: jax.tree.map(lambda w: lax.psum(w, "i"), s), axis_name="i")
    np.testing.assert_array_equal(step(state)["w"], np.full((4, 2), 4))
    eight = jax.tree.map(lambda w: jnp.concatenate([w, w]), state)
    with pytest.raises(ValueError, match=r"does not match the sharding|incompatible devices"):
        stock(double)(eight["w"])
    np.testing.assert_array_equal(step(eight)["w"], np.full((8, 2), 8))


def test_device_put_sharded():
    devices = jax.devices()[5:1:-1]
    shards = [{"x": np.full(2, i), "y": (jnp.float32(i), i), "key": jax.random.key(i)} for i in range(4)]
    out = compat.device_put_sharded(shards, devices)
    np.testing.assert_array_equal(out["x"], [[0, 0], [1, 1], [2, 2], [3, 3]])
    np.testing.assert_array_equal(out["y"][0], np.arange(4))
    assert out["y"][1].dtype == np.int32
    np.testing.assert_array_equal(jax.random.key_data(out["key"])[:, 1], np.arange(4))
    assert {d: float(rows_of(out["y"][0])[d][0]) for d in devices} == dict(zip(devices, range(4), strict=True))
    np.testing.assert_array_equal(compat.device_put_sharded((1.0, 2.0), devices[:2]), [1, 2])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: compat.device_put_replicated(1.0, []), DevicesError, "must be non-empty"),
        (
            lambda: compat.device_put_replicated(1.0, 8),  # type: ignore[call-overload]
            OptionTypeError,
            "devices must be a list of devices",
        ),
        (lambda: compat.device_put_replicated({"a": "b"}, jax.devices()), NotAnArrayError, r"tree\['a'\] is of type"),
        (
            lambda: compat.device_put_sharded(x8, jax.devices()),  # type: ignore[call-overload]
            OptionTypeError,
            r"got ndarray\. .* write list\(shards",
        ),
        (lambda: compat.device_put_sharded([1, 2], jax.devices()), ShardsError, "2 shards for 8 devices"),
        (lambda: compat.device_put_sharded([], []), DevicesError, "must be non-empty"),
        (lambda: compat.device_put_sharded([x8, ["b"]], jax.devices()[:2]), NotAnArrayError, r"tree\[1\]\[0\] is"),
        (
            lambda: compat.device_put_sharded([{"a": 1}, {"a": 1}, {"b": 1}], jax.devices()[:3]),
            ShardsError,
            r"(?s)these differ:\n  \* shards\[2\] is .*'b'.* and shards\[0\] is .*'a'",
        ),
        (
            lambda: compat.device_put_sharded([{"a": x8}, {"a": x8[:4]}, {"a": 1}], jax.devices()[:3]),
            ShardsError,
            r"(?s)shards\[1\]\['a'\] is float32\[4\], and shards\[0\]\['a'\] is float32\[8\]\n.*\[2\]\['a'\] is int32",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.few("13")
@pytest.mark.parametrize("n", [1, 4, 8, 12, 13])
def test_derivatives_of_results_that_differ_do_not_depend_on_devices(n):
    def gradient(pmap):
        return jax.grad(lambda x: pmap(lambda x: x * x, axis_name="i", out_axes=None)(x))(np.arange(1.0, n + 1))

    np.testing.assert_allclose(gradient(compat.pmap), 2 * np.arange(1.0, n + 1) / n, rtol=1e-6)
    if n <= 8:
        np.testing.assert_allclose(gradient(compat.pmap), gradient(jax.pmap), rtol=1e-6)


def test_weak_types_stay_weak():
    weak = compat.device_put_replicated((0.1, np.float32(1), jnp.asarray(2)), jax.devices()[:4])
    assert [x.weak_type for x in jax.tree.leaves(weak)] == [True, False, True]
    rate = compat.device_put_sharded([1.0, 2.0], jax.devices()[:2])
    assert rate.weak_type
    assert compat.pmap(lambda r, x: r * x)(rate, jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16
