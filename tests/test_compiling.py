"""A program is compiled once, for arguments on any devices; other processes reuse it from JAX's cache."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import replicax
from replicax import pmap


@pytest.fixture
def compiled():
    """A list to which the name of each compiled function is added."""
    names = []

    def listen(event, _, *, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name.removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.few("12", "8")
@pytest.mark.parametrize("n", [8, 12, 14])
def test_wherever_the_arguments_lie(n, compiled):
    calls: list[None] = []

    def step(w, x):
        calls.append(None)
        return w + lax.pmean(x, "batch"), x - w

    mapped = pmap(step, axis_name="batch")
    w, x = np.zeros((n, 3), np.float32), np.ones((n, 3), np.float32)
    expected = jax.vmap(step, axis_name="batch")(w, x)
    calls.clear()
    whole = NamedSharding(Mesh(np.array(jax.devices()[:4]), "mine"), PartitionSpec())
    results = mapped(w, x)
    everywhere = [x, results[1] * 0 + 1, replicax.replicate(np.ones(3, np.float32), n), jax.device_put(x, whole)]
    everywhere += [jax.device_put(x, device) for device in jax.devices()[:2]]
    for argument in everywhere:
        for got, want in zip(mapped(w, argument), expected, strict=True):
            np.testing.assert_allclose(got, want)
        mapped(replicax.replicate(w[0], n), argument)
    assert compiled.count("step") == 1
    assert len(calls) == 1


def test_a_training_loop_compiles_its_step_once(compiled):
    def step(state, x):
        return jax.tree.map(lambda s: s + lax.pmean(x, "batch").sum(), state)

    mapped = pmap(step, axis_name="batch")
    state = replicax.replicate({"w": np.zeros(3, np.float32), "b": np.float32(0)}, 14)
    for _ in range(3):
        state = mapped(state, np.ones((14, 2), np.float32))
    np.testing.assert_array_equal(replicax.unreplicate(state)["b"], 6)
    assert compiled.count("step") == 1


def test_an_argument_with_a_layout_of_its_own_in_memory():
    mesh = Mesh(np.array(jax.devices()), "mine")
    x = np.arange(8 * 3 * 5, dtype=np.float32).reshape(8, 3, 5)
    transposed = jax.device_put(x, Format(Layout((0, 2, 1)), NamedSharding(mesh, PartitionSpec("mine"))))
    mapped = pmap(lambda x: x @ x.T)
    for argument in (x, transposed, x):
        np.testing.assert_allclose(mapped(argument), x @ x.transpose(0, 2, 1))


PROGRAMS = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import replicax

replicax.simulate_devices(4)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

events = []
jax.monitoring.register_event_listener(
    lambda name, **_: events.append(name) if name.startswith("/jax/compilation_cache/cache_") else None
)


class Axis:
    pass


AXIS, TABLE = Axis(), jnp.arange(3.0)
GROUPS = [[0, 3, 4], [1, 2, 5, 6, 7, 8, 9]]


@jax.custom_vjp
def rule(x):
    return jnp.sin(x)


rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (ct * lax.psum(jnp.cos(x), AXIS),))


def talk(x):
    y = lax.psum(x, AXIS) + lax.all_gather(x, AXIS).sum(0) + lax.ppermute(x, AXIS, [(0, 3), (3, 5), (5, 9)])
    y = lax.while_loop(lambda y: y.sum() < 100, lambda y: y + lax.psum(y, AXIS, axis_index_groups=GROUPS), y)
    return y @ TABLE + jax.grad(lambda x: rule(x).sum())(x).sum()


def outer(row):
    return replicax.pmap(lambda x: lax.psum(x, ("i", "j")), axis_name="j")(row)


x = np.ones((10, 3), np.float32)
results = replicax.pmap(talk, axis_name=AXIS)(x)
replicax.pmap(outer, axis_name="i")(np.ones((2, 2, 3), np.float32))
jax.grad(lambda w: replicax.pmap(lambda w, x: (w * x).sum(), in_axes=(None, 0))(w, x).sum())(1.0)
replicax.unreplicate(replicax.replicate(x[0], 10))
print(*(name.rpartition("_")[2] for name in events))
"""


@pytest.mark.long
def test_another_process_finds_what_was_compiled(tmp_path):
    """Nothing in a program, such as a name or the order of a set, differs between processes."""
    runs = []
    for seed in "12":
        command = [sys.executable, "-c", PROGRAMS, str(tmp_path)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert not done.returncode, done.stderr
        runs.append(done.stdout.split())
    first, second = runs
    assert "misses" in first
    assert second == ["hits"] * len(first)
