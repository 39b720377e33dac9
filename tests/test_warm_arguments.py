"""Warm calls refuse and accept the same arguments as first calls, and use their current values.

JAX's C++ cache checks only the shape and dtype of an argument, not its class or whether the caller may change it.
"""

import array
import datetime
import decimal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from replicax import NotAnArrayError, NumberTooLargeError, ReplicaxError, UnconvertedArrayError, pmap

N = 8
ROWS = np.arange(3.0 * N, dtype=np.float32).reshape(N, 3)


class Own(np.ndarray):
    pass


class Shaped:
    """A class with the shape and dtype attributes of an array."""

    def __init__(self, x):
        self.x, self.shape, self.dtype, self.ndim = x, x.shape, x.dtype, x.ndim


class Convertible(Shaped):
    def __array__(self, dtype=None, copy=None):
        return self.x


class ConvertibleByJax(Shaped):
    def __jax_array__(self):
        return jnp.asarray(self.x)


class Number(float):
    pass


def memory_map(x, path):
    mapped = np.memmap(path / "x", x.dtype, "w+", shape=x.shape)
    mapped[:] = x
    return mapped


def leaked():
    kept = []
    jax.jit(lambda x: kept.append(x) or x)(ROWS)
    return kept[0]


MASKED = UnconvertedArrayError, "is a NumPy masked array"
CONVERTED = UnconvertedArrayError, "x is of type ConvertibleByJax, which has __jax_array__"

#: Refused arguments: (makes one, a valid argument that looks the same to C++, class of the error, its message).
REFUSED = {
    "a masked array": (lambda: np.ma.masked_array(ROWS, ROWS > 5), ROWS, *MASKED),
    "a masked array without a mask": (lambda: np.ma.masked_array(ROWS), ROWS, *MASKED),
    "a masked array, nested": (
        lambda: {"a": [np.ma.masked_array(ROWS)]}, {"a": [ROWS]}, *MASKED,
    ),
    "a masked scalar": (lambda: np.ma.masked, np.float32(1), *MASKED),
    "a masked array without axes": (lambda: np.ma.array(np.float32(2)), np.float32(1), *MASKED),
    "an array of records": (lambda: np.rec.array(np.zeros(N, [("a", "f4")])), ROWS[:, 0], NotAnArrayError, "a'"),
    "an array of strings": (lambda: np.array(["a"] * N), ROWS[:, 0], NotAnArrayError, "dtype <U1"),
    "an array of objects": (lambda: ROWS.astype(object), ROWS, NotAnArrayError, "dtype object"),
    "an array of times": (lambda: ROWS.astype("M8[s]"), ROWS, NotAnArrayError, "dtype datetime64"),
    "a wide array": (lambda: ROWS.astype(np.longdouble), ROWS, NotAnArrayError, "dtype float128"),
    "a duck": (lambda: Shaped(ROWS), ROWS, NotAnArrayError, "x is of type Shaped"),
    "a duck that converts": (lambda: Convertible(ROWS), ROWS, NotAnArrayError, "x is of type Convertible"),
    "a duck that JAX converts": (lambda: ConvertibleByJax(ROWS), ROWS, *CONVERTED),
    "a type": (lambda: jax.ShapeDtypeStruct(ROWS.shape, "float32"), ROWS, NotAnArrayError, "type ShapeDtypeStruct"),
    "a reference": (lambda: jax.new_ref(jnp.asarray(ROWS)), ROWS, NotAnArrayError, "references to arrays"),
    "a memory view": (lambda: ROWS.data, ROWS, NotAnArrayError, "x is of type memoryview"),
    "an array of Python's": (lambda: array.array("f", ROWS[:, 0]), ROWS[:, 0], NotAnArrayError, "x is of type array"),
    "a decimal": (lambda: decimal.Decimal(2), 2.0, NotAnArrayError, "x is of type Decimal"),
    "a time": (lambda: np.datetime64(datetime.date.today()), 2, NotAnArrayError, "x is of type datetime64"),
    "a large number": (lambda: 2**40, 2, NumberTooLargeError, "is 1099511627776, which is too large"),
    "a tracer that has leaked": (leaked, ROWS, jax.errors.UnexpectedTracerError, "leaked"),
}  # fmt: skip

#: Accepted arguments: (makes one from a valid argument and a folder, the valid argument).
TAKEN = {
    "a memory map": (memory_map, ROWS),
    "a matrix": (lambda x, _: x.view(np.matrix), ROWS),
    "a subclass": (lambda x, _: x.view(Own), ROWS),
    "another order of bytes": (lambda x, _: x.astype(">f4"), ROWS),
    "a subclass, in another order of bytes": (lambda x, _: x.astype(">f4").view(Own), ROWS),
    "negative strides": (lambda x, _: x[::-1], ROWS),
    "columns first": (lambda x, _: np.asfortranarray(x), ROWS),
    "what cannot be written": (lambda x, _: np.broadcast_to(x[:1], x.shape), ROWS),
    "a number of the user's": (lambda x, _: Number(x), 2.0),
    "a truth value": (lambda x, _: bool(x), 1),
    "a scalar of NumPy's": (lambda x, _: np.float32(x), np.float32(1)),
    "a narrow scalar": (lambda x, _: ml_dtypes.bfloat16(x), ml_dtypes.bfloat16(1)),
    "an array without axes": (lambda x, _: np.array(x), np.float32(1)),
    "a subclass without axes": (lambda x, _: np.array(x).view(Own), np.float32(1)),
}


def plain(x, d):
    """Valid arguments for which C++ may cache the program: on the host, and in place."""
    yield x
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(x)):
        yield pmap(lambda x: x, devices=jax.devices()[:d])(x)


def mapped(x, d):
    axis = 0 if np.ndim(jax.tree.leaves(x)[0]) else None
    double = lambda x: jax.tree.map(lambda leaf: leaf * 2, x)
    return pmap(double, in_axes=axis, axis_size=N, devices=jax.devices()[:d])


@pytest.mark.few(8)
@pytest.mark.parametrize("d", [1, 3, 8])
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_first_call_refuses_a_warm_call_refuses(name, d):
    make, like, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text) as cold:
        mapped(like, d)(make())
    for given in plain(like, d):
        fun = mapped(like, d)
        for _ in range(3):
            fun(given)
        for _ in range(2):
            with pytest.raises(kind, match=text) as warm:
                fun(make())
            if issubclass(kind, ReplicaxError):
                assert str(warm.value) == str(cold.value)


@pytest.mark.few(5)
@pytest.mark.parametrize("d", [1, 3, 8])
@pytest.mark.parametrize("name", TAKEN)
def test_what_a_first_call_takes_a_warm_call_takes(name, d, tmp_path):
    make, like = TAKEN[name]
    x = make(like, tmp_path)
    expected = np.broadcast_to(2 * np.asarray(x), (N, *np.shape(x)) if np.ndim(x) == 0 else np.shape(x))
    np.testing.assert_array_equal(mapped(like, d)(x), expected)
    for given in plain(like, d):
        fun = mapped(like, d)
        for _ in range(3):
            fun(given)
        for _ in range(3):
            np.testing.assert_array_equal(fun(x), expected)


@pytest.mark.few(5)
@pytest.mark.parametrize("d", [1, 3, 8])
@pytest.mark.parametrize("kind", ["a memory map", "a subclass", "a subclass without axes", "an array without axes"])
def test_it_may_change_as_soon_as_the_call_returns(kind, d, tmp_path):
    like = np.ones(() if "without axes" in kind else (N, 500), np.float32)
    raw = np.ones(like.size + 16, np.float32)  # aligned, so that JAX would alias the memory
    aligned = raw[(-raw.ctypes.data // 4) % 16 :][: like.size].reshape(like.shape)
    x = memory_map(like, tmp_path) if kind == "a memory map" else aligned.view(Own) if "subclass" in kind else aligned
    slow = lambda x, k: lax.fori_loop(0, 3, lambda _, y: y + 1, x.max() + k)
    fun = pmap(slow, in_axes=(0 if x.ndim else None, 0), devices=jax.devices()[:d])
    given = (like if x.ndim else np.float32(1)), jnp.zeros(N)
    for _ in range(3):
        fun(*given)
    for value in range(20):
        x[...] = value
        out = fun(x, given[1])
        x[...] = 1000
        np.testing.assert_array_equal(out, np.full(N, value + 3))


@pytest.mark.parametrize("d", [1, 8])
def test_a_masked_array_that_is_donated_or_called_by_name(d):
    masked = np.ma.masked_array(ROWS, ROWS > 5)
    for options in ({"donate_argnums": 0}, {"static_broadcasted_argnames": "power"}):
        fun = pmap(lambda x, power=1: x**power, devices=jax.devices()[:d], **options)
        for call in (lambda x, fun=fun: fun(x), lambda x, fun=fun: fun(x=x)):
            for _ in range(3):
                call(ROWS)
            with pytest.raises(UnconvertedArrayError, match="x is a NumPy masked array"):
                call(masked)
