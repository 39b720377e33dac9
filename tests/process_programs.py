"""What ``tests/test_processes.py`` runs in every process. Each function returns what is wrong, by name, or a value."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import collectives
import replicax
import transforms
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
# Transformations


def transformed(name, program, counts, kind):
    """A transformation of a map of own rows, or of global arrays: the results of this process, as NumPy arrays."""
    x, mapped = own(transforms.rows(sum(counts)), counts), pmap(transforms.PROGRAMS[program], AXIS)
    if kind != "own rows":
        return replicax.fetch(transforms.TRANSFORMS[name](mapped, replicax.to_global(x)))
    of_all = transforms.weights
    transforms.weights = lambda x: own(of_all(jnp.zeros((sum(counts), *x.shape[1:]))), counts)
    try:
        return replicax.fetch(transforms.TRANSFORMS[name](mapped, x))
    finally:
        transforms.weights = of_all


def derivatives(counts):
    """The gradient by own rows, by an argument for all and by a closed-over array, and what is on which devices."""
    x = own(transforms.rows(sum(counts)), counts)
    w, v = np.array([1, 2, 3], np.float32), jnp.array([3, 1, 2], jnp.float32)

    def loss(x, w, v):
        def fun(x, w):
            return jnp.sin(x * w) * lax.psum(x * v, AXIS), lax.pmean(x * w * v, AXIS)

        rows, equal = pmap(fun, AXIS, in_axes=(0, None), out_axes=(0, None))(x, w)
        return (rows**2).sum() + equal.sum()

    found = jax.grad(loss, (0, 1, 2))(x, w, v)
    return [np.asarray(x) for x in found], all(x.is_fully_addressable for x in found)


def round_trip(counts):
    """Rows made global along an axis, and back, with keys and arrays that are equal everywhere."""
    n, mine = sum(counts), replicax.distributed.replicas(sum(counts))
    x = transforms.rows(n)
    found: dict[str, object] = {}
    keys = jax.random.split(jax.random.key(3), n)
    for name, tree, axis in (("rows", x, 0), ("jax.Array", jnp.asarray(x), 0), ("columns", x.T, -1)):
        every = replicax.to_global(own(tree, counts) if axis == 0 else own(tree.T, counts).T, axis)
        back = replicax.to_local(every, axis)
        right = jnp.moveaxis(jnp.moveaxis(tree, axis, 0)[mine.start : mine.stop], 0, axis)
        found |= {name: difference(replicax.fetch(every), tree, 0), f"{name}, own": difference(back, right, 0)}
        found[f"{name}, devices"] = every.sharding.device_set == {*jax.devices()} and back.is_fully_addressable
    every = replicax.to_global({"keys": own(keys, counts)})["keys"]
    found["keys"] = difference(jax.random.key_data(replicax.fetch(every)), jax.random.key_data(keys), 0)
    w: dict[str, Any] = replicax.to_global({"w": np.ones(3, np.float32), "b": 2.0}, axis=None)
    found["equal"] = w["w"].sharding.is_fully_replicated and np.asarray(replicax.to_local(w, axis=None)["b"]) == 2.0
    again = replicax.to_global(every)
    found["again"] = again is every and replicax.to_local(x) is x
    return {name: said for name, said in found.items() if said not in (None, True)}


def own_rows_with_a_global_parameter(counts):
    """A parameter on all processes, with own rows: values, and a derivative that is global again."""
    x, w = own(transforms.rows(sum(counts)), counts), replicax.to_global(np.array([1, 2, 3], np.float32), axis=None)
    total = pmap(lambda x, w: lax.psum(x * w, AXIS), AXIS, in_axes=(0, None), out_axes=None)
    gradient = jax.grad(lambda w: total(x, w).sum())(w)
    return np.asarray(total(x, w)).tolist(), replicax.fetch(gradient).tolist(), gradient.is_fully_addressable


def global_arrays(counts):
    """A map of global arrays: again when warm, donated, ahead of time, without jit, and of what ``debug_nans`` sees."""
    n, found = sum(counts), {}
    x = transforms.rows(n)
    mapped = pmap(
        lambda x, w: (x * w - lax.pmean(x, AXIS), lax.psum(x, AXIS)), AXIS, in_axes=(0, None), out_axes=(0, None)
    )
    right = np.asarray(x * 2 - x.mean(0)), x.sum(0)

    def compare(name, out):
        for k, (a, b) in enumerate(zip(replicax.fetch(out), right, strict=True)):
            if fault := difference(a, b, 1e-5):
                found[f"{name} {k}"] = fault

    every = replicax.to_global(own(x, counts))
    for name in ("cold", "warm", "warm again"):
        compare(name, mapped(every, np.float32(2)))
    compare("ahead of time", mapped.lower(every, np.float32(2)).compile()(every, np.float32(2)))
    shape = mapped.eval_shape(every, np.float32(2))[0].shape
    found |= {} if shape == x.shape else {"eval_shape": shape}
    with jax.disable_jit():
        compare("disable_jit", mapped(every, np.float32(2)))
        own_out = pmap(lambda x: lax.psum(x, AXIS), AXIS, out_axes=None)(own(x, counts))
        if fault := difference(own_out, right[1], 1e-5):
            found["disable_jit, own rows"] = fault
    with jax.debug_nans(True):
        compare("debug_nans", mapped(every, np.float32(2)))
    donating = pmap(lambda x: x + 1, donate_argnums=0)
    other = donating(every)
    if not every.is_deleted() or (fault := difference(replicax.fetch(other), x + 1, 1e-6)):
        found["donated"] = f"{every.is_deleted()}, {fault}"
    said = mapped.explain_cache_miss(own(x, counts), np.float32(2))
    if "called with the rows of each process, and was called with arrays over all processes" not in said:
        found["explained"] = said
    return found


def memory_of_a_device(counts):
    """The bytes of one row, and the bytes of arguments, results and temporaries on one device of a map of such rows."""
    x = np.ones((counts[jax.process_index()], 1 << 16), np.float32)
    analysis = pmap(lambda x: jnp.sin(x) + lax.psum(x.sum(), AXIS), AXIS).lower(x).compile().memory_analysis()
    return (
        4 << 16,
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.temp_size_in_bytes,
    )


def own_and_global_in_turn():
    """The rows of results, and whether they are of this process, of maps of own rows and of global arrays in turn."""
    x = np.ones((2, 3), np.float32)
    every, found = replicax.to_global(x), []
    turns = [x, every, every, x, x, every, x, every, every, every, every, x]
    rows, whole = (pmap(lambda x: lax.psum(x, AXIS), AXIS, out_axes=axis) for axis in (0, None))
    for arg in turns:
        y = rows(arg)
        found.append((len(y), y.is_fully_addressable, whole(arg).is_fully_addressable))
    return found == [(2, True, True) if arg is x else (4, False, False) for arg in turns]


def more_processes_than_replicas():
    """``jit`` of a map of one replica, by a global array, and a loop around it."""
    x = replicax.to_global(np.ones((1 - jax.process_index(), 2), np.float32))
    mapped = pmap(lambda x: x + lax.psum(x, AXIS), AXIS)
    looped = jax.jit(lambda x: lax.scan(lambda c, _: (mapped(c), None), x, None, length=2)[0])
    return replicax.fetch(jax.jit(mapped)(x)).tolist(), replicax.fetch(looped(x)).tolist()


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


def with_other_lanes():
    lanes = ["vectorized", "sequential"][jax.process_index()]
    return raised(lambda: pmap(lambda x: 2 * x, AXIS, lanes=lanes)(np.ones((4, 3), np.float32)))


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


def without_rows():
    return raised(lambda: pmap(new()[0], AXIS)(np.ones((0, 3), np.float32)))


def with_another_axis_size():
    return raised(lambda: pmap(new()[0], AXIS, axis_size=3)(np.ones((2, 3), np.float32)))


def rows_of_one_and_of_all():
    x = np.ones((2, 3), np.float32)
    return raised(lambda: pmap(lambda a, b: a + b, AXIS)(x, replicax.to_global(x)))


def a_local_array_closed_over_in_jit():
    x = pmap(lambda x: x)(np.ones((2, 3), np.float32))
    return raised(lambda: jax.jit(lambda: pmap(new()[0], AXIS)(x))())


def a_local_array_passed_to_jit():
    x = pmap(lambda x: x)(np.ones((2, 3), np.float32))
    return raised(lambda: jax.jit(pmap(new()[0], AXIS))(x))


def a_split_array_for_every_replica():
    x = np.ones((2, 3), np.float32)
    return raised(lambda: pmap(lambda a, b: a + b[0], AXIS, in_axes=(0, None))(x, replicax.to_global(x)))


def a_global_array_in_a_local_map():
    x = replicax.to_global(np.ones((2, 3), np.float32))
    return raised(lambda: pmap(lambda x: x, devices=jax.local_devices())(x))


def a_global_array_on_other_devices():
    some = [jax.devices()[0], jax.devices()[-1]]
    x = replicax.to_global(np.ones((2, 3), np.float32), devices=some)
    return raised(lambda: pmap(new()[0], AXIS)(x))


def jacobians_by_unequal_rows():
    x = np.ones((2 + jax.process_index(), 3), np.float32)
    return raised(lambda: jax.jacfwd(lambda x: pmap(new()[0], AXIS)(x).sum())(x))


def jacobians_of_unequal_rows():
    x, add = np.ones((2 + jax.process_index(), 3), np.float32), new()[0]
    mapped = pmap(lambda x, w: add(x) * w, AXIS, in_axes=(0, None))
    return raised(lambda: jax.jacrev(lambda w: mapped(x, w))(np.float32(2)))


def vmap_of_other_sizes():
    x = np.ones((4 + jax.process_index(), 2, 3), np.float32)
    return raised(lambda: jax.vmap(pmap(new()[0], AXIS))(x))


def a_string_in_one_process():
    x = np.ones((2, 3), np.float32)
    return raised(lambda: pmap(new()[0], AXIS)("no" if jax.process_index() else x))


def no_such_axis_in_one_process():
    x = np.ones((2, 3), np.float32)
    return raised(lambda: replicax.to_global(x, axis=3 * jax.process_index()))


def to_global_in_jit():
    return raised(lambda: jax.jit(replicax.to_global)(np.ones((2, 3), np.float32)))


def to_local_in_jit():
    x = replicax.to_global(np.ones((2, 3), np.float32))
    return raised(lambda: jax.jit(replicax.to_local)(x))


def to_local_of_a_split_array():
    x = replicax.to_global(np.ones((2, 3), np.float32))
    return raised(lambda: replicax.to_local(x, axis=None))


def to_global_of_other_types():
    return raised(lambda: replicax.to_global(np.ones((2, 3 + jax.process_index()), np.float32)))


def to_global_of_other_values():
    return raised(lambda: replicax.to_global({"w": np.full(3, jax.process_index())}, axis=None))


def to_global_without_rows():
    return raised(lambda: replicax.to_global(np.ones((0, 3), np.float32)))


def a_map_and_to_global():
    x = np.ones((2, 3), np.float32)
    return raised(lambda: replicax.to_global(x) if jax.process_index() else pmap(new()[0], AXIS)(x))


def warm_and_not():
    """Process 1 has a short last batch; process 0 has not, and its program is already compiled."""
    hurry()
    mapped = pmap(new()[0], AXIS)
    mapped(np.ones((4, 3), np.float32))
    rows = 3 if jax.process_index() else 4
    return raised(lambda: jax.block_until_ready(mapped(np.ones((rows, 3), np.float32))))


def warm_after_an_abort():
    """Process 1 calls a warm map after it has given up."""
    hurry()
    mapped, x = pmap(new()[0], AXIS), np.ones((2, 3), np.float32)
    mapped(x)
    mapped(x)
    if jax.process_index() == 0:
        return raised(lambda: jax.block_until_ready(mapped(x)))
    first = raised(lambda: mapped(x.astype(np.float16)))
    second = raised(lambda: jax.block_until_ready(mapped(100 * x)))
    print(f"said {first == second}", flush=True)
    return first


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
