"""The statements of random programs, and the Hypothesis strategy for programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from fuzz_programs import (
    AXIS,
    EXACT,
    LARGEST,
    SHAPES,
    SMOOTH,
    Argument,
    Flags,
    Function,
    Line,
    Program,
    Scope,
    Value,
    Writer,
    bounded,
    either,
)

Write = Callable[[Writer, Scope], None]

# ---------------------------------------------------------------------------------------------------------------
# Collectives


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def communicates(w: Writer, scope: Scope, name: str, *facts: str) -> None:
    w.communications += 1
    w.note(name, *facts)
    if not scope.together:
        w.note("communicates apart")


def groups(w: Writer, scope: Scope, name: str, *, uneven: bool = False) -> tuple[str, int]:
    """Sometimes ``axis_index_groups``, as Python code; and the number of replicas in a group."""
    if w.plain or w.n == 1 or w.one_in(2) or (scope.batched and name in ("all_to_all", "pswapaxes")):
        return "", w.n  # JAX has no vmap rule for these two with groups
    order = w.draw(st.permutations(range(w.n))) if w.one_in(2) else list(range(w.n))
    size = w.one_of(divisors(w.n)[::-1])
    cuts = list(range(0, w.n + 1, size))
    if uneven and w.one_in(2):
        cuts = [0, w.draw(st.integers(1, w.n - 1)), w.n]
        size = cuts[1]
    w.beyond_vmap()
    w.note(f"{name} in groups")
    return f", axis_index_groups={[order[a:b] for a, b in itertools.pairwise(cuts)]}", size


def summed(w: Writer, value: Value) -> None:
    """Notes a complex sum. ``jax.pmap`` cannot run it: XLA aborts when it folds a sum of complex constants."""
    if value.dtype == "complex64":
        w.note("complex sum")


def reduction(name: str, but: Sequence[str]) -> Write:
    def write(w: Writer, scope: Scope) -> None:
        a = w.value(scope, lambda v: v.dtype not in but)
        if a is None:
            return
        summed(w, a)
        axis = w.one_of([AXIS, '("i", "j")', '"j"', '("j", "i")']) if scope.rows and w.one_in(2) else AXIS
        grouped = groups(w, scope, name, uneven=True)[0] if axis == AXIS else ""
        operand = f"lax.stop_gradient({a.name})" if name in ("pmax", "pmin") else a.name
        text, dtype = f"lax.{name}({operand}, {axis}{grouped})", a.dtype
        if name == "psum":
            dtype = "int32" if a.dtype == "bool" else a.dtype
            text = bounded(text, dtype, w.n if axis == AXIS else 4 * w.n)
        if name == "pmean" and dtype in EXACT:
            dtype = "float32"
        communicates(w, scope, name)
        w.assign(scope, text, dtype, a.shape, a.varies if axis == '"j"' else bool(grouped))

    return write


def all_gather(w: Writer, scope: Scope) -> None:
    a = w.value(scope, lambda v: v.size * w.n <= LARGEST)
    if a is None:
        return
    summed(w, a)
    grouped, size = groups(w, scope, "all_gather")
    tiled = bool(a.shape) and w.one_in(2)
    axis = w.draw(st.integers(0, len(a.shape) - tiled))
    shape = list(a.shape)
    if tiled:
        shape[axis] *= size
    else:
        shape.insert(axis, size)
    if w.one_in(4):
        axis -= len(shape)
    communicates(w, scope, "all_gather")
    w.assign(
        scope, f"lax.all_gather({a.name}, {AXIS}, axis={axis}, tiled={tiled}{grouped})", a.dtype, shape, bool(grouped)
    )


def divided(
    w: Writer, scope: Scope, size: int, tiled: bool, of: Sequence[str] = (*SMOOTH, *EXACT)
) -> tuple[Value, int] | None:
    """A value with a dimension that can be split over ``size`` replicas, and the index of that dimension."""
    a = w.value(scope, lambda v: v.dtype in of and v.size * size * (1 + tiled) <= LARGEST)
    if a is None:
        return None
    fits = [k for k, length in enumerate(a.shape) if (length % size == 0 if tiled else length == size)]
    if fits and w.one_in(2):
        return a, w.one_of(fits)
    axis = w.draw(st.integers(0, len(a.shape)))
    length = size * (1 + (tiled and w.one_in(2)))
    shape = (*a.shape[:axis], length, *a.shape[axis:])
    return Value(f"rows({a.name}, {length}, {axis})", a.dtype, shape, a.varies), axis


def psum_scatter(w: Writer, scope: Scope) -> None:
    grouped, size = groups(w, scope, "psum_scatter")
    tiled = w.one_in(2)
    operand = divided(w, scope, size, tiled, ("float32",) if w.plain else ("float32", *EXACT[2:], "int32"))
    if operand is None:
        return
    a, axis = operand
    shape = list(a.shape)
    if tiled:
        shape[axis] //= size
    else:
        del shape[axis]
    if a.dtype != "float32":
        w.beyond_vmap()  # the vmap rule adds to a float32 zero
    communicates(w, scope, "psum_scatter")
    text = f"lax.psum_scatter({a.name}, {AXIS}, scatter_dimension={axis}, tiled={tiled}{grouped})"
    w.assign(scope, bounded(text, a.dtype, w.n), a.dtype, shape, True)


def all_to_all(w: Writer, scope: Scope) -> None:
    grouped, size = groups(w, scope, "all_to_all")
    tiled = w.one_in(2)
    operand = divided(w, scope, size, tiled)
    if operand is None:
        return
    a, split = operand
    concat = w.draw(st.integers(0, len(a.shape) - 1))
    shape = list(a.shape)
    if tiled:
        shape[split] //= size
        shape[concat] *= size
    else:
        del shape[split]
        shape.insert(concat, size)
    exchange(w, scope, "all_to_all", f"{split}, {concat}, tiled={tiled}{grouped}", a, shape)


def pswapaxes(w: Writer, scope: Scope) -> None:
    grouped, size = groups(w, scope, "pswapaxes")
    operand = divided(w, scope, size, False)
    if operand is not None:
        exchange(w, scope, "pswapaxes", f"{operand[1]}{grouped}", operand[0], operand[0].shape)


def exchange(w: Writer, scope: Scope, name: str, options: str, a: Value, shape: Sequence[int]) -> None:
    if (a.varies is not True or scope.smooth or scope.batched) and not w.beyond_vmap():
        return  # vmap has no correct rule for values that are equal in all replicas, nor under another vmap
    communicates(w, scope, name)
    w.assign(scope, f"lax.{name}({a.name}, {AXIS}, {options})", a.dtype, shape, True)


def ppermute(w: Writer, scope: Scope) -> None:
    a, n = w.any_value(scope), w.n
    kind = w.one_of(["rotation", "any", "self"] if w.plain else ["partial", "any", "empty", "self"])
    to = w.draw(st.permutations(range(n))) if kind in ("any", "partial") else [(k + 1) % n for k in range(n)]
    pairs = [(k, k if kind == "self" else to[k]) for k in range(n)]
    if kind in ("partial", "empty"):
        pairs = [p for p in pairs if kind == "partial" and w.one_in(2)]
    if len(pairs) < n:
        w.beyond_vmap()
        w.note("ppermute, partial")
    communicates(w, scope, "ppermute")
    w.assign(scope, f"lax.ppermute({a.name}, {AXIS}, {pairs})", a.dtype, a.shape, True if a.varies else None)


def pshuffle(w: Writer, scope: Scope) -> None:
    a = w.any_value(scope)
    communicates(w, scope, "pshuffle")
    perm = list(w.draw(st.permutations(range(w.n))))
    w.assign(scope, f"lax.pshuffle({a.name}, {AXIS}, {perm})", a.dtype, a.shape, True if a.varies else None)


def pbroadcast(w: Writer, scope: Scope) -> None:
    a = w.any_value(scope)
    if not w.beyond_vmap():
        return
    communicates(w, scope, "pbroadcast")
    source = w.draw(st.integers(0, w.n - 1))
    # JAX's transpose of pbroadcast supports only scalars.
    operand = a.name if a.shape == () or scope.forward else f"lax.stop_gradient({a.name})"
    w.assign(scope, f"lax.pbroadcast({operand}, {AXIS}, {source})", a.dtype, a.shape, None)


def ragged_all_to_all(w: Writer, scope: Scope) -> None:
    a = w.any_value(scope)
    if w.n > 6 or not w.beyond_vmap():
        return  # lockstep takes too long with many replicas
    communicates(w, scope, "ragged_all_to_all")
    w.assign(scope, f"ragged({a.name}, {w.n})", a.dtype, (2 * w.n, 2), True)


def axis_index(w: Writer, scope: Scope) -> None:
    w.note("axis_index")
    w.assign(scope, f"lax.axis_index({AXIS})", "int32", (), True)


def axis_size(w: Writer, scope: Scope) -> None:
    w.note("axis_size")
    w.assign(scope, f"jnp.int32(lax.axis_size({AXIS}))", "int32", (), False)


COLLECTIVES: dict[str, Write] = {
    "psum": reduction("psum", ()),
    "ppermute": ppermute,
    "all_gather": all_gather,
    "psum_scatter": psum_scatter,
    "all_to_all": all_to_all,
    "pmax": reduction("pmax", ("complex64",)),
    "pmean": reduction("pmean", ("bool", "bfloat16", "float16")),
    "pmin": reduction("pmin", ("complex64",)),
    "pshuffle": pshuffle,
    "pbroadcast": pbroadcast,
    "pswapaxes": pswapaxes,
    "axis_index": axis_index,
    "axis_size": axis_size,
    "ragged_all_to_all": ragged_all_to_all,
}


# ---------------------------------------------------------------------------------------------------------------
# Control flow, derivatives and rules


def call_of(name: str, transform: str) -> Write:
    """Writes a call of a function under ``jit`` or ``checkpoint``."""

    def write(w: Writer, scope: Scope) -> None:
        args = [w.any_value(scope) for _ in range(w.draw(st.integers(1, 2)))]
        params = [w.parameter(a, varies=a.varies) for a in args]
        f, (out,) = w.function(scope, params, [None])
        w.note(name)
        w.assign(scope, f"{transform}({f})({', '.join(a.name for a in args)})", out.dtype, out.shape, out.varies)

    return write


def over_rows(name: str) -> Write:
    """Writes a map over the rows of a value: ``vmap``, ``lax.map``, or a nested ``pmap``."""

    def write(w: Writer, scope: Scope) -> None:
        a = w.value(scope, lambda v: v.shape and v.shape[0] <= 4)
        if a is None:
            a = w.any_value(scope)
            a = Value(f"rows({a.name}, 2, 0)", a.dtype, (2, *a.shape), a.varies)
        flags: Flags = {} if name == "map" else {"batched": True, "rows": True}
        f, (out,) = w.function(scope, [w.parameter(a, a.shape[1:], a.varies)], [None], **flags)
        w.note(name)
        text = {
            "vmap": f'jax.vmap({f}, axis_name="j")({a.name})',
            "map": f"lax.map({f}, {a.name})",
            "map inside": f'inner({f}, axis_name="j")({a.name})',
        }[name]
        w.assign(scope, text, out.dtype, (a.shape[0], *out.shape), out.varies)

    return write


def carried(w: Writer, scope: Scope) -> tuple[list[Value], list[Value]]:
    """One or two initial carries of a loop, and the body's parameters for them."""
    suits = lambda v: v.size <= 64
    first = w.value(scope, suits) or scope.values[0]
    values = [first, *([w.value(scope, suits) or first] if w.one_in(3) else [])]
    return values, [w.parameter(v, varies=True if v.varies else None) for v in values]


def several(names: Sequence[str]) -> str:
    return "(" + "".join(f"{name}, " for name in names) + ")"


def carry_on(w: Writer, scope: Scope, text: str, values: Sequence[Value], outs: Sequence[Value], ys: str = "") -> None:
    """Appends a loop, and its final carries as new values."""
    names = [w.name("v") for _ in values]
    scope.statements.append(Line(f"{several(names)}{ys} = {text}"))
    for name, v, out in zip(names, values, outs, strict=True):
        scope.values.append(Value(name, v.dtype, v.shape, True if True in (v.varies, out.varies) else None))


def scan(w: Writer, scope: Scope) -> None:
    values, params = carried(w, scope)
    xs = w.value(scope, lambda v: v.shape and v.shape[0] <= 4)
    rows = [w.parameter(xs, xs.shape[1:], xs.varies)] if xs else []
    f, (*outs, y) = w.function(
        scope,
        [*params, *rows],
        [*values, None],
        lambda names: f"{several(names[:-1])}, {names[-1]}",
        signature=f"carry, {rows[0].name if rows else '_'}",
        unpack=[Line(f"{several([p.name for p in params])} = carry")],
    )
    length, ys = xs.shape[0] if xs else 2, w.name("v")
    options = f"{xs.name if xs else None}, length={length}, reverse={w.one_in(2)}"
    w.note("scan")
    carry_on(w, scope, f"lax.scan({f}, {several([v.name for v in values])}, {options})", values, outs, f", {ys}")
    if length * y.size <= LARGEST:
        scope.values.append(Value(ys, y.dtype, (length, *y.shape), True if y.varies else None))


def fori_loop(w: Writer, scope: Scope) -> None:
    values, params = carried(w, scope)
    counter = Value(w.name("k"), "int32", (), None)
    f, outs = w.function(
        scope,
        [counter, *params],
        values,
        several,
        signature=f"{counter.name}, carry",
        unpack=[Line(f"{several([p.name for p in params])} = carry")],
    )
    w.note("fori_loop")
    times = w.draw(st.integers(0, 3))
    carry_on(w, scope, f"lax.fori_loop(0, {times}, {f}, {several([v.name for v in values])})", values, outs)


def while_loop(w: Writer, scope: Scope) -> None:
    """A loop of at most three iterations, which replicas leave alone or together."""
    if not w.plain and not w.one_in(3):
        return  # lockstep runs them operation by operation, which is slow
    values, params = carried(w, scope)
    if any(v.dtype in SMOOTH for v in values):
        if scope.smooth:
            return
        w.note("no reverse derivative")
    bound, varies = w.number(scope, 4)
    condition = w.one_of(
        ["k < {}", '(k < {}) & (lax.pmax(k, "i") < 2)', 'k < jnp.minimum({}, 1 + lax.pmin(k, "i"))']
    ).format(bound)
    apart, before = varies is not False, w.communications
    counter = Value(w.name("k"), "int32", (), None)
    f, outs = w.function(
        scope,
        [counter, *params],
        values,
        lambda names: several([f"{counter.name} + 1", *names]),
        signature="state",
        unpack=[Line(f"{several([counter.name, *[p.name for p in params]])} = state")],
        together=scope.together and not apart,
    )
    goes_on = w.name("f")
    scope.statements.append(Function(goes_on, "state", (Line("k, *_ = state"),), condition))
    inside = "pm" in condition
    if inside:
        communicates(w, scope, "pmax")
    w.note("while_loop", *["while_loop, replicas apart"] * apart, *["while_loop, condition communicates"] * inside)
    if w.communications > before:
        w.note("communicating while_loop", *["communicates apart"] * apart)
    start = several(["jnp.int32(0)", *(v.name for v in values)])
    outs = [Value(o.name, o.dtype, o.shape, True if varies else o.varies) for o in outs]
    carry_on(w, scope, f"lax.while_loop({goes_on}, {f}, {start})[1:]", values, outs)


def branches(name: str) -> Write:
    """Writes a ``cond`` or ``switch``."""

    def write(w: Writer, scope: Scope) -> None:
        a = w.any_value(scope)
        count = 2 if name == "cond" else w.draw(st.integers(2, 3))
        index, varies = w.number(scope, count)
        apart, before = varies is not False, w.communications
        made = [
            w.function(scope, [w.parameter(a, varies=a.varies)], [a], together=scope.together and not apart)
            for _ in range(count)
        ]
        w.note(name, *[f"{name}, replicas apart"] * apart)
        if apart and w.communications > before:
            w.note("communicating choice, replicas apart")
        varies = either(varies, *(out.varies for _, (out,) in made))
        functions = ", ".join(f for f, _ in made)
        text = f"{index} == 0, {functions}" if name == "cond" else f"{index}, [{functions}]"
        w.assign(scope, f"lax.{name}({text}, {a.name})", a.dtype, a.shape, varies)

    return write


def associative_scan(w: Writer, scope: Scope) -> None:
    a = w.value(scope, lambda v: v.shape and v.shape[0] <= 4 and v.dtype in ("float32", "int32", "bfloat16"))
    if a is not None:
        w.note("associative_scan")
        communicates(w, scope, "psum")
        f = f"lambda p, q: {bounded(f'(p + lax.psum(q, {AXIS}))', a.dtype, 1 + w.n)}"
        w.assign(scope, f"lax.associative_scan({f}, {a.name})", a.dtype, a.shape, True if a.varies else None)


def derivative(name: str) -> Write:
    """Writes a derivative inside the program."""

    def write(w: Writer, scope: Scope) -> None:
        a = w.value(scope, lambda v: v.dtype == "float32" and v.size <= 24)
        if a is None:
            return
        scalar = name in ("grad", "checkpointed grad")
        like = Value("", "float32", () if scalar else (2,), None)
        returns = (lambda names: f"jnp.sum({names[0]})") if scalar else ", ".join
        if scalar:
            like = Value("", "float32", a.shape, None)
        forward = name in ("jvp", "jacfwd")
        flags: Flags = {"smooth": scope.smooth or not forward, "forward": scope.forward or forward}
        flags["batched"] = scope.batched or name in ("jacfwd", "jacrev")
        f, _ = w.function(scope, [w.parameter(a, varies=a.varies)], [like], returns, **flags)
        text, shape = {
            "grad": (f"jax.grad({f})({a.name})", a.shape),
            "checkpointed grad": (f"jax.grad(jax.checkpoint({f}))({a.name})", a.shape),
            "jvp": (f"jax.jvp({f}, ({a.name},), (jnp.cos({a.name}),))[1]", (2,)),
            "vjp": (f"jax.vjp({f}, {a.name})[1](jnp.float32([1, 2]))[0]", a.shape),
            "jacfwd": (f"jax.jacfwd({f})({a.name})", (2, *a.shape)),
            "jacrev": (f"jax.jacrev({f})({a.name})", (2, *a.shape)),
        }[name]
        w.note(name)
        w.assign(scope, f"jnp.sin({text} / 3)", "float32", shape, None)

    return write


def rule(name: str) -> Write:
    """Writes a ``custom_jvp`` or ``custom_vjp`` with a deliberately wrong rule, which may communicate."""

    def write(w: Writer, scope: Scope) -> None:
        a = w.value(scope, lambda v: v.dtype == "float32")
        if a is None or (name == "custom_vjp" and scope.forward):
            return  # JAX cannot differentiate a custom_vjp in forward mode
        tangent, talks = w.one_of(
            [("2 * {}", False), ('lax.pmean({}, "i") / 2', True), ('lax.ppermute({}, "i", PERM)', True)]
        )
        perm = str([(k, (k + 1) % w.n) for k in range(w.n)])
        tangent = tangent.format("t").replace("PERM", perm)
        f, (out,) = w.function(scope, [w.parameter(a, varies=a.varies)], [a], closed=True, decorator=f"jax.{name}")
        if name == "custom_jvp":
            body, returns = (Line("(x,), (t,) = primals, tangents"),), f"{f}(x), jnp.cos(x) * {tangent}"
            scope.statements.append(Function(f"{f}_jvp", "primals, tangents", body, returns, f"{f}.defjvp"))
        else:
            scope.statements.append(Function(f"{f}_fwd", "x", (), f"{f}(x), x"))
            scope.statements.append(Function(f"{f}_bwd", "x, t", (), f"(jnp.cos(x) * {tangent},)"))
            scope.statements.append(Line(f"{f}.defvjp({f}_fwd, {f}_bwd)"))
        w.note(name, "a rule of the user's", *[f"{name}, rule communicates"] * talks)
        if name == "custom_vjp" and (talks or out.varies is not True):
            w.note("derived by pmap alone")  # under vmap, the rule gets the sum of all replicas' cotangents
        w.assign(scope, f"{f}({a.name})", "float32", a.shape, out.varies)

    return write


CONTROL: dict[str, Write] = {
    "map inside": over_rows("map inside"),
    "scan": scan,
    "cond": branches("cond"),
    "while_loop": while_loop,
    "grad": derivative("grad"),
    "jit": call_of("jit", "jax.jit"),
    "vmap": over_rows("vmap"),
    "fori_loop": fori_loop,
    "switch": branches("switch"),
    "checkpoint": call_of("checkpoint", "jax.checkpoint"),
    "map": over_rows("map"),
    "custom_jvp": rule("custom_jvp"),
    "custom_vjp": rule("custom_vjp"),
    "associative_scan": associative_scan,
    "jvp": derivative("jvp"),
    "vjp": derivative("vjp"),
    "checkpointed grad": derivative("checkpointed grad"),
    "jacfwd": derivative("jacfwd"),
    "jacrev": derivative("jacrev"),
}


# ---------------------------------------------------------------------------------------------------------------
# The strategy


@st.composite
def programs(draw: Callable[[Any], Any], collectives: Sequence[str] | None = None) -> Program:
    """A random program, on a random number of devices."""
    devices = draw(st.sampled_from([2, 3, 1, 4, 5, 8]))
    replicas = draw(st.sampled_from(_replica_counts(devices)[draw(st.integers(0, 3))]))
    chosen = {name: COLLECTIVES[name] for name in collectives or COLLECTIVES}
    w = Writer(draw, replicas, chosen, CONTROL, plain=draw(st.integers(0, 4)) < 3)
    arguments = tuple(_argument(w, k) for k in range(draw(st.integers(1, 3))))
    scope = Scope([Value(a.name, a.dtype, a.shape, a.axis is not None) for a in arguments])
    w.note(*(a.dtype for a in arguments))
    w.statements(scope, 1, 7)
    results = scope.values[len(arguments) :][:12] or scope.values
    plain = not w.one_in(2)
    count = len(arguments)
    return Program(
        replicas=replicas,
        devices=devices,
        arguments=arguments,
        in_dict=count > 1 and w.one_in(4),
        keyword=count == 3 and arguments[-1].axis == 0 and w.one_in(3),
        body=tuple(scope.statements),
        results=tuple((v.name, 0 if plain else _out_axis(w, v)) for v in results),
        axis_size=w.one_in(4),
        under_jit=w.one_in(4),
        derivatives=w.one_in(2),
        beside_pmap=w.one_in(3),
        facts=frozenset(w.facts),
    )


def _replica_counts(devices: int) -> list[list[int]]:
    """Replica counts in four nonempty lists: N > D and not a multiple of D, N < D, a multiple of D, N = D."""
    above = [n for n in (*range(2, 14), 16, 24) if n > devices]
    ragged = [n for n in above if n % devices] or above
    below = list(range(2, devices)) or above
    return [ragged, [*below, 1], [n for n in above if n % devices == 0], [devices]]


def _argument(w: Writer, number: int) -> Argument:
    dtype = w.one_of(["float32", "int32", "float32", *SMOOTH, *EXACT])
    shape = w.one_of([*SHAPES, (w.n,), (w.n, 2)])
    axis = w.one_of([0, 0, None, -1, min(1, len(shape))])
    return Argument(f"x{number}", dtype, shape, axis)


def _out_axis(w: Writer, value: Value) -> int | None:
    axes = [0, -1, *range(1, len(value.shape) + 1)]
    return w.one_of([*axes, None, None] if value.varies is False else axes)
