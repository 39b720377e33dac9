"""``replicate``, ``shard``, ``unreplicate``, ``local_replicas``, ``fetch``: correct, and no full copy on a device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import replicax

SIZES = [1, 3, 8, 12, 13, 64]


def tree():
    return {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3), "n": 3, "key": jax.random.key(0), "b": jnp.bfloat16(2)}


def rows_held(x):
    return max(shard.data.shape[0] for shard in x.addressable_shards)


@pytest.mark.few("12", "13")
@pytest.mark.parametrize("n", SIZES)
def test_replicate_and_back(n):
    many = replicax.replicate(tree(), n)
    assert many["w"].shape == (n, 2, 3)
    assert many["n"].shape == (n,)
    one = replicax.unreplicate(many)
    np.testing.assert_array_equal(one["w"], tree()["w"])
    assert one["w"].devices() == {jax.devices()[0]}
    assert (int(one["n"]), float(one["b"]), one["b"].dtype) == (3, 2.0, jnp.bfloat16)
    assert jax.random.bits(one["key"]) == jax.random.bits(jax.random.key(0))
    if n % 8 == 0:
        assert rows_held(many["w"]) == n // 8


def test_replicate_onto_all_devices_or_some():
    assert replicax.replicate(np.ones(2)).shape == (8, 2)
    some = replicax.replicate(np.ones(2), devices=jax.devices()[2:4])
    assert some.shape == (2, 2)
    assert some.devices() == set(jax.devices()[2:4])


@pytest.mark.few("12", "13")
@pytest.mark.parametrize("n", SIZES)
def test_shard(n):
    x = np.arange(n * 4 * 2).reshape(n * 4, 2)
    for batch in (x, jnp.asarray(x), jax.device_put(x, jax.devices()[5])):
        out = replicax.shard({"x": batch}, n)["x"]
        np.testing.assert_array_equal(out, x.reshape(n, 4, 2))
    if n % 8 == 0:
        assert rows_held(out) == n // 8
    np.testing.assert_array_equal(replicax.pmap(lambda rows: rows.sum())(out), x.reshape(n, -1).sum(1))


def test_shard_copies_what_its_owner_may_change():
    x = np.ones((64, 4096), np.float32)
    out = replicax.shard(x)
    x[:] = 7
    np.testing.assert_array_equal(np.unique(out), 1)


@pytest.mark.few("12")
@pytest.mark.parametrize("n", SIZES)
def test_local_replicas_are_the_rows_in_order(n):
    x = np.arange(n * 3.0, dtype=np.float32).reshape(n, 3)
    out = replicax.pmap(lambda a: {"a": a, "k": jax.random.key(a[0].astype(int))})(x)
    rows = replicax.local_replicas(out)
    assert len(rows) == n
    for row, expected in zip(rows, x, strict=True):
        assert isinstance(row["a"], np.ndarray)
        np.testing.assert_array_equal(row["a"], expected)
        assert jax.random.bits(row["k"]) == jax.random.bits(jax.random.key(int(expected[0])))
    assert len(replicax.local_replicas(x)) == n


@pytest.mark.parametrize("n", [*SIZES, 14])
def test_fetch(n):
    x = np.arange(n * 6.0, dtype=np.float32).reshape(n, 2, 3)
    out = replicax.pmap(lambda a: (a, a.T, jax.random.key(a[0, 0].astype(int))), out_axes=(0, 1, 0))(x)
    rows, columns, keys = replicax.fetch(out)
    assert type(rows) is type(columns) is np.ndarray
    np.testing.assert_array_equal(rows, x)
    np.testing.assert_array_equal(columns, np.asarray(out[1]))
    assert isinstance(keys, jax.Array)
    host: dict[str, Any] = replicax.fetch({"a": 3, "b": [x, x[0, 0, 0]]})
    assert (host["a"], host["b"][1]) == (3, 0)
    assert host["b"][0] is x


def test_in_one_process_global_arrays_are_those_over_its_devices():
    x = np.arange(36, dtype=np.float32).reshape(12, 3)
    w: dict[str, Any] = {"w": np.ones(3, np.float32), "b": 2.0}
    every = replicax.to_global(x)
    assert every.sharding.device_set == {*jax.devices()}
    np.testing.assert_array_equal(every, x)
    np.testing.assert_array_equal(replicax.to_global(x.T, axis=-1), x.T)
    assert replicax.to_local(every) is every
    np.testing.assert_array_equal(jax.jit(lambda x: replicax.to_local(replicax.to_global(x)))(x), x)
    whole = replicax.to_global(w, axis=None)
    assert whole["w"].sharding.is_fully_replicated
    assert replicax.to_local(whole, axis=None)["b"] == 2.0
    total = jax.grad(lambda x: (replicax.to_global(x) ** 2).sum())(x)
    np.testing.assert_allclose(total, 2 * x, rtol=1e-6)
    with pytest.raises(replicax.errors.MappedSizeError, match=r"tree\['w'\] has the shape \(3,\)"):
        replicax.to_global(w, axis=1)
    word: Any = "rows"
    with pytest.raises(replicax.errors.OptionTypeError, match="axis must be an int"):
        replicax.to_global(x, axis=word)


@pytest.mark.parametrize("spec", [P("a"), P(None, "b"), P("a", "b"), P("b", "a"), P(("b", "a")), P(("a", "b")), P()])
def test_fetch_of_any_placement(spec):
    x = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    mesh = Mesh(np.array(jax.devices()[::-1]).reshape(4, 2), ("a", "b"))
    np.testing.assert_array_equal(replicax.fetch(jax.device_put(x, NamedSharding(mesh, spec))), x)
    shuffled = Mesh(np.array(jax.devices())[[3, 1, 4, 0, 5, 7, 2, 6]].reshape(2, 4), ("a", "b"))
    np.testing.assert_array_equal(replicax.fetch(jax.device_put(x, NamedSharding(shuffled, spec))), x)


def test_leaves_on_different_devices_are_read_at_once():
    x = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    tree = [jax.device_put(x + k, device) for k, device in enumerate(jax.devices()[:3])]
    for k, first in enumerate(replicax.unreplicate(tree)):
        np.testing.assert_array_equal(first, x[0] + k)
        assert first.devices() == {jax.devices()[k]}


def test_reading_moves_nothing_between_devices():
    out = replicax.pmap(lambda a: a + 1)(np.ones((16, 3), np.float32))
    with jax.transfer_guard_device_to_device("disallow_explicit"):
        replicax.local_replicas(out)
        replicax.unreplicate(out)
        replicax.fetch(out)


def test_unreplicate_reads_any_placement():
    x = np.arange(8.0).reshape(4, 2)
    mesh = Mesh(np.array(jax.devices()[::-1]).reshape(4, 2), ("a", "b"))
    for spec in (P("a"), P(None, "b"), P("a", "b"), P()):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        np.testing.assert_array_equal(replicax.unreplicate(placed), x[0])
        np.testing.assert_array_equal(replicax.local_replicas(placed), x)
    np.testing.assert_array_equal(replicax.unreplicate([x, x[:, 0]])[0], x[0])
