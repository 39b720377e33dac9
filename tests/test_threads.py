"""Many threads call one map at once: it is traced and compiled once, and no thread hangs."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import replicax
from replicax import pmap
from replicax._runtime import dispatch as _dispatch

THREADS = 8


def together(work):
    """Runs ``work(k)`` in several threads that start at the same time. Returns the results."""
    barrier = threading.Barrier(THREADS)

    def begin(k):
        barrier.wait(timeout=60)
        return work(k)

    with ThreadPoolExecutor(THREADS) as pool:
        return [future.result(timeout=120) for future in [pool.submit(begin, k) for k in range(THREADS)]]


@pytest.mark.parametrize("n", [8, 13])
def test_the_first_call_of_many_threads_is_traced_and_compiled_once(n):
    traced, compiled = [], []

    def fun(x):
        traced.append(threading.get_ident())
        for _ in range(5):
            x = jnp.sin(x) + lax.pmean(x, "i")
        return x

    x = np.arange(n, dtype=np.float32)
    expected = [jax.vmap(fun, axis_name="i")(x + k) for k in range(THREADS)]
    traced.clear()
    rows = [x + k for k in range(THREADS)]
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    compiled.clear()
    out = together(lambda k: np.asarray(pmap(fun, "i")(rows[k])))
    assert len(traced) == 1
    assert len(compiled) == 1
    for ours, theirs in zip(out, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_threads_with_different_types_and_static_values_do_not_mix():
    traced: Counter[tuple[tuple[int, ...], int]] = Counter()

    def fun(x, n):
        traced[x.shape, n] += 1
        return x * n

    mapped = pmap(fun, static_broadcasted_argnames="n")
    rows = [np.arange(8.0 * (k % 4 + 1), dtype=np.float32).reshape(8, -1) for k in range(THREADS)]
    for k, out in enumerate(together(lambda k: np.asarray(mapped(rows[k], n=k % 2)))):
        np.testing.assert_array_equal(out, rows[k] * (k % 2))
    assert set(traced.values()) == {1}
    assert len(traced) == 4


def test_maps_that_call_each_other_from_many_threads():
    traced: Counter[str] = Counter()

    def inner(x):
        traced["inner"] += 1
        return x + lax.psum(x, "j")

    def outer(x):
        traced["outer"] += 1
        return pmap(inner, "j")(x) * 2

    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    calls = [lambda: pmap(outer)(x), lambda: pmap(inner, "j")(x[0])]
    expected = [2 * (x + x.sum(1, keepdims=True)), x[0] + x[0].sum()]
    for k, out in enumerate(together(lambda k: np.asarray(calls[k % 2]()))):
        np.testing.assert_allclose(out, expected[k % 2])
    assert traced == {"outer": 1, "inner": 2}  # inner is traced by itself and inside outer


def test_a_function_that_calls_maps_from_another_thread_while_it_is_traced(monkeypatch):
    """The trace and the other thread wait for each other. Then that thread traces, too."""
    monkeypatch.setattr(_dispatch, "PATIENCE", 0.2)
    x = np.arange(8, dtype=np.float32)
    other = pmap(lambda y: y * 2)
    started: list[bool] = []

    def fun(y):
        if not started:
            started.append(True)
            with ThreadPoolExecutor(1) as pool:
                total = pool.submit(lambda: np.asarray(other(x)).sum() + np.asarray(mapped(x)).sum()).result(60)
            return y + total
        return y + 1

    mapped = pmap(fun)
    np.testing.assert_array_equal(mapped(x), x + 2 * x.sum() + (x + 1).sum())


def test_a_fault_in_one_thread_leaves_the_others_their_turn():
    attempts = []

    def fun(x):
        attempts.append(1)
        if len(attempts) < THREADS:
            raise ZeroDivisionError
        return x + 1

    mapped = pmap(fun)

    def work(_):
        try:
            return np.asarray(mapped(np.arange(8.0))).sum()
        except ZeroDivisionError:
            return None

    assert sorted(together(work), key=str) == [36.0, *[None] * (THREADS - 1)]
    np.testing.assert_array_equal(mapped(np.arange(8.0)), np.arange(8) + 1)


def test_clearing_while_others_call():
    mapped = pmap(lambda x: x + lax.psum(x, "i"), "i")
    x = np.arange(8, dtype=np.float32)

    def work(k):
        for _ in range(3):
            if k % 4 == 0:
                mapped.clear_cache()
            np.testing.assert_array_equal(mapped(x), x + 28)
        return True

    assert all(together(work))
    assert issubclass(replicax.AheadOfTimeError, TypeError)
