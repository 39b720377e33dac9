"""XLA compiles a map to the same operations as a program written by hand with ``shard_map``."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from replicax import pmap

COLLECTIVE = re.compile(
    r"= (\w+)\[([\d,]*)\][^ ]* (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = \S+ ([\w-]+)\(", re.MULTILINE)
BYTES = {"f32": 4, "s32": 4, "bf16": 2, "pred": 1}


def train_step(w, batch):
    def loss(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    value, gradient = jax.value_and_grad(loss)(w, batch)
    return w - 0.1 * lax.pmean(gradient, "i"), lax.pmax(jnp.int32(1000 * value), "i")  # float pmax also handles NaN


def gather(w, x):
    return lax.all_gather(x.sum(0), "i") @ w[:, :2], lax.axis_index("i") + x.astype(jnp.int32).sum()


def looped(w, x):
    def step(carry, row):
        return carry + lax.psum(row, "i"), jnp.sin(carry)

    return lax.fori_loop(0, 5, lambda k, c: lax.cond(k > 2, lambda a: a + lax.psum(a, "i"), jnp.cos, c), w), lax.scan(
        step, x[0], x
    )


def prints(w, x):
    return jnp.sort(x @ w, axis=0), lax.while_loop(lambda v: v.sum() < 100, lambda v: v * 2 + 1, x)


PROGRAMS = [train_step, gather, looped, prints]


def by_hand(fun, n, d):
    """``jit(shard_map(fun))``, or ``jit(shard_map(vmap(fun)))`` with several replicas per device."""
    mesh = Mesh(np.array(jax.devices()[:d]), ("i",))
    if n == d:

        def device(w, x):
            return jax.tree.map(lambda y: y[None], fun(w, x[0]))
    else:
        device = jax.vmap(fun, (None, 0), axis_name="lane")
    return jax.jit(jax.shard_map(device, mesh=mesh, in_specs=(P(), P("i")), out_specs=P("i"), check_vma=False))


def arguments(n):
    return jnp.ones((4, 4)), jnp.ones((n, 3, 4))


def optimized(lowered):
    return lowered.compile().as_text()


def collectives(text):
    return Counter(COLLECTIVE.findall(text))


def operations(text):
    return Counter(OPERATION.findall(text))


@pytest.mark.few(5)
@pytest.mark.parametrize("fun", PROGRAMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("d", [1, 2, 8])
def test_one_replica_a_device_compiles_to_the_program_by_hand(fun, d):
    ours = optimized(pmap(fun, "i", in_axes=(None, 0), devices=jax.devices()[:d]).lower(*arguments(d)))
    theirs = optimized(by_hand(fun, d, d).lower(*arguments(d)))
    if d > 1:
        assert collectives(ours) == collectives(theirs)
    else:
        assert not collectives(ours)  # in the program by hand, XLA keeps collectives of one device
    assert sum(operations(ours).values()) <= sum(operations(theirs).values()), operations(ours) - operations(theirs)


def over_both(fun):
    """The same program by hand, with collectives over the axes of lanes and devices."""
    over = ("lane", "i")

    def train_step_by_hand(w, batch):
        value, gradient = jax.value_and_grad(lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2))(w, batch)
        return w - 0.1 * lax.pmean(gradient, over), lax.pmax(jnp.int32(1000 * value), over)

    def looped_by_hand(w, x):
        def step(carry, row):
            return carry + lax.psum(row, over), jnp.sin(carry)

        loop = lax.fori_loop(0, 5, lambda k, c: lax.cond(k > 2, lambda a: a + lax.psum(a, over), jnp.cos, c), w)
        return loop, lax.scan(step, x[0], x)

    return {train_step: train_step_by_hand, looped: looped_by_hand, prints: prints}[fun]


@pytest.mark.few(5)
@pytest.mark.parametrize("fun", [train_step, looped, prints], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("n", "d"), [(16, 8), (64, 8), (6, 2), (12, 1)])
def test_lanes_compile_to_the_program_by_hand(fun, n, d):
    mapped = pmap(fun, "i", in_axes=(None, 0), devices=jax.devices()[:d], lanes="vectorized")
    ours = optimized(mapped.lower(*arguments(n)))
    theirs = optimized(by_hand(over_both(fun), n, d).lower(*arguments(n)))
    if d > 1:
        assert collectives(ours) == collectives(theirs)
    assert sum(operations(ours).values()) <= sum(operations(theirs).values()), operations(ours) - operations(theirs)


def bytes_out(text):
    """The result bytes of each kind of collective on one device."""
    total: Counter[str] = Counter()
    for dtype, shape, name in COLLECTIVE.findall(text):
        total[name] += BYTES[dtype] * int(np.prod([int(k) for k in shape.split(",") if k], dtype=int))
    return total


@pytest.mark.few(5)
@pytest.mark.parametrize("reduce", [lax.psum, lax.pmean, lax.pmax, lax.pmin], ids=lambda f: f.__name__)
@pytest.mark.parametrize("n", [8, 64, 61, 1000])
def test_a_reduction_over_many_replicas_sends_one_replicas_bytes(reduce, n):
    text = optimized(pmap(lambda x: reduce(x, "i"), "i", out_axes=None).lower(np.ones((n, 100), np.float32)))
    assert bytes_out(text) == {"all-reduce": 400}


def test_the_sum_of_a_tree_is_one_collective():
    gradients = [np.ones((12, 4, k), np.float32) for k in range(1, 13)]
    text = pmap(lambda tree: lax.psum(tree, "i"), "i").lower(gradients).compile().as_text()
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 1


def test_all_gather_sends_each_replica_once():
    text = optimized(pmap(lambda x: lax.all_gather(x, "i"), "i", out_axes=None).lower(np.ones((64, 100), np.float32)))
    assert bytes_out(text) == {"all-gather": 64 * 400}  # the result has all replicas once


def test_a_map_without_collectives_sends_nothing():
    for n in (5, 8, 64):
        text = optimized(pmap(lambda x: jnp.sin(x)).lower(np.ones((n, 100), np.float32)))
        assert not collectives(text)


def test_a_branch_that_asks_for_its_index_alone_is_still_a_choice():
    """``axis_index`` does not communicate, so each device runs only one branch."""
    fun = lambda x: lax.cond(x[0] > 0, lambda x: jnp.sin(x) * lax.axis_index("i"), jnp.cos, x)
    assert " cond[" in str(pmap(fun, "i").trace(np.ones((8, 3), np.float32)).jaxpr)
