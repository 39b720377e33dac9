"""The table collective × context: every JAX collective, inside every kind of control flow and transformation.

A variant is a function of one array ``x`` of shape (3,), over the mapped axis ``"i"``. Its groups and permutations
depend on the number of replicas. The reference is ``replicax.testing.lockstep``: ``jax.vmap`` does not support groups
or partial permutations, and its ``all_to_all`` is wrong for operands that are equal on all replicas.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replicax import pmap
from replicax.testing import lockstep
from replicax.testing._check import difference

AXIS = "i"

#: (replicas, devices): N < D, N = D, D divides N or not; groups inside a device, across devices, of whole devices.
PAIRS = [(3, 8), (4, 4), (8, 2), (7, 3), (6, 4), (6, 1)]


def size():
    return lax.axis_size(AXIS)


def columns(x, count):
    """(3, count), with distinct columns."""
    return x[:, None] * (1 + jnp.arange(count, dtype=x.dtype) / 4)


def interleaved():
    """Two interleaved groups of equal size; for an odd number of replicas, one group in reverse order."""
    n = size()
    return [list(range(k, n, 2)) for k in (0, 1)] if n % 2 == 0 else [list(range(n))[::-1]]


def halves():
    """Two contiguous groups of equal size, of whole devices if the number of devices is even."""
    n = size()
    return [list(range(n // 2)), list(range(n // 2, n))] if n % 2 == 0 else [list(range(n))]


def neighbours():
    """Groups of two neighbouring replicas, on the same device if it runs an even number of replicas."""
    n = size()
    return [[k, k + 1] for k in range(0, n, 2)] if n % 2 == 0 else [[k] for k in range(n)]


def uneven():
    return [[0], list(range(1, size()))[::-1]] if size() > 1 else [[0]]


def shift(by=1):
    return [(k, (k + by) % size()) for k in range(size())]


def ragged(x, groups=None):
    """Replica s sends k % 3 rows to replica s + k."""
    n = size() if groups is None else len(groups[0])
    counts = np.array([[(r - s) % n % 3 for r in range(n)] for s in range(n)], np.int32)
    at = np.cumsum(counts, 0) - counts  # the row of receiver r at which sender s writes
    me = lax.axis_index(AXIS)
    if groups is not None:
        rank = np.zeros(size(), np.int32)
        for group in groups:
            rank[group] = np.arange(n)
        me = jnp.asarray(rank)[me]
    rows = columns(x, 3).T
    send, target, receive = (jnp.asarray(table)[me] for table in (counts, at, counts.T))
    output = jnp.zeros((2 * n, 3), x.dtype)
    offsets = jnp.zeros(n, jnp.int32)
    return lax.ragged_all_to_all(rows, output, offsets, send, target, receive, axis_name=AXIS, axis_index_groups=groups)


def one_sided(x):
    """``psend`` and ``precv``, which JAX supports only on GPUs and has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return lax.precv(lax.psend(x, AXIS, [(0, 1)]), jax.ShapeDtypeStruct(x.shape, x.dtype), AXIS, [(0, 1)])


#: Each collective by name, as a function from shape (3,) to any shape.
VARIANTS = {
    "psum": lambda x: lax.psum(x, AXIS),
    "psum, groups": lambda x: lax.psum(x, AXIS, axis_index_groups=interleaved()),
    "psum, groups of neighbours": lambda x: lax.psum(x, AXIS, axis_index_groups=neighbours()),
    "psum, halves": lambda x: lax.psum(x, AXIS, axis_index_groups=halves()),
    "psum, uneven groups": lambda x: lax.psum(x, AXIS, axis_index_groups=uneven()),
    "pmean": lambda x: lax.pmean(x, AXIS),
    "pmean, groups": lambda x: lax.pmean(x, AXIS, axis_index_groups=interleaved()),
    "pmax": lambda x: lax.pmax(x, AXIS),
    "pmax, uneven groups": lambda x: lax.pmax(x, AXIS, axis_index_groups=uneven()),
    "pmin": lambda x: lax.pmin(x, AXIS),
    "pmin, groups": lambda x: lax.pmin(x, AXIS, axis_index_groups=interleaved()),
    "ppermute": lambda x: lax.ppermute(x, AXIS, shift()),
    "ppermute, partial": lambda x: lax.ppermute(x, AXIS, shift(2)[: size() // 2]),
    "ppermute, empty": lambda x: lax.ppermute(x, AXIS, []),
    "ppermute, to oneself": lambda x: lax.ppermute(x, AXIS, [(k, k) for k in range(size())]),
    "pshuffle": lambda x: lax.pshuffle(x, AXIS, list(range(size()))[::-1]),
    "pbroadcast": lambda x: lax.pbroadcast(x, AXIS, size() - 1),
    "all_gather": lambda x: lax.all_gather(x, AXIS),
    "all_gather, last axis": lambda x: lax.all_gather(x, AXIS, axis=1),
    "all_gather, tiled": lambda x: lax.all_gather(x, AXIS, tiled=True),
    "all_gather, groups": lambda x: lax.all_gather(x, AXIS, axis_index_groups=interleaved()),
    "all_gather, tiled, halves": lambda x: lax.all_gather(x, AXIS, axis_index_groups=halves(), tiled=True),
    "psum_scatter": lambda x: lax.psum_scatter(columns(x, size()).T, AXIS),
    "psum_scatter, last axis": lambda x: lax.psum_scatter(columns(x, size()), AXIS, scatter_dimension=1),
    "psum_scatter, tiled": lambda x: lax.psum_scatter(columns(x, 2 * size()).T, AXIS, tiled=True),
    "psum_scatter, groups": lambda x: lax.psum_scatter(
        columns(x, len(interleaved()[0])).T, AXIS, axis_index_groups=interleaved()
    ),
    "psum_scatter, tiled, halves": lambda x: lax.psum_scatter(
        columns(x, 2 * len(halves()[0])), AXIS, scatter_dimension=1, axis_index_groups=halves(), tiled=True
    ),
    "all_to_all": lambda x: lax.all_to_all(columns(x, size()), AXIS, 1, 1),
    "all_to_all, other axis": lambda x: lax.all_to_all(columns(x, size()), AXIS, 1, 0),
    "all_to_all, tiled": lambda x: lax.all_to_all(columns(x, 2 * size()), AXIS, 1, 0, tiled=True),
    "all_to_all, tiled, groups": lambda x: lax.all_to_all(
        columns(x, 2 * len(interleaved()[0])), AXIS, 1, 1, axis_index_groups=interleaved(), tiled=True
    ),
    "all_to_all, halves": lambda x: lax.all_to_all(
        columns(x, len(halves()[0])), AXIS, 1, 1, axis_index_groups=halves()
    ),
    "all_to_all of equal operands": lambda x: lax.all_to_all(columns(lax.psum(x, AXIS), size()), AXIS, 1, 1),
    "pswapaxes": lambda x: lax.pswapaxes(columns(x, size()).T, AXIS, 0),
    "pswapaxes, groups": lambda x: lax.pswapaxes(
        columns(x, len(neighbours()[0])).T, AXIS, 0, axis_index_groups=neighbours()
    ),
    "ragged_all_to_all": ragged,
    "ragged_all_to_all, groups": lambda x: ragged(x, interleaved()),
    "axis_index": lambda x: x * lax.axis_index(AXIS),
    "axis_size": lambda x: x * size(),
}


def folded(f):
    """``f`` with its result reduced to shape (3,) and bounded by tanh. Each element has its own weight."""

    def from_3_to_3(x):
        y = f(x).astype(x.dtype).reshape(-1)
        y = jnp.concatenate([y, jnp.zeros(-y.size % 3, y.dtype)]) * np.cos(np.arange(y.size + -y.size % 3))
        return jnp.tanh(y.reshape(-1, 3).sum(0)).astype(x.dtype)

    return from_3_to_3


def _while(f, x):
    """Replica r runs r % 3 iterations, with a collective in each."""
    rounds = lax.axis_index(AXIS) % 3
    return lax.while_loop(lambda s: s[0] < rounds, lambda s: (s[0] + 1, folded(f)(s[1])), (0, x))[1]


def _custom_vjp(f, x):
    """A ``custom_vjp`` whose backward rule runs the same collective, and its gradient inside the program."""

    @jax.custom_vjp
    def call(y):
        return folded(f)(y)

    call.defvjp(lambda y: (folded(f)(y), jnp.cos(y)), lambda r, ct: (r * folded(f)(ct + r),))
    return call(x), jax.grad(lambda y: jnp.sum(call(y) ** 2))(x)


def _inside(f, x):
    return jax.grad(lambda y: jnp.sum(jnp.sin(folded(f)(y))))(x)


#: Each context by name: runs a collective ``f`` on ``x``.
CONTEXTS = {
    "top level": lambda f, x: f(x),
    "scan": lambda f, x: lax.scan(lambda carry, t: (folded(f)(carry + t), carry), x, jnp.stack([x, 2 * x])),
    "while": _while,
    "cond": lambda f, x: (
        lax.cond(size() > 0, folded(f), jnp.sin, x),
        lax.cond(lax.axis_index(AXIS) % 2 == 0, folded(f), jnp.sin, x),
    ),
    "jit": lambda f, x: jax.jit(f)(x),
    "remat": lambda f, x: jax.checkpoint(folded(f))(x),
    "custom_vjp": _custom_vjp,
    "grad inside": _inside,
    "grad outside": lambda f, x: folded(f)(jnp.sin(x)),
}

NO_DERIVATIVE = "JAX has no derivative of pmax and pmin"
ONLY_SCALARS = "JAX's derivative of pbroadcast supports only scalars"
SWAPPED_SHAPE = "JAX's reverse derivative of an untiled all_to_all between two axes has a wrong shape; write tiled=True"
GROUPS_FORGOTTEN = "JAX's reverse derivative of ragged_all_to_all ignores the groups"

#: The cells for which JAX itself raises an error during tracing or differentiation, with the reason and the text.
REFUSED = (
    {
        (variant, context): (NO_DERIVATIVE, "Differentiation rule for 'p(max|min)' not implemented")
        for variant in VARIANTS
        for context in ("grad inside", "grad outside")
        if variant.startswith(("pmax", "pmin"))
    }
    | {("pbroadcast", "grad inside"): (ONLY_SCALARS, "full must be called with scalar fill_value")}
    | {("all_to_all, other axis", "grad inside"): (SWAPPED_SHAPE, "Expected cotangent type")}
    | {("ragged_all_to_all, groups", "grad inside"): (GROUPS_FORGOTTEN, "has to be divisible by the size of the")}
)


def applicable(context):
    return [variant for variant in VARIANTS if (variant, context) not in REFUSED]


def share(context):
    """A ninth of the variants: each variant is in the share of one context that supports it."""
    at = list(CONTEXTS).index(context)
    return [variant for k, variant in enumerate(VARIANTS) if (k + 4) % len(CONTEXTS) == at]


def program(context, variants):
    """All cells of one context in one program, so that they need only one compilation."""
    return lambda x: {variant: CONTEXTS[context](VARIANTS[variant], x) for variant in variants}


def rows(n):
    return np.random.default_rng(n).uniform(0.1, 1, (n, 3)).astype(np.float32)


def faults(context, n, d, variants=None):
    """The differences from the reference in one context, by variant."""
    fun = program(context, applicable(context) if variants is None else variants)
    ours, right = pmap(fun, AXIS, devices=jax.devices()[:d]), lockstep(fun, axis_name=AXIS)
    # lockstep runs a while loop until all replicas are done, which needs concrete values.
    once = jax.jit if context != "while" else lambda f: f
    if context == "grad outside":
        return _differences(_derivatives(ours, n), _derivatives(right, n))
    return _differences(ours(rows(n)), once(right)(rows(n)))


def _derivatives(mapped, n):
    """The derivative of a weighted sum of the results, by variant."""

    def weighted(x):
        return {v: jnp.sum(y * np.cos(np.arange(y.size)).reshape(y.shape)) for v, y in mapped(x).items()}

    return jax.jit(jax.jacrev(weighted))(rows(n))


def _differences(ours, theirs):
    found = {}
    for variant, out in ours.items():
        for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(theirs[variant]), strict=True):
            if fault := difference(x, y, 1e-4):
                found[variant] = fault
    return found


def refusal(variant, context, n, d):
    """The text of the error that a cell raises, or None."""
    fun = pmap(lambda x: CONTEXTS[context](VARIANTS[variant], x), AXIS, devices=jax.devices()[:d])
    call = fun if context != "grad outside" else jax.grad(lambda x: fun(x).sum())
    try:
        call(rows(n))
    except (NotImplementedError, TypeError, ValueError) as error:
        return str(error)
    return None


def render():
    """The table as Markdown. The tests check every cell."""
    reasons = list(dict.fromkeys(reason for reason, _ in REFUSED.values()))
    lines = ["| | " + " | ".join(CONTEXTS) + " |", "| --- |" + " --- |" * len(CONTEXTS)]
    for variant in VARIANTS:
        marks = [
            "✓" if (variant, context) not in REFUSED else f"({reasons.index(REFUSED[variant, context][0]) + 1})"
            for context in CONTEXTS
        ]
        lines.append(f"| {variant} | " + " | ".join(marks) + " |")
    lines += ["", *(f"{k}. {reason}." for k, reason in enumerate(reasons, 1))]
    return "\n".join(lines)
