"""What ``tests/test_deterministic.py`` runs, in processes that compile with XLA's own optimizations."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import replicax
from process_programs import own
from replicax import _jax
from training_workloads import OPTIONS, training

W = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)


def rows(n):
    """Rows whose sum depends on the order: their sizes span six powers of ten."""
    rng = np.random.default_rng(n)
    return (rng.normal(size=(n, 2, 6)) * 10.0 ** rng.integers(-3, 3, (n, 2, 6))).astype(np.float32)


def sums(x):
    y = x @ W
    return lax.psum(1.1 * x, "i"), jnp.sin(x) - lax.pmean(y, "i"), lax.psum(0.1, "i"), lax.psum(y[:0], "i")


def scattered(x):
    every = jnp.stack([jnp.sin(k * x + 1) @ W for k in range(lax.axis_size("i"))])
    tiled = lax.psum_scatter(jnp.tile(x @ W, (len(every), 1)), "i", tiled=True)
    return lax.psum_scatter(every, "i"), tiled


def large(x):
    """So large that each device adds a part of the elements."""
    return lax.psum(jnp.tile(1.1 * jnp.sin(x), (40, 30)), "i")


def loops(x):
    def step(carry, _):
        y = jnp.sin(carry @ W)
        total = lax.psum(1.3 * y, "i")
        return 0.5 * carry + 0.01 * total + y, total

    mean = lax.fori_loop(0, 3, lambda _, y: 0.7 * jnp.tanh(y @ W) + 0.3 * lax.pmean(y, "i"), x)
    return mean, lax.scan(step, x, None, length=4)


def own_loops(x):
    """Each replica has its own number of iterations."""
    goes_on = lambda s: (jnp.abs(s[0]).sum() > 8) & (s[1] < 7)
    return lax.while_loop(goes_on, lambda s: (0.8 * s[0] + 0.01 * lax.pmean(s[0] @ W, "i"), s[1] + 1), (x, 0))


def branches(x):
    both = lambda x: 1.1 * lax.psum(x @ W, "i") + x, lambda x: lax.pmean(x @ W, "i") - x
    return lax.cond(lax.psum(x.sum(), "i") > 0, *both, x), lax.cond(x[0, 0] > 0, *both, x)


def gradients(x):
    def of_sums(w, x):
        total = jnp.tanh(0.1 * lax.psum(jnp.tanh(x @ w), "i") + x)
        return jnp.sum(total**2) + jnp.sum(lax.pmean(x @ w @ w, "i") ** 3)

    def of_parts(w, x):
        n = lax.axis_size("i")
        part = lax.psum_scatter(jnp.tile(jnp.sin(x @ w), (n, 1)), "i", tiled=True)
        return jnp.sum(part * jnp.cos(x)) + jnp.sum(lax.all_gather(x @ w, "i") ** 2 * 0.3)

    return [jax.grad(f, (0, 1))(jnp.asarray(W), x) for f in (of_sums, of_parts)]


def short_floats(x):
    y, z = (x @ W).astype(jnp.bfloat16), x.astype(jnp.float16) * jnp.float16(0.3)
    in_loop = lax.fori_loop(0, 2, lambda _, y: lax.psum(y * jnp.bfloat16(0.3), "i") * jnp.bfloat16(0.2) + y, y)
    return lax.psum(y * y, "i"), lax.pmean(z, "i"), in_loop


def grouped(x):
    n = lax.axis_size("i")
    groups = [list(range(n))] if n % 2 else [list(range(0, n, 2)), list(range(1, n, 2))]
    unequal = [list(range(0, n, 2)), list(range(1, n, 2))] if n > 1 else [[0]]

    def loss(w):
        h = jnp.sin(x @ w)
        mean = lax.all_gather(1.1 * h, "i", axis_index_groups=groups).sum(0)
        return jnp.mean((h - mean / n) ** 2) + jnp.sum(lax.psum(h, "i", axis_index_groups=groups) * h)

    every = jnp.stack([jnp.sin(k * x + 1) @ W for k in range(len(groups[0]))])
    part = lax.psum_scatter(every, "i", axis_index_groups=groups)
    return lax.psum(1.1 * x @ W, "i", axis_index_groups=unequal), part, jax.grad(loss)(jnp.asarray(W))


def others(x):
    """Sums of complex numbers and of integers, extrema of zeros of both signs and of NaN, random numbers."""
    index, zeros = lax.axis_index("i"), jnp.where(x > 0, 0.0, -0.0)
    drawn = [jax.random.normal(jax.random.fold_in(jax.random.key(1, impl=k), index)) for k in ("threefry2x32", "rbg")]
    return (
        lax.psum((x + 1j * x) * (x - 0.3j), "i"),
        lax.psum(x > 0, "i"),
        lax.pmax(zeros, "i"),
        lax.pmin(jnp.where(x > 1, jnp.nan, zeros), "i"),
        lax.pbroadcast(zeros, "i", 0),
        lax.ppermute(1.1 * x, "i", [(k, k // 2) for k in range(0, lax.axis_size("i"), 2)]),
        drawn,
    )


def inside(x):
    """An inner map, at the top level and in a loop."""
    total = lambda x: (x * lax.psum(jnp.sin(x) @ W, "j"), lax.psum(1.1 * x, ("i", "j")), lax.pmean(x, "i"))
    inner = replicax.pmap(total, "j")
    step = lambda c, _: (c + inner(jnp.stack([c, 2 * c]))[0].sum(0), lax.psum(1.1 * c, "i"))
    return inner(jnp.stack([x, jnp.cos(x), 2 * x])), lax.scan(step, x, None, length=2)


PROGRAMS = {
    f.__name__: f
    for f in (sums, scattered, large, loops, own_loops, branches, gradients, grouped, short_floats, others, inside)
}


def bits(tree):
    """A digest of the bits of all leaves."""
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))).hexdigest()[:16]


def mapped(name, devices, **options):
    return replicax.pmap(PROGRAMS[name], "i", devices=jax.devices()[:devices], **options)


def bits_of(name, n, devices, options):
    """The bits of a program on each number of devices."""
    return {d: bits(mapped(name, d, **options)(rows(n))) for d in devices}


def own_results(names, counts):
    """The rows that this process computes, if process p has ``counts[p]`` of them."""
    x = own(rows(sum(counts)), counts)
    found = (replicax.pmap(PROGRAMS[name], "i", deterministic=True)(x) for name in names)
    return [jax.tree.map(np.asarray, result) for result in found]


def results(names, n):
    """The rows of all replicas, computed by one process on one device."""
    return [jax.tree.map(np.asarray, mapped(name, 1, deterministic=True)(rows(n))) for name in names]


# ---------------------------------------------------------------------------------------------------------------
# Training


def trained(model, n, steps, devices=None):
    """The bits of the parameters and of the state of the optimizer after some steps, and the last loss.

    Args:
        model: The model.
        n: The number of replicas, of all processes together.
        steps: The number of steps.
        devices: The number of devices of this process; None for all.
    """
    run, (params, state, x, y, _) = training(model, n)
    mine = replicax.distributed.replicas(n)
    x, y = x[mine.start : mine.stop], y[mine.start : mine.stop]
    some = None if devices is None else jax.devices()[:devices]
    step, value = replicax.pmap(run, **OPTIONS, devices=some, deterministic=True), 0.0
    for k in range(steps):
        params, state, value = step(params, state, x, y, np.int32(k))
    return bits((params, state)), float(value)


def trained_with(options, model, n, steps, devices):
    """The same, with other options of the compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jax, "SAME_BITS", options)
        return trained(model, n, steps, devices)
