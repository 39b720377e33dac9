"""Every user error: its class, the builtin exception that ``jax.pmap`` raises for it, and its message."""

import contextlib
import functools
import pathlib
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import replicax
from collectives import one_sided
from replicax import pmap

x8, x4 = np.arange(8.0), np.arange(4.0)


def add(left, right):
    return left


def call(fun, *args, **options):
    """A function that maps ``fun`` with these options and calls the map."""
    return lambda **kwargs: pmap(fun, **options)(*args, **kwargs)


def donated_before(fun):
    state = pmap(lambda x: x)(x8)
    return fun(state), fun(state)


def passed_twice(fun):
    x = pmap(lambda x: x)(x8)
    return fun({"a": x}, x)


def on_devices():
    return pmap(lambda x: x)(x8)


def deleted():
    x = on_devices()
    x.delete()
    return x


class Converts:
    def __jax_array__(self):
        return jnp.asarray(x8)


class Incomparable:
    def __hash__(self):
        return 1

    def __eq__(self, other):
        raise RuntimeError("never")


def warm(fun, good, bad):
    """Runs two correct calls, if possible, and then one with the error."""
    for _ in range(2):
        with contextlib.suppress(replicax.StaticArgumentError):
            fun(*good())
    return fun(*bad)


#: Name: (function that raises, class, builtin, parts of the message).
FAULTS = {
    "sizes": (
        call(add, x8, {"w": x4, "b": x8}),
        replicax.MappedSizeError, ValueError,
        ["left of shape (8,): axis 0 has size 8", "right['w'] of shape (4,): axis 0 has size 4", "None in in_axes"],
    ),
    "sizes of keyword arguments": (
        lambda: pmap(add)(x8, right=x4),
        replicax.MappedSizeError, ValueError, ["left of shape (8,)", "right of shape (4,): axis 0 has size 4"],
    ),
    "sizes on other axes": (
        call(add, np.ones((8, 3)), np.ones((3, 4)), in_axes=(0, 1)),
        replicax.MappedSizeError, ValueError, ["left of shape (8, 3): axis 0 has size 8", "axis 1 has size 4"],
    ),
    "axis_size disagrees": (
        call(add, x8, x8, axis_size=5),
        replicax.MappedSizeError, ValueError, ["axis_size is 5", "left of shape (8,)", "Correct axis_size"],
    ),
    "the name of the axis in the place of the function": (
        lambda: pmap("i"),  # type: ignore[call-overload]
        replicax.NotAFunctionError, TypeError, ["got 'i'", "pmap(axis_name='i')"],
    ),
    "names as positions": (
        lambda: pmap(add, donate_argnums="left"),  # type: ignore[arg-type]
        replicax.OptionTypeError, TypeError, ["donate_argnums must be an int", "got 'left'", "donate_argnames"],
    ),
    "an unhashable thing in a static tuple": (
        call(add, x8, (1, [2]), static_broadcasted_argnums=1),
        replicax.StaticArgumentError, ValueError, ["right is of type tuple (unhashable type: 'list')"],
    ),
    "an int for no int type": (
        call(add, x8, 2**70, in_axes=(0, None)),
        replicax.NumberTooLargeError, OverflowError, [f"right is {2**70}", "64-bit int. Pass a float"],
    ),
    "an int for no int type, to a helper": (
        lambda: replicax.replicate({"n": 2**70}, 8),
        replicax.NotAnArrayError, TypeError, ["tree['n'] is the int 118", "too large for JAX's ints"],
    ),
    "an int for no int type, as a result": (
        lambda: pmap(lambda x: [x, 2**70])(x8),
        replicax.NotAnArrayError, TypeError, ["result[1] is the int 118", "too large for JAX's ints"],
    ),
    "objects to show": (
        lambda: replicax.show_replicas(np.array([None] * 8)),
        replicax.NotAnArrayError, TypeError, ["array has dtype object", "dtype=float"],
    ),
    "a deleted array to show": (
        lambda: replicax.show_replicas(deleted()),
        replicax.DeletedArrayError, RuntimeError, ["array", "donated or deleted"],
    ),
    "a deleted array to shard": (
        lambda: replicax.shard({"a": deleted()}, 4),
        replicax.DeletedArrayError, RuntimeError, ["tree['a'] was donated or deleted"],
    ),
    "a deleted array for a compiled program": (
        lambda: pmap(lambda x: x).lower(x8).compile()(deleted()),
        replicax.DeletedArrayError, RuntimeError, ["x was donated to an earlier call, or deleted"],
    ),
    "nothing mapped": (
        call(add, x8, x8, in_axes=None),
        replicax.MappedSizeError, ValueError, ["no argument is mapped", "left of shape (8,)", "axis_size=8"],
    ),
    "no arguments": (call(lambda: 1), replicax.MappedSizeError, ValueError, ["called without arrays", "axis_size"]),
    "two bits, padded": (
        call(lambda x: x, jnp.zeros(13, "int2")),
        replicax.UnsupportedDtypeError, TypeError, ["13 replicas", "int2", "on 7 devices, 2 per device", "int8"],
    ),
    "an empty axis": (
        call(add, np.ones((0, 2)), np.ones((0,))),
        replicax.MappedSizeError, ValueError, ["at least one replica", "left of shape (0, 2)"],
    ),
    "axis_size zero": (
        call(lambda: 1, axis_size=0), replicax.MappedSizeError, ValueError, ["axis_size is 0"],
    ),
    "axis_size zero, and arrays": (
        call(add, x8, x8, axis_size=0),
        replicax.MappedSizeError, ValueError, ["at least one replica", "axis_size is 0", "leave axis_size out"],
    ),
    "replicate into none": (
        lambda: replicax.replicate(x8, 0),
        replicax.MappedSizeError, ValueError, ["replicate: axis_size", "at least 1, got 0"],
    ),
    "a mapped scalar": (
        call(add, x8, 3.0),
        replicax.AxisSpecError, ValueError, ["right of shape (): a scalar has no axis to map", "None in in_axes"],
    ),
    "several mapped scalars": (
        call(add, 1, {"a": 2.0, "b": x8}), replicax.AxisSpecError, ValueError, ["left of shape ()", "right['a']"],
    ),
    "an axis out of range": (
        call(add, np.ones((8, 2)), x8, in_axes=2),
        replicax.AxisSpecError, ValueError, ["left of shape (8, 2): axis 2", "right of shape (8,): axis 2"],
    ),
    "a negative axis out of range": (
        call(add, x8, x8, in_axes=(0, -2)), replicax.AxisSpecError, ValueError, ["right of shape (8,): axis -2"],
    ),
    "in_axes of another length": (
        call(add, x8, x8, in_axes=(0,)), replicax.AxisSpecError, ValueError, ["in_axes=(0,) has length 1", "2 pos"],
    ),
    "in_axes of another structure": (
        call(add, x8, {"w": x8}, in_axes=(0, {"v": 0})),
        replicax.AxisSpecError, ValueError,
        ["in_axes does not match the tuple of arguments", "in_axes[1] is a dict with the keys 'v', but should match a"],
    ),
    "in_axes no int": (
        call(add, x8, x8, in_axes=(0, {"w": 1.5, "v": "a"})),
        replicax.AxisSpecTypeError, TypeError, ["in_axes[1]['w'] is 1.5, of type float", "in_axes[1]['v'] is 'a'"],
    ),
    "in_axes a truth value": (
        call(add, x8, x8, in_axes=True), replicax.AxisSpecTypeError, TypeError, ["in_axes is True, of type bool"],
    ),
    "out_axes no int": (
        call(add, x8, x8, out_axes="a"), replicax.AxisSpecTypeError, TypeError, ["out_axes is 'a', of type str"],
    ),
    "out_axes of another structure": (
        call(lambda x: (x, x), x8, out_axes=(0, 0, 0)),
        replicax.AxisSpecError, ValueError,
        ["out_axes does not match the result", "is a tuple of length 3, but should match a tuple of length 2"],
    ),
    "out_axes out of range": (
        call(lambda x: {"a": x, "b": [x]}, x8, out_axes=2),
        replicax.AxisSpecError, ValueError, ["result['a'] of shape (): axis 2", "result['b'][0] of shape (): axis 2"],
    ),
    "out_axes=None for what differs": (
        call(lambda x: (x, lax.psum(x, "i"), {"i": lax.axis_index("i")}), x8, out_axes=None, axis_name="i"),
        replicax.DivergentOutputError, ValueError, ["result[0] of shape ()", "result[2]['i']", "jax.lax.pmean"],
    ),
    "a string": (
        call(add, x8, {"name": "abc", "w": x8}),
        replicax.NotAnArrayError, TypeError, ["right['name'] is of type str: 'abc'", "static_broadcasted_argnums"],
    ),
    "a function and an object": (
        call(add, print, {"w": object()}),
        replicax.NotAnArrayError, TypeError, ["left is of type builtin_function", "right['w'] is of type object"],
    ),
    "an array of strings": (
        call(add, x8, np.array(["a"] * 8)), replicax.NotAnArrayError, TypeError, ["right is a NumPy array of dtype"],
    ),
    "a masked array": (
        call(add, {"a": np.ma.masked_array(x8, x8 > 5), "b": "text"}, x8),
        replicax.UnconvertedArrayError, ValueError,
        ["left['a'] is a NumPy masked array", "left['b'] is of type str: 'text'", "x.filled(0)"],
    ),
    "an object with __jax_array__": (
        call(add, x8, {"w": Converts()}),
        replicax.UnconvertedArrayError, TypeError,
        ["right['w'] is of type Converts, which has __jax_array__", "by jax.numpy.asarray(x)"],
    ),
    "a result that is a masked array": (
        call(lambda x: {"bad": np.ma.masked_array(x8)}, x8),
        replicax.UnconvertedArrayError, ValueError, ["result['bad'] is a NumPy masked array", "x.filled(0)"],
    ),
    "shard a masked array": (
        lambda: replicax.shard([x8, np.ma.masked_array(x8)]),
        replicax.UnconvertedArrayError, ValueError, ["shard needs", "tree[1] is a NumPy masked", "x.filled(0)"],
    ),
    "fetch an object with __jax_array__": (
        lambda: replicax.fetch({"w": Converts()}),
        replicax.UnconvertedArrayError, TypeError, ["tree['w'] is of type Converts", "jax.numpy.asarray(x)"],
    ),
    "a compiled program called with a masked array": (
        lambda: pmap(add).lower(x8, x8).compile()(x8, np.ma.masked_array(x8)),
        replicax.AheadOfTimeError, TypeError, ["Argument 'right' compiled with float32[8]: it is a NumPy masked array"],
    ),
    "a compiled program called with many other types": (
        lambda: pmap(lambda xs: xs).lower([x8] * 30).compile()([x4] * 30),
        replicax.AheadOfTimeError, TypeError, ["Argument 'xs[0]' compiled with float32[8]", "and 21 more"],
    ),
    "a result that is no array": (
        call(lambda x: {"good": x, "bad": "text"}, x8),
        replicax.NotAnArrayError, TypeError, ["result['bad'] is of type str: 'text'"],
    ),
    "an unhashable static argument": (
        call(add, x8, [1, 2], static_broadcasted_argnums=1),
        replicax.StaticArgumentError, ValueError, ["right is of type list", "such as a tuple"],
    ),
    "a missing static argument": (
        call(lambda x, n=2: x, x8, static_broadcasted_argnums=(1,)),
        replicax.StaticArgumentError, ValueError, ["missing from a call with 1", "* n", "by position"],
    ),
    "static and donated": (
        call(add, x8, 1, static_broadcasted_argnums=1, donate_argnums=(0, 1)),
        replicax.StaticArgumentError, ValueError, ["both name ['right']"],
    ),
    "no devices": (
        call(add, x8, x8, devices=[]),
        replicax.DevicesError, ValueError, ["'devices' argument to pmap must be non-empty", "jax.devices()"],
    ),
    "a device twice": (
        lambda: pmap(add, devices=[jax.devices()[0]] * 2)(x8, x8),
        replicax.DevicesError, ValueError, ["appears 2 times"],
    ),
    "no device": (
        call(add, x8, x8, devices=[0, 1]), replicax.DevicesError, ValueError, ["devices[0] is 0, which is not a dev"],
    ),
    "an unknown backend": (
        call(add, x8, x8, backend="abacus"), replicax.UnknownBackendError, RuntimeError, ["backend='abacus'", "'cpu'"],
    ),
    "an unbound axis": (
        call(lambda x: lax.psum(x, "rows"), x8, axis_name="cols"),
        replicax.UnboundAxisError, NameError, ["unbound axis name: rows", "names in scope are 'cols'"],
    ),
    "an unbound axis with no name in scope": (
        call(lambda x: lax.pmean(x, "rows"), x8),
        replicax.UnboundAxisError, NameError, ["No axis in scope has a name", "axis_name='rows'"],
    ),
    "an unbound axis asked for its index": (
        call(lambda x: x + lax.axis_index("rows"), x8, axis_name="cols"),
        replicax.UnboundAxisError, NameError, ["'cols'"],
    ),
    "a collective without a rule": (
        call(one_sided, x8, axis_name="i"),
        replicax.UnsupportedCollectiveError, NotImplementedError, ["psend over the mapped axis 'i'", "with ppermute"],
    ),
    "a collective without a rule in a loop": (
        call(lambda x: lax.fori_loop(0, 2, lambda _, y: one_sided(y), x), x8, axis_name="i"),
        replicax.UnsupportedCollectiveError, NotImplementedError, ["psend over the mapped axis 'i'"],
    ),
    "groups": (
        call(lambda x: lax.psum(x, "i", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6]]), x8, axis_name="i"),
        replicax.CollectiveArgumentError, ValueError, ["psum: axis_index_groups=[[0, 1, 2, 3], [4, 5, 6]]", "0 to 7"],
    ),
    "an array donated before": (
        lambda: donated_before(pmap(lambda state: state + 1, donate_argnums=0)),
        replicax.DeletedArrayError, RuntimeError,
        ["state was donated to an earlier call, or deleted", "x + 0"],
    ),
    "an array donated and passed twice": (
        lambda: passed_twice(pmap(add, donate_argnums=0)),
        replicax.DeletedArrayError, RuntimeError, ["left['a'] is donated, and passed"],
    ),
    "an array deleted by the user": (
        lambda: pmap(add)(deleted(), x8),
        replicax.DeletedArrayError, RuntimeError, ["left was donated to an earlier call, or deleted"],
    ),
    "an array deleted by the user, warm": (
        lambda: warm(pmap(add), lambda: (on_devices(), x8), (deleted(), x8)),
        replicax.DeletedArrayError, RuntimeError, ["left was donated to an earlier call, or deleted"],
    ),
    "an array donated and passed twice, warm": (
        lambda: warm(pmap(add, donate_argnums=0), lambda: (on_devices(), on_devices()), [on_devices()] * 2),
        replicax.DeletedArrayError, RuntimeError, ["left is donated, and passed twice"],
    ),
    "fetch what was deleted": (
        lambda: replicax.fetch({"a": deleted(), "b": x8}),
        replicax.DeletedArrayError, RuntimeError, ["fetch cannot read", "tree['a'] was donated or deleted"],
    ),
    "unreplicate what was deleted": (
        lambda: replicax.unreplicate([x8, deleted()]),
        replicax.DeletedArrayError, RuntimeError, ["unreplicate cannot read", "tree[1] was donated or deleted"],
    ),
    "local_replicas of what was deleted": (
        lambda: replicax.local_replicas(deleted()),
        replicax.DeletedArrayError, RuntimeError, ["local_replicas cannot read", "tree was donated or deleted"],
    ),
    "an int too large": (
        call(add, x8, [1, 2**40] * 4, in_axes=(0, None)),
        replicax.NumberTooLargeError, OverflowError, ["right[1] is 1099511627776", "jax_enable_x64"],
    ),
    "no name in a collective": (
        call(lambda x: lax.psum(x, None), x8),
        replicax.UnboundAxisError, NameError, ["got axis_name=None", "psum(x, 'i')", "axis_name='i'"],
    ),
    "static arguments that cannot be compared": (
        lambda: warm(pmap(add, static_broadcasted_argnums=1), lambda: (x8, Incomparable()), (x8, Incomparable())),
        replicax.StaticArgumentError, ValueError, ["right, of type Incomparable, raised RuntimeError: never", "__eq__"],
    ),
    "a donated position that the function lacks": (
        call(add, x8, x8, donate_argnums=(0, 5)),
        replicax.ArgumentNameError, ValueError,
        ["donate_argnums=(0, 5) contains position 5", "takes 2 positional", "from 0 to 1"],
    ),
    "a negative donated position that the function lacks": (
        call(add, x8, x8, donate_argnums=-3), replicax.ArgumentNameError, ValueError, ["contains position -3"],
    ),
    "one size against a tree of many": (
        call(lambda p, x: x, {f"w{i}": x8 for i in range(160)}, np.ones(12)),
        replicax.MappedSizeError, ValueError,
        ["160 arrays of p: axis 0 has size 8 (p['w0'] of shape (8,), ...)", "x of shape (12,): axis 0 has size 12"],
    ),
    "a type in place of an array": (
        call(add, x8, jax.ShapeDtypeStruct((8,), "float32")),
        replicax.NotAnArrayError, TypeError, ["right is of type ShapeDtypeStruct"],
    ),
    "in_axes for keywords": (
        lambda: pmap(lambda x: x, in_axes={"x": 1})(x=x8),
        replicax.AxisSpecError, ValueError, ["in_axes={'x': 1}", "by keyword"],
    ),
    "devices for an inner map": (
        call(lambda x: pmap(jnp.sin, devices=jax.devices())(x), np.ones((2, 4))),
        replicax.NestedMapError, ValueError, ["Nested pmap with explicit devices argument", "outermost"],
    ),
    "axis_size no int": (
        call(add, x8, x8, axis_size="8"), replicax.OptionTypeError, TypeError, ["axis_size must be an int, got '8'"],
    ),
    "argnums no int": (
        call(add, x8, x8, donate_argnums="left"), replicax.OptionTypeError, TypeError, ["donate_argnums must be"],
    ),
    "devices no list": (
        lambda: pmap(add, devices=jax.devices()[0]), replicax.OptionTypeError, TypeError, ["Write [device] for one"],
    ),
    "backend no string": (call(add, backend=3), replicax.OptionTypeError, TypeError, ["backend must be a string"]),
    "axis_name unhashable": (
        call(add, axis_name=["i"]), replicax.OptionTypeError, TypeError, ["axis_name must be hashable"],
    ),
    "axis_name an int": (
        call(add, axis_name=0), replicax.OptionTypeError, TypeError, ["must not be an int, got 0", "psum(x, 0)"],
    ),
    "axis_name unhashable within": (
        call(add, axis_name=("i", ["j"])), replicax.OptionTypeError, TypeError, ["axis_name must be hashable"],
    ),
    "a name that the function lacks": (
        call(add, static_broadcasted_argnames=("left", "middle")),
        replicax.ArgumentNameError, ValueError,
        ["static_broadcasted_argnames must name parameters of add", "* 'middle'", "'left', 'right'"],
    ),
    "a donated name that the function lacks": (
        call(lambda: 1, donate_argnames="state"),
        replicax.ArgumentNameError, ValueError, ["donate_argnames must name", "* 'state'", "has no parameters"],
    ),
    "argnames no string": (
        call(add, donate_argnames=["left", 1]),
        replicax.OptionTypeError, TypeError, ["donate_argnames must be a str", "got 1 of type int", "donate_argnums"],
    ),
    "static and donated by name": (
        call(add, static_broadcasted_argnames="right", donate_argnums=1),
        replicax.StaticArgumentError, ValueError, ["both name ['right']"],
    ),
    "an unhashable static argument by name": (
        lambda: pmap(add, static_broadcasted_argnames="right")(x8, right=[1]),
        replicax.StaticArgumentError, ValueError, ["right is of type list"],
    ),
    "a compiled program called with another type": (
        lambda: pmap(add).lower(x8, x8).compile()(x8, x4),
        replicax.AheadOfTimeError, TypeError, ["Argument 'right' compiled with float32[8] and called with float32[4]"],
    ),
    "a compiled program called with another structure": (
        lambda: pmap(add).lower(x8, x8).compile()(x8, [x8]),
        replicax.AheadOfTimeError, TypeError, ["right is a list, and was an array", "lowered for"],
    ),
    "a compiled program called with another static value": (
        lambda: pmap(add, static_broadcasted_argnums=1).lower(x8, 2).compile()(x8, 3),
        replicax.AheadOfTimeError, TypeError, ["right is 3, and was 2", "Leave them out"],
    ),
    "a compiled program under jit": (
        lambda: jax.jit(pmap(add).lower(x8, x8).compile())(x8, x8),
        replicax.AheadOfTimeError, TypeError, ["add is a compiled", "left is a tracer", "right is a tracer"],
    ),
    "lowered inside another map": (
        lambda: pmap(lambda x: pmap(add).lower(x, x))(np.ones((4, 4))),
        replicax.AheadOfTimeError, TypeError, ["add cannot be compiled ahead of time here", "inside another map"],
    ),
    "a static argument far before the first": (
        call(add, x8, x8, static_broadcasted_argnums=-5), replicax.StaticArgumentError, ValueError, ["argument -5"],
    ),
    "shard over no devices": (
        lambda: replicax.shard(x8, devices=[0]), replicax.DevicesError, ValueError, ["which is not a device"],
    ),
    "shard what is no array": (
        lambda: replicax.shard({"a": np.array(["x"] * 8)}), replicax.NotAnArrayError, TypeError, ["tree['a'] is a"],
    ),
    "replicate what is no array": (
        lambda: replicax.replicate({"f": jnp.sin}), replicax.NotAnArrayError, TypeError, ["tree['f'] is of type"],
    ),
    "replicate onto devices by position": (
        lambda: replicax.replicate(x8, jax.devices()), replicax.OptionTypeError, TypeError, ["axis_size must be an"],
    ),
    "local_replicas of a tracer": (
        lambda: jax.jit(replicax.local_replicas)(x8), replicax.NotAnArrayError, TypeError, ["tree is of type"],
    ),
    "no function at all": (
        lambda: pmap(None),  # type: ignore[call-overload]
        replicax.NotAFunctionError, TypeError, ["must be callable, got None"],
    ),
    "no function": (
        lambda: pmap(3),  # type: ignore[call-overload]
        replicax.NotAFunctionError, TypeError, ["must be callable, got 3 of type int"],
    ),
    "shard that does not divide": (
        lambda: replicax.shard({"a": np.ones((10, 2)), "b": np.float32(1)}, 4),
        replicax.MappedSizeError, ValueError, ["tree['a'] of shape (10, 2)", "tree['b'] of shape ()", "4 equal parts"],
    ),
    "shard into none": (lambda: replicax.shard(x8, 0), replicax.MappedSizeError, ValueError, ["at least 1"]),
    "unreplicate a scalar": (
        lambda: replicax.unreplicate({"a": x8, "b": 1.0}), replicax.AxisSpecError, ValueError, ["tree['b']", "float"],
    ),
    "local_replicas of unequal arrays": (
        lambda: replicax.local_replicas({"a": x8, "b": x4}),
        replicax.MappedSizeError, ValueError, ["tree['a'] of shape (8,)", "tree['b'] of shape (4,)"],
    ),
    "too late for other devices": (
        lambda: (jax.devices(), replicax.simulate_devices(3)),
        replicax.SimulationError, RuntimeError, ["simulate_devices(3)", "8 device(s) of platform 'cpu'"],
    ),
    "zero devices": (lambda: replicax.simulate_devices(0), replicax.SimulationError, RuntimeError, ["at least 1"]),
}  # fmt: skip

INTERNAL = re.compile(
    r"flat_args|_internal|lane|dynamic\b|<locals>|0x[0-9a-f]{6}|ANONYMOUS|leaf\b|leaves\b|_spec", re.I
)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault):
    thunk, kind, builtin, pieces = FAULTS[fault]
    with pytest.raises(kind) as caught:
        thunk()
    message = str(caught.value)
    assert isinstance(caught.value, builtin)
    assert isinstance(caught.value, replicax.ReplicaxError)
    missing = [piece for piece in pieces if piece not in message]
    assert not missing, message
    assert not INTERNAL.search(message), message
    assert len(message.splitlines()) <= 12, message
    assert message.rstrip().endswith((".", ")")), "a message ends with what to write instead"
    assert len(frames_of_ours(caught.value)) <= 2
    shown = "".join(traceback.format_exception(caught.value))
    assert not re.search("not a valid JAX type|not supported as direct inputs|Triggering __jax", shown), shown


def test_a_fault_inside_the_function_passes_as_it_is():
    def fun(x):
        return undefined_name  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(NameError, match="undefined_name") as caught:
        pmap(fun)(x8)
    assert not isinstance(caught.value, replicax.ReplicaxError)
    with pytest.raises(ZeroDivisionError):
        pmap(lambda x: x / (1 // 0))(x8)
    with pytest.raises(jax.errors.TracerBoolConversionError, match=r"function branchy at .*value of the argument x"):
        pmap(branchy)(x8)


def branchy(x):
    return x if x > 0 else -x


def test_the_traceback_of_an_unbound_axis_shows_the_users_line():
    def fun(x):
        return lax.psum(x, "rows")

    with pytest.raises(NameError) as caught:
        pmap(fun)(x8)
    assert "fun" in [frame.name for frame in caught.traceback]


def test_a_call_that_fails_loses_nothing():
    fun = pmap(lambda x, y: x + y, donate_argnums=0)
    state = pmap(lambda x: x)(x8)
    with pytest.raises(replicax.MappedSizeError):
        fun(state, x4)
    np.testing.assert_array_equal(fun(state, x8), 2 * x8)


def test_nothing_is_checked_against_devices_at_decoration():
    functools.partial(pmap, backend="abacus")(lambda x: x)
    pmap(lambda x: x, axis_size=3, in_axes=None)


def test_out_axes_none_returns_what_all_replicas_have():
    for n in (1, 5, 8, 9, 64):
        total, count = pmap(lambda x: (lax.psum(x, "i"), lax.axis_size("i")), out_axes=None, axis_name="i")(
            jnp.arange(float(n))
        )
        assert (total.shape, float(total), int(count)) == ((), n * (n - 1) / 2, n)


@pytest.mark.parametrize("same", [True, False])
def test_constants_that_replicas_choose_for_themselves_differ(same):
    """Each result is equal in all replicas, but the choice between them is not."""

    def choose(x):
        chosen = lax.psum(x, "i") > 0 if same else lax.axis_index("i") > 0
        return lax.cond(chosen, lambda: 1.0, lambda: 2.0)

    mapped = pmap(choose, "i", out_axes=None)
    if same:
        np.testing.assert_array_equal(mapped(np.ones(8)), 1)
    else:
        with pytest.raises(replicax.DivergentOutputError, match="may differ between"):
            mapped(np.ones(8))


def test_many_faults_are_told_in_few_lines():
    with pytest.raises(replicax.NotAnArrayError) as caught:
        pmap(add)(x8, {f"w{i}": "text" for i in range(100)})
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert lines[-2] == "  * and 91 more"


def test_an_exception_whose_own_text_fails_passes_as_it_is():
    class TextlessError(ValueError):
        def __str__(self):
            raise KeyError("no text")

    class TextlessNameError(NameError):
        def __str__(self):
            raise KeyError("no text")

    for kind in TextlessError, TextlessNameError:

        def fun(x, kind=kind):
            raise kind

        with pytest.raises(kind):
            pmap(fun, static_broadcasted_argnums=())(x8)


def frames_of_ours(error):
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [file for file in files if file.startswith(SOURCE)]


SOURCE = str(pathlib.Path(replicax.__file__).parent)


def test_an_exception_of_the_users_shows_their_code_and_not_ours():
    def fails(x):
        return x / (1 // 0) if x.ndim else x

    def nests(x):
        return pmap(lambda y: pmap(fails)(y))(x)

    cold = pmap(fails)
    warmed, donating, static = (
        pmap(fails), pmap(fails, donate_argnums=0), pmap(lambda x, n: fails(x), static_broadcasted_argnums=1)
    )  # fmt: skip
    for _ in range(3):
        warmed(x8), donating(on_devices()), static(x8, 1)
    many = pmap(lambda xs: fails(xs[0]))
    for _ in range(3):
        many([x8] * 30)
    wrong = np.ones((8, 2))
    for thunk in (
        lambda: cold(wrong), lambda: warmed(wrong), lambda: donating(wrong), lambda: static(wrong, 1),
        lambda: many([wrong] * 30), lambda: nests(np.ones((2, 2, 2, 2))), lambda: jax.jit(cold)(wrong),
        lambda: cold.lower(wrong), lambda: cold.eval_shape(wrong), lambda: replicax.compat.pmap(fails)(wrong),
    ):  # fmt: skip
        with pytest.raises(ZeroDivisionError) as caught:
            thunk()
        assert len(frames_of_ours(caught.value)) <= 2
        assert str(caught.traceback[-1].path) == __file__  # the file in which it was raised


def test_the_traceback_of_a_warm_call_has_as_few_frames():
    masked = np.ma.masked_array(x8, x8 > 5)
    for options in ({}, {"donate_argnums": 0}, {"static_broadcasted_argnums": 1}, {"devices": jax.devices()[:1]}):
        fun, last = pmap(lambda x, n=2: x, **options), [1] * ("static_broadcasted_argnums" in options)
        for given in (on_devices, lambda: x8):
            for _ in range(3):
                fun(given(), *last)
            for wrong in masked, Converts(), "text", np.ones(()):
                with pytest.raises(replicax.ReplicaxError) as caught:
                    fun(wrong, *last)
                assert len(frames_of_ours(caught.value)) <= 2
            if last:
                with pytest.raises(replicax.StaticArgumentError) as caught:
                    fun(given(), [1])
                assert len(frames_of_ours(caught.value)) <= 2
