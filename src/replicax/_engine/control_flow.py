"""Loops and branches that replicas go through differently, and that communicate: all replicas take part, as in vmap."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from replicax import _jax
from replicax._engine.collectives import any_replica
from replicax._engine.communication import TWICE
from replicax._engine.runner import Runner
from replicax._engine.varying import Varying
from replicax._jax import Equation
from replicax._typing import Array, ArrayLike


def runs_apart(runner: Runner, eqn: Equation, varying: Sequence[Varying]) -> bool:
    """Whether replicas go through a loop or branch differently in which some wait for others."""
    disagree = runner.analysis.predicate(eqn, varying)
    return bool(disagree) and bool(disagree & runner.communication.awaited(eqn, in_rules=TWICE))


def together(runner: Runner, eqn: Equation, args: Sequence[ArrayLike], varying: Sequence[Varying]) -> list[Array]:
    """Runs such a loop or branch."""
    return (_loop if eqn.primitive.name == "while" else _choice)(runner, eqn, args, varying)


def _loop(runner: Runner, eqn: Equation, args: Sequence[ArrayLike], varying: Sequence[Varying]) -> list[Array]:
    """A loop that replicas leave at different times, and that communicates: all stay until the last leaves.

    As in ``vmap``, a replica that is done keeps its carry, and goes on taking part in the collectives.
    """
    cond, body = _jax.sub_jaxprs(eqn)
    for_cond, for_body = runner.analysis.operands(eqn, varying)
    split = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    cond_consts, body_consts, carry = args[: split[0]], args[split[0] : split[1]], args[split[1] :]
    waiting = runner.analysis.predicate(eqn, varying) & runner.communication.awaited(eqn, in_rules=TWICE)
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
    """A choice that replicas make differently, and that communicates: all run every branch, as in ``vmap``.

    Where derivative rules alone communicate, a replica adds nothing to the derivatives of branches that it has not
    taken: see https://github.com/jax-ml/jax/issues/1052 for how ``vmap`` sees to that.
    """
    index, *operands = args
    by_rules = not varying[0] & runner.communication.awaited(eqn, in_rules=0)
    results = []
    for k, (branch, ops) in enumerate(zip(_jax.sub_jaxprs(eqn), runner.analysis.operands(eqn, varying), strict=True)):
        own = [_where_taken(index == k, x) for x in operands] if by_rules else operands
        results.append(runner.run(branch, _jax.constants(branch), own, ops))
    return [lax.select_n(index, *cases) if len(cases) > 1 else cases[0] for cases in zip(*results, strict=True)]


def _where_taken(taken: Array, x: ArrayLike) -> ArrayLike:
    """``x``, a constant to derivatives where the branch is not taken."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return x
    return lax.select_n(taken, lax.stop_gradient(x), x)


def _where_still(goes_on: Array, new: Array, old: Array) -> Array:
    """``new`` in the loops that go on. A loop under a vmap of the user's has a condition for each of its rows."""
    return lax.select_n(lax.broadcast_in_dim(goes_on, new.shape, range(goes_on.ndim)), old, new)
