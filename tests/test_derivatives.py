"""Custom derivative rules give the same derivatives on any number of devices, equal to those of ``jax.pmap``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from replicax import pmap
from replicax.testing import check, lockstep

AXIS = "i"


def compiled_lockstep(fun, **options):
    return jax.jit(lockstep(fun, **options))


def rows(n):
    return np.random.default_rng(n).uniform(0.1, 1, (n, 3)).astype(np.float32)


@jax.custom_vjp
def constant(x):
    return jnp.ones(())


constant.defvjp(lambda x: (constant(x), x), lambda x, ct: (jnp.cos(x) * ct,))


@jax.custom_vjp
def equal(x):
    return lax.pmean(x, AXIS) * np.array([1, 2, 3], np.float32)


equal.defvjp(lambda x: (equal(x), x), lambda x, ct: (ct * x,))


@jax.custom_jvp
def constant_forward(x):
    return jnp.ones(3)


@constant_forward.defjvp
def _(primals, tangents):
    return constant_forward(*primals), jnp.cos(primals[0]) * tangents[0]


@jax.custom_vjp
def weighted(x, w):
    return x * w


weighted.defvjp(lambda x, w: (x * w, (x, w)), lambda r, ct: (ct * r[1], jnp.ones(3)))

#: Rules whose primal result or an argument is equal in all replicas, but whose derivative differs.
RULES = {
    "a constant, in reverse": constant,
    "a mean, in reverse": equal,
    "a constant, forwards": constant_forward,
    "an argument for all": lambda x: weighted(x, jnp.ones(3)),
}


@pytest.mark.few("a constant, in reverse-3", "an argument for all-3")
@pytest.mark.parametrize("d", [1, 2, 3, 4])
@pytest.mark.parametrize("name", RULES)
def test_results_equal_in_all_replicas(name, d):
    check(
        lambda x: RULES[name](jnp.sin(x)),
        rows(4),
        axis_name=AXIS,
        devices=jax.devices()[:d],
        reference=jax.pmap,
        derivatives=True,
        rtol=1e-4,
    )


@pytest.mark.long
@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_a_constant_derivative_by_an_argument_for_all(d):
    check(
        weighted,
        rows(4),
        rows(1)[0],
        in_axes=(0, None),
        devices=jax.devices()[:d],
        reference=jax.pmap,
        derivatives=True,
    )


@pytest.mark.parametrize("d", [1, 2, 8])
def test_an_equal_result_of_a_rule_may_be_broadcast(d):
    out = pmap(equal, AXIS, out_axes=None, devices=jax.devices()[:d])(rows(8))
    np.testing.assert_allclose(out, rows(8).mean(0) * [1, 2, 3], rtol=1e-6)


@pytest.mark.few("2")
@pytest.mark.parametrize("d", [1, 2, 3])
def test_a_checkpointed_loop_differentiated_inside(d):
    def fun(x):
        loop = lambda y: lax.fori_loop(0, 2, lambda _, z: lax.pmean(jnp.sin(z), AXIS), y)
        return jax.grad(jax.checkpoint(lambda y: jnp.sum(jnp.cos(loop(y)))))(x)

    check(fun, rows(3), axis_name=AXIS, devices=jax.devices()[:d])


@pytest.mark.long
@pytest.mark.parametrize("d", [1, 2, 4])
def test_sums_of_complex_constants(d):
    """XLA aborts when it folds a sum of complex constants between devices, also in ``jax.pmap``."""

    def fun(x):
        ones = jnp.full((4, 3), 1 + 2j)
        return {
            "psum": x + lax.psum(ones[0], AXIS),
            "groups": x + lax.psum(ones[0], AXIS, axis_index_groups=[[0, 1, 2], [3]]),
            "psum_scatter": x + lax.psum_scatter(ones, AXIS),
            "inside": jax.grad(lambda y: jnp.real(lax.pmean(y, AXIS) + lax.all_gather(y, AXIS)).sum())(x),
        }

    check(
        fun,
        rows(4) * (1 + 1j),
        axis_name=AXIS,
        devices=jax.devices()[:d],
        reference=compiled_lockstep,
        derivatives=True,
    )


@pytest.mark.few("2")
@pytest.mark.parametrize("d", [1, 2, 4])
def test_the_derivative_by_a_complex_argument_for_all_may_be_constant(d):
    """JAX adds this sum between devices itself, because the argument is not sharded."""

    def fun(x, w):
        return x + lax.fori_loop(0, 1, lambda _, carry: (x * 1j, carry[1]), (w, w))[0]

    options = {"in_axes": (0, None), "devices": jax.devices()[:d]}
    check(fun, rows(4) * (1 + 1j), rows(1)[0] * 1j, derivatives=True, **options)


@pytest.mark.few("2")
@pytest.mark.parametrize("d", [1, 2, 3])
def test_rules_of_what_is_equal_everywhere(d):
    """No argument is mapped, so no value varies."""
    sine = jax.custom_jvp(jnp.sin)
    sine.defjvp(lambda primals, tangents: (sine(*primals), jnp.cos(primals[0]) * tangents[0]))
    square = jax.custom_vjp(lambda x: sine(x) ** 2)
    square.defvjp(lambda x: (square(x), x), lambda x, ct: (2 * sine(x) * jnp.cos(x) * ct,))
    options = {"in_axes": None, "axis_size": 3, "devices": jax.devices()[:d]}
    for fun in (sine, square):
        check(fun, rows(1)[0], out_axes=None, derivatives=True, **options)
    check(sine, rows(1)[0], derivatives=True, **options)


@jax.custom_vjp
def summed_forwards(x):
    """A psum whose transpose is the identity: one of the two operators of tensor parallelism."""
    return lax.psum(x, AXIS)


summed_forwards.defvjp(lambda x: (lax.psum(x, AXIS), None), lambda _, ct: (ct,))


@jax.custom_vjp
def equal_in_the_forward_rule(x):
    return x * 1


equal_in_the_forward_rule.defvjp(lambda x: (lax.pmean(x, AXIS), x), lambda x, ct: (ct * x,))


@pytest.mark.few("3")
@pytest.mark.parametrize("d", [1, 2, 3, 6, 8])
def test_cotangents_of_rules_on_any_number_of_devices(d):
    """For a result with ``out_axes=None``, each replica gets 1/N of the cotangent, as in ``jax.pmap``."""
    derivative = jax.grad(lambda x: pmap(summed_forwards, AXIS, out_axes=None, devices=jax.devices()[:d])(x).sum())
    np.testing.assert_allclose(derivative(rows(6)), np.full((6, 3), 1 / 6), rtol=1e-6)
    options = {"axis_name": AXIS, "devices": jax.devices()[:d], "reference": jax.pmap, "derivatives": True}
    check(equal_in_the_forward_rule, rows(6), **options)


@pytest.mark.long
@pytest.mark.parametrize("d", [1, 3, 6])
def test_a_constant_summed_over_groups_of_different_sizes(d):
    groups = [[0, 1], [2, 3, 4, 5]]

    def fun(x):
        ones = lax.psum(jnp.ones(()), AXIS, axis_index_groups=groups)
        return ones + x[0] * 0, lax.scan(
            lambda c, _: (lax.psum(c, AXIS, axis_index_groups=groups) / 3, None), ones, None, 2
        )

    check(fun, rows(6), axis_name=AXIS, devices=jax.devices()[:d], reference=compiled_lockstep, derivatives=True)


@pytest.mark.parametrize("d", [1, 3, 6])
def test_the_derivative_of_a_closed_over_array_under_jit(d):
    mapped = pmap(lambda x: x * 2, devices=jax.devices()[:d])
    out = jax.jit(lambda scale: jax.grad(lambda x: (scale * mapped(x)).sum())(jnp.arange(6.0)))(3.0)
    np.testing.assert_allclose(out, np.full(6, 6.0))


@pytest.mark.few("5-3")
@pytest.mark.parametrize(("n", "d"), [(8, 8), (12, 8), (5, 3)])
def test_the_types_in_a_rule_are_plain(n, d):
    """Types have no mesh, in rules traced with the map or later. Libraries compare them."""
    meshes = []

    def seen(x, *other):
        meshes.append([jax.typeof(y).sharding.mesh for y in (x, jnp.sin(x), *other)])
        return x

    rule = jax.custom_vjp(lambda x: jnp.sin(seen(x)))
    rule.defvjp(lambda x: (jnp.sin(seen(x)), x), lambda x, ct: (ct * jnp.cos(seen(x, ct)),))
    forward = jax.custom_jvp(lambda x: rule(seen(x)))
    forward.defjvp(lambda primals, tangents: (rule(*primals), jnp.cos(seen(*primals, *tangents)) * tangents[0]))
    for fun in (rule, forward):
        derivative = jax.grad(lambda x, fun=fun: pmap(fun, devices=jax.devices()[:d])(x).sum())
        for run in (derivative, jax.jit(derivative)):
            meshes.clear()
            np.testing.assert_allclose(run(rows(n)), np.cos(rows(n)), rtol=1e-5)
            assert len(meshes) > 1
            assert all(mesh.empty for each in meshes for mesh in each)


@pytest.mark.long
@pytest.mark.parametrize(("n", "d"), [(8, 8), (12, 8), (5, 3)])
@pytest.mark.parametrize("where", ["plain", "nested"])
def test_a_checkpointed_loop_of_equinox(where, n, d):
    """Every diffrax solve uses this loop. Its backward rule compares the types of its arguments."""
    loops = pytest.importorskip("equinox.internal", reason="equinox is not installed: pip install '.[clients]'")

    def steps(scale, count):
        step = lambda c: (c[0] + 1, jnp.sin(c[1] * scale))
        return loops.while_loop(lambda c: c[0] < count, step, (jnp.int32(0), scale), kind="checkpointed", max_steps=16)[
            1
        ]

    counts = jnp.arange(n) % 5 + 2
    options: dict[str, Any] = {"in_axes": (None, 0)}

    def program(mapped):
        return steps if where == "plain" else lambda s, k: mapped(lambda k: steps(s, k))(jnp.stack([k, k + 1]))

    ours, right = pmap(program(pmap), devices=jax.devices()[:d], **options), jax.vmap(program(jax.vmap), **options)
    derivative, expected = (jax.grad(lambda s, f=f: (f(s, counts) ** 2).sum()) for f in (ours, right))
    np.testing.assert_allclose(derivative(1.3), jax.jit(expected)(1.3), rtol=1e-5)


@jax.custom_jvp
def communicates_forward(x):
    return jnp.sin(x)


@communicates_forward.defjvp
def _(primals, tangents):
    return communicates_forward(*primals), lax.pmean(tangents[0], AXIS) * jnp.cos(*primals)


@jax.custom_vjp
def communicates_ahead(x):
    return jnp.sin(x)


communicates_ahead.defvjp(lambda x: (jnp.sin(x), lax.psum(jnp.cos(x), AXIS)), lambda r, ct: (r * ct,))


@jax.custom_vjp
def communicates_backward(x):
    return jnp.sin(x)


communicates_backward.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda r, ct: (r * lax.psum(ct, AXIS),))

#: Functions with a collective only in a derivative rule: the traced program does not show it.
IN_RULES = [communicates_forward, communicates_ahead, communicates_backward]


@pytest.mark.long
@pytest.mark.parametrize(("n", "d"), [(4, 8), (12, 8), (5, 3)])
@pytest.mark.parametrize("rule", IN_RULES, ids=["jvp", "fwd", "bwd"])
def test_a_branch_that_replicas_disagree_on_and_whose_rule_communicates(rule, n, d):
    """Only some replicas take the branch. The collective in its rule needs all."""

    def choose(x):
        return lax.cond(lax.axis_index(AXIS) % 2 == 0, lambda x: jnp.tanh(rule(x)), lambda x: x**3, x)

    def twice(x):  # the rule is in a nested branch
        return lax.switch(lax.axis_index(AXIS) % 3, [choose, jax.checkpoint(jnp.cos), jax.jit(rule)], x)

    for fun in (choose, twice):
        mapped, right = pmap(fun, AXIS, devices=jax.devices()[:d]), jax.vmap(fun, axis_name=AXIS)
        ours, expected = (jax.grad(lambda x, f=f: (f(x) ** 2).sum()) for f in (mapped, right))
        for run in (ours, jax.jit(ours)):
            np.testing.assert_allclose(run(rows(n)), jax.jit(expected)(rows(n)), rtol=1e-5)


@pytest.mark.few("5-3")
@pytest.mark.parametrize(("n", "d"), [(4, 8), (12, 8), (5, 3)])
def test_a_loop_that_replicas_leave_at_different_times_and_whose_rule_communicates(n, d):
    def loop(x):
        turns, step = lax.axis_index(AXIS), lambda s: (s[0] + 1, communicates_forward(s[1]))
        return lax.while_loop(lambda s: s[0] < turns, step, (0, x))[1]

    x = rows(n)
    ours, right = (
        jax.jvp(f, (x,), (jnp.cos(x),))[1]
        for f in (pmap(loop, AXIS, devices=jax.devices()[:d]), jax.vmap(loop, axis_name=AXIS))
    )
    np.testing.assert_allclose(ours, right, rtol=1e-5)
