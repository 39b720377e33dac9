"""The table of transformations of a map, and the programs that are mapped.

A transformation takes a mapped function and its argument ``x`` of shape (N, 3), and returns arrays. The same
transformation of ``jax.vmap`` gives the expected results.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

AXIS = "i"


def rows(n):
    return np.random.default_rng(n).uniform(0.2, 1, (n, 3)).astype(np.float32)


def weights(x):
    """A different weight for each element, so that swapped elements change the sum."""
    return jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)


def scalar(mapped):
    return lambda x: jnp.sum(mapped(x) * weights(x))


def of_scale(mapped, x):
    """A function of two numbers, so that its Hessian is small."""
    return lambda s: jnp.sum(mapped(x * s[0] + s[1]) * weights(x))


# ---------------------------------------------------------------------------------------------------------------
# Programs of one replica: smooth, from shape (3,) to (3,), for any number of replicas, with values near 1


def centered(x):
    return jnp.cos(x - lax.pmean(x, AXIS)) * x


def looped(x):
    return lax.scan(lambda c, _: (jnp.tanh(c + 0.1 * lax.pmean(c, AXIS)), None), x, None, length=3)[0]


def shifted(x):
    n = lax.axis_size(AXIS)
    return x * lax.ppermute(jnp.sin(x), AXIS, [(r, (r + 1) % n) for r in range(n)])


def gathered(x):
    every = lax.all_gather(x, AXIS)
    return x * jnp.mean(every * every, 0)


def parted(x):
    """A branch that differs between replicas, without a collective; a custom derivative rule; a checkpoint."""
    y = lax.cond(lax.axis_index(AXIS) % 2 == 0, jnp.sin, lambda y: y * y, x)
    return jax.nn.silu(y) + jax.checkpoint(jnp.cos)(x) * lax.axis_size(AXIS) / (lax.axis_index(AXIS) + 1)


PROGRAMS = {f.__name__: f for f in (centered, looped, shifted, gathered, parted)}

# ---------------------------------------------------------------------------------------------------------------
# Transformations


def custom_vjp(mapped, x):
    """The map is the primal, and the rules call it, too."""
    rule = jax.custom_vjp(mapped)
    rule.defvjp(lambda x: (mapped(x), x), lambda x, ct: (2 * mapped(x) * ct,))
    return jax.value_and_grad(scalar(rule))(x)


def custom_jvp(mapped, x):
    rule = jax.custom_jvp(mapped)
    rule.defjvp(lambda primals, tangents: (mapped(*primals), 3 * mapped(*primals) * tangents[0]))
    return jax.jvp(rule, (x,), (x,)), jax.grad(scalar(rule))(x)


def linear_transpose(mapped, x):
    def linear(y):
        return jax.linearize(mapped, x)[1](y)

    return jax.linear_transpose(linear, jax.ShapeDtypeStruct(x.shape, x.dtype))(weights(x))


def made_jaxpr(mapped, x):
    return jax.core.eval_jaxpr((jaxpr := jax.make_jaxpr(mapped)(x)).jaxpr, jaxpr.consts, x)


def linearized(mapped, x):
    y, tangent = jax.linearize(mapped, x)
    return y, tangent(x), tangent(weights(x))


def pulled_back(mapped, x):
    y, pullback = jax.vjp(mapped, x)
    return y, pullback(weights(x))


def two_sizes(mapped, x):
    """Maps of three sizes in one program: all rows, one row, and twice as many rows."""
    y = mapped(x)
    return y + mapped(x[:1]) + jnp.split(mapped(jnp.concatenate([x, 2 * x])), 2)[1]


def while_loop(mapped, x):
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, mapped(s[1])), (0, x))[1]


def in_scan_and_derived(mapped, x):
    return jax.grad(lambda x: jnp.sum(lax.scan(lambda c, w: (mapped(c) * w, None), x, jnp.ones(2))[0] * weights(x)))(x)


def exported(mapped, x):
    return export.export(jax.jit(mapped))(jax.ShapeDtypeStruct(x.shape, x.dtype))


#: The transformations by name. Each takes a mapped function and its argument, and also works with vmap.
TRANSFORMS = {
    "jit": lambda f, x: jax.jit(lambda x: f(x) + x)(x),
    "grad": lambda f, x: jax.grad(scalar(f))(x),
    "value_and_grad": lambda f, x: jax.jit(jax.value_and_grad(scalar(f)))(x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (weights(x),)),
    "vjp": pulled_back,
    "linearize": linearized,
    "linear_transpose": linear_transpose,
    "hessian": lambda f, x: jax.hessian(of_scale(f, x))(jnp.ones(2)),
    "jacfwd": lambda f, x: jax.jit(jax.jacfwd(of_scale(f, x)))(jnp.ones(2)),
    "jacrev": lambda f, x: jax.jacrev(lambda s: f(x * s[0])[:, :2].sum(0))(jnp.ones(2)),
    "vmap": lambda f, x: jax.vmap(f)(jnp.stack([x, x * x])),
    "vmap of the last axis": lambda f, x: jax.vmap(f, in_axes=2, out_axes=1)(jnp.stack([x, x * x], 2)),
    "vmap of grad": lambda f, x: jax.jit(jax.vmap(jax.grad(scalar(f))))(jnp.stack([x, x * x])),
    "grad of vmap": lambda f, x: jax.grad(lambda y: jnp.sum(jax.vmap(f)(jnp.stack([y, y * y])) ** 2))(x),
    "scan": lambda f, x: lax.scan(lambda c, w: (f(c) * w, f(c).sum()), x, jnp.ones(2)),
    "grad of scan": in_scan_and_derived,
    "fori_loop": lambda f, x: lax.fori_loop(0, 2, lambda _, c: f(c), x),
    "while_loop": while_loop,
    "cond": lambda f, x: lax.cond(jnp.sum(x) > 0, f, lambda x: x, x),
    "switch": lambda f, x: jax.jit(lambda k, x: lax.switch(k, [lambda x: x, f, lambda x: 2 * f(x)], x))(2, x),
    "checkpoint": lambda f, x: jax.grad(lambda x: jnp.sum(jax.checkpoint(f)(jnp.sin(x)) ** 2))(x),
    "custom_vjp": custom_vjp,
    "custom_jvp": custom_jvp,
    "make_jaxpr": made_jaxpr,
    "closed over": lambda f, x: jax.grad(lambda s: jax.jit(lambda x: jnp.sum(f(x * s)))(x))(jnp.float32(2)),
    "two sizes": lambda f, x: jax.jit(lambda x: two_sizes(f, x))(x),
}
