"""Derivative rules of the user's, rewritten when JAX calls them."""

from __future__ import annotations

import jax

from replicax import _jax
from replicax._engine.blocks import lane_by_lane
from replicax._engine.collectives import where_replica
from replicax._engine.runner import Runner
from replicax._typing import Array, ArrayLike, Function, PyTree


def rewritten_rule(runner: Runner, rule: Function, role: str, *, per_lane: int) -> Function:
    """A derivative rule of the user's, rewritten when JAX calls it.

    The rules are one replica's, and so is what they take and give. But JAX hands a reverse rule the sum over
    lanes for a result that it knows to be equal in all of them, and cannot match such a result with a tangent
    that differs. So with ``per_lane`` each lane gets results of its own, and padding has no part in cotangents.

    Args:
        runner: What rewrites the program that has the rule.
        rule: The rule.
        role: ``"jvp"``, ``"fwd"`` or ``"bwd"``.
        per_lane: How many results the function has that are to be each lane's own. With 0 nothing varies, but the
            cotangents of a function that is called alike everywhere.
    """
    axes = runner.scope.axes
    everywhere = frozenset(axes)

    def rewritten(*args: ArrayLike) -> PyTree:
        with _jax.axis_env({axis.name: axis.size for axis in axes}):
            jaxpr, arrays, restore = _jax.trace_rule(rule, args)
        # JAX calls a rule when vmap and shard_map have long returned, and taken their axes along.
        with _jax.axis_env(runner.scope.physical):
            varies = per_lane or (role == "bwd" and runner.communication.axes_of(jaxpr))
            varying = [everywhere if varies else frozenset()] * len(arrays)
            results = runner.run(jaxpr, _jax.constants(jaxpr), arrays, varying)
            if per_lane and role == "bwd":
                results = [where_replica(axes, x) for x in results]
            first = len(results) - per_lane if role == "fwd" else 0  # residuals come first
            own = [lane_by_lane(axes, x) for x in results[first:]] if per_lane else results[first:]
            return restore([*results[:first], *own])

    return rewritten


def expanded(
    runner: Runner, expansion: tuple[Function, Function], args: list[ArrayLike], *, per_lane: int
) -> list[Array]:
    """An operation that JAX keeps whole until it is compiled, and that communicates: what it stands for."""
    primal, jvp = (rewritten_rule(runner, rule, "jvp", per_lane=per_lane) for rule in expansion)
    call = jax.custom_jvp(primal)
    call.defjvp(lambda primals, tangents: jvp(*primals, *tangents))
    return list(call(*args))
