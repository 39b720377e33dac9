"""pmap computes what vmap computes: replicas × devices × collectives × dtypes × control flow, and derivatives.

By default every pair of N and D runs a part of the table, in rotation, so that every part meets pairs with N below,
equal to, above and not dividing D. ``make sweep`` runs the whole table for every pair.
"""

import os

import jax
import numpy as np
import pytest
from jax import lax

from programs import AXIS, CONTROL, DIFFERENTIABLE, DTYPES, custom_rules, program
from replicax.testing import check

REPLICAS = (*range(1, 21), 64, 1000)
DEVICES = (1, 2, 3, 5, 8)
PAIRS = [(n, d) for n in REPLICAS for d in DEVICES]
FULL = os.environ.get("REPLICAX_SWEEP") == "full"


def rows(n):
    """Positive, so that sums do not cancel: rounding is then small beside the results in every dtype."""
    return np.abs(np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32)) + np.float32(0.1)


def rotation(table, pair):
    """The whole table, or the entry whose turn it is."""
    return tuple(table) if FULL else (list(table)[PAIRS.index(pair) % len(table)],)


@pytest.mark.parametrize("pair", PAIRS, ids="{0[0]}on{0[1]}".format)
def test_values_equal_vmap(pair):
    n, d = pair
    check(program(rotation(CONTROL, pair), DTYPES), rows(n), axis_name=AXIS, devices=jax.devices()[:d])


@pytest.mark.parametrize("pair", PAIRS, ids="{0[0]}on{0[1]}".format)
def test_derivatives_equal_vmap(pair):
    n, d = pair
    fun = program(rotation(DIFFERENTIABLE, pair), ("float32",))
    check(fun, rows(n), axis_name=AXIS, devices=jax.devices()[:d], derivatives=True, rtol=1e-3)


@pytest.mark.parametrize("pair", [(1, 1), (5, 5), (5, 1), (5, 2), (8, 8), (8, 3), (7, 3)], ids="{0[0]}on{0[1]}".format)
def test_derivative_rules_that_communicate(pair):
    """vmap multiplies cotangents by N where a rule of its own communicates over them; jax.pmap does not."""
    n, d = pair
    check(custom_rules, rows(n), axis_name=AXIS, devices=jax.devices()[:d])
    options = {"axis_name": AXIS, "devices": jax.devices()[:d], "derivatives": True, "rtol": 1e-4}
    check(custom_rules, rows(n), reference=jax.pmap, **options)

    @jax.custom_vjp
    def scaled(x, w):
        return x * w

    scaled.defvjp(lambda x, w: (x * w, (x, w)), lambda r, ct: (ct * r[1], lax.psum(ct * r[0], AXIS)))
    check(lambda x, w: scaled(x, w), rows(n), rows(1)[0], in_axes=(0, None), reference=jax.pmap, **options)
