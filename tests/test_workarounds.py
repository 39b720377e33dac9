"""Reproduces in plain JAX each bug of JAX or XLA that replicax works around. If a test fails, delete the workaround.

Code that works around a bug says ``workaround: name``, with the name of a function here. The function reproduces the
bug without replicax: it returns whether the bug exists, or crashes. It runs in a new process with unmodified JAX, as
``python test_workarounds.py name``. Functions that cannot crash share one process.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxlib import version as jaxlib

SOURCE = pathlib.Path(__file__).parent.parent / "src" / "replicax"

#: XLA aborts a process with a hanging collective after 4 s instead of 40 s.
SOON = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=2 --xla_cpu_collective_call_terminate_timeout_seconds=4"


@dataclasses.dataclass(frozen=True)
class Fault:
    """A bug of JAX or XLA.

    Attributes:
        shows: Returns whether the bug exists, in a process with eight CPU devices.
        alone: Whether it may crash or hang the process, and so needs its own.
        mended: The first version with the fix; None if no version has it.
        version: The installed version to compare with ``mended``: that of JAX, or of jaxlib.
    """

    shows: Callable[[], bool]
    alone: bool
    mended: tuple[int, ...] | None
    version: tuple[int, ...]

    @property
    def expected(self):
        return self.mended is None or self.version < self.mended


FAULTS: dict[str, Fault] = {}


def fault(*, alone=False, mended=None, version=jax.__version_info__):
    def register(shows):
        FAULTS[shows.__name__] = Fault(shows, alone, mended, version)
        return shows

    return register


# ---------------------------------------------------------------------------------------------------------------
# Donation


@fault(alone=True, mended=(0, 11, 2))
def taken_arrays():
    """XLA aborts, or raises its own error, if a program on several devices gets an array that was donated before."""
    f = jax.jit(lambda x: 2 * x, donate_argnums=0)
    x = placed(np.ones(8))
    f(x)
    return raises(lambda: f(x), "INVALID_ARGUMENT", rather="Array has been deleted")


@fault(alone=True, mended=(0, 11, 1))  # earlier, on one device: https://github.com/jax-ml/jax/issues/9635
def donated_twice():
    """XLA aborts if an array is donated twice to a program on several devices."""
    x = placed(np.ones(8))
    with pytest.raises(jax.errors.JaxRuntimeError, match="donate the same buffer twice"):
        jax.jit(lambda x, y: (x + 1, y + 2), donate_argnums=(0, 1))(x, x)
    return False


# ---------------------------------------------------------------------------------------------------------------
# Threads


@fault(alone=True, mended=(0, 12), version=tuple(map(int, jaxlib.__version__.split(".")[:2])))
def few_cpu_threads():
    """Asynchronous calls occupy all eight threads of XLA's pool, so that collectives hang."""
    f = on_devices(lambda x: lax.psum(x, "i"))
    x = y = f(placed(np.ones(8)))
    for _ in range(2000):
        y = f(x)
    return float(y[0]) != 64


@fault(alone=True)
def failing_callbacks():
    """If a callback raises on one device while the others wait in a collective, XLA aborts."""

    def fails(k):
        if k == 3:
            raise ValueError("three")
        return k

    def fun(x):
        return lax.psum(jax.pure_callback(fails, x, x), "i")

    with pytest.raises(jax.errors.JaxRuntimeError, match="three"):
        jax.block_until_ready(on_devices(fun)(placed(np.arange(8.0, dtype=np.float32))))
    return False


@fault(alone=True)
def permutations_of_a_part():
    """A ppermute along one mesh axis hangs if devices along the other axis do not run it."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def fun(x):
        shift = lambda x: lax.ppermute(x, "b", [(k, (k + 1) % 4) for k in range(4)])
        return lax.cond(lax.axis_index("a") == 0, shift, lambda x: x, x)

    spec = PartitionSpec(("a", "b"))
    y = jax.jit(jax.shard_map(fun, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(np.arange(8.0))
    return y.tolist() != [3, 0, 1, 2, 4, 5, 6, 7]


# ---------------------------------------------------------------------------------------------------------------
# Reductions between devices


@fault(alone=True)
def complex_constants():
    """XLA aborts when it folds a sum of complex constants between devices."""
    y = on_devices(lambda x: x + lax.psum(jnp.full((1,), 1 + 2j), "i"))(np.zeros(8, np.complex64))
    y = on_devices(lambda x: lax.psum(jnp.full((3,), 1 + 2j), "i")[None])(np.zeros(8))
    return y.tolist() != [[8 + 16j] * 3] * 8


@fault()
def constants_over_groups():
    """XLA folds a sum of constants over groups as if all groups had the size of the first."""
    groups = [[0, 1], [2, 3, 4, 5, 6, 7]]
    y = on_devices(lambda x: 0 * x + lax.psum(np.ones(3), "i", axis_index_groups=groups))(np.ones((8, 3)))
    return y[:, 0].tolist() != [2, 2, *[6] * 6]


@fault()
def lost_nans():
    """A maximum or minimum between CPU devices loses a NaN."""
    x = np.where(np.arange(8) == 3, np.nan, np.arange(8))
    return not all(jnp.isnan(on_devices(lambda x: f(x, "i"))(x)).all() for f in (lax.pmax, lax.pmin))  # noqa: B023


@fault()
def complex_extremes():
    """XLA lacks a maximum of complex numbers between CPU devices."""
    return raises(lambda: on_devices(lambda x: lax.pmax(x, "i"))(np.arange(8).astype(np.complex64)), "UNIMPLEMENTED")


# ---------------------------------------------------------------------------------------------------------------
# 2-bit and 4-bit integers


@fault(alone=True)
def two_bits_concatenated():
    """Concatenation of 2-bit arrays overruns buffers in XLA."""
    x = (jnp.arange(64) % 4 - 2).astype("int2")
    y = jax.jit(lambda x: jnp.concatenate([x, x]))(x)
    return y.astype("int8").tolist() != 2 * x.astype("int8").tolist()


@fault(alone=True)
def two_bits_gathered():
    """``all_gather`` of 2-bit arrays overruns buffers in XLA."""
    x = (jnp.arange(64) % 4 - 2).astype("int2")
    y = on_devices(lambda x: lax.all_gather(x, "i", tiled=True))(x)
    return y.astype("int8").tolist() != 8 * x.astype("int8").tolist()


@fault(alone=True)
def two_bits_padded():
    """XLA pads a sharded 2-bit array wrongly."""
    x = (jnp.arange(80) % 4 - 2).astype("int2")
    y = jax.jit(lambda x: jnp.pad(x, 3))(placed(x))
    return y.astype("int8").tolist() != jnp.pad(x.astype("int8"), 3).tolist()


@fault()
def two_bits_summed():
    """XLA lacks a 2-bit sum between CPU devices."""
    x = jnp.ones(8).astype("int2")
    return raises(lambda: on_devices(lambda x: lax.psum(x, "i"))(x), "UNIMPLEMENTED")


@fault()
def four_bits_summed():
    """A 4-bit sum between CPU devices does not wrap: it is 24, but int4 wraps to -8."""
    y = on_devices(lambda x: lax.psum(x, "i").astype("int8"))(jnp.full(8, 3).astype("int4"))
    return y.tolist() != [-8] * 8


@fault(mended=(0, 11, 2))
def layouts_of_four_bits():
    """A compiled program refuses a 4-bit array because of its memory layout, which is correct."""
    where = NamedSharding(mesh_of_all(), PartitionSpec("i"))
    program = jax.jit(lambda x: x + x, in_shardings=where)
    program = program.lower(jax.ShapeDtypeStruct((8,), "int4")).compile()
    return raises(lambda: program(jax.device_put(jnp.ones(8).astype("int4"), where)), "input layouts that disagree")


# ---------------------------------------------------------------------------------------------------------------
# Placement and memory of arrays


@fault()  # https://github.com/jax-ml/jax/issues/37830
def shared_memory():
    """``device_put`` aliases a NumPy array at a 64-byte boundary, so later changes to it show in the JAX array."""
    memory = np.zeros(2**20 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    x = memory[start : start + 2**20]
    y = jax.device_put(x)
    x[0] = 1
    return int(y[0]) == 1


@fault(mended=(0, 11, 2))
def arrays_without_elements():
    """For a result without elements, each device gets the whole shape, but JAX expects a shard."""
    where = NamedSharding(mesh_of_all(), PartitionSpec("i"))
    y = jax.jit(lambda x: x[:, :0], out_shardings=where)(placed(np.ones((8, 3))))
    return raises(lambda: np.asarray(y), "could not broadcast")


@fault()
def rows_split_unevenly():
    """XLA communicates more to pad rows for devices, unless the rows are constrained to be replicated."""
    mesh = jax.make_mesh((4,), ("i",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    whole, rows = NamedSharding(mesh, PartitionSpec()), PartitionSpec("i")
    fun = jax.shard_map(lambda x: 2 * x + lax.psum(x, "i"), mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)

    def sent(pin):
        def program(x):
            x = pin(x)
            return pin(pin(fun(pin(jnp.concatenate([x, x[-1:], x[-1:]]))))[:6])

        text = jax.jit(program).lower(np.ones((6, 3))).compile().as_text()
        return len(re.findall(r" (?:all-reduce|all-gather|collective-permute|all-to-all)\(", text))

    return sent(lambda x: x) > sent(lambda x: lax.with_sharding_constraint(x, whole))


# ---------------------------------------------------------------------------------------------------------------
# Rules under vmap


@fault()
def untiled_collectives():
    """Untiled ``psum_scatter``, the transpose of ``all_gather``, fails under ``vmap`` over an axis other than 0."""
    scatter = lambda tiled: jax.vmap(lambda x: lax.psum_scatter(x, "i", tiled=tiled), in_axes=1)
    assert on_devices(scatter(True))(np.ones((64, 2))).shape == (16, 1)
    return raises(lambda: on_devices(scatter(False))(np.ones((64, 2))), "tuple index out of range")


@fault()
def all_to_all_over_groups():
    """``all_to_all`` with groups has no rule for any ``vmap``."""
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    swap = jax.vmap(lambda x: lax.all_to_all(x, "i", 0, 0, axis_index_groups=pairs, tiled=True), in_axes=1)
    return raises(lambda: on_devices(swap)(np.ones((16, 3))), "open a feature request")


@fault(mended=(0, 11))  # https://github.com/jax-ml/jax/pull/38998
def axes_from_the_end():
    """``all_to_all`` with negative axes inserts dimensions at the wrong position under ``vmap``."""
    swap = jax.vmap(lambda x: lax.all_to_all(x, "i", -1, 0), axis_name="i")
    return raises(lambda: swap(np.ones((2, 3, 2))), "cannot reshape")


@fault()  # on purpose: https://github.com/jax-ml/jax/issues/19085
def draws_of_one_key():
    """``vmap`` draws for a whole batch of ``rbg`` keys with the first key."""
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)
    return not jnp.array_equal(jax.vmap(jax.random.bits)(keys), jnp.stack([jax.random.bits(key) for key in keys]))


# ---------------------------------------------------------------------------------------------------------------
# Tracing


@fault()
def index_at_once():
    """Under ``ensure_compile_time_eval``, JAX evaluates ``axis_index`` during tracing, and fails."""
    with jax.ensure_compile_time_eval():
        return raises(lambda: jax.make_jaxpr(lambda: lax.axis_index("i"), axis_env=[("i", 4)])(), "unbound axis name")


@fault()
def static_arguments_compared():
    """JAX compares static arguments with equal hashes, even if their ``==`` raises an error."""

    class Incomparable:
        def __hash__(self):
            return 0

        def __eq__(self, other):
            raise TypeError("cannot be compared")

    trace = jax.make_jaxpr(lambda a, x: x, static_argnums=0)
    trace(Incomparable(), 1.0)
    return raises(lambda: trace(Incomparable(), 1.0), "cannot be compared|checking equality")


# ---------------------------------------------------------------------------------------------------------------
# Helpers


def mesh_of_all():
    return jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))


def placed(x):
    return jax.device_put(x, NamedSharding(mesh_of_all(), PartitionSpec("i")))


def on_devices(fun):
    rows = PartitionSpec("i")
    return jax.jit(jax.shard_map(fun, mesh=mesh_of_all(), in_specs=rows, out_specs=rows, check_vma=False))


def raises(call, match, rather=None):
    try:
        jax.block_until_ready(call())
    except Exception as error:
        if re.search(match, str(error)):
            return True
        if not rather or not re.search(rather, str(error)):
            raise
    return False


def show(names):
    """Prints for each name whether its bug exists, or the error that the function raised."""
    warnings.simplefilter("ignore")
    jax.config.update("jax_num_cpu_devices", 8)
    for name in names:
        try:
            found: bool | str = bool(FAULTS[name].shows())
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        print(json.dumps([name, found]), flush=True)


@functools.cache
def shown(*names):
    """Runs these functions in a new process. Returns the results by name; True for a crash or a hang."""
    env = {**os.environ, "XLA_FLAGS": SOON, "NPROC": "8"}
    command = [sys.executable, __file__, *names]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50, check=False)
    except subprocess.TimeoutExpired:
        assert len(names) == 1
        return {names[0]: True}
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    if done.returncode:
        assert done.returncode < 0, done.stderr
        found[names[len(found)]] = True
    return found


# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_still_there(name):
    known = FAULTS[name]
    safe = [other for other, each in FAULTS.items() if not each.alone]
    found = shown(name)[name] if known.alone else shown(*safe)[name]
    assert isinstance(found, bool), found
    if known.expected:
        places = ", ".join(path for path, named in references() if name in named)
        assert found, f"JAX {jax.__version__} no longer needs this workaround: delete it in {places}"
    else:
        assert not found, f"JAX {jax.__version__} has this fault again: change the version here and in versions.py"


def references():
    for path in sorted(SOURCE.rglob("*.py")):
        named = re.findall(r"[Ww]orkarounds?: ((?:\w+, )*\w+)", path.read_text())
        yield str(path.relative_to(SOURCE)), {name for some in named for name in some.split(", ")}


def test_code_refers_to_each_fault_by_name():
    assert set().union(*(named for _, named in references())) == set(FAULTS)


if __name__ == "__main__":
    show(sys.argv[1:])
