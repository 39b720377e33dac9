"""A signature is traced and compiled once, whoever maps the function; a function that is dropped takes it along."""

import gc
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replicax import pmap


class Traced:
    """A function that counts how often it is traced."""

    def __init__(self):
        self.count = 0

    def __call__(self, x, w=1.0):
        self.count += 1
        return x * w + lax.psum(x, "i")

    def method(self, x):
        return self(x)


def test_a_signature_is_traced_once():
    fun = Traced()
    mapped = pmap(fun, "i")
    x = np.arange(8, dtype=np.float32)
    for argument in (x, x + 1, jnp.asarray(x), jax.device_put(x, jax.devices()[3]), mapped(x), x[::-1]):
        mapped(argument)
    assert fun.count == 1
    for changed in (x.astype(np.int32), x[:4], np.ones((8, 2), np.float32)):
        mapped(changed)
    assert fun.count == 4
    mapped(x.astype(np.float64))  # becomes float32
    assert fun.count == 4


def test_a_padded_map_that_feeds_itself_is_compiled_once():
    compiled = []

    def listen(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    step = pmap(lambda x: x + lax.psum(x, "i"), "i")
    state = step(step(np.arange(13.0)))
    jax.monitoring.register_event_duration_secs_listener(listen)
    for _ in range(3):
        state = step(state)
    state.block_until_ready()
    assert not compiled


def test_mapping_the_same_function_again_reuses_what_was_compiled():
    fun = Traced()
    x = np.arange(8, dtype=np.float32)
    for _ in range(3):
        pmap(fun, "i")(x)
        pmap(fun.method, axis_name="i")(x)
        pmap(fun.method, axis_name="i", in_axes=(0,))(x)
    assert fun.count == 3  # the object, its method, and the method with options of its own
    pmap(fun, "i", devices=jax.devices()[:2])(x)
    assert fun.count == 4


def test_methods_of_different_objects_do_not_share():
    first, second = Traced(), Traced()
    pmap(first.method, "i")(np.arange(8.0))
    pmap(second.method, "i")(np.arange(8.0))
    assert (first.count, second.count) == (1, 1)


def test_a_dropped_function_is_freed_with_its_programs():
    big = np.ones(1000)

    def fun(x):
        return x + big.sum() + lax.psum(x, "i")

    mapped = pmap(fun, "i")
    mapped(np.arange(13.0))
    gone = weakref.ref(fun)
    programs = weakref.ref(mapped._dispatcher)
    del fun, mapped
    jax.clear_caches()
    gc.collect()
    assert gone() is None
    assert programs() is None


def test_tracing_modes_do_not_share():
    fun = pmap(lambda x: x * 1.5)
    x = np.arange(3)
    assert fun(x).dtype == jnp.float32
    with jax.enable_x64(True):
        assert fun(x).dtype == jnp.float64
    assert fun(x).dtype == jnp.float32


def test_decoration_touches_no_device():
    script = """
import replicax, functools
from jax._src import xla_bridge

@functools.partial(replicax.pmap, axis_name="i", donate_argnums=0, backend="cpu", axis_size=4, in_axes=(0, None))
def fun(x, y): return x

assert not xla_bridge.backends_are_initialized()
replicax.simulate_devices(3)
replicax.simulate_devices(5)
assert not xla_bridge.backends_are_initialized()
import jax
assert jax.device_count() == 5
replicax.simulate_devices(5)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=120)
