"""``lanes="auto"``, the default: the rule on CPUs, and fewer lanes at once where memory does not suffice."""

import itertools
import logging
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import replicax
from replicax import _jax
from replicax._runtime import memory
from replicax._runtime.executable import Executable
from replicax._runtime.packing import packed
from replicax.testing import processes

rng = np.random.default_rng(0)


def smooth(x):
    return jnp.tanh(x * 1.1 + 0.1) * 0.9 + 0.05 * x * x


def loop(x, n):
    return lax.while_loop(lambda s: s[1] < n, lambda s: (smooth(s[0]), s[1] + 1), (x, 0))[0]


def loop_in_a_loop(x, n):
    def body(s):
        inner = lax.while_loop(lambda t: t[1] < (n + s[1]) % 5, lambda t: (smooth(t[0]), t[1] + 1), (s[0], 0))
        return inner[0], s[1] + 1

    return lax.while_loop(lambda s: s[1] < n, body, (x, 0))[0]


def branch(x, n):
    return lax.cond(n % 4 == 0, lambda x: lax.fori_loop(0, 50, lambda _, x: smooth(x), x), lambda x: x + 1, x)


def branches_in_a_loop(x, n):
    return lax.scan(lambda x, k: (lax.cond((n + k) % 3 == 0, smooth, lambda x: x / 2, x), None), x, jnp.arange(9))[0]


def inside_jit_and_a_custom_rule(x, n):
    rule = jax.custom_jvp(lambda x: loop(x, n))
    rule.defjvp(lambda p, t: (rule(*p), t[0]))
    return jax.jit(rule)(x)


def small_matrix_for_all(x, n):
    w = jnp.ones((x.size, x.size)) / x.size
    return lax.while_loop(lambda s: s[1] < n, lambda s: (jnp.tanh(w @ s[0]), s[1] + 1), (x, 0))[0]


def large_matrix_of_its_own(x, n):
    y = jnp.outer(x, x) / x.size
    return lax.while_loop(lambda s: s[1] < n, lambda s: (s[0] @ s[0] / x.size, s[1] + 1), (y, 0))[0]


def straight(x, n):
    return smooth(x) * n


def mostly_dense(x, n):
    """A training step that skips a bad update: the branch is a small part of it."""
    gradient = jnp.tanh(jnp.outer(x, x)) @ jnp.outer(x, x) @ x
    return lax.cond(n > 3, lambda: x - gradient, lambda: x)


def same_for_all(x, n):
    return lax.while_loop(lambda s: s[1] < lax.pmax(n, "i"), lambda s: (smooth(s[0]), s[1] + 1), (x, 0))[0]


def communicating_loop(x, n):
    return lax.while_loop(lambda s: s[1] < n, lambda s: (lax.pmean(smooth(s[0]), "i"), s[1] + 1), (x, 0))[0]


def known_for_all(x, n):
    most = lax.pmax(n, "i")
    return lax.while_loop(lambda s: s[1] < most, lambda s: (smooth(s[0]), s[1] + 1), (x, 0))[0]


def inner_map(x, n):
    return replicax.pmap(lambda x: loop(x, n))(x)


ALL = None

#: How many of 96 lanes run at once where all values are scalars, and where they are short: it depends on XLA's version.
SCALARS, SHORT = (32, 32) if _jax.SMALL_LANES_GAIN else (ALL, 1)

#: The program, the size of its argument, and how many of 96 lanes run at once.
RULE: dict[Callable[..., Any], dict[int, int | None]] = {
    loop: {1: SCALARS, 16: SHORT, 256: 1, 4096: 1},
    loop_in_a_loop: {1: SCALARS, 256: 1},
    branch: {1: SCALARS, 4096: 1},
    branches_in_a_loop: {1: ALL, 4096: 1},
    inside_jit_and_a_custom_rule: {1: SCALARS, 4096: 1},
    small_matrix_for_all: {16: SHORT, 256: SCALARS},
    large_matrix_of_its_own: {4: SHORT, 64: 1},
    straight: {1: ALL, 4096: ALL},
    mostly_dense: {4: ALL, 128: ALL},
    same_for_all: {256: ALL},
    communicating_loop: {256: ALL},
    known_for_all: {256: ALL},
    inner_map: {256: ALL},
}


def arguments(n, size):
    return rng.normal(size=(n, size)).astype(np.float32), rng.integers(1, 30, n).astype(np.int32)


@pytest.mark.parametrize(
    ("program", "size", "at_once"),
    [(program, size, lanes) for program, sizes in RULE.items() for size, lanes in sizes.items()],
    ids=[f"{program.__name__}-{size}" for program, sizes in RULE.items() for size in sizes],
)
def test_the_rule(program, size, at_once):
    types = jax.ShapeDtypeStruct((192, size), np.float32), jax.ShapeDtypeStruct((192,), np.int32)
    plan = replicax.pmap(program, "i", devices=jax.devices()[:2]).trace(*types).lanes
    assert (plan.lanes, plan.at_once) == (96, at_once or 96)


@pytest.mark.skipif(not _jax.SMALL_LANES_GAIN, reason="all lanes run at once")
@pytest.mark.parametrize(("lanes", "at_once"), [(1, 1), (64, 64), (65, 32), (72, 24), (80, 16), (96, 32), (500, 32)])
def test_how_many_are_a_few(lanes, at_once):
    types = jax.ShapeDtypeStruct((lanes, 1), np.float32), jax.ShapeDtypeStruct((lanes,), np.int32)
    assert replicax.pmap(loop, devices=jax.devices()[:1]).trace(*types).lanes.at_once == at_once


@pytest.mark.few(3)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("size", [1, 256])
@pytest.mark.parametrize("program", [loop, loop_in_a_loop, branch, communicating_loop], ids=lambda f: f.__name__)
def test_values_are_those_of_vmap(program, size, wrap):
    args = arguments(83, size)
    ours = wrap(replicax.pmap(program, "i", devices=jax.devices()[:2]))(*args)
    np.testing.assert_allclose(ours, jax.vmap(program, axis_name="i")(*args), rtol=1e-4, atol=1e-5)


def test_derivatives_from_outside():
    x, n = arguments(83, 256)
    by = lambda mapped: jax.jit(jax.grad(lambda x: (mapped(x, n) ** 2).sum()))
    ours = by(replicax.pmap(branch, devices=jax.devices()[:2]))
    np.testing.assert_allclose(ours(x), by(jax.vmap(branch))(x), rtol=1e-4, atol=1e-5)
    assert " conditional(" in ours.lower(x).compile().as_text()  # one branch is taken, and not both


def test_straight_line_programs_are_the_same_as_before():
    x, n = arguments(24, 5)
    texts = [replicax.pmap(straight, lanes=lanes).lower(x, n).as_text() for lanes in ("auto", "vectorized")]
    assert texts[0] == texts[1]


def test_programs_with_packed_arguments_run_the_same_number_of_lanes():
    many = [np.ones(16, np.float32) for _ in range(64)]
    mapped = replicax.pmap(lambda *xs: sum(xs), lanes="sequential")
    mapped(*many)
    program, leaves = mapped._dispatcher.resolve(mapped.__wrapped__, tuple(many), {})
    assert isinstance(program, Executable)
    pack = None
    for _ in range(10):
        pack = pack or packed(program, leaves)
    assert pack is not None
    assert pack.executable.spec.lanes.at_once == program.spec.lanes.at_once == 1


# ---------------------------------------------------------------------------------------------------------------
# Memory

MIB = 2**20
SIZES = (16, 512, 10)
LIMIT = 512 * MIB


def loss(params, x):
    return jnp.mean((jax.nn.relu(x @ params[0]) @ params[1]) ** 2)


def train(params, x):
    value, gradient = jax.value_and_grad(loss)(params, x)
    return jax.tree.map(lambda p, g: p - 0.1 * lax.pmean(g, "i"), params, gradient), lax.pmean(value, "i")


def train_by_hand(params, x):
    """One replica after the other, on one device."""
    each = [jax.jit(jax.value_and_grad(loss))(params, own) for own in x]
    value, gradient = jax.tree.map(lambda *rows: sum(rows) / len(x), *each)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value


def memory_of_process(field):
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Notices(logging.Handler):
    def __init__(self):
        super().__init__()
        self.seen = []

    def emit(self, record):
        self.seen.append((record.levelname, record.getMessage()))


def with_little_memory(wrong_estimate):
    """Trains for a step with 512 MiB for both devices, where 64 replicas at once on each need more."""
    notices = Notices()
    logger = logging.getLogger("replicax")
    logger.addHandler(notices)
    logger.setLevel(logging.INFO)
    params = [np.full(shape, 0.05, np.float32) for shape in itertools.pairwise(SIZES)]
    x = np.random.default_rng(0).normal(size=(128, 2048, SIZES[0])).astype(np.float32)
    step = lambda **options: replicax.pmap(train, "i", in_axes=(None, 0), out_axes=None, **options)
    right = jax.tree.map(np.asarray, train_by_hand(params, x))
    jax.block_until_ready(step(lanes="sequential")(params, x))  # what XLA's threads and compiler keep
    everything = step(lanes="vectorized").lower(params, x).compile().memory_analysis().temp_size_in_bytes
    before, estimate = memory_of_process("VmRSS"), (lambda program: 0) if wrong_estimate else memory._needed
    resource.setrlimit(resource.RLIMIT_DATA, (memory_of_process("VmData") + LIMIT, resource.RLIM_INFINITY))
    with mock.patch.object(memory, "_needed", estimate):
        mapped = step()
        results = jax.tree.map(np.asarray, mapped(params, x))
        plan = mapped.trace(params, x).lanes
        temporaries = mapped.lower(params, x).compile().memory_analysis().temp_size_in_bytes
        peak = memory_of_process("VmHWM") - before
    return results, right, plan, (everything, temporaries, peak), notices.seen


@pytest.mark.long
@pytest.mark.parametrize("wrong_estimate", [False, True], ids=["by the estimate", "after it ran out"])
def test_a_step_that_needs_more_memory_than_there_is(wrong_estimate, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # with optimization
    with processes(1, devices=2) as fresh:
        results, right, plan, (everything, temporaries, peak), notices = fresh.run(
            with_little_memory, wrong_estimate, timeout=300
        )[0]
    assert everything > 1.25 * LIMIT  # on each device
    assert plan.at_once < plan.lanes == 64
    assert 2 * temporaries < LIMIT
    assert peak < LIMIT
    for ours, theirs in zip(jax.tree.leaves(results), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    levels, texts = zip(*notices, strict=True)
    assert set(levels) == {"WARNING" if wrong_estimate else "INFO"}
    start = "train: 64 replicas at once on a device ran out" if wrong_estimate else "train: 64 replicas at once need"
    assert texts[0].startswith(start)
    assert ("RESOURCE_EXHAUSTED: Out of memory allocating" in texts[0]) is wrong_estimate


@pytest.mark.parametrize("estimate", [lambda program: 2**40, lambda program: 0], ids=["estimate", "first run"])
def test_a_program_in_one_piece_runs_as_it_is(monkeypatch, estimate):
    """Refs and the results of inner maps that stay on their devices need all lanes at once."""
    monkeypatch.setattr(memory, "free", lambda devices: 100)
    monkeypatch.setattr(memory, "_needed", estimate)

    def program(x):
        ref = jax.new_ref(jnp.zeros(3))
        ref[...] = x
        return ref[...]

    x = rng.normal(size=(16, 3)).astype(np.float32)
    mapped = replicax.pmap(program)
    np.testing.assert_array_equal(mapped(x), x)
    assert mapped.trace(x).lanes.at_once == 2
    inner = replicax.pmap(replicax.pmap(jnp.sin), devices=jax.devices()[:4])
    y = rng.normal(size=(2, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(inner(y), np.sin(y), rtol=1e-5)


def test_only_what_processes_on_one_host_share_is_divided():
    assert memory.least([("a", 100), ("a", 80), ("b", 50)]) == 40
    assert memory.least([("a", 100), ("b", None)]) is None


def test_the_limits_of_control_groups(tmp_path):
    def write(path, **values):
        for name, value in values.items():
            (tmp_path / path).mkdir(parents=True, exist_ok=True)
            (tmp_path / path / name.replace("_", ".", 1)).write_text(f"{value}\n")

    write("", memory_max="max", memory_current=10)
    write("job", memory_max=1000, memory_current=400, memory_stat="anon 300\ninactive_file 100")
    write("job/task", memory_max=900, memory_current=350)
    found = list(memory._left_of_control_groups("0::/job/task\n", tmp_path))
    assert sorted(found) == [550, 700]
    write("memory", memory_limit_in_bytes=500, memory_usage_in_bytes=450, memory_stat="total_inactive_file 20")
    found = list(memory._left_of_control_groups("7:memory:/docker/of the host\n3:cpu,cpuacct:/\n", tmp_path))
    assert found == [70]


def test_fewer_lanes_after_it_ran_out():
    assert [memory.fewer(64, at_once) for at_once in (64, 16, 3, 2)] == [16, 4, 1, 1]
    assert memory.fewer(37, 37) == 9
