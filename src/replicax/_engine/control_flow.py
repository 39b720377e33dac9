"""Loops and branches that contain collectives, and whose predicate differs between replicas.

All replicas participate in every iteration and every branch, as in ``vmap``.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from replicax import _jax
from replicax._engine.collectives import any_replica
from replicax._engine.communication import NESTED_DERIVATIVES
from replicax._engine.runner import Runner
from replicax._engine.varying import Varying
from replicax._jax import Equation
from replicax._typing import Array, ArrayLike


def is_divergent(runner: Runner, eqn: Equation, varying: Sequence[Varying]) -> bool:
    """Whether the predicate of a loop or branch differs between replicas that communicate in this loop or branch."""
    disagree = runner.analysis.predicate(eqn, varying)
    return bool(disagree) and bool(disagree & runner.communication.awaited(eqn, in_rules=NESTED_DERIVATIVES))


def run_divergent(runner: Runner, eqn: Equation, args: Sequence[ArrayLike], varying: Sequence[Varying]) -> list[Array]:
    """Runs a loop or branch for which :func:`is_divergent` is true."""
    return (_loop if eqn.primitive.name == "while" else _choice)(runner, eqn, args, varying)


def _loop(runner: Runner, eqn: Equation, args: Sequence[ArrayLike], varying: Sequence[Varying]) -> list[Array]:
    """Runs a loop with collectives, whose trip count differs between replicas, until all replicas are done.

    As in ``vmap``, a replica that is done keeps its carry, and still participates in the collectives.
    """
    cond, body = _jax.sub_jaxprs(eqn)
    for_cond, for_body = runner.analysis.operands(eqn, varying)
    split = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    cond_consts, body_consts, carry = args[: split[0]], args[split[0] : split[1]], args[split[1] :]
    waiting = runner.analysis.predicate(eqn, varying) & runner.communication.awaited(eqn, in_rules=NESTED_DERIVATIVES)
    axes = sorted(waiting, key=lambda axis: axis.level)

    def goes_on(carry: Sequence[ArrayLike]) -> Array:
        return runner.run(cond, _jax.constants(cond), [*cond_consts, *carry], for_cond)[0]

    def step(state: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        own, carry = state
        after = runner.run(body, _jax.constants(body), [*body_consts, *carry], for_body)
        carry = [_where_still(own, new, old) for new, old in zip(after, carry, strict=True)]
        return goes_on(carry), carry

    state = lax.while_loop(lambda state: any_replica(axes, jnp.any(state[0])), step, (goes_on(carry), carry))
    return list(state[1])


def _choice(runner: Runner, eqn: Equation, args: Sequence[ArrayLike], varying: Sequence[Varying]) -> list[Array]:
    """Runs all branches of a ``cond`` with collectives on all replicas, and selects each replica's result.

    This is what ``vmap`` does. If only derivative rules communicate, the gradients of branches that a replica does not
    take are stopped. For the same technique in ``vmap``, see https://github.com/jax-ml/jax/issues/1052.
    """
    index, *operands = args
    by_rules = not varying[0] & runner.communication.awaited(eqn, in_rules=0)
    results = []
    for k, (branch, ops) in enumerate(zip(_jax.sub_jaxprs(eqn), runner.analysis.operands(eqn, varying), strict=True)):
        own = [_where_taken(index == k, x) for x in operands] if by_rules else operands
        results.append(runner.run(branch, _jax.constants(branch), own, ops))
    return [lax.select_n(index, *cases) if len(cases) > 1 else cases[0] for cases in zip(*results, strict=True)]


def _where_taken(taken: Array, x: ArrayLike) -> ArrayLike:
    """Returns ``x``, with its gradient stopped if the branch is not taken."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return x
    return lax.select_n(taken, lax.stop_gradient(x), x)


def _where_still(goes_on: Array, new: Array, old: Array) -> Array:
    """Returns ``new`` where the loop continues, else ``old``.

    Under the user's ``vmap``, ``goes_on`` has batch dimensions.
    """
    return lax.select_n(lax.broadcast_in_dim(goes_on, new.shape, range(goes_on.ndim)), old, new)
