"""The replaced functions of flax, chex and kfac-jax read replica 0, or place all replicas, in any layout.

The flax and kfac-jax modules here are short versions of those of flax 0.12 and kfac-jax 0.0.8. clients/ runs the real
packages.
"""

import importlib
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from replicax import compat

FLAX = """
    import jax

    def replicate(tree, devices=None, axis_name="_"):
        raise NotImplementedError("builds a mesh")

    def unreplicate(tree):
        return jax.tree.map(lambda x: x.addressable_shards[0].data.squeeze(0), tree)

    def prefetch_to_device(iterator, size, devices=None, axis_name="_"):
        raise NotImplementedError("builds a mesh")

    def shard(x):
        return x.reshape(jax.local_device_count(), -1)
"""
COMMON = """
    import jax, jax.numpy as jnp

    def stack_forest(forest):
        return jax.tree.map(lambda *xs: jnp.stack(xs), *forest)

    def get_metrics(device_metrics):
        return stack_forest(jax.device_get(jax.tree.map(lambda x: x.addressable_shards[0].data.squeeze(0),
                                                        device_metrics)))
"""
KFAC = """
    import jax
    from jax import lax

    is_scalar = lambda x: isinstance(x, float | int) or (isinstance(x, jax.Array) and not x.shape)
    pmap_mean = jax.pmap(lambda x: lax.pmean(x, "i"), axis_name="i")
    p_split = jax.pmap(lambda key: tuple(jax.random.split(key)))
    p_split_num = jax.pmap(lambda key, num: tuple(jax.random.split(key, num)), static_broadcasted_argnums=1)

    def get_first(obj):
        return jax.tree.map(lambda x: x.addressable_shards[0].data.squeeze(0), obj)

    def get_mean(obj):
        return get_first(pmap_mean(obj))

    def broadcast_all_local_devices(obj, axis_name=None):
        raise NotImplementedError("builds a mesh")

    def replicate_all_local_devices(obj, axis_name=None):
        raise NotImplementedError("builds a mesh")
"""
FILES = {
    "flax/__init__.py": "from flax.jax_utils import unreplicate",
    "flax/jax_utils.py": FLAX,
    "flax/training/__init__.py": "",
    "flax/training/common_utils.py": COMMON,
    "kfac_jax/__init__.py": "from kfac_jax._src import utils",
    "kfac_jax/_src/__init__.py": "",
    "kfac_jax/_src/utils/__init__.py": "from kfac_jax._src.utils import parallel\nget_first = parallel.get_first\n"
    "get_mean = parallel.get_mean\ntable = {'get_first': get_first}",
    "kfac_jax/_src/utils/parallel.py": KFAC,
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flax", "kfac_jax")]:
        monkeypatch.delitem(sys.modules, name)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    yield ("flax", "flax.jax_utils", "flax.training.common_utils", "kfac_jax._src.utils")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flax", "kfac_jax")]:
        del sys.modules[name]


@pytest.fixture(params=["before", "after"])
def imported(request, packages):
    """Imports the packages before or after replicax is installed."""
    import_all = lambda: [importlib.import_module(name) for name in packages]
    early = import_all() if request.param == "before" else None
    return lambda: early or import_all()


@pytest.mark.long
@pytest.mark.parametrize("n", [8, 11, 12, 20])
def test_replica_0_and_all_of_them(imported, n):
    with compat.installed(replicas=n):
        flax, jax_utils, common_utils, kfac = imported()
        x = np.arange(3.0 * n, dtype=np.float32).reshape(n, 3) + 1
        state = jax.pmap(lambda x: {"w": 2 * x, "step": lax.axis_index("i") + 5}, axis_name="i")(x)
        for first in (jax_utils.unreplicate, flax.unreplicate, kfac.get_first, kfac.table["get_first"]):
            out = first(state)
            np.testing.assert_array_equal(out["w"], 2 * x[0])
            assert out["step"].shape == ()
            assert int(out["step"]) == 5
        np.testing.assert_array_equal(jax_utils.unreplicate(jax.tree.map(lambda x: x + 1, state))["w"], 2 * x[0] + 1)
        assert int(jax_utils.unreplicate(jnp.int32(3))) == int(kfac.get_first(jnp.int32(3))) == 3
        np.testing.assert_array_equal(jax_utils.unreplicate(x), x[0])
        np.testing.assert_array_equal(jax_utils.unreplicate(jnp.asarray(x)), x[0])
        metrics = [jax.pmap(lambda x: {"loss": lax.psum(x, "i")}, axis_name="i")(x[:, 0] * k) for k in range(3)]
        ours = common_utils.get_metrics(metrics)["loss"]
        np.testing.assert_allclose(ours, [x[:, 0].sum() * k for k in range(3)], rtol=1e-6)
        np.testing.assert_allclose(kfac.get_mean(state["w"]), 2 * x.mean(0), rtol=1e-6)

        tree = {"a": np.arange(2), "b": jnp.ones(()), "c": 0.5}
        for copies in (jax_utils.replicate(tree), kfac.parallel.replicate_all_local_devices(tree, "name")):
            np.testing.assert_array_equal(copies["a"], np.tile(np.arange(2), (n, 1)))
            assert copies["c"].shape == (n,)
        assert not jax_utils.replicate(tree)["c"].weak_type  # flax converts numbers to NumPy arrays
        batches = [jax_utils.shard(np.arange(2.0 * n) + k) for k in range(4)]
        for batch, ours in zip(batches, jax_utils.prefetch_to_device(iter(batches), 2), strict=True):
            np.testing.assert_array_equal(ours, batch)
            assert ours.sharding.is_equivalent_to(state["w"].sharding, 2)
        keys = kfac.parallel.broadcast_all_local_devices(jax.random.split(jax.random.PRNGKey(0), n))
        one, two = kfac.parallel.p_split(keys)
        assert one.shape == two.shape == (n, 2)
        assert len(kfac.parallel.p_split_num(keys, 3)) == 3


@pytest.mark.few("after-11", "before-None")
@pytest.mark.parametrize("replicas", [None, 8, 11])
def test_a_result_without_a_mapped_axis_is_left_whole(imported, replicas):
    with compat.installed(replicas=replicas):
        _, jax_utils, _, kfac = imported()
        n = replicas or 11
        mapped = jax.pmap(
            lambda x: (lax.pmean(jnp.stack([x, x, x]), "i"), x), axis_name="i", out_axes=(None, 0)
        )  # mean is replicated over all devices; so is own with 11 replicas
        mean, own = mapped(np.arange(n, dtype=np.float32))
        for first in (jax_utils.unreplicate, kfac.get_first):
            np.testing.assert_allclose(first(mean), np.full(3, (n - 1) / 2))
            assert float(first(own)) == 0


def test_replicas_that_called_back_into_python_are_read_too(imported):
    def fun(x):
        return jax.pure_callback(lambda x: 2 * x, jax.ShapeDtypeStruct((), jnp.float32), x, vmap_method="sequential")

    with compat.installed(replicas=11):
        _, jax_utils, *_ = imported()
        assert float(jax_utils.unreplicate(jax.pmap(fun)(np.arange(3.0, 14.0, dtype=np.float32)))) == 6


def test_what_was_there_is_put_back(packages):
    modules = [importlib.import_module(name) for name in packages]
    before = [dict(vars(module)) for module in modules]
    user = sys.modules["a_user"] = type(sys)("a_user")
    vars(user).update(mine=modules[1].unreplicate)
    try:
        with compat.installed():
            assert user.mine is modules[0].unreplicate is modules[1].unreplicate is not before[1]["unreplicate"]
            assert user.mine.__name__ == "unreplicate"
            with compat.installed():
                pass
            assert user.mine is modules[1].unreplicate
        assert user.mine is before[1]["unreplicate"]
    finally:
        del sys.modules["a_user"]
    assert [dict(vars(module)) for module in modules] == before
    assert not any("AfterImport" in type(finder).__name__ for finder in sys.meta_path)


def test_what_is_imported_meanwhile_is_put_back(packages):
    with compat.installed(replicas=12):
        modules = [importlib.import_module(name) for name in packages]
        ours = modules[0].unreplicate, modules[3].get_first
    assert modules[0].unreplicate not in ours
    assert modules[3].get_first not in ours
    assert modules[3].get_first is modules[3].parallel.get_first
    importlib.reload(modules[1])
    assert modules[1].unreplicate not in ours
    with compat.installed():
        importlib.reload(modules[1])
        assert modules[1].unreplicate.__wrapped__


# ---------------------------------------------------------------------------------------------------------------
# chex


@pytest.mark.long
@pytest.mark.parametrize("n", [8, 11, 12])
def test_chex(n):
    chex = pytest.importorskip("chex", reason="chex is not installed: pip install '.[clients]'")
    variants = importlib.import_module("chex._src.variants")
    with compat.installed(replicas=n):
        chex.assert_devices_available(n, "cpu")
        out = jax.pmap(lambda x: x)(np.arange(float(n)))
        chex.assert_tree_is_sharded({"a": out}, devices=jax.local_devices())
        if n > 8:
            for other in (out[0], jnp.ones(n), jax.pmap(lambda x: x)(np.ones(6))):
                with pytest.raises(AssertionError, match=rf"Tree leaf '\['a'\]' has shape .* expected {n} rows on"):
                    chex.assert_tree_is_sharded({"a": other}, devices=jax.local_devices())
        pmapped = next(f for kind, f in variants._variant_decorators.items() if kind.name == "WITH_PMAP")
        assert float(pmapped(lambda x, y: x + lax.psum(y, "i"))(1.0, y=2.0)) == 1 + 2 * n
        total = pmapped(axis_name="k", reduce_fn=None, static_argnums=1)(lambda x, s: s * lax.psum(x, "k"))
        np.testing.assert_array_equal(total(jnp.ones(2), 3), np.full((n, 2), 3 * n))
        part = pmapped(lambda x: lax.psum(x, "i"), n_devices=3, reduce_fn="identity")
        np.testing.assert_array_equal(part(np.float32(1)), np.full(3, 3))
        mapped = pmapped(lambda x: x + 1, broadcast_args_to_devices=False, reduce_fn=None)
        np.testing.assert_array_equal(mapped(np.arange(n)), np.arange(n) + 1)
    assert variants._with_pmap in variants._variant_decorators.values()
    assert type(variants._with_pmap).__name__ == "curry"
