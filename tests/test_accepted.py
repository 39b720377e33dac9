"""What JAX's own maps take or what a program may hold, and a map took for something else, or refused without saying."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import replicax
from replicax import pmap


def close(ours, right):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), ours, right)


def rows(n, *shape):
    return np.random.default_rng(n).normal(size=(n, *shape)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------
# in_axes and static arguments


def scaled(x, y, power=2, offset=0.0):
    return x**power + y + offset


@pytest.mark.parametrize("n", [8, 13])
def test_in_axes_may_have_entries_for_arguments_that_are_left_out_where_some_are_static(n):
    """As in jax.pmap, which looks up the entries of the arguments that it is given."""
    mapped = pmap(scaled, in_axes=(0, 0, None, None), static_broadcasted_argnums=2)
    close(mapped(rows(n), rows(n), 3), rows(n) ** 3 + rows(n))
    if n == 8:
        close(jax.pmap(scaled, in_axes=(0, 0, None, None), static_broadcasted_argnums=2)(rows(n), rows(n), 3),
              rows(n) ** 3 + rows(n))  # fmt: skip


def test_in_axes_without_an_entry_for_a_static_argument():
    mapped = pmap(lambda x, mode, y, z, w: x + y + z + w, in_axes=(0, 0, 0, None), static_broadcasted_argnums=1)
    x = rows(8)
    with pytest.raises(replicax.AxisSpecError) as caught:
        mapped(x, "train", x, x, 1.0)
    assert str(caught.value).splitlines() == [
        "in_axes=(0, 0, 0, None) is of length 4, and the function was called with 5 positional argument(s), static "
        "ones among them:",
        "  * x: in_axes[0] is 0",
        "  * mode (static): in_axes[1] is 0",
        "  * y: in_axes[2] is 0",
        "  * z: in_axes[3] is None",
        "  * w: no entry",
        "Give one entry for each positional argument; that of a static argument is not used, and None will do. Write "
        "in_axes=(0, None, 0, 0, None), or a single int for all of them.",
    ]
    right = pmap(lambda x, mode, y, z, w: x + y + z + w, in_axes=(0, None, 0, 0, None), static_broadcasted_argnums=1)
    close(right(x, "train", x, x, 1.0), 3 * x + 1)
    with pytest.raises(replicax.AxisSpecError, match=r"in_axes=\(0, None, 0, 0, 0\), or"):
        pmap(lambda x, mode, y, z, w: x, in_axes=(0, 0), static_broadcasted_argnums=1)(x, "train", x, x, x)
