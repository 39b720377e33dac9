"""``check`` finds every difference, and ``lockstep`` agrees with ``vmap`` where both are correct."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from programs import AXIS, CONTROL, DTYPES, program
from replicax import DivergentOutputError
from replicax.testing import MismatchError, check, lockstep
from replicax.testing._check import compare

x5 = np.abs(np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)) + 0.1


@pytest.mark.long
@pytest.mark.parametrize("control", CONTROL)
def test_lockstep_agrees_with_vmap(control):
    fun = program((control,), DTYPES[list(CONTROL).index(control) % 3 :: 3])
    once = jax.jit if not control.startswith("while") else lambda f: f  # its loops need concrete values
    compare(str, once(lockstep(fun, axis_name=AXIS))(x5), jax.jit(jax.vmap(fun, axis_name=AXIS))(x5))


def summed_by_some(x):
    return lax.cond(lax.axis_index("i") % 2 == 0, lambda a: lax.psum(a, "i"), lambda a: a, x)


@pytest.mark.long
@pytest.mark.parametrize("d", [1, 2, 3, 8])
def test_pmap_agrees_with_lockstep_where_vmap_has_a_wrong_derivative(d):
    check(summed_by_some, x5, axis_name="i", reference=lockstep, derivatives=True, devices=jax.devices()[:d])


@pytest.mark.long
def test_lockstep_has_the_right_derivative_where_vmap_has_a_wrong_one():
    fun = summed_by_some
    with pytest.raises(MismatchError, match="derivative"):
        check(fun, x5, axis_name="i", derivatives=True)
    # Finite differences confirm the derivative of lockstep.
    loss = jax.jit(lambda x: jnp.sum(jnp.sin(lockstep(fun, axis_name="i")(x))))
    slope = jax.grad(loss)(x5)
    step = np.zeros_like(x5)
    step[1, 0] = 1e-2
    np.testing.assert_allclose((loss(x5 + step) - loss(x5 - step)) / 2e-2, slope[1, 0], rtol=1e-2)


def wrong(how):
    """A reference with wrong results."""

    def reference(fun, **options):
        return lambda *args: how(jnp.asarray(jax.vmap(fun, **options)(*args)))

    return reference


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (lambda y: y.at[2, 1].add(1e-3), r"1 of 15 elements differ, first at \(2, 1\)"),
        (lambda y: y.at[0].set(jnp.nan), "3 of 15 elements differ"),
        (lambda y: y.at[0].set(jnp.inf), "3 of 15 elements differ"),
        (lambda y: y.astype(jnp.bfloat16), "the reference bfloat16"),
        (lambda y: y[:, None], r"float32\[5, 3\], but the reference float32\[5, 1, 3\]"),
        (lambda y: [y], "structure"),
        (lambda y: (y * 0) + y[::-1], "elements differ"),
        (lambda y: lax.stop_gradient(y), "derivative by args"),
    ],
)
def test_check_finds_every_kind_of_difference(how, says):
    with pytest.raises(MismatchError, match=says):
        check(lambda x: x * 2, x5, reference=wrong(how), derivatives=True)


@pytest.mark.parametrize(
    ("fun", "right"),
    [
        (lambda x: jnp.where(x == 1, 1.0, 1e7), lambda x: jnp.where(x == 1, -1.0, 1e7)),
        (lambda x: jnp.stack([x * 1e6, 1.0]), lambda x: jnp.stack([x * 1e6, 7.0])),
        (lambda x: x.astype(jnp.bfloat16), lambda x: (x * 1.05).astype(jnp.bfloat16)),
        (lambda x: x.astype(jnp.float8_e4m3fn), lambda x: (x * 1.4).astype(jnp.float8_e4m3fn)),
        (lambda x: jnp.where(x == 1, lax.stop_gradient(x), x * 1e7), lambda x: jnp.where(x == 1, x, x * 1e7)),
        (lambda x: x * 1e-9, lambda x: x * 1.01e-9),
    ],
)
def test_check_is_not_blinded_by_large_neighbours_or_small_types(fun, right):
    with pytest.raises(MismatchError):
        check(fun, np.arange(1, 13, dtype=np.float32), reference=lambda _, **o: jax.vmap(right, **o), derivatives=True)


def test_check_compares_derivatives_by_keyword_arguments_and_refuses_to_compare_none():
    x = np.arange(1, 9, dtype=np.float32)
    with pytest.raises(MismatchError, match=r"derivative by kwargs\['a'\]"):
        check(
            lambda *, a: lax.stop_gradient(a), kwargs={"a": x}, derivatives=True,
            reference=lambda _, **o: jax.vmap(lambda *, a: a, **o),
        )  # fmt: skip
    with pytest.raises(MismatchError, match="no derivative to compare"):
        check(lambda a: a, np.arange(8), derivatives=True)


def test_lockstep_refuses_to_return_one_of_several_results():
    with pytest.raises(DivergentOutputError, match="differ"):
        lockstep(lambda a: a, out_axes=None)(np.arange(3))


def test_check_finds_integers_that_differ_by_one():
    with pytest.raises(MismatchError, match="1 of 5 elements differ"):
        check(lambda x: x, np.arange(5), reference=wrong(lambda y: y.at[4].add(1)))


def test_nan_and_infinity_agree_with_themselves():
    check(lambda x: (jnp.log(x - 1), 1 / (x - x[0])), x5)


def test_lockstep_cuts_and_joins_along_any_axes():
    x, y = np.arange(12.0).reshape(3, 4), {"a": np.arange(8.0).reshape(2, 4), "b": 5.0}

    def fun(x, y, *, z):
        return {"x": x - lax.pmax(x, AXIS), "y": (y["a"] * z, None), "n": lax.psum(x * y["b"], AXIS)}

    options: dict[str, Any] = {
        "axis_name": AXIS,
        "in_axes": (-1, {"a": 1, "b": None}),
        "out_axes": {"x": -1, "y": (1, 0), "n": None},
        "axis_size": 4,
    }
    ours, right = (transform(fun, **options)(x, y, z=np.arange(4)) for transform in (lockstep, jax.vmap))
    compare(str, ours, right)
    none: dict[str, Any] = {"axis_size": 3, "in_axes": None, "axis_name": AXIS}
    compare(str, *(f(lambda: (lax.axis_index(AXIS), ()), **none)() for f in (lockstep, jax.vmap)))
