"""Rewrites the user's derivative rules when JAX calls them."""

from __future__ import annotations

import jax

from replicax import _jax
from replicax._engine.blocks import as_batched
from replicax._engine.collectives import where_replica
from replicax._engine.runner import Runner
from replicax._typing import Array, ArrayLike, Function, PyTree


def rewritten_rule(runner: Runner, rule: Function, role: str, *, per_lane: int) -> Function:
    """Wraps a derivative rule of the user. The wrapper rewrites the rule when JAX calls it.

    A rule takes and returns the values of one replica. But if ``vmap`` tracks a result as unbatched, JAX sums the
    result's cotangent over the lanes for the reverse rule, and cannot combine the result with a batched tangent. So
    with ``per_lane``, results are batched over lanes, and a reverse rule returns zeros in padding lanes.

    Args:
        runner: Rewrites the program that contains the rule.
        rule: The rule.
        role: ``"jvp"``, ``"fwd"`` or ``"bwd"``.
        per_lane: The number of results of the function that must be batched over lanes. If it is 0, no argument
            varies, but cotangents may.
    """
    axes = runner.scope.axes
    everywhere = frozenset(axes)

    def rewritten(*args: ArrayLike) -> PyTree:
        with _jax.axis_env({axis.name: axis.size for axis in axes}):
            jaxpr, arrays, restore = _jax.trace_rule(rule, args)
        # When JAX calls a rule, vmap and shard_map have returned, and their axes are no longer in scope.
        with _jax.axis_env(runner.scope.physical):
            varies = per_lane or (role == "bwd" and runner.communication.axes_of(jaxpr))
            varying = [everywhere if varies else frozenset()] * len(arrays)
            results = runner.run(jaxpr, _jax.constants(jaxpr), arrays, varying)
            if per_lane and role == "bwd":
                results = [where_replica(axes, x) for x in results]
            first = len(results) - per_lane if role == "fwd" else 0  # residuals come first
            own = [as_batched(axes, x) for x in results[first:]] if per_lane else results[first:]
            return restore([*results[:first], *own])

    return rewritten


def expanded(
    runner: Runner, expansion: tuple[Function, Function], args: list[ArrayLike], *, per_lane: int
) -> list[Array]:
    """Runs an operation over mapped axes as other primitives, because JAX expands it only at compile time.

    Args:
        runner: Rewrites the program that contains the operation.
        expansion: The operation in terms of other primitives, and its JVP.
        args: The operands.
        per_lane: The number of results.
    """
    primal, jvp = (rewritten_rule(runner, rule, "jvp", per_lane=per_lane) for rule in expansion)
    call = jax.custom_jvp(primal)
    call.defjvp(lambda primals, tangents: jvp(*primals, *tangents))
    return list(call(*args))
