"""The primitive for a map inside another mapped function."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from replicax._jax import (
    Equation,
    Jaxpr,
    as_type,
    axis_env,
    body,
    constants,
    is_literal,
    run,
    sub_jaxprs,
    trace_flat,
    with_results,
    without_constants,
)
from replicax._jax.interpreters import ad, ad_util, batching, core, parallel
from replicax._typing import Array, ArrayLike, Atom, Aval, Axes, AxisName, PyTreeDef

# ---------------------------------------------------------------------------------------------------------------
# Nested maps


def nested_map(
    jaxpr: Jaxpr,
    args: Sequence[ArrayLike],
    *,
    name: AxisName,
    size: int,
    in_axes: Axes,
    out_axes: Axes,
) -> list[Array]:
    """Records a map inside another mapped function as one equation.

    JAX's transformations of the equation record a ``nested_map`` too, so the rewriter still sees which part of the
    program is mapped. Under a trace, only the rewriter can run the equation.

    Args:
        jaxpr: The program of one replica, without closed-over arrays.
        args: The arguments, including their mapped axes.
        name: The name of the mapped axis.
        size: The number of replicas.
        in_axes: The mapped axis of each argument.
        out_axes: The mapped axis of each result; None for a result that is equal in all replicas.
    """
    params = {"name": name, "size": size, "in_axes": tuple(in_axes), "out_axes": tuple(out_axes)}
    return list(_nested_map_p.bind(*args, jaxpr=jaxpr, **params))


#: The name of the primitive.
NESTED_MAP = "nested_map"

_nested_map_p = core.Primitive(NESTED_MAP)
_nested_map_p.multiple_results = True


def is_nested_map(eqn: Equation) -> bool:
    """Whether the equation is a :func:`nested_map`."""
    return eqn.primitive is _nested_map_p


def nesting(jaxpr: Jaxpr) -> list[list[tuple[AxisName, int]]]:
    """Returns the axis names and sizes of the nested maps at each level of a program, outermost level first."""
    levels: list[dict[tuple[AxisName, int], None]] = []
    seen: set[tuple[int, int]] = set()

    def visit(jaxpr: Jaxpr, depth: int) -> None:
        if (id(jaxpr), depth) in seen:
            return
        seen.add((id(jaxpr), depth))
        for eqn in body(jaxpr).eqns:
            inner = is_nested_map(eqn)
            if inner:
                levels.extend({} for _ in range(depth + 1 - len(levels)))
                levels[depth][eqn.params["name"], eqn.params["size"]] = None
            for sub in sub_jaxprs(eqn):
                visit(sub, depth + inner)

    visit(jaxpr, 0)
    return [list(level) for level in levels]


def _nested_map_type(
    *avals: Aval, jaxpr: Jaxpr, name: AxisName, size: int, in_axes: Axes, out_axes: Axes
) -> tuple[list[Aval], set[object]]:
    del avals, in_axes
    outs = [_with_axis(var.aval, axis, size) for var, axis in zip(body(jaxpr).outvars, out_axes, strict=True)]
    return outs, core.filter_named_axis_effects(body(jaxpr).effects, {name})


def _with_axis(aval: Aval, axis: int | None, size: int) -> Aval:
    shape = aval.shape if axis is None else (*aval.shape[:axis], size, *aval.shape[axis:])
    return core.ShapedArray(shape, aval.dtype, weak_type=aval.weak_type)


def _nested_map_jvp(
    primals: Sequence[Array],
    tangents: Sequence[Array | ad_util.Zero],
    *,
    jaxpr: Jaxpr,
    name: AxisName,
    size: int,
    **axes: Axes,
) -> tuple[list[Array], list[Array | ad_util.Zero]]:
    """Differentiates with two nested maps. The first returns results and residuals. The second maps over tangents.

    A residual that is an argument is read from the arguments, so the first map does not return it.
    """
    in_axes, out_axes = axes["in_axes"], axes["out_axes"]
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad_util.Zero]
    fwd, consts, pushforward = _linearized(jaxpr, moving, {name: size})
    args, arg_axes = [*consts, *primals], (*[None] * len(consts), *in_axes)
    found = _Residuals(fwd, args, arg_axes, len(out_axes))
    results = nested_map(
        found.jaxpr, args, name=name, size=size, in_axes=arg_axes, out_axes=(*out_axes, *found.out_axes)
    )
    outs, residuals = results[: len(out_axes)], found.values(results[len(out_axes) :])
    varies = [k for k, x in enumerate(outs) if _tangent_type(x).dtype != jax.dtypes.float0]

    def tangent(*args: Array) -> list[Array]:
        linear = jax.tree.unflatten(pushforward, args[: len(residuals)])
        out_dots = linear(*args[len(residuals) :])
        return [out_dots[k] for k in varies]

    residual_avals = [var.aval for var in body(fwd).outvars[len(out_axes) :]]
    tangent_avals = [body(jaxpr).invars[i].aval.to_tangent_aval() for i in moving]
    lin, consts = trace_flat(tangent, [*residual_avals, *tangent_avals], {name: size})
    out_dots = nested_map(
        lin,
        [*consts, *residuals, *(tangents[i] for i in moving)],
        name=name,
        size=size,
        in_axes=(*[None] * len(consts), *found.axes, *(in_axes[i] for i in moving)),
        out_axes=[out_axes[k] for k in varies],
    )
    dots = dict(zip(varies, out_dots, strict=True))
    return outs, [dots[k] if k in dots else ad_util.Zero(_tangent_type(x)) for k, x in enumerate(outs)]


def _linearized(
    jaxpr: Jaxpr, moving: Sequence[int], sizes: Mapping[AxisName, int]
) -> tuple[Jaxpr, list[Array], PyTreeDef]:
    """Linearizes a program. The returned program computes its results, followed by the residuals.

    Args:
        jaxpr: The program.
        moving: The positions of the arguments that are differentiated.
        sizes: The mapped axis in scope, with its size.

    Returns:
        The program, its constants, and the pytree structure that turns the residuals into a linear function.
    """
    pushforward: list[PyTreeDef] = []

    def primal(*args: Array) -> list[Array]:
        def of_moving(*some: Array) -> list[Array]:
            every = list(args)
            for i, x in zip(moving, some, strict=True):
                every[i] = x
            return run(jaxpr, every)

        outs, linear = jax.linearize(of_moving, *(args[i] for i in moving))
        residuals, treedef = jax.tree.flatten(linear)
        pushforward.append(treedef)
        return [*outs, *residuals]

    fwd, consts = trace_flat(primal, [var.aval for var in body(jaxpr).invars], sizes)
    return fwd, consts, pushforward[0]


def _tangent_type(x: Array) -> Aval:
    return core.typeof(x).to_tangent_aval()


class _Residuals:
    """The residuals of a linearized nested map. Each is an argument or an extra result of the map.

    Attributes:
        jaxpr: The linearized program. It does not return residuals that are arguments.
        out_axes: The mapped axes of the residuals that it returns.
        axes: The mapped axes of all residuals.
    """

    def __init__(self, jaxpr: Jaxpr, args: Sequence[Array], arg_axes: Axes, outs: int) -> None:
        known = {var: k for k, var in enumerate(body(jaxpr).invars)}
        residuals = body(jaxpr).outvars[outs:]
        self._from = [None if is_literal(var) else known.get(var) for var in residuals]
        self._args = args
        self.axes = [0 if k is None else arg_axes[k] for k in self._from]
        own = [var for var, k in zip(residuals, self._from, strict=True) if k is None]
        self.out_axes = [0] * len(own)
        self.jaxpr = with_results(jaxpr, [*body(jaxpr).outvars[:outs], *own])

    def values(self, results: Sequence[Array]) -> list[Array]:
        """Returns all residuals, given the extra results of the linearized map."""
        further = iter(results)
        return [next(further) if k is None else self._args[k] for k in self._from]


def _nested_map_transposed(
    cts: Sequence[Array | ad_util.Zero],
    *args: Array | ad.UndefinedPrimal,
    jaxpr: Jaxpr,
    name: AxisName,
    size: int,
    **axes: Axes,
) -> list[Array | None]:
    """Maps over the cotangents. The cotangent of an unmapped argument is summed over the replicas."""
    in_axes, out_axes = axes["in_axes"], axes["out_axes"]
    linear = [i for i, x in enumerate(args) if ad.is_undefined_primal(x)]
    known = [i for i in range(len(args)) if i not in linear]
    given = [k for k, ct in enumerate(cts) if type(ct) is not ad_util.Zero]
    avals = [var.aval for var in body(jaxpr).invars]
    out_avals = [var.aval for var in body(jaxpr).outvars]

    def transposed(*args: Array) -> list[Array]:
        values, cts = args[: len(known)], dict(zip(given, args[len(known) :], strict=True))

        def of_linear(*some: Array) -> list[Array]:
            every = dict(zip(known, values, strict=True)) | dict(zip(linear, some, strict=True))
            return [run(jaxpr, [every[i] for i in range(len(every))])[k] for k in given]

        shares = [_share(cts[k], out_axes[k], size, out_avals[k]) for k in given]
        types = [jax.ShapeDtypeStruct(avals[i].shape, avals[i].dtype) for i in linear]
        pulled = jax.linear_transpose(of_linear, *types)(shares)
        return [parallel.psum(x, name) if in_axes[i] is None else x for i, x in zip(linear, pulled, strict=True)]

    types = [*(avals[i] for i in known), *(out_avals[k] for k in given)]
    back, consts = trace_flat(transposed, types, {name: size})
    pulled = nested_map(
        back,
        [*consts, *(args[i] for i in known), *(cts[k] for k in given)],
        name=name,
        size=size,
        in_axes=(*[None] * len(consts), *(in_axes[i] for i in known), *(out_axes[k] for k in given)),
        out_axes=[in_axes[i] for i in linear],
    )
    return list(map(dict(zip(linear, pulled, strict=True)).get, range(len(args))))


def _share(ct: Array, axis: int | None, size: int, aval: Aval) -> Array:
    """Returns one replica's cotangent of a result. If the result is not mapped, each replica gets an equal part."""
    return as_type((ct / size if axis is None else ct).astype(aval.dtype), aval)


def _nested_map_batched(
    axis_data: batching.AxisData,
    args: Sequence[Array],
    dims: Sequence[int | None],
    *,
    jaxpr: Jaxpr,
    name: AxisName,
    size: int,
    **axes: Axes,
) -> tuple[list[Array], list[int | None]]:
    """Batches the program of one replica. A ``vmap`` axis with the name of the mapped axis is shadowed inside."""
    args = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
    in_axes = [a if d is None or a is None else a + 1 for a, d in zip(axes["in_axes"], dims, strict=True)]
    if axis_data.name == name:
        axis_data = dataclasses.replace(axis_data, name=core.no_axis_name)
    with axis_env({name: size}):
        batched, out_dims = batching.batch_jaxpr2(jaxpr, axis_data, tuple(None if d is None else 0 for d in dims))
        inner, consts = without_constants(batched), constants(batched)
    out_axes = [a if d is None or a is None else a + (d <= a) for a, d in zip(axes["out_axes"], out_dims, strict=True)]
    outs = nested_map(
        inner,
        [*consts, *args],
        name=name,
        size=size,
        in_axes=[*[None] * len(consts), *in_axes],
        out_axes=out_axes,
    )
    return outs, [d if d is None or a is None else d + (a < d) for a, d in zip(out_axes, out_dims, strict=True)]


def _nested_map_run(
    *args: Array, jaxpr: Jaxpr, name: AxisName, size: int, in_axes: Axes, out_axes: Axes
) -> list[Array]:
    """Runs a nested map on concrete values, while the outer map is traced."""
    run_all = jax.vmap(lambda *own: run(jaxpr, own), in_axes, list(out_axes), axis_size=size, axis_name=name)
    return list(run_all(*args))


def _nested_map_checked(
    _: object, *atoms: Atom, jaxpr: Jaxpr, name: AxisName, size: int, **axes: Axes
) -> tuple[list[Aval], set[object]]:
    """Checks the jaxpr, for ``jax_enable_checks``."""
    with axis_env({name: size}):
        core.check_jaxpr(body(jaxpr))
    avals = [atom.aval for atom in atoms]
    return _nested_map_type(
        *avals, jaxpr=jaxpr, name=name, size=size, in_axes=axes["in_axes"], out_axes=axes["out_axes"]
    )


core.custom_typechecks[_nested_map_p] = _nested_map_checked
_nested_map_p.def_impl(_nested_map_run)
_nested_map_p.def_effectful_abstract_eval(_nested_map_type)
ad.primitive_jvps[_nested_map_p] = _nested_map_jvp
ad.primitive_transposes[_nested_map_p] = _nested_map_transposed
batching.fancy_primitive_batchers[_nested_map_p] = _nested_map_batched
