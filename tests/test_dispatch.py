"""Warm calls: which calls run in C++, which arguments are packed, and that neither changes a result."""

import gc
import sys
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from replicax import DeletedArrayError, StaticArgumentError, pmap
from replicax._runtime import cpu_threads
from replicax._runtime import dispatch as _dispatch
from replicax._runtime import transfer as _transfer
from replicax._runtime.call_path import Path
from replicax._runtime.run import run


@pytest.fixture
def by_python(monkeypatch):
    """One entry per program run from Python."""
    calls = []

    def counted(*args):
        calls.append(args)
        return run(*args)

    monkeypatch.setattr(_dispatch, "run", counted)
    return calls


def rows(n, *shape, dtype=np.float32):
    return (np.arange(n * int(np.prod(shape))).reshape(n, *shape) % 7).astype(dtype)


def placed(x):
    """``x`` on the devices of a map with as many replicas."""
    return pmap(lambda x: x)(x)


CALLS = {
    "an array in place": lambda n: ((placed(rows(n, 3)),), {}),
    "an array of NumPy's": lambda n: ((rows(n, 3),), {}),
    "arrays in place, nested": lambda n: (({"a": placed(rows(n, 3)), "b": [placed(rows(n))]},), {}),
    "by keyword": lambda n: ((placed(rows(n, 3)),), {"y": placed(rows(n, 3))}),
    "by keyword, of NumPy's": lambda n: ((rows(n, 3),), {"y": rows(n, 3)}),
    "a static argument": lambda n: ((placed(rows(n, 3)),), {"power": 3}),
}


def fun(x, y=0, power=1):
    return jax.tree.map(lambda leaf: lax.psum(leaf**power, "i") + leaf + y, x)


@pytest.mark.few(7)
@pytest.mark.parametrize("n", [1, 8, 16])
@pytest.mark.parametrize("call", CALLS)
def test_a_warm_call_runs_nothing_of_ours(by_python, call, n):
    args, kwargs = CALLS[call](n)
    mapped = pmap(fun, "i", static_broadcasted_argnames="power")
    static = {name: kwargs.pop(name) for name in ("power",) if name in kwargs}
    expected = jax.vmap(lambda args, kwargs: fun(*args, **(kwargs | static)), axis_name="i")(args, kwargs)
    for _ in range(4):
        before = len(by_python)
        out = mapped(*args, **kwargs, **static)
        jax.tree.map(np.testing.assert_array_equal, out, expected)
    assert len(by_python) == before, "and the call before it had been alike"


@pytest.mark.parametrize(("n", "simulated"), [(1, True), (8, True), (8, False)])
def test_a_warm_call_of_arrays_in_place_has_no_frame_of_pythons(monkeypatch, n, simulated):
    """Not even a frame of JAX. On several simulated devices there is one frame, which prevents a deadlock."""
    if not simulated:
        monkeypatch.setattr(cpu_threads, "may_hang", lambda mesh: False)
    mapped, x, frames = pmap(lambda x, y: fun(x, y), "i"), placed(rows(n, 3)), []  # no other test uses this map

    def entered(frame, event, _):
        if event == "call":
            frames.append(frame.f_code.co_qualname)

    mapped(x, y=x)
    monkeypatch.setattr(cpu_threads._calls, "caller", threading.get_ident())  # independent of earlier tests
    for _ in range(3):
        frames.clear()
        sys.setprofile(entered)
        try:
            mapped(x, y=x)
        finally:
            sys.setprofile(None)
    assert frames == ["bounded.<locals>.bounding"] * (simulated and n > 1)


def test_nested_arrays_of_numpy_on_several_devices_go_by_themselves_too(by_python):
    tree = {"a": rows(8, 3), "b": [rows(8), 2.0]}
    mapped = pmap(lambda t: t["a"] * t["b"][1] + t["b"][0], in_axes=({"a": 0, "b": [0, None]},))
    for _ in range(3):
        before = len(by_python)
        np.testing.assert_array_equal(mapped(tree), 2 * tree["a"] + tree["b"][0][:, None])
    assert len(by_python) == before


@pytest.mark.few(13)
@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", [3, 20_000, 500_000])
@pytest.mark.parametrize("n", [1, 8, 13])
def test_an_array_may_change_as_soon_as_the_call_returns(n, size, nested, axis):
    raw = np.empty(4 * n * size + 64, np.uint8)
    start = -raw.ctypes.data % 64  # aligned, so that JAX would alias the memory
    x = raw[start : start + 4 * n * size].view(np.float32).reshape(n, size)
    fun = lambda t, k: lax.fori_loop(0, 3, lambda _, y: y + 1, jax.tree.leaves(t)[0].max() + k)
    mapped = pmap(fun, in_axes=(axis, 0))
    for value in (1, 2, 3, 4):
        x[:] = value
        out = mapped([x] if nested else x, np.zeros(n, np.float32))
        x[:] = 1000
        np.testing.assert_array_equal(out, np.full(n, value + 3))


def test_devices_that_are_one_cpu_share_what_all_of_them_get():
    whole = jax.sharding.NamedSharding(jax.make_mesh((8,), ("i",)), jax.sharding.PartitionSpec())
    x = _transfer.put(rows(1000, 1000), whole)
    assert len({x.addressable_data(k).unsafe_buffer_pointer() for k in range(8)}) == 1


def test_several_threads_copy_a_large_array():
    mapped, x = pmap(lambda x: x.sum()), rows(8, 500_000)
    np.testing.assert_allclose(mapped(x), x.sum(1), rtol=1e-4)
    assert sum(thread.name.startswith("replicax-copy") for thread in threading.enumerate()) > 0


def test_settings_are_part_of_a_call():
    mapped, x = pmap(lambda x: x * 1.5), np.arange(8)
    for _ in range(3):
        assert mapped(x).dtype == jnp.float32
        with jax.enable_x64(True):
            assert mapped(x).dtype == jnp.float64
            np.testing.assert_array_equal(mapped(x), x * 1.5)
        with jax.disable_jit():
            np.testing.assert_array_equal(mapped(x), x * 1.5)


def test_a_nan_is_found_in_a_warm_call():
    mapped, zeros = pmap(lambda x: x / x), placed(np.zeros(8, np.float32))
    for _ in range(3):
        mapped(zeros)
        with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
            mapped(zeros)


def test_a_nan_is_found_where_all_is_donated():
    mapped = pmap(lambda x: x / x, donate_argnums=0)
    for value in (1, 1, 0):
        zeros = placed(np.full(8, value, np.float32))
        with jax.debug_nans(value == 0):
            if value:
                mapped(zeros)
            else:
                with pytest.raises(FloatingPointError, match="nan"):
                    mapped(zeros)


@pytest.mark.few(3)
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("dtype", [">f4", ">i2", ">c8", ">f8"])
def test_bytes_in_another_order(dtype, n):
    mapped, x = pmap(lambda tree: jax.tree.map(lambda x: x * 2, tree)), rows(n, 3)
    for _ in range(2):
        for given in (x.astype(dtype[1:]), x.astype(dtype)):
            for tree in (given, [given], {"a": (given,)}):
                jax.tree.map(lambda y: np.testing.assert_array_equal(y, 2 * x), mapped(tree))
    many = [x.astype(dtype)] * 10
    for _ in range(3):
        np.testing.assert_array_equal(pmap(sum)(many), 10 * x)


def test_a_tracer_that_has_leaked_is_said_to_have():
    leaked = []
    jax.jit(lambda x: leaked.append(x) or x)(placed(rows(8)))
    for call in (lambda: pmap(lambda x: x + 1)(*leaked), lambda: pmap(lambda x: x + leaked[0].sum())(rows(8))):
        for _ in range(2):
            with pytest.raises(jax.errors.UnexpectedTracerError):
                call()


def test_what_a_map_is_called_by_outlives_it():
    call = pmap(lambda x: x + 1).__call__
    for _ in range(2):
        with jax.disable_jit():
            np.testing.assert_array_equal(call(np.arange(3)), [1, 2, 3])
        np.testing.assert_array_equal(call(np.arange(3)), [1, 2, 3])


@pytest.mark.parametrize("n", [1, 8, 13])
def test_rows_that_share_memory_or_have_none(n):
    same, empty = np.broadcast_to(rows(1, 4), (n, 4)), np.zeros((n, 0), np.float32)
    mapped = pmap(lambda x: x + 1)
    for _ in range(3):
        np.testing.assert_array_equal(mapped(same), same + 1)
        assert np.asarray(mapped(empty)).shape == (n, 0)
        assert np.asarray(pmap(lambda x: x[:0])(same)).shape == (n, 0)


def test_static_arguments_that_are_equal_are_not_alike():
    mapped = pmap(lambda x, k: x * 0 + (k if isinstance(k, float) else 10), static_broadcasted_argnums=1)
    x = placed(rows(8))
    for _ in range(3):
        assert [float(mapped(x, k)[0]) for k in (1, 1.0, True)] == [10, 1, 10]
        with pytest.raises(StaticArgumentError):
            mapped(x, [1])


@pytest.mark.few(2)
@pytest.mark.parametrize("tree", [lambda x: x, lambda x: [placed(rows(8)), x], lambda x: {"a": {"b": [x, 1.0]}}])
def test_a_deleted_array_is_named(tree):
    mapped, kept = pmap(lambda t, k: sum(jax.tree.leaves(t)) + k, in_axes=(None, 0)), placed(rows(8))
    alive = jax.tree.map(lambda _: placed(rows(8)), tree(kept))
    for _ in range(3):
        mapped(alive, kept)
    gone, taken = placed(rows(8)), pmap(lambda x: x + 1, donate_argnums=0)
    for _ in range(2):  # the second call runs in C++
        taken(placed(rows(8)))
    taken(gone)
    given = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else placed(rows(8)), tree(gone))
    for _ in range(2):
        with pytest.raises(DeletedArrayError, match=r"t.* was donated to an earlier call, or deleted"):
            mapped(given, kept)


def test_what_is_remembered_is_freed():
    def make():
        fun = lambda x: x + 1
        mapped = pmap(fun)
        for _ in range(3):
            mapped(placed(rows(8)))
            mapped(rows(8))
        return weakref.ref(fun), weakref.ref(mapped._dispatcher)

    references = make()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_clearing_forgets_what_runs_in_cpp(by_python):
    traced = []
    mapped, x = pmap(lambda x: traced.append(1) or x + 1), placed(rows(8))
    for _ in range(3):
        mapped(x)
    mapped.clear_cache()
    mapped(x)
    assert len(traced) == 2


# ---------------------------------------------------------------------------------------------------------------
# Packed


def many(n, count=24):
    """Various small arrays, each with its mapped axis."""
    kinds = [
        (rows(n, 3), 0),
        (rows(n, dtype=np.int32), 0),
        (rows(4, n, 2), 1),
        (rows(2, 5), None),
        (rows(n, 2, dtype=np.int64), -2),
        (rows(n, 2, 2, dtype=np.float16), 0),
        (rows(n, 3) > 2, 0),
        (rows(n, 2, dtype=np.complex64) * 1j, 0),
        (np.array(3.5, np.float32), None),
        (rows(n, 6)[:, ::2], 0),
        (rows(n, 0), 0),
        (np.asfortranarray(rows(n, 3, 2)), 0),
    ]
    return zip(*(kinds[k % len(kinds)] for k in range(count)), strict=True)


@pytest.mark.long
@pytest.mark.parametrize("n", [1, 5, 8, 13, 16])
def test_many_small_arrays_compute_the_same_packed_or_not(n):
    (leaves, axes), traced = many(n), []
    state = placed(rows(n, 3))

    def fun(state, leaves, scale):
        traced.append(1)
        total = sum(jnp.abs(x).astype(jnp.float32).sum() for x in leaves)
        return state * scale + lax.psum(jnp.sin(total), "i"), [x + x for x in leaves], lax.pmax(total, "i")

    mapped = pmap(fun, "i", in_axes=(0, list(axes), None), out_axes=(0, 0, None))
    arrays = [x.copy(order="K") for x in leaves]
    expected = jax.vmap(fun, (0, list(axes), None), (0, 0, None), axis_name="i")(state, arrays, 2.0)
    traced.clear()
    outs = []
    for _ in range(4):
        outs.append(mapped(state, arrays, 2.0))
        for x in arrays:  # the caller may change them at once
            x[...] = 0
        for x, original in zip(arrays, leaves, strict=True):
            x[...] = original
    assert traced == [1]
    assert mapped._start is Path.PACKED
    for out in outs:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), out, expected)
        assert jax.tree.map(lambda x: x.dtype, out) == jax.tree.map(lambda x: x.dtype, expected)
        jax.tree.map(np.testing.assert_array_equal, out, outs[0])  # bitwise equal


def test_packed_arrays_and_arrays_in_place_take_turns(by_python):
    host = {f"x{k}": rows(8, k % 3 + 1) for k in range(20)}
    mapped = pmap(lambda tree: jax.tree.map(lambda x: x + 1, tree))
    for _ in range(3):
        there = mapped(host)
        again = mapped(there)
        for name, x in host.items():
            np.testing.assert_array_equal(there[name], x + 1)
            np.testing.assert_array_equal(again[name], x + 2)
    before = len(by_python)
    mapped(there)
    assert len(by_python) == before


def test_donated_arrays_beside_packed_ones_are_taken():
    mapped = pmap(lambda state, tree: (state + sum(tree), tree), donate_argnums=(0, 1))
    host = [rows(8, 3) for _ in range(10)]
    for _ in range(3):
        state = placed(rows(8, 3))
        np.testing.assert_array_equal(mapped(state, host)[0], 11 * rows(8, 3))
        assert state.is_deleted()
    with pytest.raises(DeletedArrayError, match="state was donated to an earlier call, or deleted"):
        mapped(state, host)


def test_large_programs_are_not_compiled_a_second_time(monkeypatch):
    monkeypatch.setattr("replicax._runtime.packing.EQUATIONS", 5)
    mapped = pmap(lambda tree: sum(tree))
    for _ in range(3):
        np.testing.assert_array_equal(mapped([rows(8)] * 10), 10 * rows(8))
    assert mapped._start is not Path.PACKED
