"""pmap equals vmap: replicas × devices × collectives × dtypes × control flow, and derivatives.

Each pair of N and D runs one kind of control flow, in rotation, with every collective, in float32, int32 and half of
all dtypes, alternating. ``make sweep`` runs every kind of control flow for each of the 110 pairs.
"""

import functools

import jax
import numpy as np
import pytest
from jax import lax

from layouts import FULL, PAIRS, every_pair
from programs import AXIS, CONTROL, DIFFERENTIABLE, DTYPES, custom_rules, program
from replicax import pmap
from replicax.testing import check
from replicax.testing._check import compare, gradient

SMALL = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def rows(n):
    """Positive numbers: sums do not cancel, so rounding errors are small relative to the results."""
    return np.abs(np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32)) + np.float32(0.1)


def rotation(table, n, d):
    """The whole table, or one entry, in rotation."""
    return tuple(table) if FULL else (list(table)[PAIRS.index((n, d)) % len(table)],)


def dtypes(n, d):
    """float32, int32 and, alternating, half of ``DTYPES``."""
    return ("float32", "int32", *DTYPES[PAIRS.index((n, d)) % 2 :: 2])


@functools.cache
def values_of_vmap(n, controls, dtypes):
    return jax.jit(jax.vmap(program(controls, dtypes), axis_name=AXIS))(rows(n))


@functools.cache
def derivatives_of_vmap(n, controls):
    return gradient(jax.vmap(program(controls, ("float32",)), axis_name=AXIS), (rows(n),), {}, jax.jit)


@pytest.mark.few("7on5")
@every_pair
def test_values_equal_vmap(n, d):
    controls = rotation(CONTROL, n, d)
    ours = pmap(program(controls, dtypes(n, d)), AXIS, devices=jax.devices()[:d])
    out, expected = ours(rows(n)), values_of_vmap(n, controls, dtypes(n, d))
    for small in (False, True):  # in small dtypes, the summation order changes rounding
        cells = [cell for cell in out if (cell[2] in SMALL) == small]
        compare(str, {c: out[c] for c in cells}, {c: expected[c] for c in cells}, 0.1 if small else None)


@pytest.mark.few("7on5")
@every_pair
def test_derivatives_equal_vmap(n, d):
    controls = rotation(DIFFERENTIABLE, n, d)
    ours = pmap(program(controls, ("float32",)), AXIS, devices=jax.devices()[:d])
    compare(str, gradient(ours, (rows(n),), {}, lambda fun: fun), derivatives_of_vmap(n, controls), rtol=1e-3)


@pytest.mark.few("5on2")
@pytest.mark.parametrize("pair", [(1, 1), (5, 5), (5, 1), (5, 2), (8, 8), (8, 3), (7, 3)], ids="{0[0]}on{0[1]}".format)
def test_derivative_rules_that_communicate(pair):
    """The reference is ``jax.pmap``: under ``vmap``, cotangents in such rules are multiplied by N."""
    n, d = pair
    check(custom_rules, rows(n), axis_name=AXIS, devices=jax.devices()[:d])
    options = {"axis_name": AXIS, "devices": jax.devices()[:d], "derivatives": True, "rtol": 1e-4}
    check(custom_rules, rows(n), reference=jax.pmap, **options)

    @jax.custom_vjp
    def scaled(x, w):
        return x * w

    scaled.defvjp(lambda x, w: (x * w, (x, w)), lambda r, ct: (ct * r[1], lax.psum(ct * r[0], AXIS)))
    check(lambda x, w: scaled(x, w), rows(n), rows(1)[0], in_axes=(0, None), reference=jax.pmap, **options)


@pytest.mark.few("5on3")
@pytest.mark.parametrize("pair", [(5, 3), (8, 8), (7, 1)], ids="{0[0]}on{0[1]}".format)
def test_a_distributed_solver(pair):
    """The operator of a linear solve contains a collective."""
    n, d = pair

    def solve(b):
        return jax.scipy.sparse.linalg.cg(lambda v: 2 * v + lax.pmean(v, AXIS), b, maxiter=5)[0]

    check(solve, rows(n), axis_name=AXIS, devices=jax.devices()[:d], rtol=1e-4)
