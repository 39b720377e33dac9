"""``install(replicas=N)``: the program sees N devices, several per real device, and uses them."""

import sys
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh

import replicax
from replicax import DevicesError, OptionTypeError, ReplicasError, _jax, compat

REAL = tuple(jax.devices())
x8 = np.arange(8.0, dtype=np.float32)


@pytest.fixture(params=[8, 11, 12, 20])
def n(request):
    """On 8 devices: one row per device; replicated over 6; two rows on each of 6; replicated over 7."""
    with compat.installed(replicas=request.param):
        yield request.param


def test_the_program_counts_them(n):
    lanes = -(-n // 8)
    assert jax.device_count() == jax.local_device_count() == jax.device_count("cpu") == n
    for devices in (jax.devices(), jax.local_devices(), jax.devices("cpu"), jax.local_devices(0, backend="cpu")):
        assert devices == [REAL[r // lanes] for r in range(n)]
    with pytest.raises(ValueError, match="Unknown process_index 1"):
        jax.local_devices(process_index=1)
    assert jax.process_count() == 1


def test_afterwards_it_counts_those_that_there_are():
    names = ("devices", "local_devices", "device_count", "local_device_count")
    before = [getattr(jax, name) for name in names]
    with compat.installed(replicas=12):
        assert all(getattr(jax, name) is not one for name, one in zip(names, before, strict=True))
        with compat.installed(), compat.installed(replicas=12):
            compat.install()
            assert jax.device_count() == 12
        assert jax.device_count() == 12
    assert [getattr(jax, name) for name in names] == before
    with compat.installed():
        assert jax.device_count() == 8
        assert [getattr(jax, name) for name in names] == before


@pytest.mark.parametrize("package", ["jax.experimental.multihost_utils", "orbax.checkpoint", "replicax._arrays"])
def test_jax_and_orbax_see_those_that_there_are(package):
    asking = {"jax": jax, "__name__": package}
    with compat.installed(replicas=12):
        assert eval("jax.device_count(), jax.local_device_count()", asking) == (8, 8)
        assert tuple(eval("jax.devices()", asking)) == tuple(eval("jax.local_devices()", asking)) == REAL
        assert eval("jax.device_count()", asking | {"__name__": "jaxtyping"}) == 12
        assert len(jax.make_mesh((8,), ("i",)).devices) == 8


def test_the_devices_of_another_platform_are_its_own(monkeypatch):
    gpu = [types.SimpleNamespace(client="gpu", platform="gpu")] * 2
    monkeypatch.setattr(_jax, "devices", lambda backend=None: list(REAL) if backend == "cpu" else gpu)
    with compat.installed(replicas=3):
        assert jax.device_count() == 3
        assert tuple(jax.devices("cpu")) == REAL


@pytest.mark.few("11")
def test_maps_take_such_lists(n):
    def fun(x):
        return x - lax.pmean(x, "i"), lax.ppermute(x, "i", [(i, (i + 1) % n) for i in range(n)])

    x = np.arange(n, dtype=np.float32)
    mapped = jax.pmap(fun, axis_name="i", devices=jax.devices())
    for ours, theirs in zip(mapped(x), jax.vmap(fun, axis_name="i")(x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    part = jax.pmap(lambda x: lax.psum(x, "i"), axis_name="i", devices=np.array(jax.local_devices()[:5]))
    np.testing.assert_array_equal(part(np.arange(5.0)), np.full(5, 10))


@pytest.mark.few("11")
def test_arrays_are_put_on_such_lists(n):
    tree = {"a": np.arange(3), "b": (jnp.ones(2), 0.5), "key": jax.random.key(1)}
    out = jax.device_put_replicated(tree, jax.local_devices())
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    np.testing.assert_array_equal(out["a"], np.tile(np.arange(3), (n, 1)))
    assert (out["b"][0].shape, out["b"][1].shape, out["b"][1].weak_type) == ((n, 2), (n,), True)
    assert jax.random.key_data(out["key"]).shape == (n, 2)
    shards = [{"a": np.full(2, i), "b": float(i), "key": jax.random.key(i)} for i in range(n)]
    out = jax.device_put_sharded(shards, jax.devices())
    np.testing.assert_array_equal(out["a"], np.stack([shard["a"] for shard in shards]))
    np.testing.assert_array_equal(jax.random.key_data(out["key"])[:, 1], np.arange(n))
    assert out["b"].weak_type
    total = jax.pmap(lambda t: lax.psum(t["a"], "i"), axis_name="i", donate_argnums=0)(out)
    np.testing.assert_array_equal(total, np.full((n, 2), n * (n - 1) // 2))


@pytest.mark.few("12")
def test_what_is_put_lies_where_maps_put_results(n):
    result = jax.pmap(lambda x: 2 * x)(np.ones((n, 3)))
    for put in (
        jax.device_put_replicated(np.ones(3), jax.devices()),
        jax.device_put_sharded(list(np.ones((n, 3))), jax.devices()),
    ):
        assert put.sharding.is_equivalent_to(result.sharding, 2)
        held = [(s.device, s.data.shape) for s in put.addressable_shards]
        assert held == [(s.device, s.data.shape) for s in result.addressable_shards]


@pytest.mark.few("11")
def test_one_that_is_put_does_not_see_later_changes(n):
    row, rows = np.ones(4), np.ones((n, 4))
    out = jax.device_put_replicated(row, jax.devices()), jax.device_put_sharded(list(rows), jax.devices())
    row[:], rows[:] = 9, 9
    for x in out:
        np.testing.assert_array_equal(x, np.ones((n, 4)))


# ---------------------------------------------------------------------------------------------------------------
# Mesh


def test_a_mesh_refuses_them():
    original = vars(Mesh)["__new__"]
    with compat.installed(replicas=12):
        text = r"(?s)must contain each device once, but:\n  \* CpuDevice\(id=0\) appears 2 times.*dict\.fromkeys"
        with pytest.raises(DevicesError, match=text):
            Mesh(jax.devices(), ("i",))
        with pytest.raises(ValueError, match="appears 2 times"):
            Mesh(devices=np.array(jax.devices()).reshape(3, 4), axis_names=("i", "j"))
        mesh = Mesh(np.array(list(dict.fromkeys(jax.devices()))).reshape(2, 3), ("i", "j"))
        assert isinstance(mesh, Mesh)
        assert type(mesh) is Mesh
        assert mesh == Mesh(np.array(REAL[:6]).reshape(2, 3), ("i", "j"))
        assert Mesh(np.empty((), dtype=object), ()).empty
    assert vars(Mesh)["__new__"].__func__ is original.__func__
    with compat.installed(), pytest.raises(DevicesError, match="appears 8 times"):
        Mesh([REAL[0]] * 8, ("i",))
    assert Mesh([REAL[0]] * 8, ("i",)).size == 8  # JAX's Mesh accepts it and fails later


# ---------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("install", [compat.install, lambda replicas: compat.installed(replicas=replicas).__enter__()])
@pytest.mark.parametrize(
    ("replicas", "error", "text"),
    [
        (0, ReplicasError, "replicas must be the number of devices that the program sees, at least 1, got 0"),
        (-1, ReplicasError, r"at least 1, got -1\. Write replicas=8\."),
        ("eight", OptionTypeError, "replicas must be an int, got 'eight' of type str"),
        (2.0, OptionTypeError, "replicas must be an int, got 2.0 of type float"),
    ],
)
def test_no_number_of_devices(install, replicas, error, text):
    before = jax.pmap
    with pytest.raises(error, match=text):
        install(replicas)
    assert jax.pmap is before


def test_an_environment_with_no_number(monkeypatch):
    monkeypatch.setenv("REPLICAX_REPLICAS", "many")
    with pytest.raises(ReplicasError, match=r"REPLICAX_REPLICAS must be .* got 'many'\. Write REPLICAX_REPLICAS=8"):
        compat.install()
    monkeypatch.setenv("REPLICAX_REPLICAS", "12")
    with compat.installed():
        assert jax.device_count() == 12
    with compat.installed(replicas=9):
        assert jax.device_count() == 9


def test_once_the_program_has_used_devices_it_is_too_late():
    text = r"replicas=12: .* the program has used JAX's devices already .* --replicas 12\."
    with pytest.raises(ReplicasError, match=text):
        compat.install(replicas=12)
    assert not hasattr(jax, "device_put_replicated")


def test_no_two_numbers_at_once():
    for first in (9, None):
        with (
            compat.installed(replicas=first),
            pytest.raises(ReplicasError, match=f"replicas=12: .* already installed, with replicas={first}"),
        ):
            compat.install(replicas=12)
    assert not hasattr(jax, "device_put_replicated")


def test_no_fewer_than_there_are():
    with compat.installed(replicas=5):
        for count in (jax.device_count, jax.local_device_count, jax.devices, jax.local_devices):
            with pytest.raises(ReplicasError, match=r"replicas=5: there are 8 devices.* replicas=8 or more, or hide"):
                count()


def test_no_stand_ins_in_several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with compat.installed(replicas=12), pytest.raises(ReplicasError, match="this run has 2 processes"):
        jax.local_device_count()


def test_modules_that_have_taken_counts_are_named(monkeypatch):
    early = types.ModuleType("an_early_importer")
    vars(early).update(local_device_count=jax.local_device_count)
    monkeypatch.setitem(sys.modules, "an_early_importer", early)
    with compat.installed():
        pass  # no warning: without replicas, its function returns the right count
    text = r"already.*: an_early_importer \(local_device_count\)\. Call"
    with pytest.warns(RuntimeWarning, match=text), compat.installed(replicas=12):
        pass


def test_lists_that_are_none():
    with compat.installed(replicas=12):
        for call in (
            lambda: jax.pmap(lambda x: x, devices=[*jax.devices(), "cpu"]),
            lambda: jax.device_put_replicated(1.0, [*jax.devices(), 3]),
        ):
            with pytest.raises(DevicesError, match="which is not a device"):
                call()
        with pytest.raises(replicax.ShardsError, match="3 shards for 12 devices"):
            jax.device_put_sharded([1, 2, 3], jax.devices())
    assert Counter(jax.devices()) == Counter(REAL)
