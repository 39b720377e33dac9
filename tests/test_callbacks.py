"""If a callback fails in one replica, the call raises the user's exception, and the next call works."""

import functools
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src import dispatch
from jax.experimental import io_callback

import replicax
from replicax import pmap

LAYOUTS = [(8, 8), (12, 8), (5, 3), (4, 1)]
NUMBER = jax.ShapeDtypeStruct((), jnp.float32)


@pytest.fixture(autouse=True)
def _no_errors_left():
    """Clears JAX's runtime tokens, which keep the error of a call and raise it in later ``effects_barrier`` calls."""
    yield
    dispatch.runtime_tokens.clear()


class Picky:
    """The sine; raises an error for ``refused`` numbers."""

    def __init__(self, *refused):
        self.refused = refused

    def __call__(self, x, function=np.sin):
        if float(x) in self.refused:
            raise ZeroDivisionError(f"not {float(x):g}")
        return np.float32(function(x))


def pure(callback, x):
    return jax.pure_callback(callback, NUMBER, x, vmap_method="sequential")


def run(fun, n, d, x=None):
    x = jnp.arange(n, dtype=jnp.float32) if x is None else x
    return jax.block_until_ready(pmap(fun, "i", devices=jax.devices()[:d])(x))


# Each takes the callback and the argument of one replica, and contains a collective.
PROGRAMS = {
    "pure_callback": lambda c, x: lax.psum(pure(c, x), "i"),
    "io_callback": lambda c, x: lax.psum(io_callback(c, NUMBER, x), "i"),
    "debug.callback": lambda c, x: (jax.debug.callback(c, x), lax.psum(x, "i"))[1],
    "debug.callback behind": lambda c, x: (lax.psum(x, "i"), jax.debug.callback(c, x))[0],
    "jit": lambda c, x: jax.jit(lambda x: lax.psum(pure(c, x), "i"))(x),
    "scan": lambda c, x: lax.scan(lambda s, t: (lax.psum(s, "i") + t * pure(c, x), s), x, jnp.arange(3.0))[0],
    "fori_loop": lambda c, x: lax.fori_loop(0, 3, lambda _, s: lax.pmean(s, "i") + pure(c, x), x),
    "branch": lambda c, x: lax.cond(x > 2, lambda: lax.psum(pure(c, x), "i"), lambda: lax.psum(x, "i")),
    "index of a branch": lambda c, x: lax.cond(
        pure(c, x) > 0.1, lambda: lax.psum(x, "i"), lambda: lax.psum(2 * x, "i")
    ),
    "checkpoint": lambda c, x: jax.checkpoint(lambda x: lax.psum(jnp.sin(pure(c, x)), "i"))(x),
    "pmax": lambda c, x: lax.pmax(pure(c, x), "i"),
    "all_gather": lambda c, x: lax.all_gather(pure(c, x), "i"),
}


@pytest.mark.few(5)
@pytest.mark.parametrize(("n", "d"), [(8, 8), (5, 3)])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_user_sees_the_exception_and_its_replica_and_the_next_call_works(program, n, d):
    callback = Picky()
    fun = functools.partial(PROGRAMS[program], callback)
    expected = jax.vmap(fun, axis_name="i")(jnp.arange(n, dtype=jnp.float32))
    mapped = pmap(fun, "i", devices=jax.devices()[:d])
    x = jnp.arange(n, dtype=jnp.float32)
    np.testing.assert_allclose(mapped(x), expected, rtol=1e-5)
    callback.refused = (3,)
    message = r"CallbackError: A callback of \S+ raised ZeroDivisionError in replica 3 of 'i': not 3"
    with pytest.raises(RuntimeError, match=message) as caught:
        jax.block_until_ready(mapped(x))
    assert "test_callbacks.py" in str(caught.value)  # the file in which the callback raised the error
    callback.refused = ()
    np.testing.assert_allclose(mapped(x), expected, rtol=1e-5)


@pytest.mark.few("5-3")
@pytest.mark.parametrize(("n", "d"), LAYOUTS)
def test_loops_whose_predicates_read_a_callback_stop(n, d):
    refusing = Picky(0.0)  # with zeros for failed results, none of these loops would stop

    def alone(x):
        return lax.while_loop(lambda s: pure(refusing, 0 * s) < 1, lambda s: s + 1, x)

    def together(x):
        return lax.while_loop(lambda s: lax.psum(pure(refusing, x), "i") < 1e9, lambda s: lax.pmean(s, "i"), x)

    def not_all(x):
        return lax.while_loop(lambda s: pure(refusing, x) < 2, lambda s: lax.psum(s, "i"), x)

    for fun in alone, together, not_all:
        with pytest.raises(RuntimeError, match=r"raised ZeroDivisionError in replica \d+ of 'i': not 0"):
            run(fun, n, d)


@pytest.mark.few(2)
@pytest.mark.parametrize(("n", "d"), LAYOUTS)
def test_a_choice_by_a_callback_that_every_device_makes_for_itself(n, d):
    calls = []

    def flaky(x):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("the disk")
        return np.float32(x)

    def fun(x):
        chosen = pure(flaky, jnp.float32(1))
        y = lax.cond(chosen > 0, lambda: lax.psum(x, "i"), lambda: lax.ppermute(x, "i", [(0, 1)]))
        return lax.while_loop(lambda s: s[0] < chosen, lambda s: (s[0] + 1, lax.psum(s[1], "i")), (0.0, y))[1]

    with pytest.raises(RuntimeError, match=r"raised OSError in replicas? \d+.* of 'i': the disk"):
        run(fun, n, d)
    x = np.arange(n, dtype=np.float32)
    np.testing.assert_allclose(run(fun, n, d), np.full(n, n * x.sum()), rtol=1e-5)


@pytest.mark.long
def test_a_vectorized_callback_names_the_range_of_replicas():
    def refuse(x):
        if (np.asarray(x) == 3).any():
            raise ValueError("a three")
        return np.sin(x)

    def fun(x, method="expand_dims"):
        return lax.psum(jax.pure_callback(refuse, NUMBER, x, vmap_method=method), "i")

    for method in "expand_dims", "broadcast_all", "legacy_vectorized":
        with pytest.raises(RuntimeError, match="raised ValueError in replicas 2 to 3 of 'i': a three"):
            run(functools.partial(fun, method=method), 16, 8)
        expected = jax.vmap(functools.partial(fun, method=method), axis_name="i")(jnp.arange(16.0) + 4)
        got = run(functools.partial(fun, method=method), 16, 8, jnp.arange(16.0) + 4)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_maps_inside_maps_name_both_replicas():
    refusing = Picky(11.0)

    def fun(row):
        return pmap(lambda x: lax.psum(pure(refusing, x), ("i", "j")), "j")(row)

    with pytest.raises(RuntimeError, match="in replica 2 of 'i', replica 3 of 'j': not 11"):
        run(fun, 3, 8, jnp.arange(12.0).reshape(3, 4))
    x = jnp.arange(12.0).reshape(3, 4) + 20
    np.testing.assert_allclose(run(fun, 3, 8, x), np.full((3, 4), np.sin(x).sum()), rtol=1e-5)


def test_runs_that_nobody_waits_for_are_kept_apart():
    mapped = pmap(lambda x: lax.psum(pure(Picky(3.0), x), "i"), "i")
    runs = [mapped(jnp.arange(8.0) + 4 * (k != 5)) for k in range(12)]
    for k, y in enumerate(runs):
        if k == 5:
            with pytest.raises(RuntimeError, match="not 3"):
                np.asarray(y)
        else:
            np.testing.assert_allclose(y, np.full(8, np.sin(np.arange(8) + 4.0).sum()), rtol=1e-5)


def test_no_part_of_a_failed_run_is_handed_out():
    out = pmap(lambda x: (lax.psum(pure(Picky(3.0), x), "i"), x + 1), "i")(jnp.arange(8.0))
    for x in out:
        for shard in x.addressable_shards:
            with pytest.raises(RuntimeError, match="not 3"):
                np.asarray(shard.data)


def test_a_device_calls_back_no_more_after_a_failure():
    seen = []

    def fun(x):
        y = pure(Picky(3.0), x)
        jax.debug.callback(lambda i: seen.append(int(i)), lax.axis_index("i"))
        return lax.psum(y, "i")

    with pytest.raises(RuntimeError, match="not 3"):
        run(fun, 8, 8)
    assert 3 not in seen


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (lambda x: np.ones(3, np.float32), r"result 0 of the callback is float32\[3\], but .* says float32\[\]"),
        (lambda x: np.int32(1), r"result 0 of the callback is int32\[\], but result_shape_dtypes says float32\[\]"),
        (lambda x: (x, x), "the callback returned 2 results, but result_shape_dtypes has 1"),
    ],
)
def test_a_callback_that_returns_what_it_did_not_promise(returned, what):
    with pytest.raises(RuntimeError, match=f"raised TypeError in replica \\d of 'i': {what}"):
        run(lambda x: lax.psum(pure(returned, x), "i"), 8, 8)


class TextlessError(Exception):
    def __str__(self):
        raise ValueError("no text")


@pytest.mark.parametrize("kind", [KeyError, TextlessError])
def test_an_exception_without_text(kind):
    def refuse(x):
        raise kind

    with pytest.raises(RuntimeError, match=rf"raised {kind.__name__} in replica \d of 'i'$"):
        run(lambda x: lax.psum(pure(refuse, x), "i"), 8, 8)


def test_a_map_without_a_name():
    with pytest.raises(RuntimeError, match="raised ZeroDivisionError in replica 3: not 3"):
        jax.block_until_ready(pmap(lambda x: pure(Picky(3.0), x))(jnp.arange(8.0)))


# ---------------------------------------------------------------------------------------------------------------
# Transformations from outside


@jax.custom_jvp
def by_jvp(x):
    return pure(sine, x)


@jax.custom_vjp
def by_vjp(x):
    return pure(sine, x)


sine = Picky()
by_jvp.defjvp(lambda p, t: (by_jvp(*p), pure(functools.partial(sine, function=np.cos), p[0]) * t[0]))
by_vjp.defvjp(lambda x: (by_vjp(x), x), lambda x, ct: (jnp.cos(x) * ct,))


@pytest.mark.long
@pytest.mark.parametrize(("n", "d"), LAYOUTS)
@pytest.mark.parametrize("function", [by_jvp, by_vjp])
def test_functions_with_derivative_rules_that_call_back(function, n, d):
    def fun(x):
        return lax.psum(function(x), "i") * x

    mapped = pmap(fun, "i", devices=jax.devices()[:d])
    vmapped = jax.vmap(fun, axis_name="i")
    x = jnp.arange(n, dtype=jnp.float32)
    ways = [
        lambda f: f(x),
        lambda f: jax.jit(f)(x),
        lambda f: jax.grad(lambda x: (f(x) ** 2).sum())(x),
        lambda f: jax.vmap(f)(jnp.stack([x, 2 * x])),
    ]
    for way in ways:
        sine.refused = ()
        np.testing.assert_allclose(way(mapped), way(vmapped), rtol=1e-4, atol=1e-4)
        sine.refused = (3.0,)
        with pytest.raises(RuntimeError, match="in replica 3 of 'i': not 3"):
            jax.block_until_ready(way(mapped))
    sine.refused = ()


CALLS = {
    "pure_callback": pure,
    "io_callback": lambda c, x: io_callback(c, NUMBER, x),
    "debug.callback": lambda c, x: (jax.debug.callback(c, x), x)[1],
}


def in_a_rule(kind, call):
    """The sine with a custom rule. The primal has no callback; the forward rule has one."""
    sine_of = getattr(jax, f"custom_{kind}")(jnp.sin)
    if kind == "jvp":
        sine_of.defjvp(lambda p, t: (jnp.sin(*p), (jnp.cos(*p) + 0 * call(*p)) * t[0]))
    else:
        sine_of.defvjp(lambda x: (jnp.sin(x) + 0 * call(x), x), lambda x, ct: (jnp.cos(x) * ct,))
    return sine_of


WHERE = {
    "at the top": lambda f, x: f(x),
    "in a jit": lambda f, x: jax.jit(f)(x),
    "in a scan": lambda f, x: lax.scan(lambda s, _: (lax.pmean(f(s), "i"), None), x, None, length=2)[0] + f(x),
    "in a branch": lambda f, x: lax.cond(x > -1, f, jnp.cos, x),
    "in a map inside": lambda f, x: pmap(lambda y: lax.psum(f(y), ("i", "j")), "j")(jnp.stack([x, x + 20])).sum(),
}


#: Every callback at the top level, and ``pure_callback`` in every other place.
RULES = [(call, "at the top", *layout) for call in CALLS for layout in [(8, 8), (5, 3)]]
RULES += [("pure_callback", where, 5, 3) for where in WHERE if where != "at the top"]


@pytest.mark.long
@pytest.mark.parametrize(("call", "where", "n", "d"), RULES)
@pytest.mark.parametrize("kind", ["jvp", "vjp"])
def test_callbacks_that_a_forward_rule_alone_makes(n, d, kind, call, where):
    callback = Picky()
    ruled = in_a_rule(kind, functools.partial(CALLS[call], callback))
    mapped = pmap(lambda x: lax.psum(WHERE[where](ruled, x), "i") * x, "i", devices=jax.devices()[:d])
    plain = jax.vmap(lambda x: lax.psum(WHERE[where](jnp.sin, x), "i") * x, axis_name="i")
    x = jnp.arange(n, dtype=jnp.float32)
    ways = [
        lambda f: jax.grad(lambda x: f(x).sum())(x),
        lambda f: jax.jit(jax.grad(lambda x: jax.jit(f)(x).sum()))(x),
    ]
    for way in ways:
        callback.refused = ()
        np.testing.assert_allclose(way(mapped), way(plain), rtol=1e-4, atol=1e-4)
        callback.refused = (3.0,)
        with pytest.raises(RuntimeError, match=r"raised ZeroDivisionError in replica 3 of 'i'.*: not 3"):
            jax.block_until_ready(way(mapped))
    np.testing.assert_allclose(mapped(x), plain(x), rtol=1e-4)  # the primal has no callback


def test_a_forward_rule_that_cannot_be_traced_is_not_needed_without_a_derivative():
    @jax.custom_vjp
    def fun(x):
        return 2 * x

    def refuses(x):
        raise ZeroDivisionError("no derivative")

    fun.defvjp(refuses, refuses)
    x = jnp.arange(8.0)
    np.testing.assert_array_equal(jax.jit(pmap(fun))(x), 2 * x)
    with pytest.raises(ZeroDivisionError, match="no derivative"):
        jax.grad(lambda x: pmap(fun)(x).sum())(x)


def test_debug_callbacks_under_derivatives_and_checkpoint():
    seen = []

    def fun(x):
        jax.debug.callback(lambda v: seen.append(float(v)), x)
        return lax.psum(jnp.sin(x), "i")

    x = jnp.arange(12.0)
    mapped = pmap(fun, "i")
    for wrapped in mapped, jax.checkpoint(mapped):
        got = jax.grad(lambda x, wrapped=wrapped: wrapped(x).sum())(x)
        np.testing.assert_allclose(got, 12 * np.cos(x), rtol=1e-5)
        jax.effects_barrier()
        assert set(seen) == set(range(12))
        seen.clear()


def test_without_jit():
    with jax.disable_jit(), pytest.raises(RuntimeError, match="not 3"):
        run(lambda x: lax.psum(pure(Picky(3.0), x), "i"), 8, 8)


@pytest.mark.parametrize("function", [np.sin, jnp.sin, lambda x: x * 2], ids=["NumPy", "JAX", "operator"])
def test_without_jit_on_another_device_than_that_of_the_operands(function):
    """As on a GPU: JAX gives a callback arrays on the first CPU device."""
    x = jnp.arange(4.0)
    mapped = pmap(lambda x: lax.psum(pure(lambda x: np.float32(function(x)), x), "i"), "i", devices=jax.devices()[-1:])
    refused = pmap(lambda x: lax.psum(pure(Picky(3.0), x), "i"), "i", devices=jax.devices()[-1:])
    with jax.disable_jit():
        np.testing.assert_allclose(mapped(x), [sum(map(function, np.arange(4.0)))] * 4, rtol=1e-6)
        with pytest.raises(RuntimeError, match="raised ZeroDivisionError in replica 3 of 'i': not 3"):
            jax.block_until_ready(refused(x))


@pytest.mark.parametrize("d", [1, 3])
def test_a_key_comes_as_its_data(d):
    keys, seen = jax.random.split(jax.random.key(0), 4), []

    def program(key):
        jax.debug.callback(lambda key: seen.append(tuple(map(int, key))), key)
        return jax.pure_callback(lambda key: np.float32(key[1]), NUMBER, key, vmap_method="sequential")

    data = jax.random.key_data(keys)
    np.testing.assert_array_equal(run(program, 4, d, keys), data[:, 1].astype(np.float32))
    jax.effects_barrier()
    assert sorted(seen) == sorted(tuple(map(int, key)) for key in data)


# ---------------------------------------------------------------------------------------------------------------
# Order, interrupts


@pytest.mark.parametrize(("n", "d"), [(8, 8), (12, 8), (4, 1)])
def test_ordered_callbacks_are_refused_by_name(n, d):
    ordered = {
        r"jax\.experimental\.io_callback": lambda x: io_callback(np.sin, NUMBER, x, ordered=True),
        r"jax\.debug\.print": lambda x: jax.debug.print("{}", x, ordered=True),
        r"jax\.debug\.callback": lambda x: lax.scan(
            lambda s, _: (s, jax.debug.callback(np.sin, x, ordered=True)), x, None, length=2
        ),
    }
    for name, fun in ordered.items():
        with pytest.raises(replicax.OrderedCallbackError, match=rf"<lambda> calls {name} with ordered=True"):
            run(fun, n, d)
        with pytest.raises(replicax.OrderedCallbackError, match=rf"<lambda> calls {name} with ordered=True"):
            run(lambda x, fun=fun: pmap(fun, "j")(x), n, d, jnp.ones((n, 2)))


#: Places in which JAX cannot vectorize an io_callback, by the text of the error.
UNVECTORIZED = {
    "branch of jax.lax.cond": lambda c, x: lax.cond(x > 3, lambda: io_callback(c, NUMBER, x), lambda: x),
    "branch of jax.lax.cond or jax.lax.switch": lambda c, x: lax.switch(
        jnp.int32(x) % 3, [lambda: x, lambda: 2 * x, lambda: io_callback(c, NUMBER, x)]
    ),
    "jax.lax.while_loop": lambda c, x: lax.while_loop(lambda s: io_callback(c, NUMBER, s) < 20, lambda s: s + 1, x),
    "jax.lax.while_loop that": lambda c, x: lax.while_loop(
        lambda s: s < 20, lambda s: s + io_callback(lambda s: np.float32(1), NUMBER, s), x
    ),
}


@pytest.mark.parametrize("where", UNVECTORIZED)
def test_an_io_callback_that_several_replicas_of_a_device_cannot_make_is_refused_by_name(where):
    fun = functools.partial(UNVECTORIZED[where], lambda x: np.float32(x))
    run(fun, 5, 8)  # one replica per device
    for thunk in (
        lambda: run(fun, 16, 8),
        lambda: jax.jit(pmap(fun, "i"))(jnp.arange(16.0)),
        lambda: run(lambda x: pmap(fun, "j")(x), 16, 8, jnp.ones((16, 2))),
    ):
        with pytest.raises(replicax.UnsupportedCallbackError, match=where) as caught:
            thunk()
        assert isinstance(caught.value, NotImplementedError)
        assert "vmap-of-cond" not in str(caught.value)


@pytest.mark.few("1")
@pytest.mark.parametrize("devices", [1, 8])
def test_an_interrupt_while_devices_wait_for_each_other_does_not_lose_the_session(devices):
    script = """
        import signal, sys, time
        import jax, jax.numpy as jnp, numpy as np
        import replicax

        replicax.simulate_devices(int(sys.argv[1]))

        def slow(x):
            if x == 3:
                print("calling", flush=True)
                for _ in range(20 if slowly else 1):
                    time.sleep(0.05)
            return np.float32(x)

        def fun(x):
            y = jax.pure_callback(slow, jax.ShapeDtypeStruct((), "float32"), x, vmap_method="sequential")
            return jax.lax.psum(y, "i")

        slowly = False
        mapped = replicax.pmap(fun, "i")
        np.asarray(mapped(jnp.arange(8.0)))
        print("ready", flush=True)
        slowly = True
        try:
            np.asarray(mapped(jnp.arange(8.0)))
        except BaseException as error:
            print("KeyboardInterrupt" in type(error).__name__ + str(error), flush=True)
        slowly = False
        print(np.asarray(mapped(jnp.arange(8.0)))[0], flush=True)
    """
    environment = {**os.environ, "NPROC": "64"}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(devices)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout
        assert process.stderr
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None, process.stderr.read()
        assert process.stdout.readline() == "calling\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=50)
    assert out.split() == ["True", "calling", "28.0"], err
