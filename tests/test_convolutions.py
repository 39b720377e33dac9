"""Convolutions of replicas that a CPU runs one after the other."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import replicax


def convolution(shape, kernel, numbers, **options):
    """A convolution and its gradients."""
    w = np.random.default_rng(1).normal(size=kernel).astype(np.float32)

    def program(x):
        convolve = lambda x, w: lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)
        gradients = jax.grad(lambda x, w: jnp.sum(jnp.sin(convolve(x, w))), (0, 1))(x, w)
        return convolve(x, w), lax.pmean(gradients, "i")

    return program, shape


ONE: Any = {"window_strides": (1, 1), "padding": "SAME"}
CONVOLUTIONS = {
    "images": convolution((2, 3, 8, 7), (5, 3, 3, 3), None, window_strides=(2, 1), padding="SAME"),
    "in_order": convolution((2, 8, 7, 3), (3, 3, 3, 5), ("NHWC", "HWIO", "NHWC"), **ONE),
    "mixed": convolution((3, 8, 2, 7), (3, 5, 3, 3), ("CHNW", "IOHW", "WNHC"), window_strides=(1, 2), padding="VALID"),
    "sequences": convolution((2, 9, 4), (3, 4, 6), ("NWC", "WIO", "NCW"), window_strides=(1,), padding=[(2, 0)]),
    "volumes": convolution((1, 2, 4, 5, 3), (3, 2, 2, 2, 2), None, window_strides=(1, 1, 1), padding="SAME"),
    "dilated": convolution(
        (2, 3, 8, 7),
        (5, 3, 2, 2),
        None,
        window_strides=(1, 1),
        padding=[(1, 2), (0, 1)],
        lhs_dilation=(2, 1),
        rhs_dilation=(1, 2),
    ),
    "grouped": convolution((2, 4, 8, 7), (6, 2, 3, 3), None, **ONE, feature_group_count=2),
    "batch_groups": convolution((4, 3, 8, 7), (6, 3, 3, 3), None, **ONE, batch_group_count=2),
    "a_point": convolution((2, 4), (3, 4), None, window_strides=(), padding="VALID"),
}


def rows(n, shape):
    return np.random.default_rng(n).normal(size=(n, *shape)).astype(np.float32)


@pytest.mark.few(5)
@pytest.mark.parametrize("lanes", ["sequential", 2])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_values_are_those_of_vmap(name, lanes):
    program, shape = CONVOLUTIONS[name]
    x = rows(5, shape)
    ours = replicax.pmap(program, "i", devices=jax.devices()[:2], lanes=lanes)(x)
    theirs = jax.vmap(program, axis_name="i")(x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, 1e-4, 1e-4)


def in_a_checkpoint(x):
    return jax.checkpoint(jax.jit(CONVOLUTIONS["images"][0]))(x)


@pytest.mark.parametrize("program", [CONVOLUTIONS["images"][0], in_a_checkpoint])
def test_features_are_last(program):
    x = rows(4, CONVOLUTIONS["images"][1])
    text = replicax.pmap(program, "i", devices=jax.devices()[:1], lanes="sequential").lower(x).compile().as_text()
    found = re.findall(r" convolution\(.*dim_labels=(\S+?)[,\s]", text)
    assert len(found) >= 3
    assert {labels.split("->")[0] for labels in found} == {"b01f_01io"}


def test_derivatives_from_outside():
    program, shape = CONVOLUTIONS["mixed"]
    x = rows(5, shape)
    scalar = lambda mapped: lambda x: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(mapped(x)))
    mapped = replicax.pmap(program, "i", devices=jax.devices()[:2], lanes="sequential")
    theirs = jax.grad(scalar(jax.vmap(program, axis_name="i")))(x)
    np.testing.assert_allclose(jax.grad(scalar(mapped))(x), theirs, 1e-4, 1e-4)


@pytest.mark.parametrize(("size", "gradients", "at_once"), [(4, True, 32), (16, False, 32), (16, True, 1)])
def test_by_default_gradients_of_large_convolutions_run_one_after_the_other(size, gradients, at_once):
    w = np.ones((8, 3, 3, 3), np.float32)
    loss = lambda w, x: jnp.mean(lax.conv(x, w, (1, 1), "SAME") ** 2)
    program = lambda x: lax.pmean(jax.grad(loss)(w, x) if gradients else loss(w, x), "i")
    mapped = replicax.pmap(program, "i", devices=jax.devices()[:2], out_axes=None)
    assert mapped.trace(rows(64, (8, 3, size, size))).lanes.at_once == at_once
