"""Static and donated arguments by position and by name, pytree arguments, and axis names."""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from replicax import DeletedArrayError, pmap
from replicax._runtime import run as _run
from replicax._runtime.executable import Executable
from replicax.testing import check
from test_inputs import everywhere


def table(n):
    return np.arange(n * 4, dtype=np.float32).reshape(n, 4)


class Powers:
    """A function that records the static arguments of each trace."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, n, *, scale=1):
        self.seen.append((n, scale))
        assert isinstance(n, int)
        assert isinstance(scale, int)
        return scale * x**n


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "options",
    [
        {"static_broadcasted_argnums": 1, "static_broadcasted_argnames": "scale"},
        {"static_broadcasted_argnames": ("scale", "n")},
        {"static_broadcasted_argnames": ["n", "scale"], "in_axes": (0, None)},
    ],
    ids=["by position and name", "by name", "with in_axes"],
)
@pytest.mark.parametrize("n", [8, 13])
def test_static_arguments_are_passed_either_way(n, options):
    fun = Powers()
    mapped = pmap(fun, **options)
    x = table(n)
    for power, scale in ((2, 1), (3, 1), (3, 5)):
        np.testing.assert_array_equal(mapped(x, power, scale=scale), scale * x**power)
        np.testing.assert_array_equal(mapped(x, n=power, scale=scale), scale * x**power)
        if "in_axes" not in options:  # in_axes covers positional arguments only
            np.testing.assert_array_equal(mapped(scale=scale, n=power, x=x), scale * x**power)
    assert set(fun.seen) == {(2, 1), (3, 1), (3, 5)}
    np.testing.assert_array_equal(mapped(x, n=2), x**2)  # scale has a default value
    traced = len(fun.seen)
    mapped(x + 1, 3, scale=5)
    mapped(x + 1, scale=5, n=3)
    assert len(fun.seen) == traced


def test_static_arguments_of_functions_with_any_signature():
    x = table(8)

    def variadic(x, *rest, **options):
        return sum(rest, x) * options.get("times", 1)

    assert_is = np.testing.assert_array_equal
    assert_is(pmap(variadic, static_broadcasted_argnames="times")(x, x, times=3), 6 * x)
    assert_is(pmap(variadic, static_broadcasted_argnums=(1, 2))(x, 1, 2), x + 3)
    assert_is(pmap(lambda x, n, /: x * n, static_broadcasted_argnames="n")(x, 2), 2 * x)
    assert_is(pmap(functools.partial(lambda x, n, m: x * n * m, m=2), static_broadcasted_argnames="n")(x, 3), 6 * x)
    assert_is(pmap(jnp.sum, static_broadcasted_argnames=("axis", "keepdims"))(x, axis=0, keepdims=True)[:, 0], x.sum(1))


def test_named_arguments_of_methods():
    class Model:
        scale = 3

        @pmap(static_broadcasted_argnums=0, static_broadcasted_argnames="n", donate_argnames="x")
        def power(self, x, n):
            return self.scale * x**n

    x = jnp.asarray(table(8))
    np.testing.assert_array_equal(Model().power(x, n=2), 3 * table(8) ** 2)
    assert x.is_deleted()


@pytest.mark.few(3)
@pytest.mark.parametrize("n", [8, 13])
@pytest.mark.parametrize("options", [{"donate_argnums": 1}, {"donate_argnames": "s"}, {"donate_argnames": ("s", "t")}])
def test_donated_arguments_are_passed_either_way(n, options):
    fun = pmap(lambda x, s, *, t: (s["a"] + x, t + 1), **options)
    keep = pmap(lambda x: x + 0)
    for by_name in (False, True):
        x, s, t = (keep(table(n)) for _ in range(3))
        out = fun(x, s={"a": s}, t=t) if by_name else fun(x, {"a": s}, t=t)
        np.testing.assert_array_equal(out[0], 2 * table(n))
        np.testing.assert_array_equal(out[1], table(n) + 1)
        assert (x.is_deleted(), s.is_deleted()) == (False, True)
        assert t.is_deleted() == ("t" in options.get("donate_argnames", ()))


@pytest.mark.few(2)
@pytest.mark.parametrize("n", [1, 5, 8, 13, 16])
def test_a_donated_argument_that_had_to_move_is_freed_before_the_program_runs(n):
    """So no second copy stays alive. If the moved array shares its buffers, it is freed right after the program."""
    fun = lambda x, w: (x + 1, w + 1)
    mapped = pmap(fun, in_axes=(0, None), out_axes=(0, None), donate_argnums=(0, 1))
    places, early = everywhere(table(n)), 0
    for place in places:
        x, w = everywhere(table(n))[place], everywhere(table(n))[place]
        program, leaves = mapped._dispatcher.resolve(fun, (x, w), {})
        assert isinstance(program, Executable)

        def execute(*placed, program=program, leaves=leaves, place=place):
            for leaf, moved in zip(leaves, placed, strict=True):
                if isinstance(leaf, jax.Array):
                    nonlocal early
                    early += leaf.is_deleted()
                    elsewhere = leaf.sharding.device_set.isdisjoint(moved.sharding.device_set)
                    assert leaf.is_deleted() or not elsewhere, place
            return program.run(*placed)

        out, _ = _run.run(program, leaves, list, execute)
        np.testing.assert_array_equal(out[0], table(n) + 1, err_msg=place)
        np.testing.assert_array_equal(out[1], table(n) + 1, err_msg=place)
        assert all(leaf.is_deleted() for leaf in leaves if isinstance(leaf, jax.Array)), place
    assert early > 3


def test_a_donated_argument_may_still_be_being_computed():
    slow = jax.jit(lambda x: lax.fori_loop(0, 100, lambda _, y: jnp.sin(y) + 1, x))
    start = jax.device_put(np.ones((8, 50_000), np.float32), jax.devices()[3])
    expected = np.asarray(slow(start)) + 1
    step = pmap(lambda x: x + 1, donate_argnums=0)
    for device in (3, 0):
        pending = jax.device_put(slow(start), jax.devices()[device])
        np.testing.assert_array_equal(step(pending), expected)
        assert pending.is_deleted()


def test_nothing_is_donated_while_jax_looks_for_nans():
    step = pmap(lambda x: jnp.log(x), donate_argnums=0)
    x = pmap(lambda x: x)(table(8) + 1)
    with jax.debug_nans(True):
        np.testing.assert_allclose(step(x), np.log(table(8) + 1), rtol=1e-6)
        assert not x.is_deleted()
        with pytest.raises(FloatingPointError, match="nan"):
            step(x - 100)


def test_keyword_arguments_in_any_order_are_one_program():
    traced = []
    fun = pmap(lambda **kwargs: traced.append(1) or sum(kwargs.values()))
    x = table(8)
    for names in ("abc", "cba", "bca"):
        np.testing.assert_array_equal(fun(**dict.fromkeys(names, x)), 3 * x)
    assert len(traced) == 1


@pytest.mark.few(2)
@pytest.mark.parametrize("n", [1, 8, 13])
@pytest.mark.parametrize("d", [3, 8])
def test_axis_size_without_arguments_or_without_a_mapped_one(n, d):
    devices = jax.devices()[:d]
    index = lambda *_: {"index": lax.axis_index("i"), "size": lax.axis_size("i")}
    for args, in_axes in (((), 0), ((), None), ((np.float32(3),), None), (({"w": table(3), "none": None},), (None,))):
        check(index, *args, axis_name="i", axis_size=n, in_axes=in_axes, devices=devices)
    out = pmap(lambda: 7, axis_size=n, devices=devices)()
    np.testing.assert_array_equal(out, np.full(n, 7))
    compiled = pmap(lambda: lax.axis_index("i"), "i", axis_size=n, devices=devices).lower().compile()
    np.testing.assert_array_equal(compiled(), np.arange(n))


def test_calls_that_jax_pmap_refuses():
    """The comments are numbers of JAX issues."""
    ones, index = np.ones((8, 1), np.float32), np.arange(4)
    for transform in (pmap, lambda f: jax.jit(pmap(f))):
        out = transform(lambda i, j: jnp.arange(36).reshape(6, 6)[i, j])(i=index, j=index)
        np.testing.assert_array_equal(out, 7 * index)  # 1170
    np.testing.assert_array_equal(
        pmap(lambda a, b: a + b, static_broadcasted_argnums=(1,))(ones, b=1), ones + 1
    )  # 3007
    np.testing.assert_array_equal(pmap(lambda empty: 1, axis_size=4)({}), np.ones(4))  # 3790
    np.testing.assert_array_equal(pmap(lambda: 1, axis_size=4)(), np.ones(4))  # 9252
    np.testing.assert_array_equal(pmap(lambda x: x, axis_size=4, in_axes=None)(2), np.full(4, 2))  # 9252
    how = pmap(lambda x, how: getattr(jnp, how)(x), static_broadcasted_argnames="how")
    np.testing.assert_allclose(how(ones, how="exp"), np.exp(ones), rtol=1e-6)  # 9904
    both = pmap(lambda a, b, c, d: a + b * c + d, static_broadcasted_argnums=2, in_axes=(0, None, None, 0))
    np.testing.assert_array_equal(both(ones, np.float32(2), 3, ones), ones * 8)  # 6302


class Axis:
    """A user's type as an axis name."""


@pytest.mark.few(5)
@pytest.mark.parametrize("name", [("rows", "cols"), 3.5, frozenset({1}), Axis, Axis(), ("nested", ("x", 1)), ""])
@pytest.mark.parametrize("n", [8, 13])
def test_any_hashable_names_an_axis(n, name):
    def fun(x):
        axes = (name,)  # a bare tuple means several axes, so an axis name that is a tuple is wrapped
        index = 0 if isinstance(name, tuple) else lax.axis_index(name)  # axis_index does not support nested tuples
        return x - lax.pmean(x, axes), index, lax.psum(1, axes)

    x = table(n)
    ours = pmap(fun, axis_name=name)(x)
    for a, b in zip(ours, jax.vmap(fun, axis_name=name)(x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-4)
    assert repr(name) in repr(pmap(fun, axis_name=name))


@jax.tree_util.register_dataclass
@dataclass
class Point:
    x: Any
    y: Any = None
    unit: str = field(default="m", metadata={"static": True})


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["activation", "name"])
@dataclass(frozen=True)
class Layer:
    """A module in the style of Equinox: arrays, an optional bias, and static fields."""

    weight: Any
    bias: Any
    activation: Any
    name: str

    def __call__(self, x):
        y = self.weight @ x
        return self.activation(y if self.bias is None else y + self.bias)


@pytest.mark.few("13")
@pytest.mark.parametrize("n", [5, 8, 13])
def test_modules_whose_functions_are_static_fields(n):
    rng = np.random.default_rng(0)
    for bias in (None, rng.normal(size=(n, 2)).astype(np.float32)):
        layer = Layer(rng.normal(size=(n, 2, 4)).astype(np.float32), bias, jnp.tanh, "first")
        shared = Layer(layer.weight[0], bias, jnp.tanh, "first")
        fun = lambda layer, x: (layer(x), jax.tree.map(lambda a: a + 1, layer))
        check(fun, layer, table(n))
        prefix = Layer(None, 0, jnp.tanh, "first")
        check(fun, shared, table(n), in_axes=(prefix, 0), out_axes=(0, Layer(0, 0, jnp.tanh, "first")))
        out = pmap(fun)(layer, table(n))[1]
        assert (out.activation, out.name, out.bias is None) == (jnp.tanh, "first", bias is None)


class Module:
    """A module whose leaves include functions and numbers. :func:`partition` separates them from the arrays."""

    def __init__(self, **fields):
        vars(self).update(fields)


def _with_keys(module):
    names = sorted(vars(module))
    return [(jax.tree_util.GetAttrKey(name), vars(module)[name]) for name in names], tuple(names)


jax.tree_util.register_pytree_with_keys(
    Module, _with_keys, lambda names, values: Module(**dict(zip(names, values, strict=True)))
)


@dataclass(frozen=True)
class Frozen:
    """The non-array leaves of a module, hashable."""

    leaves: tuple[Any, ...]
    tree: Any


def partition(module):
    leaves, tree = jax.tree.flatten(module)
    arrays = [x if isinstance(x, np.ndarray | jax.Array) else None for x in leaves]
    return tree.unflatten(arrays), Frozen(tuple(None if a is not None else x for a, x in zip(arrays, leaves)), tree)  # noqa: B905


def combine(arrays, rest):
    filled = jax.tree.leaves(arrays, is_leaf=lambda x: x is None)
    return rest.tree.unflatten([b if a is None else a for a, b in zip(filled, rest.leaves, strict=True)])


@pytest.mark.few("5")
@pytest.mark.parametrize("n", [5, 8])
def test_modules_with_functions_among_their_leaves_are_partitioned(n):
    module = Module(weight=table(n), act=jnp.tanh, power=2, layers=[Module(w=table(n) + 1, act=jnp.sin)])
    arrays, rest = partition(module)

    def apply(arrays, rest, x):
        m = combine(arrays, rest)
        return m.act(m.weight * x) ** m.power + m.layers[0].act(m.layers[0].w)

    x = table(n)
    prefix = Module(act=None, layers=0, power=None, weight=0)
    expected = jax.vmap(lambda a, x: apply(a, rest, x))(arrays, x)
    for mapped in (
        pmap(apply, static_broadcasted_argnums=1),
        pmap(apply, static_broadcasted_argnames="rest"),
        pmap(apply, static_broadcasted_argnames="rest", in_axes=(prefix, None, 0)),
    ):
        np.testing.assert_allclose(mapped(arrays, rest, x), expected, rtol=1e-6)
    np.testing.assert_allclose(pmap(lambda a, x: apply(a, rest, x))(arrays, x), expected, rtol=1e-6)
    traced = pmap(apply, static_broadcasted_argnames="rest")
    traced(arrays, rest, x)
    again = partition(Module(weight=x, act=jnp.tanh, power=2, layers=[Module(w=x, act=jnp.sin)]))
    assert "is already compiled" in traced.explain_cache_miss(*again, x)
    other = partition(Module(weight=x, act=jnp.tanh, power=3, layers=[Module(w=x, act=jnp.sin)]))
    assert "rest is Frozen(" in traced.explain_cache_miss(*other, x)


@pytest.mark.few("5")
@pytest.mark.parametrize("n", [5, 8])
def test_none_among_the_leaves(n):
    x = table(n)
    fun = lambda tree, extra=None: {"sum": sum(jax.tree.leaves((tree, extra))), "none": None, "tree": tree}
    check(fun, {"a": x, "b": None, "c": [None, x]})
    check(fun, {"a": x, "b": None}, None)
    check(fun, {"a": x, "b": None}, None, in_axes=(0, None))
    check(fun, {"a": x, "b": None}, in_axes=({"a": 0, "b": None},))
    check(fun, (x, None), kwargs={"extra": None})
    check(fun, Point(x), kwargs={"extra": Point(x, {"deep": x})})


def test_one_array_donated_and_passed_again():
    """A moved array is donated as a copy. An array in place cannot be passed twice."""
    x = jnp.arange(8.0)
    mapped = pmap(lambda x, y: (x + 1, y), donate_argnums=0)
    for ours, expected in zip(mapped(x, x), (np.arange(1.0, 9), np.arange(8.0)), strict=True):
        np.testing.assert_array_equal(ours, expected)
    there = pmap(lambda x: x * 1)(np.arange(8.0))
    with pytest.raises(DeletedArrayError, match=r"\* x is donated, and passed twice\n[^*]*$"):
        mapped(there, there)
    np.testing.assert_array_equal(there, np.arange(8.0))


class Incomparable:
    """A static argument with a hash, whose ``==`` returns an array instead of a bool."""

    def __init__(self, array):
        self.array = array

    def __eq__(self, other):
        return self.array == other.array

    def __hash__(self):
        return 5


def test_static_arguments_of_different_functions_are_not_compared():
    x = np.arange(8.0)
    plus = pmap(lambda x, c: x + c.array.sum(), static_broadcasted_argnums=1)(x, Incomparable(np.ones(3)))
    minus = pmap(lambda x, c: x - c.array.sum(), static_broadcasted_argnums=1)(x, Incomparable(np.ones(2)))
    np.testing.assert_array_equal(plus - minus, np.full(8, 5.0))


def test_wrapping_a_mapped_function_takes_what_it_wraps_and_no_more():
    @functools.wraps(pmap(lambda x: x))
    def wrapper(x):
        return x

    assert {name for name in vars(wrapper) if not name.startswith("__")} == set()


def test_attributes_of_the_function_do_not_hide_the_methods_of_the_map():
    def program(x):
        return x * 7

    vars(program).update(lower=0.0, trace=6, note="kept")
    mapped = pmap(program)
    assert mapped.note == "kept"  # type: ignore[attr-defined]
    assert mapped.__name__ == "program"
    assert "program" in mapped.lower(np.arange(8.0)).as_text()
