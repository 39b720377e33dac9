"""Maps under jit, with JAX's debugging modes, in exports, and with the user's own meshes."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import replicax
from replicax import pmap
from replicax.errors import UnsupportedTransformationError
from transforms import AXIS, centered, rows

SIZES = (3, 8, 13)
every_size = pytest.mark.parametrize("n", SIZES)


def vmapped(fun):
    return jax.jit(jax.vmap(fun, axis_name=AXIS))


def close(ours, right):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), ours, right)


# ---------------------------------------------------------------------------------------------------------------
# Under jit


#: The user's meshes, by axis type.
MESHES = {kind: jax.make_mesh((8,), ("a",), axis_types=(kind,)) for kind in (AxisType.Explicit, AxisType.Auto)}


@pytest.mark.parametrize("n", [8, 16])
def test_a_jit_of_a_map_gathers_nothing(n, recwarn):
    mapped = pmap(centered, AXIS)
    once = mapped(rows(n))
    program = jax.jit(lambda x: mapped(mapped(x))).lower(once).compile()
    sent = set(re.findall(r"(all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(", program.as_text()))
    assert sent == {"all-reduce"}
    out = program(once)
    assert [s.data.shape[0] for s in out.addressable_shards] == [n // 8] * 8
    close(out, vmapped(centered)(vmapped(centered)(once)))
    assert not recwarn.list


def test_maps_of_different_sizes_and_names_meet_under_jit():
    doubled, summed = pmap(lambda x: x * 2), pmap(lambda x: lax.psum(x, "k"), "k")
    x, y = np.arange(13.0), np.arange(3.0)
    a, b = jax.jit(lambda x, y: (doubled(x)[:3] + summed(y), doubled(jnp.concatenate([x, summed(y)]))))(x, y)
    close((a, b), (x[:3] * 2 + 3, np.concatenate([x, [3, 3, 3]]) * 2))


@pytest.mark.long
@pytest.mark.parametrize("place", [lambda x: jax.device_put(x, jax.devices()[3]), pmap(lambda x: x)])
def test_arguments_on_other_devices_move(place):
    """Cotangents move back to the devices of the arguments, also under ``vmap``."""
    for n in (3, 8):
        mapped, right = pmap(centered, AXIS), vmapped(centered)
        x = place(rows(n))
        for done in (
            lambda f, x: jax.grad(lambda x: jnp.sin(f(jnp.sin(x))).sum())(x),
            lambda f, x: jax.vmap(lambda s: f(x * s))(jnp.ones(2)),
            lambda f, x: jax.jacrev(lambda x: f(x).sum(0))(x),
            lambda f, x: jax.hessian(lambda s: f(x * s).sum())(1.0),
        ):
            close(done(mapped, x), jax.jit(functools.partial(done, right))(rows(n)))


def everywhere(x):
    return jax.device_put(x, NamedSharding(MESHES[AxisType.Auto], P()))


def test_export():
    """An export runs on its number of devices."""
    mapped = jax.jit(pmap(centered, AXIS))
    for n in (8, 13):
        made = export.export(mapped)(jax.ShapeDtypeStruct((n, 3), np.float32))
        assert made.nr_devices == 8
        close(jax.jit(made.call)(everywhere(rows(n))), vmapped(centered)(rows(n)))


def test_an_export_of_the_map_itself():
    with pytest.raises(UnsupportedTransformationError, match=r"centered is a map, .* pass jax\.jit\(centered\)"):
        export.export(pmap(centered, AXIS))(rows(4))


@pytest.mark.skipif(not importlib.util.find_spec("flatbuffers"), reason="JAX serializes with flatbuffers")
def test_an_export_comes_back_from_bytes():
    raw = export.export(jax.jit(pmap(centered, AXIS)))(rows(13)).serialize(vjp_order=1)
    back = jax.jit(jax.value_and_grad(lambda x: (export.deserialize(raw).call(x) ** 2).sum()))
    close(back(everywhere(rows(13))), jax.value_and_grad(lambda x: (vmapped(centered)(x) ** 2).sum())(rows(13)))


# ---------------------------------------------------------------------------------------------------------------
# JAX's modes


def steered(x):
    y = lax.while_loop(lambda s: s.sum() < 9 + lax.axis_index(AXIS), lambda s: s * 2, x)
    y = lax.cond(lax.axis_index(AXIS) > 1, lambda y: y, lambda y: y * 2, y)
    return lax.scan(lambda c, _: (c + lax.pmean(c, AXIS), None), y, None, 2)[0]


@pytest.mark.long
def test_disable_jit():
    n = 13
    with jax.disable_jit():
        out, derivative = pmap(steered, AXIS)(rows(n)), jax.grad(lambda x: pmap(centered, AXIS)(x).sum())(rows(n))
    close(out, vmapped(steered)(rows(n)))
    close(derivative, jax.grad(lambda x: vmapped(centered)(x).sum())(rows(n)))


def test_disable_jit_runs_python_at_every_call():
    seen = []
    mapped = pmap(lambda x: seen.append(x.shape) or x + 1)
    mapped(rows(8))
    with jax.disable_jit():
        mapped(rows(8)), mapped(rows(8))
    mapped(rows(8))
    assert len(seen) == 3


@pytest.mark.few("13")
@every_size
def test_debug_nans(n):
    bad = rows(n)
    bad[n - 1, 1] = -1
    with jax.debug_nans(True):
        mapped = pmap(lambda x: jnp.log(x) / (lax.axis_index(AXIS) + 1), AXIS)
        mapped(rows(n)), jax.jit(mapped)(rows(n)), jax.grad(lambda x: mapped(x).sum())(rows(n))
        for run in (mapped, jax.jit(mapped), jax.grad(lambda x: mapped(x).sum())):
            with pytest.raises(FloatingPointError, match="nan"):
                run(bad)


@pytest.mark.long
def test_checking_leaks():
    n, kept = 13, []

    def fun(x):
        return jnp.cos(x) * lax.axis_index(AXIS) + 1.25

    with jax.checking_leaks():
        mapped = pmap(fun, AXIS)
        out = [mapped(rows(n)), jax.jit(mapped)(rows(n)), jax.vmap(mapped)(rows(n)[None])[0]]
        out.append(lax.scan(lambda _, x: (None, mapped(x)), None, rows(n)[None])[1][0])
    close(out, [vmapped(fun)(rows(n))] * 4)
    with jax.checking_leaks(), pytest.raises(Exception, match="Leaked trace"):
        pmap(lambda x: kept.append(x + 1) or x)(rows(n))


@pytest.mark.few("13")
@every_size
def test_ensure_compile_time_eval(n):
    @jax.jit
    def outside(x):
        with jax.ensure_compile_time_eval():
            constant = pmap(steered, AXIS)(rows(n))
            assert not isinstance(constant, jax.core.Tracer)
        return x + constant

    def inside(x):
        with jax.ensure_compile_time_eval():
            first = bool(jnp.sum(jnp.arange(3)) == 3)  # a concrete value
        return x * lax.axis_index(AXIS) if first else x

    close(outside(rows(n)), rows(n) + vmapped(steered)(rows(n)))
    close(pmap(inside, AXIS)(rows(n)), vmapped(inside)(rows(n)))


# ---------------------------------------------------------------------------------------------------------------
# The user's own meshes


@pytest.mark.few("AxisType.Explicit-16")
@pytest.mark.parametrize("n", [16, 13])
@pytest.mark.parametrize("kind", MESHES, ids=str)
def test_arrays_on_a_mesh_of_the_users(kind, n):
    mapped, right = pmap(centered, AXIS), vmapped(centered)
    x = jax.device_put(rows(n), NamedSharding(MESHES[kind], P("a") if n == 16 else P()))
    close(mapped(x), right(rows(n)))
    close(jax.jit(lambda x: mapped(x) + x)(x), right(rows(n)) + rows(n))
    derivative = jax.jit(jax.grad(lambda x: right(x).sum()))(rows(n))
    for jit in (jax.jit, lambda f: f):
        close(jit(jax.grad(lambda x: mapped(x).sum()))(x), derivative)
    close(lax.scan(lambda c, _: (mapped(c), None), x, None, 2)[0], right(right(rows(n))))
    close(jax.vmap(mapped, 1, 1)(x[:, None]), right(rows(n))[:, None])
    with jax.set_mesh(MESHES[kind]):
        close(mapped(x), right(rows(n)))
        close(jax.jit(lambda x: mapped(x) + x)(x), right(rows(n)) + rows(n))
        close(jax.jit(lambda: mapped(rows(n)))(), right(rows(n)))


def test_types_of_results_say_what_those_of_arguments_say():
    x = jax.device_put(rows(16), NamedSharding(MESHES[AxisType.Explicit], P("a")))
    where = jax.jit(pmap(centered, AXIS)).eval_shape(x).sharding
    assert where.spec[0] == "a" == jax.jit(vmapped(centered)).eval_shape(x).sharding.spec[0]


def test_a_vmap_that_splits_its_batch_is_refused():
    mapped = pmap(centered, AXIS)
    batch = np.stack([rows(8)] * 8)
    split = jax.device_put(batch, NamedSharding(MESHES[AxisType.Explicit], P("a")))
    for run in (
        lambda: jax.vmap(mapped, spmd_axis_name="a")(batch),
        lambda: jax.jit(jax.vmap(jax.grad(lambda x: mapped(x).sum()), spmd_axis_name="a"))(batch),
        lambda: jax.vmap(jax.jit(mapped), spmd_axis_name="a")(batch),
        lambda: jax.vmap(mapped)(split),
        lambda: jax.jit(jax.vmap(mapped))(split),
    ):
        with pytest.raises(replicax.UnsupportedTransformationError, match=r"the mesh axis 'a'.*Leave spmd_axis"):
            run()
    inside = pmap(jax.vmap(lambda x: x * lax.pmean(x, AXIS), spmd_axis_name="a"), AXIS)
    close(inside(rows(8)), vmapped(jax.vmap(lambda x: x * lax.pmean(x, AXIS)))(rows(8)))


# ---------------------------------------------------------------------------------------------------------------
# A vmap inside the map, and collectives over both axes


@pytest.mark.few("axes0-psum", "axes1-pmax")
@pytest.mark.parametrize("collective", [lax.psum, lax.pmean, lax.pmax, lax.pmin, lambda x, axes: lax.axis_index(axes)])
@pytest.mark.parametrize("axes", [("i", "j"), ("j", "i")])
def test_collectives_over_the_axis_of_a_vmap_inside(collective, axes):
    fun = jax.vmap(lambda y: y + collective(y, axes), axis_name="j")
    for n in (8, 13):
        close(pmap(fun, AXIS)(rows(n)), vmapped(fun)(rows(n)))


def test_other_collectives_over_the_axis_of_a_vmap_inside_are_refused():
    gather = jax.vmap(lambda y: lax.all_gather(y, ("i", "j")), axis_name="j")
    shift = jax.vmap(lambda y: lax.ppermute(y, ("i", "j"), [(k, (k + 1) % 24) for k in range(24)]), axis_name="j")
    with pytest.raises(AssertionError) as caught:
        pmap(gather, AXIS)(rows(8))
    assert "over one axis after the other" in "".join(caught.value.__notes__)
    with pytest.raises(replicax.CollectiveArgumentError, match="over one axis after the other"):
        pmap(shift, AXIS)(rows(8))
    for fun in (gather, shift):
        with pytest.raises(AssertionError):
            vmapped(fun)(rows(8))


def test_an_untiled_scatter_under_a_vmap():
    f = lambda v: lax.psum_scatter(jnp.stack([v, v * 2]), "j")
    expected = jax.vmap(jax.vmap(f, axis_name="j"))(np.ones((3, 2), np.float32))
    np.testing.assert_allclose(
        jax.vmap(pmap(f, axis_name="j", devices=jax.devices()[:2]))(np.ones((3, 2), np.float32)), expected
    )


def test_scatters_and_gathers_of_outer_replicas_inside_inner_ones():
    scattered = lambda v: lax.psum_scatter(jnp.stack([v] * 3), "j")
    nested = pmap(pmap(scattered, axis_name="k"), axis_name="j", devices=jax.devices()[:3])
    np.testing.assert_allclose(nested(np.ones((3, 2))), np.full((3, 2), 3.0))
    gathered = lambda v: lax.all_gather(v, "j", axis=1) * v[:, None]
    x = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    ours = jax.jacrev(pmap(gathered, axis_name="j", devices=jax.devices()[:3]))(x)
    np.testing.assert_allclose(ours, jax.jit(jax.jacrev(jax.vmap(gathered, axis_name="j")))(x), rtol=1e-5)
