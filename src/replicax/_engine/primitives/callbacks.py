"""Primitives for callbacks into Python, with their rules for JAX's transformations. Uses non-public JAX."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replicax._jax import (
    Equation,
    Jaxpr,
    add_cotangent,
    axis_env,
    constants,
    derivative_rules,
    rule_jaxprs,
    sub_jaxprs,
    trace_rule,
)
from replicax._jax.interpreters import ad, ad_util, batching, callback, core, debugging, mlir
from replicax._jax.interpreters import linear_util as lu
from replicax._typing import Array, ArrayLike, Aval, Function, PyTree

#: Runs a jaxpr on constants, arguments and a failure number. Returns the results and the new failure number.
Run = Callable[[Jaxpr, Sequence[ArrayLike], Sequence[ArrayLike], Array], tuple[list[Array], Array]]

_NUMBER = core.ShapedArray((), np.dtype("int32"))

CALLBACKS = ("pure_callback", "io_callback", "debug_callback", "debug_print")


def is_callback(eqn: Equation) -> bool:
    """Whether the equation calls back into Python."""
    return eqn.primitive.name in CALLBACKS


def is_ordered(eqn: Equation) -> bool:
    """Whether the equation is a callback with ``ordered=True``."""
    return is_callback(eqn) and any("Ordered" in type(effect).__name__ for effect in eqn.effects)


# ---------------------------------------------------------------------------------------------------------------
# A callback that takes and returns a failure number


def guarded(eqn: Equation, args: Sequence[ArrayLike], failed: Array, name: str) -> tuple[list[Array], Array]:
    """Records a callback as one equation that also takes and returns a failure number: see ``_engine.failures``.

    Only the rewriter can run the equation, with :func:`call`.

    Args:
        eqn: The equation of the callback.
        args: Its operands.
        failed: The number of the earlier failure, int32.
        name: The name of the user's function, for error messages.
    """
    *results, failed = _guarded_p.bind(failed, *args, eqn=eqn, name=name)
    return results, failed


_guarded_p = core.Primitive("guarded_callback")
_guarded_p.multiple_results = True


@_guarded_p.def_effectful_abstract_eval  # type: ignore[untyped-decorator]
def _guarded_type(*avals: Aval, eqn: Equation, name: str) -> tuple[list[Aval], set[object]]:
    del avals, name
    return [*(var.aval for var in eqn.outvars), _NUMBER], {debugging.debug_effect} if eqn.effects else set()


def is_guarded(eqn: Equation) -> bool:
    """Whether the equation is a :func:`guarded` callback."""
    return eqn.primitive is _guarded_p


def callback_of(eqn: Equation) -> tuple[Callable[..., Sequence[ArrayLike]], tuple[Aval, ...], bool]:
    """Returns the function that a callback's equation calls, its result types, and whether it has a side effect."""
    if eqn.primitive.name in ("pure_callback", "io_callback"):
        return eqn.params["callback"], tuple(eqn.params["result_avals"]), eqn.primitive.name == "io_callback"

    def show(*args: ArrayLike) -> tuple[()]:
        eqn.primitive.impl(*args, **eqn.params)
        return ()

    return show, (), True


def call(eqn: Equation, function: Callable[..., Sequence[ArrayLike]], args: Sequence[ArrayLike]) -> list[Array]:
    """Binds a callback's equation with another function of ``args``, which also returns a failure number (int32)."""
    if eqn.primitive.name not in ("pure_callback", "io_callback"):
        return list(_effect_p.bind(*args, function=function))
    types = (*eqn.params["result_avals"], _NUMBER)
    with eqn.ctx.manager:
        return list(eqn.primitive.bind(*args, **{**eqn.params, "callback": function, "result_avals": types}))


# ---------------------------------------------------------------------------------------------------------------
# A callback with a side effect, which returns one int32


def effect(function: Function, *args: Array) -> None:
    """Calls ``function`` for its side effect. Allowed wherever ``jax.debug.callback`` is allowed."""
    _effect_p.bind(*args, function=lambda *args: (function(*args), np.int32(0))[1:])


_effect_p = core.Primitive("effect_callback")
_effect_p.multiple_results = True


@_effect_p.def_effectful_abstract_eval  # type: ignore[untyped-decorator]
def _effect_type(*avals: Aval, function: Function) -> tuple[list[Aval], set[object]]:
    del avals, function
    return [_NUMBER], {debugging.debug_effect}  # loops, branches, derivatives and checkpoints allow this effect


def _effect_batched(
    args: Sequence[Array], dims: Sequence[int | None], *, function: Function
) -> tuple[list[Array], list[int]]:
    """Calls the function once for each row, in order."""
    rows = [jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True) if d is not None]

    def one(rows: Sequence[Array]) -> list[Array]:
        row = iter(rows)
        each = (x if d is None else next(row) for x, d in zip(args, dims, strict=True))
        return list(_effect_p.bind(*each, function=function))

    return lax.map(one, rows), [0]


def _effect_jvp(
    primals: Sequence[Array], tangents: Sequence[Array | ad_util.Zero], *, function: Function
) -> tuple[list[Array], list[ad_util.Zero]]:
    del tangents
    results = _effect_p.bind(*primals, function=function)
    return results, [ad_util.p2tz(x) for x in results]


def _effect_lowered(ctx: mlir.LoweringRuleContext, *args: mlir.ir.Value, function: Function) -> Sequence[mlir.ir.Value]:
    cpu = jax.local_devices(backend="cpu")[0]

    def on_host(*flat: ArrayLike) -> tuple[ArrayLike, ...]:
        with jax.default_device(cpu):
            return tuple(function(*jax.device_put(flat, cpu)))

    results, _, _ = callback.emit_python_callback(
        ctx,
        on_host,
        None,
        list(args),
        ctx.avals_in,
        ctx.avals_out,
        has_side_effect=True,
        returns_token=False,
        sharding=callback._callback_op_sharding(ctx.module_context.axis_context, None, ctx.avals_out),
    )
    return results


_effect_p.def_impl(lambda *args, function: [jnp.int32(x) for x in function(*args)])
batching.primitive_batchers[_effect_p] = _effect_batched
ad.primitive_jvps[_effect_p] = _effect_jvp
mlir.register_lowering(_effect_p, _effect_lowered, cacheable=False)


# ---------------------------------------------------------------------------------------------------------------
# Functions with custom derivative rules


def bind_custom(eqn: Equation, args: Sequence[ArrayLike], failed: Array, run: Run) -> tuple[list[Array], Array]:
    """Binds a ``custom_jvp`` or ``custom_vjp`` function that contains callbacks, with a failure number passed through.

    The failure number is the last operand and the last result, and has no derivative. A reverse rule cannot return the
    number, so a callback in a reverse rule raises at once.

    Args:
        eqn: The equation.
        args: Its operands.
        failed: The number of an earlier failure, int32.
        run: Runs a jaxpr with guarded callbacks.
    """
    params = eqn.primitive.get_bind_params(eqn.params)
    primal, *rules = params["subfuns"]
    program = next(sub_jaxprs(eqn))

    def new_primal(*flat: Array) -> list[Array]:
        results, number = run(program, constants(program), flat[:-1], flat[-1])
        return [*results, number]

    wrapped = [
        lu.wrap_init(_with_number(role, rule, failed, run), debug_info=rule.debug_info)
        for role, rule in zip(derivative_rules(eqn), rules, strict=True)
    ]
    params = {**params, "subfuns": (lu.wrap_init(new_primal, debug_info=primal.debug_info), *wrapped)}
    if "out_trees" in params:

        def out_trees() -> tuple[jax.tree_util.PyTreeDef, ...]:
            out, *others = eqn.params["out_trees"]()
            return (jax.tree.structure((jax.tree.unflatten(out, range(out.num_leaves)), 0)), *others)

        params["out_trees"] = out_trees
    with eqn.ctx.manager:
        *results, number = eqn.primitive.bind(*args, failed, **params)
    return results, _no_tangent_p.bind(number)


def _with_number(role: str, rule: lu.WrappedFun, failed: Array, run: Run) -> Function:
    """Wraps a derivative rule to take an extra failure number. A ``jvp`` or ``fwd`` rule also returns one.

    Args:
        role: ``"jvp"``, ``"fwd"`` or ``"bwd"``.
        rule: The rule.
        failed: The number of the earlier failure.
        run: Runs the program of the rule.
    """

    def traced(args: Sequence[Array], number: Array) -> tuple[list[Array], Array]:
        jaxpr, arrays, restore = trace_rule(rule.call_wrapped, args)
        results, number = run(jaxpr, constants(jaxpr), arrays, number)
        return list(restore(results)), number

    def jvp(*flat: Array) -> list[ArrayLike]:
        primals, tangents = flat[: len(flat) // 2], flat[len(flat) // 2 :]
        results, number = traced([*primals[:-1], *tangents[:-1]], primals[-1])
        half = len(results) // 2
        return [*results[:half], number, *results[half:], np.zeros((), jax.dtypes.float0)]

    def fwd(*flat: Array) -> list[Array]:  # after each operand, JAX passes whether it is differentiated
        results, number = traced(flat[:-2], flat[-2])
        return [*results, number]

    def bwd(*flat: Array) -> Sequence[PyTree]:
        return add_cotangent(rule.call_wrapped(*flat[:-1]), ad_util.p2tz(failed))

    return {"jvp": jvp, "fwd": fwd, "bwd": bwd}[role]


def forward_rule(eqn: Equation, sizes: Mapping[Hashable, int]) -> Jaxpr | None:
    """Traces the forward rule of a ``custom_jvp`` or ``custom_vjp`` function.

    Returns None if tracing raises, because such a rule cannot run later either.

    Args:
        eqn: The equation.
        sizes: The mapped axes in scope, with their sizes.
    """
    try:
        with axis_env(sizes):
            return next(rule_jaxprs(eqn))
    except Exception:  # a user's rule may raise anything
        return None


_no_tangent_p = core.Primitive("no_tangent")  # drops the tangent that JAX gives every result of a custom_vjp
_no_tangent_p.def_impl(lambda x: x)
_no_tangent_p.def_abstract_eval(lambda x: x)
batching.defvectorized(_no_tangent_p)
ad.primitive_jvps[_no_tangent_p] = lambda primals, _: (_no_tangent_p.bind(*primals), ad_util.p2tz(primals[0]))
mlir.register_lowering(_no_tangent_p, mlir.lower_fun(lambda x: x, multiple_results=False))
