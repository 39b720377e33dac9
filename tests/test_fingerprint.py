"""``fingerprint`` depends on the bits alone, and ``first_divergence`` names where two runs part."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import replicax
from replicax.testing import MismatchError, fingerprint, first_divergence, processes
from replicax.testing._fingerprint import _hash_words

P = PartitionSpec

DTYPES = [
    "bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32",
    "float4_e2m1fn", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bfloat16", "float16", "float32", "complex64",
]  # fmt: skip

WIDE = ["int64", "uint64", "float64", "complex128"]


def mixed(x):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x


def right_hash(x):
    """The hash of an array, word by word in Python, from its bytes in memory."""
    raw, size = np.ascontiguousarray(x).tobytes(), x.dtype.itemsize
    bits = jax.dtypes.itemsize_bits(x.dtype) if x.dtype.name not in ("bool", *WIDE) else 64
    elements = [raw[k : k + size] for k in range(0, len(raw), size)]
    words = [int.from_bytes(e[k : k + 4], "little") % 2 ** min(bits, 32) for e in elements for k in range(0, size, 4)]
    keys = ((0xCC9E2D51, 0xE6546B64), (0x1B873593, 0x38B34AE5))
    sums = [sum(mixed(mixed((k * a + b) % 2**32) ^ word) for k, word in enumerate(words)) % 2**32 for a, b in keys]
    return "{:08x}{:08x}".format(*sums)


def numbers(dtype, shape=(4, 3, 5)):
    """Values of a dtype with all kinds of bits, infinities and NaNs among them."""
    dtype = jnp.dtype(dtype)
    rng = np.random.default_rng(0)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    if dtype.itemsize == 1:
        return rng.integers(0, 256, shape).astype(np.uint8).astype(dtype) if "int" in dtype.name else raw(shape, dtype)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def raw(shape, dtype):
    values = np.arange(2 ** jax.dtypes.itemsize_bits(dtype), dtype=np.uint8)
    return np.resize(values, shape).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hashes_equal_those_of_a_reference_in_python(dtype):
    x = numbers(dtype)
    assert fingerprint({"x": x}) == {
        "['x']": {"type": f"{dtype}[3,5]", "replicas": [right_hash(row) for row in x]},
    }
    assert fingerprint(jnp.asarray(x), -1)[""]["replicas"] == [right_hash(x[..., k]) for k in range(5)]
    assert fingerprint([jnp.asarray(x)], None) == {"[0]": {"type": f"{dtype}[4,3,5]", "bits": right_hash(x)}}


@pytest.mark.parametrize("dtype", WIDE)
def test_wide_numpy_arrays_keep_all_their_bits(dtype):
    x = numbers(dtype)
    expected = {"": {"type": f"{dtype}[3,5]", "replicas": [right_hash(row) for row in x]}}
    assert fingerprint(x) == expected
    with jax.enable_x64(True):
        assert fingerprint(jnp.asarray(x)) == expected


def test_scalars_keys_and_empty_arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    assert fingerprint(keys)[""]["replicas"] == [right_hash(np.asarray(d)) for d in jax.random.key_data(keys)]
    assert fingerprint({"step": 5, "rate": 0.5}, None) == {
        "['rate']": {"type": "float32[]", "bits": right_hash(np.float32(0.5))},
        "['step']": {"type": "int32[]", "bits": right_hash(np.int32(5))},
    }
    assert fingerprint(np.zeros((2, 0)))[""]["replicas"] == ["0" * 16] * 2
    assert fingerprint(np.zeros(2, jax.dtypes.float0))[""] == {
        "type": "float0[]",
        "replicas": [right_hash(np.zeros((), np.bool_))] * 2,
    }
    assert fingerprint({}) == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_bit_and_every_position_counts(dtype):
    x = numbers(dtype, (6,))
    flipped = [x.view(f"uint{8 * x.dtype.itemsize}").copy() for _ in range(6 * 8 * x.dtype.itemsize)]
    for k, bits in enumerate(flipped):
        bits[k % 6] ^= np.array(1 << (k // 6), bits.dtype)
    swapped = [x[list(order)] for order in ((1, 0, 2, 3, 4, 5), (0, 1, 2, 3, 5, 4), (5, 4, 3, 2, 1, 0))]
    found = fingerprint(np.stack([x, *(bits.view(dtype) for bits in flipped), *swapped]))[""]["replicas"]
    assert len(set(found)) == len(found)


def test_zeros_and_nans_of_different_bits_differ():
    nans = np.array([0x7FC00000, 0x7FC00001, 0xFFC00000, 0x00000000, 0x80000000], np.uint32).view(np.float32)
    assert len(set(fingerprint(nans)[""]["replicas"])) == 5


@pytest.mark.parametrize("d", [1, 2, 3, 8])
def test_results_of_maps_have_equal_hashes_on_any_number_of_devices(d):
    x = np.random.default_rng(0).normal(size=(8, 3, 4)).astype(np.float32)
    fun = replicax.pmap(lambda x: {"same": x, "moved": lax.ppermute(x, "i", [(k, 7 - k) for k in range(8)])}, "i",
                        devices=jax.devices()[:d])  # fmt: skip
    state = fun(x)
    assert fingerprint(state) == fingerprint({"same": x, "moved": x[::-1]})
    assert fingerprint(state)["['moved']"]["replicas"] == fingerprint(x)[""]["replicas"][::-1]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("a", "b"), P(None, "a"), P(("b", "a")), P()])
def test_the_sharding_does_not_matter(kind, spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    x = np.random.default_rng(0).normal(size=(8, 8, 3)).astype(np.float32)
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    for axis in (0, 1, 2, None):
        assert fingerprint(sharded, axis) == fingerprint(x, axis)
    with jax.set_mesh(mesh), jax.disable_jit():
        assert fingerprint(sharded) == fingerprint(x)


def test_only_hashes_travel_between_devices():
    mesh = Mesh(np.array(jax.devices()), "i")
    for spec in (P("i"), P(None, "i")):
        x = jax.device_put(np.zeros((8, 8, 5), np.float32), NamedSharding(mesh, spec))
        text = jax.jit(lambda x: _hash_words(x, 0, False)).lower(x).compile().as_text()
        for operation in ("all-gather", "all-to-all", "collective-permute"):
            assert operation not in text
        assert ("all-reduce" in text) == (spec != P("i"))


def hashes_of_processes():
    """What a process finds for its own rows, for all rows, and for parameters."""
    own = np.array([[1, 2], [3, 4], [5, 6]], np.float32)[:: 1 - 2 * jax.process_index()]
    everywhere = replicax.to_global(own)
    return {
        "own": fingerprint(replicax.pmap(lambda x: x)(own)),
        "all": fingerprint(everywhere),
        "whole": fingerprint(everywhere, None),
        "copies": fingerprint(replicax.to_global(np.array([7, 8], np.float32), None), None),
    }


@pytest.mark.xdist_group("processes")
def test_processes_find_the_hashes_of_one_process():
    with processes(2, devices=2) as two:
        first, second = two.run(hashes_of_processes)
    x = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    rows = np.concatenate([x, x[::-1]])
    assert (first["own"], second["own"]) == (fingerprint(x), fingerprint(x[::-1]))
    for found in (first, second):
        assert found["all"] == fingerprint(rows)
        assert found["whole"] == fingerprint(rows, None)
        assert found["copies"] == fingerprint(np.array([7, 8], np.float32), None)


def state(step, wrong=()):
    """The state of four replicas at a step, with the second array wrong in some replicas."""
    b = np.full((4, 2), step, np.float32)
    b[list(wrong), 1] += 1e-6
    return {"params": {"b": np.ones((4, 3), np.float32), "w": b}, "step": np.full(4, step)}


x = np.zeros(3)

RUNS = {
    "bits": (
        [state(0), state(1), state(2)], [state(0), state(1, [1, 3]), state(2, [0])],
        (1, "['params']['w']", (1, 3)), "step 1, tree['params']['w']: the bits of replicas 1, 3 of 4 differ",
    ),
    "two arrays": (
        [state(1)], [{**state(1, [2]), "step": np.full(4, 0)}],
        (0, "['params']['w']", (2,)),
        "step 0, tree['params']['w']: the bits of replica 2 of 4 differ (and 1 more in this step)",
    ),
    "a longer run": ([state(0)], [state(0), state(1)], (1, None, ()), "step 1: only run_b has this step"),
    "a shorter run": ([state(0), state(1)], [state(0)], (1, None, ()), "step 1: only run_a has this step"),
    "an array more": (
        [{"a": x}], [{"a": x, "b": x}],
        (0, "['b']", ()), "step 0, tree['b']: only run_b has this array",
    ),
    "another number of replicas": (
        [np.zeros((4, 2))], [np.zeros((3, 2))], (0, "", ()),
        "step 0, tree: 4 replicas of float64[2] in run_a, but 3 replicas of float64[2] in run_b",
    ),
    "another dtype": (
        [np.zeros(2, np.float32)], [np.zeros(2, np.int32)], (0, "", ()),
        "step 0, tree: 2 replicas of float32[] in run_a, but 2 replicas of int32[] in run_b",
    ),
    "many replicas": (
        [np.arange(9)], [np.arange(9) + 1], (0, "", tuple(range(9))),
        "step 0, tree: the bits of replicas 0, 1, 2, 3, 4, 5 and 3 more of 9 differ",
    ),
    "steps by name": (
        {10: state(0), 20: state(1), 30: state(2)}, {20: state(1), 30: state(2, [0])},
        (30, "['params']['w']", (0,)), "step 30, tree['params']['w']: the bits of replica 0 of 4 differ",
    ),
    "a step more by name": ({10: x, 20: x}, {20: x}, (10, None, ()), "step 10: only run_a has this step"),
}  # fmt: skip


def reread(tree):
    return json.loads(json.dumps(fingerprint(tree)))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("case", RUNS)
def test_the_first_divergence(case, recorded):
    a: Any
    b: Any
    a, b, (step, path, replicas), text = RUNS[case]
    if recorded:  # as JSON, one of the runs only
        b = {k: reread(s) for k, s in b.items()} if isinstance(b, dict) else map(reread, b)
    found = first_divergence(a, b)
    assert found is not None
    assert (found.step, found.path, found.replicas) == (step, path, replicas)
    assert str(found) == text


def test_equal_runs_do_not_diverge(tmp_path):
    for name in ("a", "b"):
        lines = [json.dumps(fingerprint(state(k))) for k in range(3)]
        (tmp_path / name).write_text("\n".join(lines))
    with (tmp_path / "a").open() as a, (tmp_path / "b").open() as b:
        assert first_divergence(map(json.loads, a), map(json.loads, b)) is None
    assert first_divergence({1: x, 2: x}, {2: x, 1: x}) is None


def test_arrays_without_a_replica_axis():
    a, b = {"w": np.zeros((2, 3)), "n": 1}, {"w": np.zeros((2, 3)), "n": 2}
    found = first_divergence([a, a], [a, b], axis=None)
    assert str(found) == "step 1, tree['n']: the bits differ"
    assert first_divergence([a, a], [fingerprint(a, None)] * 2, axis=None) is None
    found = first_divergence([np.zeros((2, 3))], [fingerprint(np.zeros((2, 3)), None)])
    assert str(found) == "step 0, tree: 2 replicas of float64[3] in run_a, but float64[2,3] in run_b"


def test_a_generator_is_read_as_far_as_needed():
    def run():
        yield np.zeros(2)
        yield np.ones(2)
        raise AssertionError("read too far")

    found = first_divergence(run(), [np.zeros(2), np.zeros(2)])
    assert str(found) == "step 1, tree: the bits of replicas 0, 1 of 2 differ"


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: fingerprint({"a": np.zeros(3), "b": np.zeros(4)}), replicax.MappedSizeError,
         r"axis 0, .*\n  \* tree\['a'\] of shape \(3,\)\n  \* tree\['b'\] of shape \(4,\)\nPass axis=None"),
        (lambda: fingerprint({"a": np.zeros(3), "b": 1.0}), replicax.MappedSizeError, r"tree\['b'\] of shape \(\)"),
        (lambda: fingerprint(np.zeros(3), 1), replicax.MappedSizeError, r"axis 1, .*\n  \* tree of shape \(3,\)"),
        (lambda: fingerprint(np.zeros(3), "rows"),  # type: ignore[arg-type]
         replicax.OptionTypeError, "axis must be an int, got 'rows'"),
        (lambda: fingerprint(["text"]), replicax.NotAnArrayError, "fingerprint needs concrete arrays"),
        (lambda: jax.jit(fingerprint)(np.zeros(3)), replicax.NotAnArrayError, "fingerprint needs concrete arrays"),
        (lambda: fingerprint([deleted()]), replicax.DeletedArrayError, r"tree\[0\] was donated or deleted"),
        (lambda: first_divergence(fingerprint(x), [x]), MismatchError, r"run_a is one fingerprint.* Pass .* \[run_a\]"),
        (lambda: first_divergence(x, x), MismatchError, r"run_a is array.* Pass the states of all steps, such as"),
        (lambda: first_divergence([x], 3), MismatchError, r"run_b is 3, and not the states of a run"),
        (lambda: first_divergence({"w": x}, {"w": x}), MismatchError, r"with the key 'w'.* For one state, pass"),
        (lambda: first_divergence({1: x}, {"1": x}), MismatchError, r"run_b is .* key '1'.*JSON makes strings"),
        (lambda: first_divergence([x], fingerprint(x)), MismatchError, r"run_b is one fingerprint"),
        (lambda: first_divergence([x], {0: x}), MismatchError, "Pass two mappings, or two sequences"),
        (lambda: first_divergence([], []), MismatchError, "neither run has a step"),
        (lambda: first_divergence({}, {}), MismatchError, "neither run has a step"),
    ],
)  # fmt: skip
def test_errors(call, kind, says):
    with pytest.raises(kind, match=says):
        call()


def deleted():
    array = jnp.zeros(3)
    array.delete()
    return array
