"""The user's derivative rules, and equations that contain jaxprs or rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax._src import ad_util, core
from jax._src import linear_util as lu

from replicax._jax.aliases import ArrayType, Equation, Jaxpr
from replicax._jax.jaxprs import (
    bears_no_constants,
    bind,
    bind_with,
    is_literal,
    primitives,
    retrace,
    sub_jaxprs,
    trace_to_jaxpr,
)
from replicax._jax.tracebacks import equation_context
from replicax._jax.tracing import NO_MESH, replica_traced
from replicax._jax.types import is_array_type, plain_type
from replicax._jax.versions import body, close, constants, is_jaxpr, wrapped_primitive
from replicax._typing import Array, ArrayLike, Atom, PyTree


def bind_again(
    eqn: Equation,
    args: Sequence[ArrayLike],
    rewrite_jaxpr: Callable[[Jaxpr], tuple[Jaxpr, list[Array]]],
    rewrite_rule: Callable[[Callable[..., Any], str], Callable[..., Any]],
) -> list[Array]:
    """Binds a higher-order equation with every jaxpr in it rewritten.

    The derivative rules of ``custom_jvp`` and ``custom_vjp`` are functions, not jaxprs. JAX calls them only if it
    differentiates. So ``rewrite_rule`` wraps each rule.

    Args:
        eqn: The equation.
        args: Its operands.
        rewrite_jaxpr: Takes a jaxpr. Returns the new jaxpr and its leading arguments, as :func:`retrace` does.
        rewrite_rule: Takes a rule and its role (``"jvp"``, ``"fwd"`` or ``"bwd"``). Returns the new rule.
    """
    hoisted: list[Array] = []

    def rewritten(value: object) -> Any:
        if is_jaxpr(value):
            jaxpr, consts = rewrite_jaxpr(value)
            hoisted.extend(consts)
            return jaxpr
        if isinstance(value, tuple | list) and any(is_jaxpr(item) for item in value):
            items = [rewritten(item) for item in value]
            return value._make(items) if hasattr(value, "_make") else type(value)(items)
        return value

    params = eqn.primitive.get_bind_params({key: rewritten(value) for key, value in eqn.params.items()})
    if "subfuns" in params:
        primal, *rules = params["subfuns"]
        wrapped = (
            lu.wrap_init(rewrite_rule(rule.call_wrapped, role), debug_info=rule.debug_info)
            for rule, role in zip(rules, derivative_rules(eqn), strict=True)
        )
        params = {**params, "subfuns": (primal, *wrapped)}
    if hoisted and isinstance(params.get("prevent_cse"), tuple):
        params = {**params, "prevent_cse": (*[False] * len(hoisted), *params["prevent_cse"])}
    return bind_with(eqn, [*hoisted, *args], params)


#: Runs an equation in another way.
Replacement = Callable[[Equation, Sequence[ArrayLike]], list[Array]]


def replace(eqn: Equation, args: Sequence[ArrayLike], replacements: Mapping[str, Replacement]) -> list[Array]:
    """Binds an equation, but at any depth, runs those of some primitives in another way.

    Args:
        eqn: The equation.
        args: Its operands.
        replacements: By the name of the primitive, what runs its equations. Derivative rules are not looked at.
    """
    if eqn.primitive.name in replacements:
        return replacements[eqn.primitive.name](eqn, args)
    if not any(replacements.keys() & primitives(sub) for sub in sub_jaxprs(eqn)):
        return bind(eqn, args)

    def rewritten(sub: Jaxpr) -> tuple[Jaxpr, list[Array]]:
        hoist = bears_no_constants(eqn)
        return retrace(lambda *args: run_with(sub, args, replacements), sub, hoist=hoist)

    return bind_again(eqn, args, rewritten, lambda rule, _: rule)


def run_with(jaxpr: Jaxpr, args: Sequence[ArrayLike], replacements: Mapping[str, Replacement]) -> list[Array]:
    """Runs a jaxpr, but at any depth, equations of some primitives in another way: see :func:`replace`."""
    inside = body(jaxpr)
    values = dict(zip([*inside.constvars, *inside.invars], [*constants(jaxpr), *args], strict=True))

    def read(atom: Atom) -> ArrayLike:
        return atom.val if is_literal(atom) else values[atom]

    for eqn in inside.eqns:
        with equation_context(eqn):
            results = replace(eqn, list(map(read, eqn.invars)), replacements)
        values.update(zip(eqn.outvars, results, strict=True))
    return list(map(read, inside.outvars))


_RULES: dict[str, tuple[str, ...]] = {"custom_jvp_call": ("jvp",), "custom_vjp_call": ("fwd", "bwd")}


def derivative_rules(eqn: Equation) -> tuple[str, ...]:
    """Returns the roles of the user's derivative rules in the equation. A rule may communicate when JAX calls it."""
    return _RULES.get(eqn.primitive.name, ())


def rule_jaxprs(eqn: Equation) -> Iterator[Jaxpr]:
    """Yields the user's derivative rules in the equation, traced as JAX would call them."""
    if not derivative_rules(eqn):
        return
    params = eqn.primitive.get_bind_params(eqn.params)
    _, *rules = params["subfuns"]
    primals = [atom.aval for atom in eqn.invars]
    if len(rules) == 1:
        jaxpr, *_ = trace_rule(rules[0].call_wrapped, [*primals, *(aval.to_tangent_aval() for aval in primals)])
        yield jaxpr
        return
    fwd, bwd = rules
    jaxpr, *_ = trace_rule(fwd.call_wrapped, [x for aval in primals for x in (aval, True)])
    yield jaxpr
    # As in JAX's JVPTrace.process_custom_vjp_call: the forward rule does not return residuals that are arguments.
    _, _, forwarded = params["out_trees"]()
    own = iter(var.aval for var in body(jaxpr).outvars)
    residuals = [next(own) if k is None else primals[k] for k in forwarded]
    jaxpr, *_ = trace_rule(bwd.call_wrapped, [*residuals, *(var.aval.to_cotangent_aval() for var in eqn.outvars)])
    yield jaxpr


def expansion(eqn: Equation) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Returns the expansion of a ``call_hi_primitive`` equation (JAX 0.12) and its JVP; None for other equations.

    Both are functions of flat arguments. The JVP takes the primals, then their tangents.
    """
    prim = wrapped_primitive(eqn)
    if prim is None:
        return None

    def primal(*flat: Array) -> list[Array]:
        return jax.tree.leaves(prim.expand(*prim.in_tree.unflatten(flat)))

    def jvp(*flat: Array) -> tuple[list[Array], list[Array]]:
        primals, tangents = flat[: len(flat) // 2], flat[len(flat) // 2 :]
        tangents = tuple(
            ad_util.p2tz(p) if t.dtype == jax.dtypes.float0 else t for p, t in zip(primals, tangents, strict=True)
        )
        out, out_dot = prim.jvp(prim.in_tree.unflatten(primals), prim.in_tree.unflatten(tangents))
        return jax.tree.leaves(out), [ad_util.instantiate(t) for t in prim.out_tree.flatten_up_to(out_dot)]

    return primal, jvp


def trace_rule(
    rule: Callable[..., Any], args: Sequence[ArrayLike | ArrayType]
) -> tuple[Jaxpr, list[Array], Callable[..., Any]]:
    """Traces a derivative rule. Its arguments and results may contain JAX's symbolic zeros and flags besides arrays.

    Args:
        rule: The rule.
        args: Its arguments. Types may replace the arrays.

    Returns:
        The jaxpr, its array arguments, and a function from the jaxpr's results to the rule's own result.
    """
    is_array = [isinstance(x, core.ShapedArray) or is_array_type(x) for x in args]
    arrays = [x for x, dynamic in zip(args, is_array, strict=True) if dynamic]
    restore: list[Callable[..., Any]] = []

    def flat(*tracers: Array) -> list[Array]:
        it = iter(tracers)
        out = rule(*(next(it) if dynamic else x for x, dynamic in zip(args, is_array, strict=True)))
        leaves, treedef = jax.tree.flatten(out)
        dynamic_out = [is_array_type(x) for x in leaves]

        def unflatten(results: Sequence[Array]) -> PyTree:
            it = iter(results)
            return treedef.unflatten(next(it) if dyn else x for x, dyn in zip(leaves_kept, dynamic_out, strict=True))

        leaves_kept = [None if dyn else x for x, dyn in zip(leaves, dynamic_out, strict=True)]
        restore.append(unflatten)
        return [x for x, dyn in zip(leaves, dynamic_out, strict=True) if dyn]

    dbg = lu.DebugInfo("replicax derivative rule", "derivative rule", None, None)
    # Equinox compares types here with types in the trace of the replica, which have no mesh.
    with replica_traced(), jax.sharding.use_abstract_mesh(NO_MESH):
        jaxpr = close(*trace_to_jaxpr(flat, list(map(plain_type, arrays)), dbg))
    return jaxpr, arrays, restore[0]
