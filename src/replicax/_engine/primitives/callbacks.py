"""Primitives for callbacks into Python, with JAX's rules for them; a door to what is not public in JAX."""

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

#: Runs a jaxpr on constants, arguments and the number of an earlier failure; the results, and the number after it.
Run = Callable[[Jaxpr, Sequence[ArrayLike], Sequence[ArrayLike], Array], tuple[list[Array], Array]]

_NUMBER = core.ShapedArray((), np.dtype("int32"))

CALLBACKS = ("pure_callback", "io_callback", "debug_callback", "debug_print")


def is_callback(eqn: Equation) -> bool:
    """Whether the equation calls back into Python."""
    return eqn.primitive.name in CALLBACKS


def is_ordered(eqn: Equation) -> bool:
    """Whether the equation asks for its calls to be made in one order: with ``ordered=True``."""
    return is_callback(eqn) and any("Ordered" in type(effect).__name__ for effect in eqn.effects)


# ---------------------------------------------------------------------------------------------------------------
# A callback that a failure goes through


def guarded(eqn: Equation, args: Sequence[ArrayLike], failed: Array, name: str) -> tuple[list[Array], Array]:
    """Records a callback that takes the number of an earlier failure and gives that of its own: see ``_failures``.

    Nothing but the rewriter can run it, with :func:`call`.

    Args:
        eqn: The callback's equation.
        args: Its operands.
        failed: The number of the earlier failure.
        name: What the user calls the mapped function.
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
    """What a callback's equation calls, on flat arguments; the types of its results; and whether it has an effect."""
    if eqn.primitive.name in ("pure_callback", "io_callback"):
        return eqn.params["callback"], tuple(eqn.params["result_avals"]), eqn.primitive.name == "io_callback"

    def show(*args: ArrayLike) -> tuple[()]:
        eqn.primitive.impl(*args, **eqn.params)
        return ()

    return show, (), True


def call(eqn: Equation, function: Callable[..., Sequence[ArrayLike]], args: Sequence[ArrayLike]) -> list[Array]:
    """Binds a callback's equation with another function, which takes these arguments and returns one number more."""
    if eqn.primitive.name not in ("pure_callback", "io_callback"):
        return list(_effect_p.bind(*args, function=function))
    types = (*eqn.params["result_avals"], _NUMBER)
    with eqn.ctx.manager:
        return list(eqn.primitive.bind(*args, **{**eqn.params, "callback": function, "result_avals": types}))


# ---------------------------------------------------------------------------------------------------------------
# A call of Python for its effect, which returns a number


def effect(function: Function, *args: Array) -> None:
    """Calls ``function`` for its effect, wherever a ``jax.debug.callback`` may be called."""
    _effect_p.bind(*args, function=lambda *args: (function(*args), np.int32(0))[1:])


_effect_p = core.Primitive("effect_callback")
_effect_p.multiple_results = True


@_effect_p.def_effectful_abstract_eval  # type: ignore[untyped-decorator]
def _effect_type(*avals: Aval, function: Function) -> tuple[list[Aval], set[object]]:
    del avals, function
    return [_NUMBER], {debugging.debug_effect}  # which loops, branches, derivatives and checkpoints allow


def _effect_batched(
    args: Sequence[Array], dims: Sequence[int | None], *, function: Function
) -> tuple[list[Array], list[int]]:
    """One call for each row, in order."""
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
# Functions with derivative rules of the user's


def bind_custom(eqn: Equation, args: Sequence[ArrayLike], failed: Array, run: Run) -> tuple[list[Array], Array]:
    """Binds a ``custom_jvp`` or ``custom_vjp`` function whose program or rules call back, failures going through it.

    The number of a failure is its last operand and its last result, and has no derivative. A reverse rule has no
    result of its own that could carry one, so that a callback in it raises where it is.
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
    """A derivative rule of such a function, which takes one operand more and gives one result more.

    Args:
        role: ``"jvp"``, ``"fwd"`` or ``"bwd"``.
        rule: The rule.
        failed: The number of the earlier failure.
        run: Runs the rule's program.
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

    def fwd(*flat: Array) -> list[Array]:  # each operand, and whether it is differentiated
        results, number = traced(flat[:-2], flat[-2])
        return [*results, number]

    def bwd(*flat: Array) -> Sequence[PyTree]:
        return add_cotangent(rule.call_wrapped(*flat[:-1]), ad_util.p2tz(failed))

    return {"jvp": jvp, "fwd": fwd, "bwd": bwd}[role]


def forward_rule(eqn: Equation, sizes: Mapping[Hashable, int]) -> Jaxpr | None:
    """The program that JAX runs in place of a ``custom_jvp`` or ``custom_vjp`` function that it differentiates.

    None where it cannot be traced: it will not run then, either.

    Args:
        eqn: The equation.
        sizes: The mapped axes in scope.
    """
    try:
        with axis_env(sizes):
            return next(rule_jaxprs(eqn))
    except Exception:  # a rule of the user's may raise anything
        return None


_no_tangent_p = core.Primitive("no_tangent")  # JAX gives every result of a custom_vjp a tangent
_no_tangent_p.def_impl(lambda x: x)
_no_tangent_p.def_abstract_eval(lambda x: x)
batching.defvectorized(_no_tangent_p)
ad.primitive_jvps[_no_tangent_p] = lambda primals, _: (_no_tangent_p.bind(*primals), ad_util.p2tz(primals[0]))
mlir.register_lowering(_no_tangent_p, mlir.lower_fun(lambda x: x, multiple_results=False))
