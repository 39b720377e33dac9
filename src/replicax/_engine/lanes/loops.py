"""Cuts loops, branches and checkpointed parts that contain collectives, if all lanes run them in the same way.

Such an equation runs once for all lanes, and the jaxprs inside of it are cut like a program of their own. This needs a
trip count, predicate or branch index that is equal in all lanes. Values that differ between lanes are stacked,
``(lanes, ...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.lanes.segments import CutEquation, Part
from replicax._engine.primitives import callbacks as callback_primitives
from replicax._jax import Equation, Jaxpr
from replicax._typing import Array, ArrayLike

#: Cuts a jaxpr, given whether each argument is stacked.
CutJaxpr = Callable[[Jaxpr, Sequence[bool]], Part]

#: Runs a jaxpr that is cut on its arguments.
RunPart = Callable[[Part, Sequence[ArrayLike]], list[ArrayLike]]

#: Equations that run one jaxpr once.
_CALLS = {"remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


def cut_equation(eqn: Equation, mapped: Sequence[bool], cut: CutJaxpr, *, differentiated: bool) -> CutEquation | None:
    """Cuts the jaxprs of an equation; None if lanes may run it differently, or if it has other things inside.

    Args:
        eqn: An equation that contains collectives.
        mapped: Whether each operand is stacked.
        cut: Cuts a jaxpr.
        differentiated: Whether JAX may call the derivative rules of the equation.
    """
    subs = list(_jax.sub_jaxprs(eqn))
    if not subs or not all(map(_is_plain, subs)) or (differentiated and _jax.derivative_rules(eqn)):
        return None
    match eqn.primitive.name:
        case "scan":
            return _cut_scan(eqn, mapped, cut)
        case "while":
            return _cut_while(eqn, mapped, cut)
        case "cond" if not mapped[0]:
            branches = [cut(sub, mapped[1:]) for sub in subs]
            return CutEquation(
                eqn, mapped, branches, list(map(any, zip(*(each.stacked for each in branches), strict=True)))
            )
        case name if name in _CALLS and len(subs) == 1 and len(_jax.body(subs[0]).invars) == len(mapped):
            part = cut(subs[0], mapped)
            return CutEquation(eqn, mapped, [part], part.stacked)
    return None


def _is_plain(jaxpr: Jaxpr) -> bool:
    """Whether there are no maps, callbacks, refs or other side effects in the jaxpr."""
    return all(
        not primitives.is_nested_map(eqn)
        and not callback_primitives.is_guarded(eqn)
        and not _jax.has_side_effect(eqn)
        and not _jax.holds_references(eqn)
        and all(map(_is_plain, _jax.sub_jaxprs(eqn)))
        for eqn in _jax.body(jaxpr).eqns
    )


def _cut_scan(eqn: Equation, mapped: Sequence[bool], cut: CutJaxpr) -> CutEquation:
    (step,), carry, operands = list(_jax.sub_jaxprs(eqn)), _jax.loop_carry(eqn), list(mapped)
    while True:
        part = cut(step, operands)
        grown = [a or b for a, b in zip(operands[carry], part.stacked, strict=False)]
        if grown == operands[carry]:
            return CutEquation(eqn, mapped, [part], [*grown, *part.stacked[len(grown) :]])
        operands[carry] = grown


def _cut_while(eqn: Equation, mapped: Sequence[bool], cut: CutJaxpr) -> CutEquation | None:
    cond, body = _jax.sub_jaxprs(eqn)
    if _jax.body(cond).outvars[0].aval.shape:  # inside the user's vmap, the loop runs until its last row is done
        return None
    for_cond, for_body, carry = _while_operands(eqn, mapped)
    while True:
        part = cut(body, [*for_body, *carry])
        grown = [a or b for a, b in zip(carry, part.stacked, strict=True)]
        if grown == carry:
            break
        carry = grown
    condition = cut(cond, [*for_cond, *carry])
    return None if condition.stacked[0] else CutEquation(eqn, mapped, [condition, part], carry)


def _while_operands(eqn: Equation, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The operands of the condition, of the body, and the carry."""
    first = eqn.params["cond_nconsts"]
    second = first + eqn.params["body_nconsts"]
    return list(operands[:first]), list(operands[first:second]), list(operands[second:])


def run_cut_equation(each: CutEquation, operands: Sequence[ArrayLike], lanes: int, run: RunPart) -> list[Array]:
    """Runs an equation whose jaxprs are cut.

    Args:
        each: The equation.
        operands: Its operands, stacked as they were when it was cut.
        lanes: The number of lanes.
        run: Runs one of its jaxprs.
    """
    eqn, parts = each.eqn, each.parts

    def run_as(part: Part, args: Sequence[ArrayLike]) -> list[Array]:
        results = zip(run(part, args), part.stacked, each.stacked, strict=True)
        return [_as_rows(y, own, wanted, lanes) for y, own, wanted in results]

    match eqn.primitive.name:
        case "scan":
            return _run_scan(each, operands, lanes, run)
        case "while":
            for_cond, for_body, carry = _while_operands(eqn, operands)
            own = _while_operands(eqn, each.mapped)[2]
            start = [_as_rows(x, a, b, lanes) for x, a, b in zip(carry, own, each.stacked, strict=True)]
            return list(
                lax.while_loop(
                    lambda carry: jnp.asarray(run(parts[0], [*for_cond, *carry])[0]),
                    lambda carry: run_as(parts[1], [*for_body, *carry]),
                    start,
                )
            )
        case "cond":
            index, *args = operands
            branches = [lambda *args, part=part: run_as(part, args) for part in parts]
            return list(lax.switch(jnp.asarray(index), branches, *map(jnp.asarray, args)))
        case "remat2" | "checkpoint":
            keep = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
            return list(jax.checkpoint(lambda *args: run_as(parts[0], args), **keep)(*operands))
    return run_as(parts[0], operands)


def _run_scan(each: CutEquation, operands: Sequence[ArrayLike], lanes: int, run: RunPart) -> list[Array]:
    eqn, (part,), carry = each.eqn, each.parts, _jax.loop_carry(each.eqn)
    count = carry.stop - carry.start
    arrays = list(map(jnp.asarray, operands))
    consts, start, rows = arrays[: carry.start], arrays[carry], arrays[carry.stop :]
    start = [_as_rows(x, a, b, lanes) for x, a, b in zip(start, each.mapped[carry], each.stacked, strict=False)]
    rows = [jnp.moveaxis(x, 1, 0) if own else x for x, own in zip(rows, part.mapped[carry.stop :], strict=True)]

    def step(state: list[Array], row: list[Array]) -> tuple[list[Array], list[Array]]:
        found = list(map(jnp.asarray, run(part, [*consts, *state, *row])))
        after = zip(found[:count], part.stacked, each.stacked, strict=False)
        return [_as_rows(y, a, b, lanes) for y, a, b in after], found[count:]

    options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    state, made = lax.scan(step, start, rows, **options)
    made = [jnp.moveaxis(y, 0, 1) if own else y for y, own in zip(made, each.stacked[count:], strict=True)]
    return [*state, *made]


def _as_rows(x: ArrayLike, stacked: bool, wanted: bool, lanes: int) -> Array:
    """Stacks one copy for each lane, if wanted."""
    x = jnp.asarray(x)
    return jnp.broadcast_to(x, (lanes, *x.shape)) if wanted and not stacked else x
