"""What ``tests/test_processes.py`` runs in every process. Each function returns what is wrong, by name, or a value."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import collectives
import replicax
from replicax import pmap
from replicax._runtime.agreement import Settings
from replicax.testing import lockstep
from replicax.testing._check import difference

AXIS, SCALAR = "i", jax.ShapeDtypeStruct((), np.float32)


def own(x, counts):
    """The rows of this process, if process p has ``counts[p]`` rows."""
    p = jax.process_index()
    return x[sum(counts[:p]) : sum(counts[: p + 1])]


def differences(ours, theirs, counts):
    """The differences of own rows from a reference of all rows, by the path of the leaf."""
    paths = jax.tree_util.tree_leaves_with_path(ours)
    return {
        jax.tree_util.keystr(path): fault
        for (path, x), y in zip(paths, jax.tree.leaves(theirs), strict=True)
        if (fault := difference(x, own(np.asarray(y), counts), 1e-4))
    }


def collective_faults(context, counts, first, share):
    """Every ``share``-th row of the table of collectives in one context, against the lock-step reference."""
    fun = collectives.program(context, collectives.applicable(context)[first::share])
    x = collectives.rows(sum(counts))
    once = jax.jit if context != "while" else lambda f: f
    right = jax.tree.map(np.asarray, once(lockstep(fun, axis_name=AXIS))(x))
    ours = pmap(fun, AXIS)
    found: dict[str, object] = {}
    for kind in (lambda x: x, jnp.asarray):
        found |= differences(ours(kind(own(x, counts))), right, counts)
    return found


def values(counts):
    """Axes of arguments and results, dtypes, keys, static arguments, donation, and results without a mapped axis."""
    n, found = sum(counts), {}
    x = np.random.default_rng(0).uniform(size=(n, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), n)

    def compare(name, fun, args, in_axes=0, out_axes=0, **options):
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        want = jax.vmap(fun, in_axes, out_axes, axis_name=AXIS)(*args)
        mine = [
            a if axis is None else jnp.moveaxis(own(jnp.moveaxis(a, axis, 0), counts), 0, axis)
            for a, axis in zip(args, axes, strict=True)
        ]
        got = pmap(fun, AXIS, in_axes=in_axes, out_axes=out_axes, **options)(*mine)
        outs = jax.tree.map(lambda _: out_axes, got) if not isinstance(out_axes, tuple) else out_axes
        rows = (
            jax.tree.map(
                lambda y, a: y if a is None else jnp.moveaxis(own(jnp.moveaxis(y, a, 0), counts), 0, a),
                want,
                outs,
                is_leaf=lambda y: y is None,
            )
            if not isinstance(got, tuple)
            else tuple(
                y if a is None else jnp.moveaxis(own(jnp.moveaxis(y, a, 0), counts), 0, a)
                for y, a in zip(want, out_axes, strict=True)
            )
        )
        for k, (a, b) in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(rows), strict=True)):
            if fault := difference(a, b, 1e-4):
                found[f"{name} {k}"] = fault
            if not a.is_fully_addressable:
                found[f"{name} {k}"] = "lies on other processes"

    compare("axes", lambda a, b: (a + lax.psum(b, AXIS), a * b), (x.T, x[0]), (1, None), (1, 0))
    compare("equal", lambda a: (lax.pmean(a, AXIS), a), (x,), 0, (None, 0))
    compare("keys", lambda k: (jax.random.normal(k, (2,)), lax.psum(jax.random.uniform(k), AXIS)), (keys,), 0, (0, 0))
    compare("keys out", lambda k: (jax.random.fold_in(k, 7), 1.0), (keys,), 0, (0, 0))
    compare("empty", lambda a: (a[:0], a), (x,), 0, (0, 0))
    for dtype in ("bool", "int4", "int8", "uint16", "int32", "bfloat16", "float16", "complex64"):
        compare(dtype, lambda a: (a, lax.all_gather(a, AXIS)), ((x * 9).astype(dtype),), 0, (0, 0))
    compare("donated", lambda a: (a * 2, lax.psum(a, AXIS)), (jnp.asarray(x),), 0, (0, 0), donate_argnums=0)
    none = np.zeros((n, 2), jax.dtypes.float0)
    if (got := pmap(lambda a: a)(own(none, counts))).shape != (counts[jax.process_index()], 2) or got.dtype != bool:
        found["float0"] = f"{got.dtype}{got.shape}"
    static = pmap(lambda a, k: a * k, static_broadcasted_argnums=1)(own(x, counts), 3)
    if fault := difference(static, own(x * 3, counts), 1e-6):
        found["static"] = fault
    return found


def nested(sizes, counts):
    """Maps inside maps: the outer level over processes, the inner levels on the devices of their process."""
    outer, inner = sizes
    x = np.random.default_rng(1).uniform(size=(outer, inner, 3)).astype(np.float32)

    def levels(over):
        def inside(y):
            return y * lax.psum(y, "j") + lax.pmean(y, AXIS), lax.psum(y, (AXIS, "j"))

        return over(lambda z: over(inside, axis_name="j")(z), axis_name=AXIS)

    want = levels(jax.vmap)(x)
    return differences(levels(pmap)(own(x, counts)), want, counts)


def callbacks(counts):
    """How often each replica calls back in this process, and what a failure raises."""
    n, seen = sum(counts), []

    def fun(x):
        jax.debug.callback(lambda i: seen.append(int(i)), lax.axis_index(AXIS))
        return lax.psum(jax.pure_callback(lambda v: np.float32(2 * v), SCALAR, x, vmap_method="sequential"), AXIS)

    x = np.arange(n, dtype=np.float32)
    out = np.asarray(pmap(fun, AXIS)(own(x, counts)))
    jax.effects_barrier()
    return sorted(seen), out.tolist()


def failing_callback(counts):
    """The error of a callback that fails in the last replica, as each process gets it."""
    n = sum(counts)

    def fail(v):
        if v == n - 1:
            raise ValueError("no good")
        return np.float32(v)

    def fun(x):
        return lax.psum(jax.pure_callback(fail, SCALAR, x, vmap_method="sequential"), AXIS)

    return raised(lambda: jax.block_until_ready(pmap(fun, AXIS)(own(np.arange(n, dtype=np.float32), counts))))


def raised(call):
    """The type and the text of what a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def local_maps():
    """A map over the devices of this process alone, which the other processes need not call."""
    if jax.process_index() != 0:
        return None
    x = np.arange(5.0, dtype=np.float32)
    mapped = pmap(lambda x: lax.psum(x, AXIS), AXIS, devices=jax.local_devices())
    return np.asarray(mapped(x)).tolist()


def helpers():
    """``replicate``, ``shard``, ``unreplicate``, ``local_replicas``, ``fetch`` and ``replicas``."""
    mine = replicax.distributed.replicas(10)
    state = replicax.replicate({"w": np.ones(3, np.float32)}, len(mine))
    batch = replicax.shard(np.arange(4 * len(mine), dtype=np.float32), len(mine)) if len(mine) else np.zeros((0, 4))
    step = pmap(lambda s, b: {"w": s["w"] + lax.psum(b.sum(), AXIS)}, AXIS)
    state = step(state, batch)
    return {
        "replicas": (mine.start, mine.stop),
        "first": replicax.unreplicate(state)["w"].tolist() if len(mine) else None,
        "rows": len(replicax.local_replicas(state)) if len(mine) else 0,
        "fetched": replicax.fetch(state)["w"].shape,
    }


# ---------------------------------------------------------------------------------------------------------------
# Faults


def new():
    """A sum over the replicas, and twice its argument, as functions that no map has compiled before."""

    def add(x):
        return lax.psum(x, AXIS)

    def double(x):
        return 2 * x

    return add, double


def hurry():
    Settings.patience, Settings.grace = 3.0, 1.0


def in_another_order():
    return raised(lambda: pmap(new()[jax.process_index()], AXIS)(np.ones((2, 3), np.float32)))


def of_another_type():
    return raised(lambda: pmap(new()[0], AXIS)(np.ones((2, 3 + jax.process_index()), np.float32)))


def closing_over_another_array():
    mine = np.full(3, jax.process_index(), np.float32)
    return raised(lambda: pmap(lambda x: x + mine, AXIS)(np.ones((2, 3), np.float32)))


def that_depends_on_the_process():
    return raised(lambda: pmap(lambda x: x * 2 if jax.process_index() else x + 1, AXIS)(np.ones((2, 3), np.float32)))


def with_another_unmapped_argument():
    mine = np.full(3, jax.process_index(), np.float32)
    return raised(lambda: pmap(lambda x, y: x + y, AXIS, in_axes=(0, None))(np.ones((2, 3), np.float32), mine))


def that_raises_in_one_process():
    def fun(x):
        if jax.process_index() == 1:
            raise ValueError("not here")
        return x

    return raised(lambda: pmap(fun, AXIS)(np.ones((2, 3), np.float32)))


def with_an_array_of_all_processes():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "a")
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    x = jax.make_array_from_callback((4, 3), where, lambda index: np.ones((1, 3), np.float32))
    return raised(lambda: pmap(new()[0], AXIS)(x))


def without_rows():
    return raised(lambda: pmap(new()[0], AXIS)(np.ones((0, 3), np.float32)))


def with_another_axis_size():
    return raised(lambda: pmap(new()[0], AXIS, axis_size=3)(np.ones((2, 3), np.float32)))


def under_grad():
    return raised(lambda: jax.grad(lambda x: pmap(new()[0], AXIS)(x).sum())(np.ones((2, 3), np.float32)))


def warm_and_not():
    """Process 1 has a short last batch; process 0 has not, and its program is already compiled."""
    hurry()
    mapped = pmap(new()[0], AXIS)
    mapped(np.ones((4, 3), np.float32))
    rows = 3 if jax.process_index() else 4
    return raised(lambda: jax.block_until_ready(mapped(np.ones((rows, 3), np.float32))))


def never_comes():
    hurry()
    if jax.process_index() == 1:
        return "elsewhere"
    return raised(lambda: pmap(new()[0], AXIS)(np.ones((2, 3), np.float32)))


def agrees_again():
    """After an error that all processes have got, they go on."""
    return np.asarray(pmap(new()[0], AXIS)(np.ones((2, 3), np.float32))).tolist()


def ahead_of_time(counts):
    """The stages of a map, and whether an explanation and the types of results are those of own rows."""
    x = own(np.arange(2.0 * sum(counts), dtype=np.float32).reshape(-1, 2), counts)
    mapped = pmap(new()[0], AXIS)
    shape = mapped.eval_shape(x).shape
    compiled = mapped.lower(x).compile()
    return shape, np.asarray(compiled(x)).tolist(), np.asarray(mapped(x)).tolist()


def under_a_tracer_when_warm():
    """A map that was called eagerly, then under ``jit`` with global arrays, in ``eval_shape``, and in another map."""
    mapped = pmap(lambda x: x + lax.psum(x, AXIS), AXIS)
    rows = np.arange(4.0, dtype=np.float32)
    mapped(own(rows, (2, 2)))
    mapped(own(rows, (2, 2)))
    where = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(jax.devices()), "a"), jax.sharding.PartitionSpec("a"))
    x = jax.make_array_from_callback((4,), where, lambda index: rows[index])
    inner = pmap(lambda x: mapped(x), "j")(own(np.stack([rows, rows]), (1, 1)))
    return replicax.fetch(jax.jit(mapped)(x)).tolist(), str(jax.eval_shape(mapped, x).dtype), np.asarray(inner).tolist()


def donated_in_every_process():
    """Whether the donated argument is deleted, with padding in one process alone."""
    x = jnp.ones((3 - jax.process_index(), 2))
    pmap(lambda x: x + 1, donate_argnums=0)(x)
    return x.is_deleted()


def of_another_setting():
    jax.config.update("jax_enable_x64", jax.process_index() == 1)
    try:
        return raised(lambda: pmap(new()[0], AXIS)(np.ones((2, 3), np.float32)))
    finally:
        jax.config.update("jax_enable_x64", False)
