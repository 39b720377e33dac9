"""The programs of the sweeps, for one replica: collectives × dtypes × control flow.

Every entry is a function of one array ``x`` of shape (3,), over the mapped axis ``"i"``.
"""

import jax
import jax.numpy as jnp
from jax import lax

AXIS = "i"


@jax.custom_jvp
def jvp_mean(x):
    return lax.pmean(x, AXIS)


@jvp_mean.defjvp
def _(primals, tangents):
    return jvp_mean(*primals), 2 * lax.pmean(tangents[0], AXIS)


@jax.custom_vjp
def vjp_sum(x):
    return lax.psum(x, AXIS)


vjp_sum.defvjp(lambda x: (lax.psum(x, AXIS), x), lambda x, ct: (3 * lax.psum(ct, AXIS) + 0 * x,))

#: Each collective by name, as a function from shape (3,) to any shape.
COLLECTIVES = {
    "psum": lambda x: lax.psum(x, AXIS),
    "pmean": lambda x: lax.pmean(x, AXIS),
    "pmax": lambda x: lax.pmax(lax.stop_gradient(x), AXIS),
    "pmin": lambda x: lax.pmin(lax.stop_gradient(x), AXIS),
    "all_gather": lambda x: lax.all_gather(x, AXIS),
    "all_gather_last": lambda x: lax.all_gather(x, AXIS, axis=1),
    "all_gather_tiled": lambda x: lax.all_gather(x, AXIS, tiled=True),
    "axis_index": lambda x: x * lax.axis_index(AXIS).astype(x.dtype),
    "axis_size": lambda x: x + jnp.asarray(lax.axis_size(AXIS) % 5, x.dtype),
}

#: The collectives whose result has the shape of the operand.
SAME_SHAPE = ("psum", "pmean", "pmax", "pmin", "axis_index", "axis_size")


def _damped(f, x):
    """``f`` with a bounded result, so that loops do not overflow."""
    y = f(x)
    return (y / (1 + abs(y)) if jnp.issubdtype(y.dtype, jnp.inexact) else y % 7).astype(x.dtype)


def _scan(f, x):
    return lax.scan(lambda carry, t: (_damped(f, carry + t), carry), x, jnp.stack([x, 2 * x]))


def _fori(f, x):
    return lax.fori_loop(0, 3, lambda _, y: _damped(f, y), x)


def _while(f, x):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, _damped(f, s[1])), (0, x))[1]


def _while_divergent(f, x):
    """Replica r runs r % 3 iterations, with a collective in each."""
    rounds = lax.axis_index(AXIS) % 3
    return lax.while_loop(lambda s: s[0] < rounds, lambda s: (s[0] + 1, _damped(f, s[1])), (0, x))[1]


def _while_divergent_rows(f, x):
    """Under a ``vmap`` in the program, each row runs its own number of iterations."""
    row = lambda y, extra: lax.while_loop(
        lambda s: s[0] < lax.axis_index(AXIS) % 3 + extra, lambda s: (s[0] + 1, _damped(f, s[1])), (0, y)
    )[1]
    return jax.vmap(row)(jnp.stack([x, 2 * x]), jnp.arange(2))


def _while_condition(f, x):
    """The condition contains a collective, and becomes false after a different number of iterations per replica."""

    def goes_on(state):
        rounds, y = state
        return (rounds < 4) & (rounds < lax.axis_index(AXIS) + (jnp.sum(abs(_damped(f, y))) < 3))

    return lax.while_loop(
        goes_on, lambda s: (s[0] + 1, s[1] - s[1] // 2 if jnp.issubdtype(x.dtype, jnp.integer) else s[1] / 2), (0, x)
    )[1]


def _cond(f, x):
    return lax.cond(lax.psum(1, AXIS) > 0, lambda y: _damped(f, y), lambda y: y, x)


def _cond_divergent(f, x):
    return lax.cond(lax.axis_index(AXIS) % 2 == 0, lambda y: _damped(f, y), lambda y: 2 * y, x)


def _switch(f, x):
    return lax.switch(lax.axis_size(AXIS) % 3, [lambda y: y, lambda y: _damped(f, y), lambda y: 2 * _damped(f, y)], x)


def _grad(f, x):
    return jax.grad(lambda y: jnp.sum(jnp.real(f(y) ** 2)))(x)


#: Each kind of control flow by name: runs a collective ``f`` on ``x``.
CONTROL = {
    "top": lambda f, x: f(x),
    "jit": lambda f, x: jax.jit(f)(x),
    "checkpoint": lambda f, x: jax.checkpoint(f)(x),
    "vmap": lambda f, x: jax.vmap(f)(jnp.stack([x, 2 * x])),
    "grad": _grad,
    "scan": _scan,
    "fori": _fori,
    "while": _while,
    "while_divergent": _while_divergent,
    "while_divergent_rows": _while_divergent_rows,
    "while_condition": _while_condition,
    "cond": _cond,
    "cond_divergent": _cond_divergent,
    "switch": _switch,
}

#: The kinds of control flow that need a result of the operand's shape.
LOOPS = (
    "scan",
    "fori",
    "while",
    "while_divergent",
    "while_divergent_rows",
    "while_condition",
    "cond",
    "cond_divergent",
    "switch",
)

#: The kinds whose reverse derivatives from outside are correct in ``jax.vmap``. JAX has no reverse derivative of
#: ``while``. ``vmap``'s derivative of a ``cond`` with a collective is wrong if the predicate differs between replicas.
DIFFERENTIABLE = ("top", "jit", "checkpoint", "vmap", "grad", "scan", "fori", "cond", "switch")

DTYPES = (
    "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2",
    "int32", "int8", "uint8", "bool", "complex64",
)  # fmt: skip


def applies(collective, control, dtype):
    """Whether JAX itself supports this cell of the table."""
    inexact = jnp.issubdtype(jnp.dtype(dtype), jnp.inexact)
    if control in LOOPS and collective not in SAME_SHAPE:
        return False
    if control in LOOPS and dtype in ("bool", "float8_e4m3fn", "float8_e5m2"):
        return False  # these dtypes do not support the arithmetic in _damped
    if control == "grad":
        return inexact and not dtype.startswith("float8") and collective not in ("pmax", "pmin")
    if dtype == "bool":
        return control in ("top", "jit", "checkpoint", "vmap") and not collective.startswith("axis")
    return not (dtype.startswith("float8") and control != "top")


def program(controls, dtypes, collectives=tuple(COLLECTIVES)):
    """One program with all these cells, so that they need only one compilation."""
    cells = [
        (control, collective, dtype)
        for control in controls
        for collective in collectives
        for dtype in dtypes
        if applies(collective, control, dtype)
    ]

    def fun(x):
        return {cell: CONTROL[cell[0]](COLLECTIVES[cell[1]], _cast(x, cell[2])) for cell in cells}

    return fun


def custom_rules(x):
    """Custom derivative rules with collectives, inside and outside of ``grad``."""
    inside = jax.grad(lambda y: jnp.sum(vjp_sum(jnp.sin(y)) + jvp_mean(y) ** 2))(x)
    return {"inside": inside, "vjp": vjp_sum(jnp.sin(x)), "jvp": jvp_mean(x) ** 2, "relu": jax.nn.relu(x)}


def _cast(x, dtype):
    if dtype == "bool":
        return x > 0
    if dtype == "complex64":
        return lax.complex(x, 1 - x)
    if jnp.issubdtype(jnp.dtype(dtype), jnp.integer):
        return jnp.round(3 * abs(x)).astype(dtype)
    if jnp.finfo(dtype).bits <= 16:  # only two summands are nonzero: with more, rounding depends on their order
        return jnp.where(lax.axis_index(AXIS) < 2, x, 0).astype(dtype)
    return x.astype(dtype)


__all__ = ["AXIS", "COLLECTIVES", "CONTROL", "DIFFERENTIABLE", "DTYPES", "custom_rules", "program"]
