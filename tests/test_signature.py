"""All options of ``jax.pmap``, all ways to call it, and all kinds of functions and arguments."""

import copy
import functools
import pickle
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from replicax import pmap
from replicax.testing import check

x8 = np.arange(8.0, dtype=np.float32)


def test_decorator_call_and_partial():
    @pmap
    def plain(x):
        """Doubles."""
        return 2 * x

    @pmap(axis_name="i", in_axes=1)
    def with_options(x):
        return lax.psum(x, "i")

    @functools.partial(pmap, axis_name="i")
    def as_jax_users_do(x):
        return lax.psum(x, "i")

    np.testing.assert_array_equal(plain(x8), 2 * x8)
    np.testing.assert_array_equal(with_options(x8[None]), np.full((8, 1), 28))
    np.testing.assert_array_equal(as_jax_users_do(x8), np.full(8, 28))
    np.testing.assert_array_equal(pmap(lambda x: lax.psum(x, "j"), "j")(x8), np.full(8, 28))
    assert (plain.__name__, plain.__doc__, plain.__module__) == ("plain", "Doubles.", __name__)
    assert "plain" in repr(plain)
    assert "'i'" in repr(with_options)


class Model:
    scale = 3.0

    def method(self, x):
        return self.scale * x

    def __call__(self, x):
        return self.scale * x

    @functools.partial(pmap, axis_name="i", static_broadcasted_argnums=0)
    def mapped(self, x):
        return lax.psum(self.scale * x, "i")


def test_methods_partials_and_callables_without_a_signature():
    np.testing.assert_array_equal(pmap(Model().method)(x8), 3 * x8)
    np.testing.assert_array_equal(pmap(Model())(x8), 3 * x8)
    np.testing.assert_array_equal(Model().mapped(x8), np.full(8, 84))
    np.testing.assert_array_equal(pmap(functools.partial(jnp.multiply, 2))(x8), 2 * x8)
    np.testing.assert_array_equal(pmap(jnp.sin)(x8), jnp.sin(x8))
    np.testing.assert_array_equal(pmap(jnp.add)(x8, x8), 2 * x8)
    np.testing.assert_array_equal(pmap(max)(x8[:, None]), x8)
    np.testing.assert_array_equal(pmap(jax.jit(lambda x: lax.psum(x, "i")), "i")(x8), np.full(8, 28))


class Point(NamedTuple):
    x: Any
    y: Any


@jax.tree_util.register_dataclass
@dataclass
class State:
    step: Any
    params: Any


@pytest.mark.few("13")
@pytest.mark.parametrize("n", [3, 8, 13, 16])
def test_trees_of_every_kind(n):
    rows = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
    point, state = Point(rows, None), State(np.arange(n), {"w": [rows, (rows,)], "none": None})
    check(lambda p, s: (Point(p.x + s.params["w"][0], s), {}, None, ()), point, state)
    check(lambda s: State(s.step, [s.params]), state, in_axes=(State(0, {"w": 0, "none": None}),))
    check(lambda p, s: (p, s), point, state, out_axes=(Point(1, None), State(0, 1)))


@pytest.mark.few("it's a 'name'", "name3", "None")
@pytest.mark.parametrize("name", ["batch", "", "it's a 'name'", ("data", 0), frozenset({"a"}), Model, None])
def test_the_axis_may_have_any_hashable_name(name):
    def total(x):
        return x if name is None or isinstance(name, tuple) else lax.psum(x, name)

    for n in (8, 13):
        check(total, np.arange(float(n)), axis_name=name)


def test_keyword_arguments_are_mapped_along_axis_0():
    fun = pmap(lambda x, *, scale, shift: x * scale["a"] + shift)
    expected = x8 * x8 + 1
    np.testing.assert_array_equal(fun(x8, scale={"a": x8}, shift=np.ones(8)), expected)
    np.testing.assert_array_equal(fun(x8, shift=np.ones(8), scale={"a": x8}), expected)
    np.testing.assert_array_equal(pmap(lambda x, y: x - y, in_axes=(0,))(x8, y=2 * x8), -x8)


@pytest.mark.few("13")
@pytest.mark.parametrize("n", [8, 13])
def test_static_arguments(n):
    traces = []

    @functools.partial(pmap, static_broadcasted_argnums=(1, 3), in_axes=(0, None, None, None))
    def fun(x, power, w, how):
        traces.append((power, how))
        assert isinstance(power, int | float)
        return how(x**power) * w

    x = np.arange(1.0, n + 1)
    np.testing.assert_allclose(fun(x, 2, 3.0, jnp.sqrt), 3 * x, rtol=1e-6)
    np.testing.assert_allclose(fun(x, 2, 4.0, jnp.sqrt), 4 * x, rtol=1e-6)
    assert traces == [(2, jnp.sqrt)]
    fun(x, 2.0, 3.0, jnp.sqrt)
    fun(x, 3, 3.0, jnp.sqrt)
    assert traces[1:] == [(2.0, jnp.sqrt), (3, jnp.sqrt)]
    np.testing.assert_array_equal(pmap(lambda x, n: x * n, static_broadcasted_argnums=-1)(x, 2), 2 * x)
    shorter = pmap(lambda x, y, k: x * k + y, static_broadcasted_argnums=2, in_axes=(0, None))
    np.testing.assert_array_equal(shorter(x, 1.0, 2), 2 * x + 1)


def test_donated_buffers_are_taken_and_others_are_not():
    step = pmap(lambda state, x: state + x, donate_argnums=0)
    keep = pmap(lambda x: x + 0)
    for n in (8, 16, 13):
        rows = np.arange(float(n), dtype=np.float32)
        for place in (keep(rows), jax.device_put(rows, jax.devices()[2]), jnp.asarray(rows)):
            other = keep(rows)
            np.testing.assert_array_equal(step(place, other), 2 * rows)
            assert place.is_deleted()
            assert not other.is_deleted()
        np.testing.assert_array_equal(step(rows, rows), 2 * rows)
        np.testing.assert_array_equal(rows, np.arange(n))


def test_a_donated_buffer_is_reused():
    step = pmap(lambda state: state + 1, donate_argnums=0)
    state = pmap(lambda x: x + 0)(np.zeros((8, 1000), np.float32))
    before = {s.data.unsafe_buffer_pointer() for s in state.addressable_shards}
    after = {s.data.unsafe_buffer_pointer() for s in step(state).addressable_shards}
    assert after == before


def test_devices_and_backend():
    out = pmap(lambda x: x, devices=jax.devices()[5:2:-1])(np.arange(3.0))
    assert [s.device.id for s in sorted(out.addressable_shards, key=lambda s: s.index[0].start)] == [5, 4, 3]
    np.testing.assert_array_equal(pmap(lambda x: x, backend="cpu")(x8), x8)
    np.testing.assert_array_equal(pmap(lambda x: x, backend="cpu", devices=jax.devices()[:2])(x8), x8)


def test_axis_size_may_repeat_what_the_arguments_say():
    np.testing.assert_array_equal(pmap(lambda x: x, axis_size=8)(x8), x8)
    of_numpys = pmap(lambda x: x, axis_size=np.int64(8), in_axes=np.int64(0))  # type: ignore[call-overload]
    np.testing.assert_array_equal(of_numpys(x8), x8)


def test_a_mesh_that_the_user_has_set_is_put_aside():
    with jax.set_mesh(jax.make_mesh((4, 2), ("i", "other"))):
        for n in (4, 8, 13):
            rows = np.arange(float(n))
            np.testing.assert_array_equal(pmap(lambda x: x + lax.psum(x, "i"), "i")(rows), rows + rows.sum())


@pytest.mark.few("3-8", "13-2")
@pytest.mark.parametrize(("n", "m"), [(8, 3), (3, 8), (13, 2), (1, 1)])
def test_maps_inside_maps(n, m):
    """Collectives over each axis and over both."""

    def nested(mapped):
        def inner(x, y):
            return x * lax.psum(y, "m") + lax.psum(x, "n"), lax.psum(y, ("n", "m")), lax.axis_index(("m", "n"))

        return mapped(mapped(inner, in_axes=(None, 0), axis_name="m"), axis_name="n")

    x, y = np.arange(float(n), dtype=np.float32), np.arange(float(n * m), dtype=np.float32).reshape(n, m)
    for ours, theirs in zip(nested(pmap)(x, y), jax.jit(nested(jax.vmap))(x, y), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.few("13")
@pytest.mark.parametrize("n", [3, 8, 13])
def test_an_enclosing_axis_of_the_same_name_is_shadowed(n):
    rows = np.random.default_rng(0).normal(size=(2, n)).astype(np.float32)

    def fun(x):
        return lax.psum(x, "i"), lax.axis_index("i"), lax.all_gather(x, "i")

    expected = jax.jit(jax.vmap(jax.vmap(fun, axis_name="i"), axis_name="i"))(rows)
    inner = pmap(fun, axis_name="i")
    for nested in (jax.vmap(inner, axis_name="i"), jax.vmap(jax.jit(inner), axis_name="i"), pmap(inner, axis_name="i")):
        for ours, theirs in zip(nested(rows), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_maps_of_different_sizes_meet_under_jit():
    def both(a, b):
        return pmap(lambda x: 2 * x)(a)[:3] + pmap(lambda x: 3 * x)(b)

    np.testing.assert_array_equal(jax.jit(both)(np.arange(12.0), np.arange(3.0)), 5 * np.arange(3))


def triple(x):
    return 3 * x


def test_a_mapped_function_is_copied_and_pickled_without_its_programs():
    mapped = pmap(triple, devices=jax.devices()[:2])
    mapped.note = "a copy keeps it"  # type: ignore[attr-defined]
    assert copy.copy(mapped) is copy.deepcopy(mapped) is mapped, "as Python copies functions"
    mapped = pmap(triple)
    mapped(x8)
    for again in (copy.deepcopy([mapped])[0], pickle.loads(pickle.dumps(mapped))):
        np.testing.assert_array_equal(again(x8), 3 * x8)
        assert repr(again) == repr(mapped)


def test_a_mapped_function_is_no_base_class():
    with pytest.raises(TypeError, match="MappedFunction cannot be subclassed"):
        type("Mine", (type(pmap(triple)),), {})


@pytest.mark.long
@pytest.mark.parametrize("n", [2, 5, 6, 8, 10, 13])
def test_jacobians_from_outside(n):
    x = np.arange(float(n), dtype=np.float32)
    ours = pmap(lambda a: jnp.sin(a) * lax.psum(a, "i"), "i", devices=jax.devices()[:4])
    theirs = jax.vmap(lambda a: jnp.sin(a) * lax.psum(a, "i"), axis_name="i")
    for derivative in (jax.jacrev, jax.jacfwd, lambda f: jax.hessian(lambda a: jnp.sum(f(a)))):
        np.testing.assert_allclose(derivative(ours)(x), jax.jit(derivative(theirs))(x), rtol=1e-4, atol=1e-4)


@pytest.mark.few("13")
@pytest.mark.parametrize("n", [5, 8, 13, 20])
def test_inside_jit_grad_vmap_and_scan(n):
    x = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    ours = pmap(lambda a: jnp.sin(a) + lax.pmean(a, "i"), "i")
    theirs = jax.vmap(lambda a: jnp.sin(a) + lax.pmean(a, "i"), axis_name="i")
    transforms = {
        "jit": jax.jit,
        "grad": lambda f: jax.grad(lambda a: jnp.sum(f(a) ** 2)),
        "jit of grad": lambda f: jax.jit(jax.grad(lambda a: jnp.sum(f(a) ** 2))),
        "jvp": lambda f: lambda a: jax.jvp(f, (a,), (a,)),
        "vmap": lambda f: lambda a: jax.vmap(f)(jnp.stack([a, 2 * a])),
        "scan": lambda f: lambda a: lax.scan(lambda c, _: (f(c), c.sum()), a, None, length=3),
        "a closed over tracer": lambda f: jax.grad(lambda a: jnp.sum(pmap(lambda i: a[i] ** 2)(np.arange(n)))),
    }
    for name, transform in transforms.items():
        ours_out, theirs_out = transform(ours)(x), jax.jit(transform(theirs))(x)
        for a, b in zip(jax.tree.leaves(ours_out), jax.tree.leaves(theirs_out), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5, err_msg=name)
