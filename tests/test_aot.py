"""Ahead-of-time compilation: maps traced, lowered and compiled for abstract arguments, then called."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import serialize_executable

import replicax
from layouts import SHORT
from replicax import pmap
from replicax.testing._check import compare
from test_inputs import everywhere


def table(n):
    return np.random.default_rng(n).normal(size=(n, 4)).astype(np.float32)


def step(state, w, *, shift):
    return {"state": state["a"] * w + lax.psum(shift, "i"), "total": lax.psum(state["a"], "i")}


def arguments(n):
    return ({"a": table(n)}, np.float32(2)), {"shift": table(n)[:, 0]}


OPTIONS: dict[str, Any] = {"axis_name": "i", "in_axes": (0, None), "out_axes": {"state": 0, "total": None}}


@pytest.mark.few(6)
@pytest.mark.parametrize("pair", SHORT, ids="{0[0]}on{0[1]}".format)
def test_compiled_for_types_and_called_like_the_map(pair):
    n, d = pair
    args, kwargs = arguments(n)
    mapped = pmap(step, devices=jax.devices()[:d], **OPTIONS)
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (args, kwargs))
    compiled = mapped.lower(*types[0], **types[1]).compile()
    x = args[0]["a"]
    expected = {"state": 2 * x + x[:, :1].sum(), "total": x.sum(0)}
    for moved in (x, jax.device_put(x, jax.devices()[n % 8]), halves(x)):
        out = compiled({"a": moved}, 2.0, **kwargs)
        compare(str, out, expected, 1e-4)
        assert out["state"].sharding == compiled.output_shardings["state"]
    assert compiled.out_info["state"].shape == (n, 4)
    assert {len(s.device_set) for s in jax.tree.leaves(compiled.input_shardings)} == {-(-n // -(-n // d))}


def halves(x):
    """Shards an even number of rows over the last two devices, in reverse order; replicates an odd number."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[::-1][:2]), ("q",))
    return jax.device_put(x, jax.NamedSharding(mesh, jax.P() if len(x) % 2 else jax.P("q")))


def test_the_stages_say_what_those_of_jax_say():
    args, kwargs = arguments(12)
    mapped = pmap(step, donate_argnames="state", **OPTIONS)
    traced = mapped.trace(*args, **kwargs)
    lowered, by_jax = traced.lower(), jax.jit(jax.vmap(lambda s: 2 * s["a"])).lower(args[0])
    compiled = lowered.compile()
    assert isinstance(mapped, jax.stages.Wrapped)
    assert isinstance(lowered, jax.stages.Lowered)
    assert isinstance(compiled, jax.stages.Compiled)
    for stage in (traced, lowered, compiled):
        assert stage.in_tree == jax.tree.structure((args, kwargs))
        assert jax.tree.map(lambda a: (a.shape, str(a.dtype)), stage.in_avals) == jax.tree.map(
            lambda a: (a.shape, str(a.dtype)), (args, kwargs)
        )
        assert [info.donated for info in jax.tree.leaves(stage.args_info)] == [True, False, False]
        assert stage.donate_argnums == (0,)
        assert jax.tree.map(lambda a: a.shape, stage.out_info) == {"state": (12, 4), "total": (4,)}
        assert stage.out_tree == jax.tree.structure({"state": 0, "total": 0})
    assert traced.fun_name == "step"
    assert "module @jit_step " in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "psum" in str(traced.jaxpr)
    assert type(lowered.cost_analysis()) is type(by_jax.cost_analysis())
    assert type(compiled.cost_analysis()) is type(by_jax.compile().cost_analysis())
    assert compiled.memory_analysis().output_size_in_bytes > 0
    assert compiled.runtime_executable() is not None
    assert "HloModule jit_step" in compiled.as_text()
    assert lowered.compiler_ir() is not None
    assert lowered.compiler_ir("hlo") is not None
    assert "HloModule jit_step" in lowered.as_text("hlo")
    assert jax.tree.structure(compiled.input_formats) == jax.tree.structure(compiled.input_shardings)
    options = {"xla_embed_ir_in_executable": True}
    compare(str, lowered.compile(compiler_options=options)(*args, **kwargs), mapped(*args, **kwargs), None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={"no_such_option": True})


def test_text_is_of_the_users_program():
    lowered = pmap(step, **OPTIONS).lower(*arguments(13)[0], **arguments(13)[1])
    text = lowered.as_text(debug_info=True)
    assert "module @jit_step " in lowered.as_text()
    assert __file__ in text
    assert replicax.__path__[0] not in text
    assert not any(name in text for name in ("Dispatcher", "MappedFunction", "trace_replica", "all_replicas"))


@pytest.mark.few("13")
@pytest.mark.parametrize("n", [8, 13])
def test_donated_arguments_are_taken(n):
    compiled = pmap(lambda s, x: s + x, donate_argnums=0).lower(table(n), table(n)).compile()
    for place, state in everywhere(table(n)).items():
        other = jnp.asarray(table(n))
        np.testing.assert_array_equal(compiled(state, other), 2 * table(n), err_msg=place)
        assert not other.is_deleted()
        if isinstance(state, jax.Array):
            assert state.is_deleted(), place
            with pytest.raises(replicax.DeletedArrayError, match="s was donated to an earlier call, or deleted"):
                compiled(state, other)


def test_donated_buffers_are_reused():
    compiled = pmap(lambda s: s + 1, donate_argnums=0).lower(jax.ShapeDtypeStruct((16, 1000), np.float32)).compile()
    state = pmap(lambda x: x + 0)(np.zeros((16, 1000), np.float32))
    before = {s.data.unsafe_buffer_pointer() for s in state.addressable_shards}
    assert {s.data.unsafe_buffer_pointer() for s in compiled(state).addressable_shards} == before
    assert "input_output_alias={ {}: (0, {}" in compiled.as_text()


def power(x, n, *, scale=1, shift=0.0):
    return scale * x**n + shift


def test_static_arguments_are_passed_or_left_out():
    mapped = pmap(power, static_broadcasted_argnums=1, static_broadcasted_argnames="scale", in_axes=(0, None))
    x = table(5)
    compiled = mapped.lower(x, 2, scale=3).compile()
    for call in (
        lambda: compiled(x, 2, scale=3), lambda: compiled(x), lambda: compiled(x, scale=3),
        lambda: compiled(x, n=2), lambda: compiled(x, 2), lambda: compiled(jnp.asarray(x), n=2, scale=3),
    ):  # fmt: skip
        np.testing.assert_allclose(call(), 3 * x**2, rtol=1e-6)
    for call, piece in (
        (lambda: compiled(x, 3), "n is 3, and was 2"),
        (lambda: compiled(x, 2.0), "n is 2.0, and was 2"),
        (lambda: compiled(x, n=3), "n is 3, and was 2"),
        (lambda: compiled(x, scale=4), "scale is 4, and was 3"),
    ):
        with pytest.raises(replicax.AheadOfTimeError, match=piece):
            call()
    by_name = mapped.lower(x, n=2).compile()
    np.testing.assert_allclose(by_name(x, n=2), x**2, rtol=1e-6)
    np.testing.assert_allclose(by_name(x), x**2, rtol=1e-6)
    with pytest.raises(replicax.AheadOfTimeError, match="scale is 3, and was not passed"):
        by_name(x, scale=3)


def test_arguments_that_it_was_not_compiled_for():
    x = table(8)
    compiled = pmap(lambda x, y: x["a"], in_axes=(0, None)).lower({"a": x}, 2).compile()
    faults = {
        "compiled with float32[8,4] and called with int32[8,4]": ({"a": x.astype(np.int32)}, 2),
        "Argument \"x['a']\" compiled with float32[8,4] and called with float32[9,4]": ({"a": table(9)}, 2),
        "Argument 'y' compiled with int32[] (weakly typed) and called with float32[] (weakly typed)": ({"a": x}, 2.5),
        "Argument 'y' compiled with int32[] (weakly typed): it is of type str: 'text'": ({"a": x}, "text"),
        "x is an array, and was a dict": (x, 2),
        "x is a dict with 2 entries, different in 'b', and was a dict with 1 entry": ({"a": x, "b": x}, 2),
        "the positional arguments are a tuple of length 1, and were a tuple of length 2": ({"a": x},),
        "x['a'] is a list, and was an array": ({"a": [x, x]}, 2),
        "x['a'] is None, and was an array": ({"a": None}, 2),
    }
    for piece, args in faults.items():
        with pytest.raises(replicax.AheadOfTimeError) as caught:
            compiled(*args)
        assert piece in str(caught.value)
        assert isinstance(caught.value, TypeError)
        known = ("Function compiled with input pytree does not match", "Argument types differ from the types")
        assert str(caught.value).startswith(known)  # the wording of JAX's own errors
    np.testing.assert_array_equal(compiled({"a": x.astype(np.float64)}, np.int64(2)), x)  # as a call of the map


def test_a_compiled_program_is_not_transformed():
    x = table(8)
    compiled = pmap(lambda x: 2 * x).lower(x).compile()
    for transformed in (jax.jit(compiled), jax.vmap(compiled), jax.grad(lambda x: compiled(x).sum())):
        with pytest.raises(replicax.AheadOfTimeError, match=r"x is a tracer[\s\S]*Call the map there"):
            transformed(x)
    in_jit = jax.jit(lambda y: y + compiled(x).sum())  # x is known before the program runs
    np.testing.assert_allclose(in_jit(np.float32(1)), 1 + 2 * x.sum(), rtol=1e-5)


def test_where_nothing_can_be_compiled_ahead():
    with pytest.raises(replicax.AheadOfTimeError, match="closes over a tracer of an enclosing jit"):
        jax.jit(lambda y: pmap(lambda x: x + y).lower(table(8)) and y)(1.0)
    with pytest.raises(replicax.AheadOfTimeError, match="is inside another map"):
        pmap(lambda x: pmap(lambda y: y).trace(x) and x)(table(8))


@pytest.mark.parametrize("n", [1, 8, 13])
def test_shapes_without_compiling(n):
    compiled = []
    args, kwargs = arguments(n)
    mapped = pmap(step, **OPTIONS)
    expected = jax.eval_shape(jax.vmap(lambda s, w, k: step(s, w, **k), (0, None, 0), axis_name="i"), *args, kwargs)
    expected["total"] = jax.ShapeDtypeStruct((4,), np.float32)  # out_axes=None
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    everything = [*everywhere(args[0]["a"]).values(), shape(args[0]["a"])]
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    for x in everything:
        assert mapped.eval_shape({"a": x}, args[1], **kwargs) == expected
    assert jax.eval_shape(mapped, *args, **kwargs) == expected
    assert jax.jit(lambda a: a + mapped.eval_shape({"a": a}, 1.0, **kwargs)["state"].shape[0]).eval_shape(
        args[0]["a"]
    ).shape == (n, 4)
    assert not compiled
    out = jax.make_jaxpr(mapped)(*args, **kwargs).out_avals
    assert [(a.shape, a.dtype) for a in out] == [(a.shape, a.dtype) for a in jax.tree.leaves(expected)]


def test_shapes_of_weak_types_and_keys():
    fun = lambda x, k: (2 * jnp.sin(1.0), x.sum(), jax.random.split(k), {"none": None})
    keys = jax.random.split(jax.random.key(0), 6)
    expected = jax.eval_shape(jax.vmap(fun), table(6), keys)
    ours = pmap(fun).eval_shape(table(6), keys)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


def test_serialized_where_the_rows_divide():
    x = pmap(lambda x: x)(table(8))
    compiled = pmap(lambda x: x - lax.pmean(x, "i"), "i").lower(x).compile()
    again = serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
    np.testing.assert_array_equal(again(x), compiled(x))
