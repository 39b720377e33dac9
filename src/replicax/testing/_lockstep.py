"""A slow reference: runs all replicas in lock step, equation by equation, stacked along a leading axis.

It shares only the tracing of the program with the engine. ``jax.vmap`` slices the arguments and stacks the results. A
collective runs the definition in its registry entry: plain ``jax.numpy`` along the leading axis, such as a sum, written
from JAX's documentation. So it also covers programs for which ``jax.vmap`` has no rule, or a wrong rule (in JAX 0.12:
the derivative of a ``cond`` with a collective, if its predicate differs between replicas).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from replicax import _jax
from replicax._engine.collectives import AWAITING, REGISTRY
from replicax._typing import Array, ArrayLike, Atom, Function, PyTree
from replicax.errors import DivergentOutputError, UnsupportedCollectiveError


def lockstep(
    fun: Function,
    in_axes: PyTree = 0,
    out_axes: PyTree = 0,
    axis_name: Hashable | None = None,
    axis_size: int | None = None,
) -> Function:
    """Maps ``fun`` like ``jax.vmap``, with all replicas in lock step on one device.

    Args:
        fun: The program of one replica.
        in_axes: As in ``jax.vmap``.
        out_axes: As in ``jax.vmap``.
        axis_name: The name of the mapped axis, for collectives.
        axis_size: The number of replicas. Required only if no argument is mapped.

    Returns:
        A function that takes arguments with the mapped axis, of shape ``(replicas, ...)`` for ``in_axes=0``, and
        returns results with the mapped axis.

    Raises:
        UnsupportedCollectiveError: on a call, if the program has a collective without a definition.
        DivergentOutputError: on a call, if results with ``out_axes=None`` differ between replicas.

    Example:
        >>> import jax, numpy as np, replicax.testing
        >>> replicax.testing.lockstep(lambda x: jax.lax.psum(x, "i"), axis_name="i")(np.arange(3))
        Array([3, 3, 3], dtype=int32)
    """

    def mapped(*args: PyTree, **kwargs: PyTree) -> PyTree:
        trees: list[Any] = []

        def one_replica(*own: PyTree, **own_kwargs: PyTree) -> list[Array]:
            leaves, tree = jax.tree.flatten((own, own_kwargs))
            trees.append(tree)
            return leaves

        together = jax.vmap(one_replica, in_axes=in_axes, axis_size=axis_size)(*args, **kwargs)
        stacked = [jnp.asarray(x) for x in together]  # vmap returns a NumPy array unchanged
        size = stacked[0].shape[0] if stacked else int(axis_size or 0)
        one_args, one_kwargs = jax.tree.unflatten(trees[0], [x[0] for x in stacked])
        name = object() if axis_name is None else axis_name
        jaxpr, consts, out = _jax.trace(fun, one_args, one_kwargs, (), {name: size})
        consts = [jnp.broadcast_to(c, (size, *jnp.shape(c))) for c in consts]
        return _placed(_Interpreter(name, size).run(jaxpr, consts, stacked), out, out_axes, size)

    return mapped


def _placed(results: Sequence[jax.Array], out: PyTree, out_axes: PyTree, size: int) -> PyTree:
    """Moves the mapped axis of each result to its ``out_axes``, and restores the pytree structure."""
    same = jax.tree.map(lambda axis: axis is None, out_axes, is_leaf=lambda axis: axis is None)
    rows = [
        (_only(x), None) if equal else (x, 0)
        for x, equal in zip(results, jax.tree.leaves(jax.tree.broadcast(same, out)), strict=True)
    ]
    nest = jax.vmap(
        lambda *own: jax.tree.unflatten(jax.tree.structure(out), own),
        in_axes=tuple(axis for _, axis in rows),
        out_axes=out_axes,
        axis_size=size,
    )
    return nest(*(x for x, _ in rows))


def _only(x: jax.Array) -> jax.Array:
    if not isinstance(x, jax.core.Tracer) and not bool((x == x[:1]).all()):
        raise DivergentOutputError(
            "out_axes=None, but the results differ between replicas. Write an int in out_axes to get all of them."
        )
    return x[0]


class _Interpreter:
    """Runs a jaxpr on stacked values of shape ``(replicas, ...)``."""

    def __init__(self, name: Hashable, size: int) -> None:
        self.name = name
        self.size = size

    def run(self, jaxpr: _jax.Jaxpr, consts: Sequence[Array], args: Sequence[Array]) -> list[Array]:
        jaxpr = _jax.body(jaxpr)
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom: Atom) -> Array:
            if _jax.is_literal(atom):
                return jnp.broadcast_to(jnp.asarray(atom.val, atom.aval.dtype), (self.size, *atom.aval.shape))
            return env[atom]

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self.equation(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def closed(self, jaxpr: _jax.Jaxpr, args: Sequence[Array]) -> list[Array]:
        return self.run(jaxpr, [self.everywhere(c) for c in _jax.constants(jaxpr)], args)

    def everywhere(self, x: ArrayLike) -> jax.Array:
        return jnp.broadcast_to(x, (self.size, *jnp.shape(x)))

    def equation(self, eqn: _jax.Equation, args: list[Array]) -> list[Array]:
        subs = list(_jax.sub_jaxprs(eqn))
        if not any(map(self.communicates, subs)):
            if not subs and self.name in _jax.named_axes(eqn):
                if (expansion := _jax.expansion(eqn)) is not None:
                    with _jax.axis_env({self.name: self.size}):
                        jaxpr, *_ = _jax.trace_rule(expansion[0], [x[0] for x in args])
                    return self.closed(jaxpr, args)
                return [self.collective(eqn, *args)]
            if eqn.primitive.name in AWAITING:
                return args
            return list(jax.vmap(lambda *xs: _jax.bind(eqn, xs), axis_size=self.size)(*args))
        match eqn.primitive.name:
            case "scan":
                return self.scan(eqn, subs[0], args)
            case "while":
                return self.while_(eqn, subs, args)
            case "cond":
                index, *operands = args
                cases = [self.closed(branch, operands) for branch in subs]
                chosen = jnp.asarray(index, jnp.int32)
                return [_select(chosen, results) for results in zip(*cases, strict=True)]
        if len(subs) == 1:  # jit, remat, custom_jvp, custom_vjp
            return self.closed(subs[0], args)
        raise UnsupportedCollectiveError(
            f"lockstep does not support a collective inside {eqn.primitive.name}. Use jax.vmap as the reference."
        )

    def communicates(self, jaxpr: _jax.Jaxpr) -> bool:
        return any(
            self.name in _jax.named_axes(eqn) or any(map(self.communicates, _jax.sub_jaxprs(eqn)))
            for eqn in _jax.body(jaxpr).eqns
        )

    def scan(self, eqn: _jax.Equation, step: _jax.Jaxpr, args: list[Array]) -> list[Array]:
        carry_at = _jax.loop_carry(eqn)
        consts, carry, xs = args[: carry_at.start], args[carry_at], args[carry_at.stop :]
        length, rows = eqn.params["length"], []
        for t in reversed(range(length)) if eqn.params["reverse"] else range(length):
            out = self.closed(step, [*consts, *carry, *(x[:, t] for x in xs)])
            carry = out[: len(carry)]
            rows.append(out[len(carry) :])
        rows = rows[::-1] if eqn.params["reverse"] else rows
        avals = [var.aval for var in eqn.outvars[len(carry) :]]
        empty = [jnp.zeros((self.size, *aval.shape), aval.dtype) for aval in avals]
        return [*carry, *([jnp.stack(column, 1) for column in zip(*rows, strict=True)] if rows else empty)]

    def while_(self, eqn: _jax.Equation, subs: list[_jax.Jaxpr], args: list[Array]) -> list[Array]:
        cond, body = subs
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        for_cond, for_body, carry = args[:n], args[n : n + m], args[n + m :]
        while (goes_on := self.closed(cond, [*for_cond, *carry])[0]).any():
            after = self.closed(body, [*for_body, *carry])
            carry = [_select(goes_on.astype(jnp.int32), pair) for pair in zip(carry, after, strict=True)]
        return carry

    def collective(self, eqn: _jax.Equation, *args: Array) -> Array:
        entry = REGISTRY.get(eqn.primitive.name)
        if entry is None:
            raise UnsupportedCollectiveError(
                f"lockstep has no definition of {eqn.primitive.name}. Use jax.vmap as the reference."
            )
        return entry.on_rows(self.size, args, eqn.params)


def _select(chosen: jax.Array, cases: Sequence[jax.Array]) -> jax.Array:
    out = cases[0]
    for k, case in enumerate(cases[1:], 1):
        out = jnp.where((chosen == k).reshape(*chosen.shape, *[1] * (out.ndim - chosen.ndim)), case, out)
    return out
