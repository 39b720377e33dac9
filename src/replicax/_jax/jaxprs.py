"""Inspects, traces, changes and binds jaxprs.

The parameters of equations differ between JAX versions (0.10 wraps a jaxpr with constants in ``ClosedJaxpr``, 0.11 has
one class). So most functions treat all primitives alike and read no parameter by name. :func:`loop_counts` is an
exception: it reads the number of carries of a ``scan``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import core
from jax._src import linear_util as lu
from jax._src.ad_checkpoint import remat_p
from jax._src.interpreters import partial_eval as pe
from jax._src.sharding_impls import UNSPECIFIED
from jax.extend import core as extend_core
from jax.extend.core import DebugInfo

from replicax._jax.aliases import ArrayType, Atom, Equation, Jaxpr, Literal
from replicax._jax.tracing import NO_MESH, AxisName, axis_env
from replicax._jax.types import as_type, without_sharding
from replicax._jax.versions import Closed, Open, body, close, constants, is_jaxpr, loop_counts, wrapped_primitive
from replicax._typing import Array, ArrayLike, PyTree


def is_literal(atom: Atom) -> bool:
    """Whether an operand is a literal: a constant stored in the equation."""
    return isinstance(atom, extend_core.Literal)


def sub_jaxprs(eqn: Equation) -> Iterator[Jaxpr]:
    """Yields the jaxprs among an equation's parameters, in a fixed order, except the update jaxpr of a scatter."""
    if eqn.primitive.multiple_results:
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if is_jaxpr(item):
                    yield item


def primitives(jaxpr: Jaxpr) -> set[str]:
    """Returns the names of all primitives in the jaxpr, at any depth."""
    names: set[str] = set()
    seen: set[int] = set()

    def visit(jaxpr: Jaxpr) -> None:
        if id(jaxpr) not in seen:
            seen.add(id(jaxpr))
            for eqn in body(jaxpr).eqns:
                names.add(eqn.primitive.name)
                for sub in sub_jaxprs(eqn):
                    visit(sub)

    visit(jaxpr)
    return names


def equations(jaxpr: Jaxpr, most: int) -> int:
    """Returns the number of equations in the jaxpr, at any depth, but at most ``most``."""
    count = 0
    for eqn in body(jaxpr).eqns:
        count += 1 + sum(equations(sub, most - count) for sub in sub_jaxprs(eqn))
        if count >= most:
            return most
    return count


def named_axes(eqn: Equation) -> tuple[AxisName, ...]:
    """Returns the mapped axes that an equation without sub-jaxprs names. Empty if it does not communicate."""
    names = _axis_parameters(eqn)
    if eqn.effects:
        names.extend(effect.name for effect in eqn.effects if isinstance(effect, core.NamedAxisEffect))
    return tuple(dict.fromkeys(name for name in names if not isinstance(name, int))) if names else ()


def repeated_axes(eqn: Equation) -> tuple[AxisName, ...]:
    """Returns the mapped axes that a collective names more than once."""
    names = _axis_parameters(eqn)
    return tuple(dict.fromkeys(name for name in names if not isinstance(name, int) and names.count(name) > 1))


def _axis_parameters(eqn: Equation) -> list[AxisName]:
    names: list[AxisName] = []
    for key in ("axes", "axis_name"):
        if key in eqn.params:
            value = eqn.params[key]
            names.extend(value if isinstance(value, tuple | list) else (value,))
    return names


def loop_carry(eqn: Equation) -> slice:
    """Returns the positions of the carried operands of a ``scan``."""
    consts, carries = loop_counts(eqn)
    return slice(consts, consts + carries)


def trace(
    fun: Callable[..., Any],
    args: Sequence[PyTree],
    kwargs: Mapping[str, PyTree],
    static: Sequence[int],
    sizes: Mapping[AxisName, int],
) -> tuple[Jaxpr, list[Array], PyTree]:
    """Traces the user's ``fun`` with mapped axes in scope.

    Args:
        fun: The user's function.
        args: The positional arguments: trees of ``jax.ShapeDtypeStruct``; static arguments unchanged.
        kwargs: The keyword arguments, in the same form.
        static: The positions of the static arguments.
        sizes: The mapped axes in scope, with their sizes.

    Returns:
        The jaxpr, its constants (which may be tracers of an enclosing trace), and the tree of ``jax.ShapeDtypeStruct``
        that ``fun`` returned.
    """
    fixed = {i: args[i] for i in static}

    @functools.wraps(fun, updated=())  # without __dict__: a user's attribute such as "trace" would hide that of jit
    def bound(*args: PyTree, **kwargs: PyTree) -> PyTree:
        # JAX compares static arguments with those of other functions, and == may raise for such pairs of types.
        # Workaround: static_arguments_compared.
        return fun(*(fixed.get(i, x) for i, x in enumerate(args)), **kwargs)

    traced = jax.make_jaxpr(bound, axis_env=list(sizes.items()), return_shape=True)
    jaxpr, out = traced(*(None if i in fixed else x for i, x in enumerate(args)), **kwargs)
    return jaxpr, list(constants(jaxpr)), out


def trace_to_jaxpr(
    fun: Callable[..., Sequence[ArrayLike]], avals: Sequence[ArrayType], debug_info: DebugInfo
) -> tuple[Jaxpr, list[Array]]:
    """Traces a function of flat arguments. Returns the jaxpr, and the values of its constants."""
    jaxpr, _, consts = pe.trace_to_jaxpr_dynamic(lu.wrap_init(fun, debug_info=debug_info), list(avals))
    return jaxpr, list(consts)


def trace_flat(
    fun: Callable[..., Sequence[ArrayLike]], avals: Sequence[ArrayType], sizes: Mapping[AxisName, int]
) -> tuple[Jaxpr, list[Array]]:
    """Traces a function of flat arguments to a jaxpr without constants.

    Returns:
        The jaxpr, and the closed-over arrays, which become its leading arguments.
    """
    with axis_env(sizes):
        jaxpr, consts = trace_to_jaxpr(fun, avals, lu.DebugInfo("nested map", "one replica", None, None))
        return close(pe.convert_constvars_jaxpr(jaxpr), ()), consts


def retrace(fun: Callable[..., Sequence[ArrayLike]], like: Jaxpr, *, hoist: bool) -> tuple[Jaxpr, list[Array]]:
    """Traces ``fun`` to a jaxpr with the argument types, the result types and the class of ``like``.

    The arguments and results of ``fun`` have the types of ``like``, but may differ in weak types. Weak types are
    restored, because loops and branches compare them.

    Args:
        fun: The function.
        like: The jaxpr whose types are used.
        hoist: Whether arrays that ``fun`` closes over become leading arguments.

    Returns:
        The jaxpr, and the arrays to pass before its arguments.
    """

    def same_types(*args: Array) -> list[Array]:
        return [as_type(x, var.aval) for x, var in zip(fun(*args), body(like).outvars, strict=True)]

    in_avals = [without_sharding(var.aval) for var in body(like).invars]
    jaxpr, consts = trace_to_jaxpr(same_types, in_avals, body(like).debug_info)
    hoisted = consts if hoist else []
    if hoist:
        jaxpr, consts = pe.convert_constvars_jaxpr(jaxpr), []
    return close(jaxpr, consts) if isinstance(like, Closed) else jaxpr, hoisted


def in_shard_map(eqn: Equation) -> bool:
    """Whether the equation was recorded inside a ``shard_map``."""
    types = (getattr(atom.aval, "sharding", None) for atom in (*eqn.invars, *eqn.outvars))
    return any(x is not None and jax.sharding.AxisType.Manual in x.mesh.axis_types for x in types)


def literal(atom: Literal) -> ArrayLike:
    """Returns the value of a literal, without the mesh of an enclosing ``shard_map`` in its type."""
    if atom.aval.sharding.mesh.empty:
        return atom.val
    value = np.asarray(atom.val, atom.aval.dtype)
    return (
        value.item()
        if atom.aval.weak_type and np.result_type(core.typeof(value.item()).dtype) == value.dtype
        else value
    )


def without_mesh(eqn: Equation) -> Equation:
    """Returns the equation as it would be recorded without a mesh in scope."""
    ctx = copy.copy(eqn.ctx)
    object.__setattr__(ctx, "cur_abstract_mesh", NO_MESH)  # no method sets this attribute
    params = dict(eqn.params)
    if "ctx_mesh" in params:
        params["ctx_mesh"] = NO_MESH
    for key in ("sharding", "out_sharding"):
        if isinstance(params.get(key), jax.sharding.NamedSharding):
            params[key] = None
    return eqn.replace(ctx=ctx, params=params)


def without_constants(jaxpr: Jaxpr) -> Jaxpr:
    """Returns the jaxpr with its constants as leading arguments."""
    if not body(jaxpr).constvars:
        return jaxpr
    return close(pe.convert_constvars_jaxpr(body(jaxpr)), ())


def with_results(jaxpr: Jaxpr, outvars: Sequence[Atom]) -> Jaxpr:
    """Returns the jaxpr with other variables as results. The jaxpr has no constants."""
    debug_info = body(jaxpr).debug_info._replace(arg_names=None, result_paths=None)
    return close(body(jaxpr).replace(outvars=list(outvars), debug_info=debug_info), ())


def open_constants(jaxpr: Jaxpr, consts: Sequence[ArrayLike]) -> Jaxpr:
    """Returns the open jaxpr whose constants are the first arguments of ``jaxpr``, which has no constants.

    Args:
        jaxpr: The jaxpr.
        consts: The values of the constants. From JAX 0.11 on, a jaxpr has no constants without their values.
    """
    debug_info = body(jaxpr).debug_info._replace(arg_names=None, result_paths=None)
    variables, count = body(jaxpr).invars, len(consts)
    values = {} if Closed is not Open else {"consts": list(consts)}
    return body(jaxpr).replace(constvars=variables[:count], invars=variables[count:], debug_info=debug_info, **values)


def inline(jaxpr: Jaxpr, wanted: Callable[[Equation], bool]) -> Jaxpr:
    """Returns the open jaxpr with the ``jit`` equations for which ``wanted`` is true inlined, at any depth."""
    values: dict[Atom, Atom] = {}
    eqns: list[Equation] = []

    def read(atom: Atom) -> Atom:
        return atom if is_literal(atom) else values.get(atom, atom)

    for eqn in body(jaxpr).eqns:
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name != "jit" or not _leaves_places_to_xla(eqn) or constants(inner) or not wanted(eqn):
            eqns.append(eqn.replace(invars=list(map(read, eqn.invars))))
            continue
        inner = inline(inner, wanted)
        own = dict(zip(inner.invars, map(read, eqn.invars), strict=True))
        for each in inner.eqns:
            own.update((var, type(var)(var.aval)) for var in each.outvars)
            stack = eqn.source_info.name_stack + each.source_info.name_stack
            eqns.append(
                each.replace(
                    invars=[atom if is_literal(atom) else own[atom] for atom in each.invars],
                    outvars=[own[var] for var in each.outvars],
                    source_info=each.source_info.replace(name_stack=stack),
                )
            )
        results = (atom if is_literal(atom) else own[atom] for atom in inner.outvars)
        values.update(zip(eqn.outvars, results, strict=True))
    return body(jaxpr).replace(eqns=eqns, outvars=list(map(read, body(jaxpr).outvars)))


def _leaves_places_to_xla(eqn: Equation) -> bool:
    """Whether a ``jit`` has no shardings, no layouts and no compiler options."""
    said = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    options = eqn.params["in_layouts"], eqn.params["out_layouts"], eqn.params["compiler_options_kvs"]
    return all(x is UNSPECIFIED for x in said) and not any(map(any, options))


def run(jaxpr: Jaxpr, args: Sequence[ArrayLike], consts: Sequence[ArrayLike] | None = None) -> list[Array]:
    """Runs a jaxpr and binds each equation unchanged. ``consts`` replaces the values of its constants."""
    return list(core.eval_jaxpr(body(jaxpr), constants(jaxpr) if consts is None else consts, *args))


def bears_no_constants(eqn: Equation) -> bool:
    """Whether the jaxpr of a higher-order equation must not close over arrays, as in ``jax.checkpoint``."""
    return eqn.primitive is remat_p


def equation_name(eqn: Equation) -> str:
    """Returns the name of the equation's primitive, or of the ``HiPrim`` in a ``call_hi_primitive`` equation."""
    prim = wrapped_primitive(eqn)
    return str(eqn.primitive.name) if prim is None else type(prim).__name__


def bind(eqn: Equation, args: Sequence[ArrayLike]) -> list[Array]:
    """Binds an equation unchanged."""
    return bind_with(eqn, args, eqn.primitive.get_bind_params(eqn.params))


def bind_with(eqn: Equation, args: Sequence[ArrayLike], params: Mapping[str, object]) -> list[Array]:
    """Binds an equation with other parameters."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]
