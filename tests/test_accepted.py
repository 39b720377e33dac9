"""Inputs and programs that JAX supports: they work in a map, or are refused with an explanation."""

import contextlib
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.sparse import BCOO, BCSR
from jax.interpreters import batching
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import replicax
from replicax import pmap
from replicax.testing import lockstep


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
    """As in ``jax.pmap``, which ignores entries of arguments that are not passed."""
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
        "in_axes=(0, 0, 0, None) has length 4, but the function was called with 5 positional argument(s), including "
        "static ones:",
        "  * x: in_axes[0] is 0",
        "  * mode (static): in_axes[1] is 0",
        "  * y: in_axes[2] is 0",
        "  * z: in_axes[3] is None",
        "  * w: no entry",
        "Write one entry per positional argument. The entry of a static argument is not used, so write None. For "
        "example, write in_axes=(0, None, 0, 0, None), or a single int for all of them.",
    ]
    right = pmap(lambda x, mode, y, z, w: x + y + z + w, in_axes=(0, None, 0, 0, None), static_broadcasted_argnums=1)
    close(right(x, "train", x, x, 1.0), 3 * x + 1)
    with pytest.raises(replicax.AxisSpecError, match=r"in_axes=\(0, None, 0, 0, 0\), or"):
        pmap(lambda x, mode, y, z, w: x, in_axes=(0, 0), static_broadcasted_argnums=1)(x, "train", x, x, x)


# ---------------------------------------------------------------------------------------------------------------
# Arrays sharded over Explicit mesh axes, if the replicas do not divide over the devices


def centered(x):
    return x * lax.axis_index("i") + lax.pmean(x, "i")


#: (replicas, devices of the mesh with Explicit axes, devices of the map). Every map has padding.
SPLIT = [(22, 2, 8), (20, 4, 8), (15, 5, 8), (10, 2, 4), (21, 7, 4)]


@pytest.mark.few("22-2-8-0")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("n", "held", "used"), SPLIT)
def test_rows_split_by_an_explicit_mesh_where_the_map_pads(n, held, used, axis):
    mesh = Mesh(np.array(jax.devices()[:held]), ("a",), axis_types=(AxisType.Explicit,))
    host = np.moveaxis(rows(n, 3), 0, axis)
    x = jax.device_put(host, NamedSharding(mesh, P(*[None] * axis, "a")))
    mapped = pmap(centered, axis_name="i", in_axes=axis, devices=jax.devices()[:used])
    right = jax.jit(jax.vmap(centered, axis_name="i", in_axes=axis))
    for _ in range(2):  # the second call is warm
        close(mapped(x), right(host))
    with jax.set_mesh(mesh):
        close(mapped(x), right(host))
    close(mapped.lower(x).compile()(x), right(host))
    close(jax.grad(lambda x: mapped(x).sum())(x), jax.grad(lambda x: right(x).sum())(host))
    close(pmap(centered, "i", in_axes=axis, donate_argnums=0, devices=jax.devices()[:used])(x + 0), right(host))


@pytest.mark.long
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
            "pmap arguments must be arrays; these are references to arrays (jax.Ref):",
            "  * ref of shape (13,)",
            "Pass the value and return the new value, as in ref = jax.new_ref(pmap(f)(ref[...])). References that the "
            "mapped function creates itself, with jax.new_ref, are supported.",
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
            f"{name} must not close over references to arrays (jax.Ref), but uses:",
            "  * one of shape (2,) and dtype float32",
            "Pass the value, ref[...], as an argument (with None in in_axes to pass it whole to every replica), and "
            "return the new value. References that the mapped function creates itself, with jax.new_ref, are "
            "supported.",
        ]
    close(ref[...], np.zeros(2))


def test_a_reference_as_a_result_is_refused():
    with pytest.raises(replicax.NotAnArrayError, match=r"result\['a'\] is a reference to an array.*value with ref\["):
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


# ---------------------------------------------------------------------------------------------------------------
# Types with their own vmap rules


def matrices(n):
    dense = np.where(rows(n, 4, 3) > 0, rows(n, 4, 3), 0)
    return BCOO.fromdense(jnp.asarray(dense), n_batch=1)


def same(ours, right):
    """Also compares tree structures, which include shapes of sparse matrices."""
    assert jax.tree.structure(ours) == jax.tree.structure(right)
    close(ours, right)


SPARSE = {
    "mapped": (lambda m, v: m @ v, (0, None), 0),
    "made dense": (lambda m, v: m.todense() * v, (0, None), 0),
    "a result": (lambda m, v: (m * 2, [m.T]), (0, None), 0),
    "a result of several axes": (lambda m, v: {"a": m, "b": v * m.sum()}, (0, None), {"a": 0, "b": 1}),
    "a communicated one": (lambda m, v: m.todense() + lax.psum(m.todense(), "i"), (0, None), 0),
}


@pytest.mark.long
@pytest.mark.parametrize("case", SPARSE)
@pytest.mark.parametrize("n", [8, 13])
def test_sparse_matrices(n, case):
    fun, in_axes, out_axes = SPARSE[case]
    mapped = pmap(fun, "i", in_axes=in_axes, out_axes=out_axes)
    right = jax.jit(jax.vmap(fun, in_axes, out_axes, axis_name="i"))(matrices(n), rows(3))
    for _ in range(2):
        same(mapped(matrices(n), rows(3)), right)
    same(jax.jit(mapped)(matrices(n), rows(3)), right)
    same(mapped.lower(matrices(n), rows(3)).compile()(matrices(n), rows(3)), right)
    same(lockstep(fun, axis_name="i", in_axes=in_axes, out_axes=out_axes)(matrices(n), rows(3)), right)


@pytest.mark.long
def test_sparse_matrices_that_all_replicas_get_whole_and_in_keywords():
    one = BCOO.fromdense(jnp.asarray(np.eye(4, 3, dtype=np.float32)))
    fun = lambda m, v, scale=None: (m @ v, m) if scale is None else (scale @ v, m)
    same(
        pmap(fun, in_axes=(None, 0), out_axes=(0, None))(one, rows(13, 3)),
        jax.jit(jax.vmap(fun, (None, 0), (0, None)))(one, rows(13, 3)),
    )
    same(
        pmap(fun, in_axes=(None, 0), out_axes=(0, None))(one, rows(13, 3), scale=matrices(13)),
        jax.jit(jax.vmap(fun, (None, 0), (0, None)))(one, rows(13, 3), scale=matrices(13)),
    )
    rowwise = BCSR.from_bcoo(matrices(8))
    same(pmap(lambda m: m)(rowwise), jax.vmap(lambda m: m)(rowwise))


@pytest.mark.long
def test_derivatives_by_and_maps_inside_maps_of_sparse_matrices():
    def loss(map_, m):
        return jnp.sin(map_(lambda m: (m @ jnp.ones(3)).sum())(m)).sum()

    m = matrices(13)
    by_data = lambda map_: jax.grad(lambda data: loss(map_, BCOO((data, m.indices), shape=m.shape)))(m.data)
    close(by_data(pmap), by_data(jax.vmap))
    wide = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), (matrices(8).data, matrices(8).indices))
    wide = BCOO(wide, shape=(2, 4, 4, 3))
    twice = lambda map_: map_(map_(lambda m: (m * 3, m.todense())))(wide)
    same(twice(pmap), twice(jax.vmap))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pmap(lambda m: m, in_axes=1)(matrices(8)), "in_axes has 1 for a BCOO: Cannot map in_axis=1"),
        (lambda: pmap(lambda m: m, out_axes=1)(matrices(8)), "out_axes has 1 for a BCOO: BCOO: cannot add out_axis=1"),
    ],
)
def test_axes_that_a_sparse_matrix_cannot_have(call, says):
    with pytest.raises(replicax.AxisSpecError) as caught:
        call()
    assert str(caught.value).startswith(says)
    assert str(caught.value).endswith("Write an entry that jax.vmap accepts, too.")


def test_axes_for_the_arrays_of_a_sparse_matrix():
    with pytest.raises(replicax.AxisSpecTypeError, match=r"in_axes\[0\] is a BCOO: write one int for the whole object"):
        pmap(lambda m: m, in_axes=(jax.tree.map(lambda _: 0, matrices(8)),))


@jax.tree_util.register_pytree_node_class
class Pair:
    """A vmappable pair of arrays, each with its own mapped axis."""

    def __init__(self, left, right):
        self.left, self.right = left, right

    def tree_flatten(self):
        return (self.left, self.right), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class Sides:
    """The axis entry for a Pair: the mapped axis of each array."""

    def __init__(self, left, right):
        self.left, self.right = left, right


@jax.tree_util.register_pytree_node_class
class Doubled(Pair):
    """A Pair whose vmap rule computes."""


batching.register_vmappable(
    Pair,
    Sides,
    int,
    lambda cont, _, x, spec: Pair(cont(x.left, spec.left), cont(x.right, spec.right)),
    lambda cont, size, x, spec: Pair(cont(size, x.left, spec.left), cont(size, x.right, spec.right)),
    None,
)
batching.register_vmappable(
    Doubled, int, int, lambda cont, _, x, axis: Doubled(cont(x.left * 2, axis), x.right),
    lambda cont, size, x, axis: x, None,
)  # fmt: skip


def test_a_type_with_specifications_of_its_own():
    fun = lambda pair, x: (Pair(pair.right * x, pair.left), pair.left + x)
    n = 13
    for inside, outside, right in ((Sides(0, 1), Sides(1, 0), rows(4, n)), (Sides(0, None), Sides(0, 0), rows(4))):
        pair = Pair(rows(n, 4), right)
        options: dict[str, Any] = {"in_axes": (inside, 0), "out_axes": (outside, 0)}
        same(pmap(fun, **options)(pair, rows(n)), jax.vmap(fun, **options)(pair, rows(n)))
    with pytest.raises(replicax.AxisSpecError, match=r"in_axes has <.*Sides.*> of type Sides for an array\. Write an"):
        pmap(fun, in_axes=(0, Sides(0, 0)))(rows(n), rows(n))


def test_a_type_whose_rule_computes_is_refused():
    with pytest.raises(replicax.NotAnArrayError, match=r"jax\.vmap rule of Doubled computes.*Pass the arrays"):
        pmap(lambda x: x.left)(Doubled(rows(8), rows(8)))


# ---------------------------------------------------------------------------------------------------------------
# A result on fewer devices than the program to which it is passed


def shared(x):
    return x / lax.psum(x, "i")


@pytest.mark.parametrize(
    "run",
    [
        lambda mapped, x: jax.jit(mapped)(x),
        lambda mapped, x: jax.jit(lambda x: mapped(x) + 1)(x),
        lambda mapped, x: lax.scan(lambda x, _: (mapped(x), None), x, None, 2),
        lambda mapped, x: lax.cond(True, mapped, mapped, x),
    ],
)
def test_devices_that_do_not_go_together_are_explained(run):
    """JAX raises the error before a map runs. It names the map's source location, which contains the explanation."""
    mapped = pmap(shared, "i")
    line = shared.__code__.co_firstlineno
    fewer = mapped(np.arange(1.0, 13.0))
    with pytest.raises(ValueError, match="Received incompatible devices") as caught:
        run(mapped, fewer)
    assert f"test_accepted.py:{line} (shared, mapped by replicax.pmap, which uses all of its 8" in str(caught.value)
    assert str(caught.value).endswith(
        " devices under jit. To pass an array that is on fewer devices, call all maps with the same devices, as in "
        "pmap(f, devices=jax.devices()[:6]); or pass replicax.fetch(x))"
    )
    run(mapped, replicax.fetch(fewer))
    on_six = pmap(shared, "i", devices=jax.devices()[:6])
    run(on_six, fewer)


def test_devices_that_do_not_go_together_for_a_map_on_all():
    with pytest.raises(ValueError, match=r"the same devices, as many as the smallest map uses; or pass"):
        jax.jit(lambda x: pmap(jnp.sin)(x[:8]))(pmap(jnp.cos)(np.ones(12)))


def test_equations_inside_a_map_keep_their_source_lines():
    jaxpr = jax.make_jaxpr(pmap(shared, "i"))(np.ones(12))
    text = jaxpr.pretty_print(source_info=True)
    line = shared.__code__.co_firstlineno + 1
    assert re.search(rf" = div .*test_accepted.py:{line}:\d+ \(shared\)", text)
    assert text.count("mapped by replicax.pmap") == 1


# ---------------------------------------------------------------------------------------------------------------
# Wrappers of jax.pmap


@pytest.mark.long
def test_the_examples_for_wrappers_in_the_docs():
    equinox = pytest.importorskip("equinox")
    page = pathlib.Path(__file__).parent.parent / "docs" / "compat.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text().split("\n## Wrappers")[1], re.DOTALL)
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    with_compat = names["y"]
    assert len(with_compat.devices()) == 6  # JAX's own pmap refuses 12 models on 8 devices
    exec(blocks[1], names)
    right = equinox.filter_vmap(lambda model, x: model(x))(names["models"], names["x"])
    close([with_compat, names["y"]], [right, right])
    assert len(blocks) == 2
