"""What JAX's own maps take or what a program may hold, and a map took for something else, or refused without saying."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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


# ---------------------------------------------------------------------------------------------------------------
# Arrays whose types say how they are split, where replicas do not divide over devices


def centered(x):
    return x * lax.axis_index("i") + lax.pmean(x, "i")


#: Replicas, devices that hold them on a mesh with Explicit axes, devices of the map: all are padded.
SPLIT = [(22, 2, 8), (20, 4, 8), (15, 5, 8), (10, 2, 4), (21, 7, 4)]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("n", "held", "used"), SPLIT)
def test_rows_split_by_an_explicit_mesh_where_the_map_pads(n, held, used, axis):
    mesh = Mesh(np.array(jax.devices()[:held]), ("a",), axis_types=(AxisType.Explicit,))
    host = np.moveaxis(rows(n, 3), 0, axis)
    x = jax.device_put(host, NamedSharding(mesh, P(*[None] * axis, "a")))
    mapped = pmap(centered, axis_name="i", in_axes=axis, devices=jax.devices()[:used])
    right = jax.vmap(centered, axis_name="i", in_axes=axis)
    for _ in range(2):  # the second call is a warm one
        close(mapped(x), right(host))
    with jax.set_mesh(mesh):
        close(mapped(x), right(host))
    close(mapped.lower(x).compile()(x), right(host))
    close(jax.grad(lambda x: mapped(x).sum())(x), jax.grad(lambda x: right(x).sum())(host))
    close(pmap(centered, "i", in_axes=axis, donate_argnums=0, devices=jax.devices()[:used])(x + 0), right(host))


@pytest.mark.parametrize("n", [22, 12])
def test_under_jit_rows_split_by_an_explicit_mesh_of_all_devices(n):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x = jax.device_put(rows(n, 3), NamedSharding(mesh, P("b")))
    mapped, right = pmap(centered, "i"), jax.vmap(centered, axis_name="i")
    for scope in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with scope:
            close(jax.jit(lambda x: mapped(x) + x)(x), right(rows(n, 3)) + rows(n, 3))
            close(jax.jit(jax.grad(lambda x: mapped(x).sum()))(x), jax.grad(lambda x: right(x).sum())(rows(n, 3)))
            close(mapped(x), right(rows(n, 3)))


# ---------------------------------------------------------------------------------------------------------------
# References


def keep(ref, x):
    ref[...] = x
    return x


def test_references_among_the_arguments_are_refused_by_name():
    ref = jax.new_ref(jnp.zeros(13))
    x = rows(13)
    for call in (
        lambda: pmap(keep)(ref, x),
        lambda: pmap(keep, in_axes=(None, 0))(ref, x),
        lambda: jax.jit(pmap(keep))(ref, x),
        lambda: jax.grad(lambda x: pmap(keep)(ref, x).sum())(x),
        lambda: pmap(keep).lower(ref, x),
    ):
        with pytest.raises(replicax.NotAnArrayError) as caught:
            call()
        assert str(caught.value).splitlines() == [
            "pmap maps arrays, and these arguments are references to arrays (jax.Ref):",
            "  * ref of shape (13,)",
            "Pass the values and return the new ones, as in ref = jax.new_ref(pmap(f)(ref[...])). A reference that the "
            "mapped function makes itself, with jax.new_ref, may be read and written there.",
        ]
    for _ in range(2):
        ref = jax.new_ref(pmap(lambda value, x: value + x)(ref[...], x))
    close(ref[...], 2 * x)


def test_references_that_a_function_closes_over_are_refused():
    ref = jax.new_ref(jnp.zeros((2,)))

    def adds(x):
        return lax.fori_loop(0, 3, lambda _, y: y + ref[...].sum(), x)

    def writes(x):
        ref[...] = jnp.ones(2)
        return x

    def of_the_outer(row):
        own = jax.new_ref(row[:2])
        return pmap(lambda x: x + own[...].sum())(row)

    for fun, name in ((adds, "adds"), (writes, "writes"), (of_the_outer, "<lambda>")):
        with pytest.raises(replicax.NotAnArrayError) as caught:
            pmap(fun)(rows(13, 3))
        assert str(caught.value).splitlines() == [
            f"{name} reads or writes references to arrays (jax.Ref) that are not its own:",
            "  * one of shape (2,) and dtype float32",
            "Pass the value, ref[...], as an argument (with None in in_axes every replica gets it whole), and return "
            "what is to be written. A reference that the mapped function makes itself, with jax.new_ref, may be read "
            "and written there.",
        ]
    close(ref[...], np.zeros(2))


def test_a_reference_as_a_result_is_refused():
    with pytest.raises(replicax.NotAnArrayError, match=r"result\['a'\] is a reference to an array.*value is ref\["):
        pmap(lambda x: {"a": jax.new_ref(x)})(rows(8))


@pytest.mark.parametrize("n", [8, 13])
def test_references_of_its_own(n):
    def step(ref, i):
        ref[...] = ref[...] * i + lax.pmean(ref[...], "i")

    def fun(x):
        ref = jax.new_ref(x)
        lax.fori_loop(0, 3, lambda i, _: step(ref, i), None)
        return ref[...]

    close(pmap(fun, "i")(rows(n, 2)), jax.vmap(fun, axis_name="i")(rows(n, 2)))
