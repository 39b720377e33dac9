"""Each signature of a function is traced and compiled once, and its programs are freed with the function."""

import functools
import gc
import logging
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from replicax import pmap
from replicax._engine.nested import Recorded


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
    assert fun.count == 3  # the object, its method, and the method with other options
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


def freed(make):
    """Whether all objects to which ``make`` returns weak references have been freed."""
    references = make()
    for _ in range(2):  # JAX drops some objects only after the first collection
        gc.collect()
    return [reference() for reference in references] == [None] * len(references)


def programs_of(mapped):
    """Weak references to a map's dispatcher, its programs, and their jitted functions."""
    held = [mapped._dispatcher]
    for program in mapped._dispatcher._programs.values():
        recorded = isinstance(program, Recorded)
        held += [program, program.staged, *([] if recorded else [program.spec, program.spec.function, program._jitted])]
    assert len(held) > 1
    return [weakref.ref(x) for x in held]


def a_closure():
    big = np.ones(1000)
    fun = lambda x: x + big.sum() + lax.psum(x, "i")
    mapped = pmap(fun, "i")
    mapped(np.arange(13.0))
    jax.jit(mapped)(np.arange(13.0))
    jax.grad(lambda x: mapped(x).sum())(np.arange(8.0))
    return [weakref.ref(fun), weakref.ref(mapped), *programs_of(mapped)]


def a_partial():
    fun = functools.partial(lambda w, x: w * x, 3.0)
    mapped = pmap(fun, "i", donate_argnums=0)
    mapped(jnp.arange(8.0))
    return [weakref.ref(fun), *programs_of(mapped)]


def a_bound_method():
    owner = Traced()
    mapped = pmap(owner.method, axis_name="i")
    mapped(np.arange(8.0))
    return [weakref.ref(owner), *programs_of(mapped)]


def what_is_compiled_ahead():
    fun = lambda x: x * 2
    mapped = pmap(fun)
    compiled = mapped.lower(np.arange(8.0)).compile()
    compiled(np.arange(8.0))
    return [weakref.ref(fun), weakref.ref(compiled), *programs_of(mapped)]


def a_map_inside_a_map():
    inner = pmap(lambda x: x + lax.psum(x, "j"), "j")
    fun = lambda x: inner(x)
    mapped = pmap(fun)
    mapped(np.ones((4, 3)))
    return [weakref.ref(fun), *programs_of(mapped), *programs_of(inner)]


def a_map_inside_itself():
    def fun(x):
        return x + 1 if x.ndim == 0 else mapped(x)

    mapped = pmap(fun)
    mapped(np.ones((4, 3)))
    return [weakref.ref(fun), *programs_of(mapped)]


class Model:
    def __init__(self):
        self.weights = jnp.ones(3)
        self.step = pmap(self.forward, "i", donate_argnames="x")

    def forward(self, x):
        return x * self.weights.sum() + lax.pmean(x, "i")


def a_method_mapped_by_its_owner():
    model = Model()
    model.step(np.arange(8.0))
    jax.jit(model.step)(np.arange(8.0))
    return [weakref.ref(model), *programs_of(model.step)]


@pytest.mark.few("a_bound_method", "what_is_compiled_ahead")
@pytest.mark.parametrize(
    "make",
    [
        a_closure,
        a_partial,
        a_bound_method,
        what_is_compiled_ahead,
        a_map_inside_a_map,
        a_map_inside_itself,
        a_method_mapped_by_its_owner,
    ],
    ids=lambda make: make.__name__,
)
def test_what_is_discarded_is_freed_without_clearing_anything(make):
    assert freed(make)


def test_clear_cache_frees_the_programs_and_traces_again():
    fun = Traced()
    mapped, x = pmap(fun, "i"), np.arange(8, dtype=np.float32)

    def call():
        mapped(x)
        jax.jit(mapped)(x)
        references = programs_of(mapped)[1:]
        mapped.clear_cache()
        return references

    assert freed(call)
    assert fun.count == 2
    np.testing.assert_array_equal(mapped(x), x + 28)
    assert fun.count == 3
    mapped(x)
    assert fun.count == 3
    pmap(Traced(), "i").clear_cache()  # an empty cache


def labelled(x, n=0, *, w=1.0):
    return jax.tree.map(lambda a: a * w + n, x)


def rows(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


#: A call that misses the cache, and its full explanation. The earlier call is ``({"a": rows(8, 2)}, 1, w=rows(8))``.
EXPLAINED = {
    "shape": (lambda call: call({"a": rows(8, 3)}, 1, w=rows(8)), "x['a'] is float32[8,3], and was float32[8,2]"),
    "dtype": (
        lambda call: call({"a": rows(8, 2, dtype=np.int32)}, 1, w=rows(8)),
        "x['a'] is int32[8,2], and was float32[8,2]",
    ),
    "weak type": (
        lambda call: call({"a": rows(8, 2)}, 1, w=jnp.full(8, 2.0)),
        "w is float32[8] (weakly typed), and was float32[8]",
    ),
    "rank": (lambda call: call({"a": rows(8)}, 1, w=rows(8)), "x['a'] is float32[8], and was float32[8,2]"),
    "replicas": (lambda call: call({"a": rows(5, 2)}, 1, w=rows(5)), "there are 5 replicas, and were 8"),
    "static value": (lambda call: call({"a": rows(8, 2)}, 3, w=rows(8)), "n is 3, and was 1"),
    "static type": (lambda call: call({"a": rows(8, 2)}, 1.0, w=rows(8)), "n is 1.0, and was 1"),
    "static left out": (lambda call: call({"a": rows(8, 2)}, w=rows(8)), "n is not passed, and was 1"),
    "structure": (
        lambda call: call({"b": rows(8, 2)}, 1, w=rows(8)),
        "x is a dict with keys 'b', and was a dict with keys 'a'",
    ),
    "nesting": (lambda call: call({"a": [rows(8, 2)]}, 1, w=rows(8)), "x['a'] is a list, and was an array"),
    "arguments": (
        lambda call: call({"a": rows(8, 2)}, 1),
        "the keyword arguments are a dict with 0 entries, different in 'w', and were a dict with 1 entry",
    ),
    "64 bits": (
        lambda call: jax.enable_x64(True)(call)({"a": rows(8, 2)}, 1, w=rows(8)),
        "JAX's setting jax_enable_x64 is True, and was False",
    ),
    "precision": (
        lambda call: jax.default_matmul_precision("highest")(call)({"a": rows(8, 2)}, 1, w=rows(8)),
        "JAX's setting jax_default_matmul_precision is 'highest', and was None",
    ),
    "under jit": (
        lambda call: under_jit(call, {"a": rows(8, 2)}, 1, w=rows(8)),
        "it is called inside a transformation such as jit, grad or vmap, and was called eagerly",
    ),
}  # fmt: skip


def under_jit(call, x, n, w):
    out = []
    jax.jit(lambda x, w: out.append(call(x, n, w=w)))(x, w)
    return out[0]


@pytest.mark.few(5)
@pytest.mark.parametrize("case", EXPLAINED)
def test_a_recompile_explains_itself(case, caplog):
    call, why = EXPLAINED[case]
    mapped = pmap(lambda x, n=0, *, w=None: labelled(x, n), static_broadcasted_argnames="n")
    assert mapped.explain_cache_miss({"a": rows(8, 2)}, 1, w=rows(8)) == "<lambda> has not been compiled before."
    mapped({"a": rows(8, 2)}, 1, w=rows(8))
    assert mapped.explain_cache_miss({"a": rows(8, 2) + 1}, 1, w=jnp.ones(8, np.float32)) == (
        "<lambda> is already compiled for such a call."
    )
    explanation = call(mapped.explain_cache_miss)
    headline, *differences = explanation.split("\n")
    assert headline == "<lambda> needs a new compilation. Differences to the call that it was compiled for:"
    assert differences[0] == f"  * {why}"
    assert len(differences) == 1, differences
    with caplog.at_level(logging.WARNING, "replicax"):
        call(mapped)
        assert not ours(caplog)
    mapped.clear_cache()
    mapped({"a": rows(8, 2)}, 1, w=rows(8))
    with jax.explain_cache_misses(True), caplog.at_level(logging.WARNING, "replicax"):
        call(mapped)
        call(mapped)
    assert ours(caplog) == [explanation]


def ours(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "replicax"]


def test_the_closest_call_explains():
    mapped = pmap(lambda x, y: x, in_axes=(0, None))
    for x, y in ((rows(8, 2), 1.0), (rows(8, 3), rows(7)), (rows(4, 4), 1)):
        mapped(x, y)
    explanation = mapped.explain_cache_miss(rows(8, 4), rows(7))
    assert "the closest of the 3 calls" in explanation
    assert explanation.endswith(":\n  * x is float32[8,4], and was float32[8,3]")
    explanation = mapped.explain_cache_miss(rows(8, 2), 2)
    assert explanation.endswith(":\n  * y is int32[] (weakly typed), and was float32[] (weakly typed)")
