"""The rewriter: runs a program of one replica, traced with logical axes, on lanes and devices.

It walks a jaxpr's equations. A collective over a logical axis becomes its rule; a higher-order equation is bound
again with every jaxpr in it rewritten; everything else is bound as it is. Rewriting changes no type.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from replicax import _jax
from replicax._blocks import lane_by_lane
from replicax._collectives import REGISTRY, any_replica, is_replica, where_replica
from replicax._errors import UnsupportedCollectiveError
from replicax._jax import Equation, Jaxpr
from replicax._layout import LogicalAxes
from replicax._varying import Analysis, Varying


class Rewriter:
    """Rewrites one traced program for the logical axes in scope.

    Args:
        logical: The logical axes, by the user's names.
    """

    def __init__(self, logical: LogicalAxes) -> None:
        self.logical = logical
        self.analysis = Analysis(logical)
        self._communicates: dict[int, tuple[Jaxpr, frozenset[Hashable]]] = {}
        self._rewritten: dict[Hashable, tuple[Jaxpr, tuple[Jaxpr, list[Any]]]] = {}

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], varying: Sequence[Varying]) -> list[Any]:
        """Runs a jaxpr on the values of one replica.

        Args:
            jaxpr: The program.
            consts: The values of its constants; none of them varies.
            args: The values of its arguments.
            varying: Where each argument varies.

        Returns:
            The values of its results.
        """
        jaxpr = _jax.body(jaxpr)
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        where = dict.fromkeys(jaxpr.constvars, frozenset[Hashable]()) | dict(zip(jaxpr.invars, varying, strict=True))
        last_use = {atom: eqn for eqn in jaxpr.eqns for atom in eqn.invars if not _jax.is_literal(atom)}
        kept = {atom for atom in jaxpr.outvars if not _jax.is_literal(atom)}

        def read(atom: Any) -> Any:
            return atom.val if _jax.is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [frozenset() if _jax.is_literal(atom) else where[atom] for atom in eqn.invars]
            with _jax.equation_context(eqn):
                results = self._equation(eqn, [read(atom) for atom in eqn.invars], operands)
            env.update(zip(eqn.outvars, results, strict=True))
            where.update(zip(eqn.outvars, self.analysis.equation(eqn, operands), strict=True))
            for atom in eqn.invars:
                if not _jax.is_literal(atom) and last_use[atom] is eqn and atom not in kept:
                    env.pop(atom, None)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Equation, args: list[Any], varying: list[Varying]) -> list[Any]:
        if not any(True for _ in _jax.sub_jaxprs(eqn)):
            return self._leaf(eqn, args)
        if not self._touches(eqn):
            return _jax.bind(eqn, args)
        if self.analysis.predicate(eqn, varying) & self._axes_inside(eqn):
            return {"while": self._divergent_while, "cond": self._divergent_cond}[eqn.primitive.name](
                eqn, args, varying
            )
        apart = bool(_jax.derivative_rules(eqn)) and (any(varying) or bool(self._axes_inside(eqn)))
        inside = zip(_jax.sub_jaxprs(eqn), self.analysis.operands(eqn, varying), strict=True)
        hoist = _jax.bears_no_constants(eqn)
        new = {id(sub): self._sub_jaxpr(sub, operands, apart=apart, hoist=hoist) for sub, operands in inside}

        def rewrite_rule(rule: Callable[..., Any], role: str) -> Callable[..., Any]:
            return self._rule(rule, role, apart=len(eqn.outvars) if apart else 0)

        return _jax.bind_again(eqn, args, lambda sub: new[id(sub)], rewrite_rule)

    def _leaf(self, eqn: Equation, args: list[Any]) -> list[Any]:
        names = [name for name in _jax.named_axes(eqn) if name in self.logical]
        if names:
            known = REGISTRY.get(eqn.primitive.name)
            if known is None and (expansion := _jax.expansion(eqn)) is not None:
                return self._expanded(expansion, args, apart=len(eqn.outvars))
            if known is None:
                raise UnsupportedCollectiveError(_unsupported(_jax.equation_name(eqn), names))
            return [known.rule(self.logical, *_jax.operands(eqn, args), **eqn.params)]
        if self._padded and _jax.has_side_effect(eqn):
            return self._guarded(eqn, args)
        if _jax.awaits_collective(eqn):
            return args  # nothing to await: the rule of what was started gave the result itself
        return _jax.bind(eqn, args)

    # What a higher-order equation holds ------------------------------------------------------------------------

    def _touches(self, eqn: Equation) -> bool:
        """Whether anything in the equation has to be rewritten."""
        return (
            bool(_jax.derivative_rules(eqn))
            or bool(self._axes_inside(eqn))
            or any(self._any_leaf(sub, self._rewrites_leaf) for sub in _jax.sub_jaxprs(eqn))
        )

    def _rewrites_leaf(self, eqn: Equation) -> bool:
        return bool(_jax.derivative_rules(eqn)) or (self._padded and _jax.has_side_effect(eqn))

    def _any_leaf(self, jaxpr: Jaxpr, test: Callable[[Equation], bool]) -> bool:
        return any(
            test(eqn) or any(self._any_leaf(sub, test) for sub in _jax.sub_jaxprs(eqn)) for eqn in _jax.body(jaxpr).eqns
        )

    def _axes_inside(self, eqn: Equation) -> frozenset[Hashable]:
        """The logical axes that collectives anywhere inside the equation are over."""
        return frozenset().union(*map(self._axes_of, _jax.sub_jaxprs(eqn)))

    def _axes_of(self, jaxpr: Jaxpr) -> frozenset[Hashable]:
        if id(jaxpr) not in self._communicates:
            axes: set[Hashable] = set()
            for eqn in _jax.body(jaxpr).eqns:
                axes.update(self._axes_inside(eqn), *[{n} for n in _jax.named_axes(eqn) if n in self.logical])
            self._communicates[id(jaxpr)] = (jaxpr, frozenset(axes))
        return self._communicates[id(jaxpr)][1]

    @property
    def _padded(self) -> bool:
        return any(axis.padding for axis in self.logical.values())

    # How it is bound again -------------------------------------------------------------------------------------

    def _sub_jaxpr(
        self, jaxpr: Jaxpr, varying: Sequence[Varying], *, apart: bool, hoist: bool
    ) -> tuple[Jaxpr, list[Any]]:
        key = (id(jaxpr), tuple(varying), apart, hoist)
        if key not in self._rewritten:

            def run(*args: Any) -> list[Any]:
                results = self.run(jaxpr, _jax.constants(jaxpr), args, varying)
                return [lane_by_lane(self.logical.values(), x) for x in results] if apart else results

            self._rewritten[key] = (jaxpr, _jax.retrace(run, jaxpr, hoist=hoist))
        return self._rewritten[key][1]

    def _rule(self, rule: Callable[..., Any], role: str, *, apart: int) -> Callable[..., Any]:
        """A derivative rule of the user's, rewritten when JAX calls it.

        The rules are one replica's, and so is what they take and give. But JAX hands a reverse rule the sum over
        lanes for a result that it knows to be equal in all of them, and cannot match such a result with a tangent
        that differs. So with ``apart`` each lane gets results of its own, and padding has no part in cotangents.

        Args:
            rule: The rule.
            role: ``"jvp"``, ``"fwd"`` or ``"bwd"``.
            apart: How many results the function has that are to be each lane's own. With 0 nothing varies, but the
                cotangents of a function that is called alike everywhere.
        """
        everywhere, axes = frozenset(self.logical), tuple(self.logical.values())

        def rewritten(*args: Any) -> Any:
            with _jax.axis_env({axis.name: axis.size for axis in axes}):
                jaxpr, arrays, restore = _jax.trace_rule(rule, args)
            # JAX calls a rule when vmap and shard_map have long returned, and taken their axes along.
            with _jax.axis_env({name: size for axis in axes for name, size in axis.physical}):
                varies = apart or (role == "bwd" and self._axes_of(jaxpr))
                varying = [everywhere if varies else frozenset()] * len(arrays)
                results = self.run(jaxpr, _jax.constants(jaxpr), arrays, varying)
                if apart and role == "bwd":
                    results = [where_replica(axes, x) for x in results]
                first = len(results) - apart if role == "fwd" else 0  # residuals come first
                own = [lane_by_lane(axes, x) for x in results[first:]] if apart else results[first:]
                return restore([*results[:first], *own])

        return rewritten

    def _expanded(
        self, expansion: tuple[Callable[..., Any], Callable[..., Any]], args: list[Any], *, apart: int
    ) -> list[Any]:
        """An operation that JAX keeps whole until it is compiled, and that communicates: what it stands for."""
        primal, jvp = (self._rule(rule, "jvp", apart=apart) for rule in expansion)
        call = jax.custom_jvp(primal)
        call.defjvp(lambda primals, tangents: jvp(*primals, *tangents))
        return list(call(*args))

    def _divergent_while(self, eqn: Equation, args: list[Any], varying: list[Varying]) -> list[Any]:
        """A loop that replicas leave at different times, and that communicates: all stay until the last leaves.

        As in ``vmap``, a replica that is done keeps its carry, and goes on taking part in the collectives.
        """
        cond, body = _jax.sub_jaxprs(eqn)
        for_cond, for_body = self.analysis.operands(eqn, varying)
        split = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
        cond_consts, body_consts, carry = args[: split[0]], args[split[0] : split[1]], args[split[1] :]
        axes = [self.logical[n] for n in self.analysis.predicate(eqn, varying) & self._axes_inside(eqn)]

        def goes_on(carry: Sequence[Any]) -> Any:
            return self.run(cond, _jax.constants(cond), [*cond_consts, *carry], for_cond)[0]

        def step(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
            own, carry = state
            after = self.run(body, _jax.constants(body), [*body_consts, *carry], for_body)
            carry = [_where_still(own, new, old) for new, old in zip(after, carry, strict=True)]
            return goes_on(carry), carry

        state = lax.while_loop(lambda state: any_replica(axes, jnp.any(state[0])), step, (goes_on(carry), carry))
        return list(state[1])

    def _divergent_cond(self, eqn: Equation, args: list[Any], varying: list[Varying]) -> list[Any]:
        """A choice that replicas make differently, and that communicates: all run every branch, as in ``vmap``."""
        index, *operands = args
        branches = zip(_jax.sub_jaxprs(eqn), self.analysis.operands(eqn, varying), strict=True)
        results = [self.run(branch, _jax.constants(branch), operands, ops) for branch, ops in branches]
        return [lax.select_n(index, *cases) if len(cases) > 1 else cases[0] for cases in zip(*results, strict=True)]

    def _guarded(self, eqn: Equation, args: list[Any]) -> list[Any]:
        """A callback of the user's that padding lanes do not make."""
        runs = jnp.bool_(True)
        for axis in self.logical.values():
            if axis.padding:
                runs = runs & is_replica(axis)
        return _jax.bind_callback_where(eqn, args, runs)


def _where_still(goes_on: Any, new: Any, old: Any) -> Any:
    """``new`` in the loops that go on. A loop under a vmap of the user's has a condition for each of its rows."""
    return lax.select_n(lax.broadcast_in_dim(goes_on, new.shape, range(goes_on.ndim)), old, new)


#: What a user calls the collectives in the registry.
KNOWN = (
    "psum, pmean, pmax, pmin, ppermute, pshuffle, pbroadcast, all_gather, psum_scatter, "
    "all_to_all, pswapaxes, ragged_all_to_all, axis_index, axis_size"
)

#: Why JAX itself has no meaning for the others in a mapped function.
REASONS = {
    "psend": "JAX has one-sided sends on GPUs alone, and without a rule for vmap. Send and receive with ppermute.",
    "precv": "JAX has one-sided receives on GPUs alone, and without a rule for vmap. Send and receive with ppermute.",
}


def _unsupported(primitive: str, names: Sequence[Hashable]) -> str:
    axes = ", ".join(map(repr, names))
    reason = REASONS.get(primitive, "Express the exchange with those, for example with all_gather and indexing.")
    return (
        f"{primitive} over the mapped axis {axes}: replicax has no rule for this collective. "
        f"It has rules for {KNOWN}. {reason}"
    )
