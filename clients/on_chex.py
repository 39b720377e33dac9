"""chex: test variants, fakes and assertions."""

import unittest

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

PACKAGES = ["chex"]


class Variants(chex.TestCase):
    @chex.all_variants
    @parameterized.named_parameters(("one", 1.0), ("three", 3.0))
    def test_all_variants(self, y):
        np.testing.assert_allclose(self.variant(lambda x, y: x + y)(2.0, y), 2 + y)

    @chex.variants(with_pmap=True)
    def test_means(self):
        @self.variant(axis_name="i", in_axes=0, reduce_fn=None, broadcast_args_to_devices=True)
        def mean(x):
            return jax.lax.pmean(x, "i")

        np.testing.assert_allclose(mean(jnp.ones(3)), np.ones((8, 3)))

    @chex.variants(with_pmap=True)
    def test_arguments(self):
        @self.variant(static_argnums=(1,), in_axes=(0, None), broadcast_args_to_devices=False, reduce_fn=None)
        def scale(x, k):
            assert isinstance(k, int)
            return k * x

        np.testing.assert_allclose(scale(np.arange(8.0), 3), 3 * np.arange(8))


def variants():
    """all_variants, with_pmap and its options"""
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Variants).run(result)
    assert result.testsRun >= 10, result
    assert result.wasSuccessful(), [text for _, text in result.errors + result.failures]


def fakes():
    """fake_pmap over jax.pmap, and off again"""
    before = jax.pmap
    with chex.fake_pmap():
        assert jax.pmap is not before
        np.testing.assert_allclose(jax.pmap(lambda x: jax.lax.psum(x, "i"), axis_name="i")(np.arange(100.0)), 4950)
    with chex.fake_pmap_and_jit():
        np.testing.assert_allclose(jax.pmap(lambda x: 2 * x)(np.arange(20.0)), 2 * np.arange(20))
    assert jax.pmap is before


def assertions():
    """assertions inside and about mapped functions"""

    def fun(x):
        chex.assert_shape(x, (3,))
        return jax.lax.psum(x, "i")

    out = jax.pmap(chex.assert_max_traces(fun, n=1), axis_name="i")
    for _ in range(3):
        total = out(np.ones((8, 3)))
    chex.assert_tree_is_on_device({"a": jnp.ones(3)}, platform="cpu")
    chex.assert_tree_is_sharded({"a": total}, devices=jax.local_devices())
    chex.assert_tree_all_finite(total)
    chex.assert_axis_dimension(total, 0, 8)


CASES = [variants, fakes, assertions]
