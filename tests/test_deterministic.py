"""``deterministic=True``: the same bits on any number of devices, in one process or in several."""

import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

import deterministic_programs as programs
import fuzz_deterministic
import replicax
from deterministic_programs import PROGRAMS, bits, rows
from launching import EXAMPLE, environment
from replicax._layout.placement import Placement, placement
from replicax._layout.trees import tree
from replicax.errors import (
    NestedMapError,
    OptionTypeError,
    UnsupportedCallbackError,
    UnsupportedCollectiveError,
    UnsupportedTransformationError,
)
from replicax.testing import processes
from training_workloads import MODELS

REPLICAS = (1, 2, 3, 5, 8, 12, 16, 23)
DEVICES = (1, 2, 3, 4, 8)

pytestmark = pytest.mark.xdist_group("deterministic")


@pytest.fixture(scope="module")
def optimized():
    """A process with 8 devices. XLA optimizes there; in this process it does not, which hides differences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")
        with processes(1, devices=8, timeout=300) as one:
            yield one


# ---------------------------------------------------------------------------------------------------------------
# The tree


def expression(n):
    """The sum of n replicas as the tree says, in words."""

    def of_block(level, index):
        if level == 0:
            return str(index)
        left = of_block(level - 1, 2 * index)
        whole = (2 * index + 1) << (level - 1) < n
        return f"({left} + {of_block(level - 1, 2 * index + 1)})" if whole else left

    return of_block((n - 1).bit_length(), 0)


def carried_out(schedule, device, items):
    slots = [None] * (schedule.slots + 1)
    for k, item in enumerate(items):
        for j in range(schedule.count[device, k]):
            item = f"({slots[schedule.merged[device, k, j]]} + {item})"
        slots[schedule.kept[device, k]] = item
    return slots


def computed(where):
    """The sum as the devices compute it, in words, and the partial sums of each."""
    plan, partials = tree(where), []
    for device, slots in enumerate(np.arange(where.slots).reshape(where.devices, -1)):
        names = [str(where.replica_at[s]) if where.is_replica[s] else "padding" for s in slots]
        found = carried_out(plan.lanes, device, names)
        partials.append([found[slot] for slot in plan.partials[device]])
    items = [partials[k // len(partials[0])][k % len(partials[0])] for k in plan.order]
    return carried_out(plan.between, 0, items)[plan.total], partials


@pytest.mark.parametrize("d", range(1, 12))
def test_the_tree_depends_on_the_number_of_replicas_alone(d):
    for n in range(1, 70):
        lanes = -(-n // d)
        found, partials = computed(placement(n, -(-n // lanes), lanes))
        assert found == expression(n)
        assert len(partials[0]) <= 2 * lanes.bit_length()


def test_the_tree_of_processes_with_own_rows():
    for runs in (((0, 2), (3, 1), (6, 4)), ((3, 1), (6, 6)), ((0, 0), (4, 7))):
        assert computed(Placement(sum(count for _, count in runs), 4, 3, runs))[0] == expression(7)


def test_the_partial_sums_of_a_device():
    _, partials = computed(placement(10, 2, 5))
    assert partials[1] == ["5", "(6 + 7)", "(8 + 9)"]


# ---------------------------------------------------------------------------------------------------------------
# Bits and values


@pytest.mark.few(2)
@pytest.mark.parametrize("n", REPLICAS)
@pytest.mark.parametrize("name", ["sums", "gradients"])
def test_the_same_bits_for_every_number_of_replicas(optimized, name, n):
    (found,) = optimized.run(programs.bits_of, name, n, DEVICES, {"deterministic": True})
    assert len(set(found.values())) == 1, found


@pytest.mark.few(4)
@pytest.mark.parametrize("n", [3, 8, 12])
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in ("sums", "gradients")])
def test_the_same_bits(optimized, name, n):
    (found,) = optimized.run(programs.bits_of, name, n, (1, 2, 3, 8), {"deterministic": True})
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("lanes", ["vectorized", "sequential"])
def test_other_bits_without_it(optimized, lanes):
    """So the tests above can fail."""
    (found,) = optimized.run(programs.bits_of, "gradients", 12, DEVICES, {"lanes": lanes})
    assert len(set(found.values())) > 1


@pytest.mark.few("recurrent-12")
@pytest.mark.parametrize("n", [8, 12, 16, 23])
@pytest.mark.parametrize("model", MODELS)
def test_training(optimized, model, n):
    found = {d: optimized.run(programs.trained, model, n, 100, d)[0] for d in DEVICES}
    assert len(set(found.values())) == 1, found
    (_, first), (_, last) = optimized.run(programs.trained, model, n, 1, 1)[0], found[1]
    assert last < 0.9 * first


@pytest.mark.long
@pytest.mark.parametrize("devices", [(4, 4), (2, 2, 2, 2)], ids=["2x4", "4x2"])
def test_training_over_processes(optimized, monkeypatch, devices):
    monkeypatch.setenv("XLA_FLAGS", "")
    with processes(len(devices), devices=devices, timeout=300) as gang:
        gang.run(programs.bits, ())
        for model, n in zip(MODELS, (8, 12, 16, 23), strict=True):
            found = gang.run(programs.trained, model, n, 100)
            assert set(found) == set(optimized.run(programs.trained, model, n, 100, 8)), model


@pytest.mark.long
def test_a_killed_run_ends_in_the_same_bits(tmp_path):
    """Killed after step 50 on 8 devices, and resumed on 3."""

    def start(devices, folder):
        words = [EXAMPLE, "--steps", "100", "--checkpoints", tmp_path / folder]
        variables = environment(JAX_NUM_CPU_DEVICES=str(devices), XLA_FLAGS="")
        return subprocess.Popen([sys.executable, *map(str, words)], env=variables, stdout=subprocess.PIPE, text=True)

    with start(8, "killed") as killed:
        assert killed.stdout is not None
        assert any(line.startswith("step 50 ") for line in killed.stdout)
        killed.kill()
    with start(3, "killed") as resumed, start(8, "whole") as whole:
        (*steps, end), (*every, expected) = (run.communicate(timeout=120)[0].splitlines() for run in (resumed, whole))
    steps, every = ([line for line in lines if line.startswith("step ")] for lines in (steps, every))
    assert 30 < int(steps[0].split()[1]) <= 51
    assert steps == every[-len(steps) :]
    assert end == expected
    assert end.startswith("fingerprint ")


@pytest.mark.long
def test_random_programs(optimized):
    ((same, differ),) = optimized.run(fuzz_deterministic.failures, 7, 12, timeout=900)
    assert not differ, differ[0]
    assert same > 6


@pytest.mark.long
def test_the_options_of_the_compiler_are_needed(optimized):
    """One device against two. If the bits are the same, try to compile without the options."""
    found = [optimized.run(programs.trained_with, {}, "attention", 8, 3, d)[0] for d in (1, 2)]
    assert found[0] != found[1]


@pytest.mark.few(3)
@pytest.mark.parametrize("d", [1, 3, 8])
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in ("inside", "others", "grouped")])
def test_values_are_those_of_vmap(name, d):
    x = rows(11)
    ours, theirs = programs.mapped(name, d, deterministic=True)(x), jax.vmap(PROGRAMS[name], axis_name="i")(x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = (np.asarray(y.astype(jnp.float32)) for y in (a, b))
        tolerance = 0.02 if name == "short_floats" else 1e-4
        np.testing.assert_allclose(a, b, tolerance, tolerance * float(np.abs(b).max()) if b.size else 0.0)


@pytest.mark.parametrize(("n", "d"), [(11, 3), (12, 8)])
def test_sums_over_groups(n, d):
    """JAX has no values of groups under ``vmap``."""
    x, program = rows(n), PROGRAMS["grouped"]
    ours = programs.mapped("grouped", d, deterministic=True)(x)
    for a, b in zip(
        jax.tree.leaves(ours), jax.tree.leaves(replicax.testing.lockstep(program, axis_name="i")(x)), strict=True
    ):
        np.testing.assert_allclose(a, b, 1e-3, 1e-3 * float(np.abs(b).max()))


def test_inner_maps_have_the_values_of_vmap():
    inner = replicax.pmap(lambda x: x - lax.psum(x, "j") + lax.pmean(x, ("i", "j")), "j", out_axes=0)
    same = jax.vmap(lambda x: x - lax.psum(x, "j") + lax.pmean(x, ("i", "j")), axis_name="j")
    x = rows(5)
    ours = replicax.pmap(lambda x: inner(x) * lax.pmax(x, "i"), "i", devices=jax.devices()[:2], deterministic=True)(x)
    np.testing.assert_allclose(ours, jax.vmap(lambda x: same(x) * lax.pmax(x, "i"), axis_name="i")(x), 1e-3, 1e-3)


def test_a_sum_of_short_floats_is_added_in_32_bits():
    x = np.full((1024, 1), 1.0, jnp.bfloat16)  # in bfloat16, 256 + 1 is 256
    ours = replicax.pmap(lambda x: lax.psum(x * 1, "i"), "i", devices=jax.devices()[:3], deterministic=True)(x)
    assert float(ours[0, 0]) == 1024


def test_options_of_the_map():
    x, y = rows(10), np.arange(10, dtype=np.float32)
    program = lambda x, y, scale: (scale * x + lax.psum(y, "i"), lax.pmean(x, "i"))
    mapped = replicax.pmap(
        program, "i", in_axes=(1, 0), out_axes=(1, None), static_broadcasted_argnums=2, donate_argnums=1,
        devices=jax.devices()[:4], lanes="sequential", deterministic=True,
    )  # fmt: skip
    turned, donated = np.moveaxis(x, 0, 1), jax.device_put(y)
    ours = mapped(turned, donated, 2)
    assert donated.is_deleted()
    np.testing.assert_allclose(ours[0], 2 * turned + 45, 1e-5)
    np.testing.assert_allclose(ours[1], x.mean(0), 1e-4, 1e-4)
    assert bits(mapped.lower(turned, y, 2).compile()(turned, y)) == bits(ours)
    assert (mapped.trace(turned, y, 2).lanes.at_once, mapped.trace(turned, y, 2).lanes.cut) == (1, 2)


def test_many_small_arrays_are_not_packed():
    names = [f"x{k}" for k in range(12)]
    x = {name: rows(6) for name in names}
    mapped = replicax.pmap(lambda x: lax.psum(sum(x.values()) * 1.1, "i"), "i", deterministic=True)
    assert len({bits(mapped(x)) for _ in range(4)}) == 1


# ---------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.long
@pytest.mark.parametrize("devices", [(2, 2), (4, 4), (2, 2, 2, 2)], ids=["2x2", "2x4", "4x2"])
def test_over_processes(optimized, monkeypatch, devices):
    monkeypatch.setenv("XLA_FLAGS", "")
    names = ["sums", "gradients", "large", "loops"]
    with processes(len(devices), devices=devices, timeout=300) as gang:
        gang.run(programs.bits, ())  # imports the module, which takes long where processes share few cores
        # Every process has another number of rows in the second call, as it must.
        for counts in ((3,) * len(devices), (0, *[4] * (len(devices) - 2), 5)):
            found = gang.run(programs.own_results, names, counts)
            (expected,) = optimized.run(programs.results, names, sum(counts))
            ours = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
            for name, a, b in zip(names, ours, expected, strict=True):
                assert bits(a) == bits(b), (name, counts)


def test_processes_must_agree():
    with processes(2, devices=1) as both:
        first, second = both.run(one_of_two)
        assert first == second
        assert "deterministic: process 0 has" in first


def one_of_two():
    try:
        replicax.pmap(lambda x: lax.psum(x, "i"), "i", lanes="sequential", deterministic=jax.process_index() == 0)(
            rows(4)
        )
    except replicax.errors.ProcessesError as error:
        return str(error)
    return "no error"


# ---------------------------------------------------------------------------------------------------------------
# What is compiled


def compiled(program, n=12, d=8):
    return replicax.pmap(program, "i", devices=jax.devices()[:d], deterministic=True).lower(rows(n)).compile().as_text()


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "inside"])
def test_no_sum_of_floats_between_devices(name):
    text = compiled(PROGRAMS[name])
    found = re.findall(r"= (\S+) (?:all-reduce|reduce-scatter)(?:-start)?\(", text)
    assert not [kind for kind in found if not re.match(r"\(?(s|u|pred)", kind)], found


def test_devices_communicate_once_for_all_sums_of_a_step():
    text = compiled(lambda x: [lax.psum(jnp.sin(x) * k, "i") for k in range(5)])
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) == 1


def test_a_device_sends_a_part_of_a_large_sum():
    text = compiled(lambda x: lax.psum(jnp.tile(x * 2, (100, 100)), "i"), 16)
    assert len(re.findall(r" all-to-all(?:-start)?\(", text)) == 1
    assert "f32[8,1200" not in text  # no device has the sums of all others


def test_what_all_replicas_compute_alike_is_compiled_with_what_reads_it():
    def step(x):
        w = jnp.asarray(programs.W)
        return 0.9 * w + lax.pmean(jnp.sin(x @ w), "i").sum()  # an update: 0.9 * w is known before the mean

    assert len(re.findall(r" conditional\(", compiled(step))) == 1


def test_temporaries_do_not_grow_with_the_replicas():
    program = lambda x: lax.psum(jnp.tile(jnp.sin(x), (100, 100)), "i")
    mapped = replicax.pmap(program, "i", out_axes=None, devices=jax.devices()[:2], deterministic=True)
    few, many = (mapped.lower(rows(n)).compile().memory_analysis().temp_size_in_bytes for n in (16, 512))
    assert many <= 2.5 * few  # 9 sums instead of 4: log2 of the replicas of a device


# ---------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("lanes", [2, 3])
def test_other_lanes(lanes):
    with pytest.raises(
        OptionTypeError, match=rf"runs the replicas of a device one after the other, and lanes is {lanes}"
    ):
        replicax.pmap(jnp.sin, lanes=lanes, deterministic=True)


def test_tune_has_nothing_to_choose():
    assert replicax.tune(replicax.pmap(jnp.sin, deterministic=True), rows(12), seconds=0.01) == "sequential"


def test_not_a_bool():
    wrong: Any = 1
    with pytest.raises(OptionTypeError, match="deterministic must be True or False, got 1"):
        replicax.pmap(jnp.sin, deterministic=wrong)


@pytest.mark.parametrize("outer", [False, True])
def test_on_an_inner_map(outer):
    inner = replicax.pmap(jnp.sin, deterministic=True)
    with pytest.raises(NestedMapError, match=r"explicit deterministic argument\. sin is mapped inside another"):
        replicax.pmap(inner, deterministic=outer)(rows(4))


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, lambda f: jax.grad(lambda x: f(x).sum()), jax.make_jaxpr])
def test_inside_a_transformation(transform):
    mapped = replicax.pmap(jnp.sin, deterministic=True)
    with pytest.raises(
        UnsupportedTransformationError, match="sin is mapped with deterministic=True, and called inside"
    ):
        transform(mapped)(rows(4))


def test_without_jit():
    with (
        jax.disable_jit(),
        pytest.raises(UnsupportedTransformationError, match=r"sin is mapped with .* called under jax\.disable_jit"),
    ):
        replicax.pmap(jnp.sin, deterministic=True)(rows(4))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: jax.pure_callback(np.sin, x, x, vmap_method="sequential"), "pure_callback"),
        (lambda x: io_callback(np.sin, x, x), "io_callback"),
        (lambda x: lax.scan(lambda c, _: (jax.pure_callback(np.sin, c, c), None), x, None, 2)[0], "pure_callback"),
    ],
)
def test_callbacks_with_results(call, name):
    def program(x):
        return call(x)

    with pytest.raises(UnsupportedCallbackError, match=f"program is mapped with .* and calls {name}: replicax cannot"):
        replicax.pmap(program, "i", deterministic=True)(rows(4))


def test_callbacks_without_results_run():
    seen = []

    def program(x):
        jax.debug.callback(lambda k: seen.append(int(k)), lax.axis_index("i"))
        return lax.psum(x, "i")

    jax.block_until_ready(replicax.pmap(program, "i", devices=jax.devices()[:2], deterministic=True)(rows(5)))
    jax.effects_barrier()
    assert sorted(seen) == list(range(5))


def test_random_numbers_of_the_device():
    def program(x):
        return lax.rng_uniform(0.0, 1.0, x.shape)

    with pytest.raises(UnsupportedCollectiveError, match=r"program is mapped .* calls lax\.rng_uniform"):
        replicax.pmap(program, "i", deterministic=True)(rows(4))


def test_refs():
    def program(x):
        total = jax.new_ref(jnp.zeros(3))
        total[...] += lax.psum(x, "i")
        return total[...]

    with pytest.raises(
        UnsupportedCollectiveError, match=r"program is mapped with deterministic=True, and uses a jax\.Ref"
    ):
        replicax.pmap(program, "i", deterministic=True)(np.ones((4, 3)))


def test_an_inner_map_that_vmap_cannot_run():
    inner = replicax.pmap(lambda x: lax.all_gather(x, ("i", "j")), "j")

    def program(x):
        return inner(x)

    with pytest.raises(UnsupportedCollectiveError, match=r"program is mapped .* an inner map runs as jax\.vmap"):
        replicax.pmap(program, "i", deterministic=True)(rows(4))
