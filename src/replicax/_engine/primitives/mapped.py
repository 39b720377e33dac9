"""Our own primitives, each with JAX's rules for it; with :mod:`replicax._jax` the only door to what is not public.

A primitive is here where no combination of JAX's operations has the meaning, or the derivative, that a map needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import ad_util, core
from jax._src.interpreters import ad, batching, mlir
from jax._src.lax import parallel, slicing

from replicax._jax import (
    NO_MESH,
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
from replicax._layout.placement import Placement

AxisName = Hashable

# ---------------------------------------------------------------------------------------------------------------
# One lane and all


def own_lane(x: Any, axis: AxisName) -> Any:
    """Element ``i`` of ``x`` in lane ``i`` of a vmapped axis, as long as the first dimension of ``x``.

    ``vmap`` only names the dimension, where an index by ``lax.axis_index`` would be a gather.
    """
    return _own_lane_p.bind(x, axis=axis)


_own_lane_p = core.Primitive("own_lane")


def _own_lane_type(x: Any, *, axis: AxisName) -> Any:
    del axis
    return x.update(shape=x.shape[1:])


def _own_lane_batched(
    axis_data: Any, args: Sequence[Any], dims: Sequence[int | None], *, axis: AxisName
) -> tuple[Any, int | None]:
    (x,), (dim,) = args, dims
    if axis_data.name != axis:
        return (own_lane(x, axis), None) if dim is None else (own_lane(jnp.moveaxis(x, dim, 1), axis), 0)
    return (x, 0) if dim is None else (jnp.diagonal(x, 0, *(dim, 0 if dim else 1)), x.ndim - 2)


_own_lane_p.def_abstract_eval(_own_lane_type)
batching.fancy_primitive_batchers[_own_lane_p] = _own_lane_batched


def each_lane(x: Any, axis: AxisName) -> Any:
    """``x``, which ``vmap`` takes to differ along the axis from here on, whether it does or not."""
    return _each_lane_p.bind(x, axis=axis)


_each_lane_p = core.Primitive("each_lane")


def _each_lane_type(x: Any, *, axis: AxisName) -> Any:
    del axis
    return x


def _each_lane_batched(
    axis_data: Any, args: Sequence[Any], dims: Sequence[int | None], *, axis: AxisName
) -> tuple[Any, int | None]:
    (x,), (dim,) = args, dims
    if axis_data.name != axis:
        return each_lane(x, axis), dim
    return (jnp.broadcast_to(x, (axis_data.size, *x.shape)), 0) if dim is None else (x, dim)


_each_lane_p.def_abstract_eval(_each_lane_type)
batching.fancy_primitive_batchers[_each_lane_p] = _each_lane_batched


# ---------------------------------------------------------------------------------------------------------------
# Padding


def pad_rows(x: Any, dim: int, placement: Placement) -> Any:
    """``x``, which has a row for each replica along ``dim``, with one for each slot: padding has copies.

    The copies give no cotangent back: not even a NaN, from a slope of infinity times a cotangent of zero.
    """
    return _pad_rows_p.bind(x, dim=dim, placement=placement)


_pad_rows_p = core.Primitive("pad_rows")


def _pad_rows(x: Any, *, dim: int, placement: Placement) -> Any:
    parts = []
    for first, rows, copies in placement.pieces:
        if rows:
            parts.append(x if rows == placement.size else slicing.slice_in_dim(x, first, first + rows, axis=dim))
        if copies:
            last = max(first + rows - 1, 0)
            row = slicing.slice_in_dim(x, last, last + 1, axis=dim)
            parts.append(jnp.broadcast_to(row, (*x.shape[:dim], copies, *x.shape[dim + 1 :])))
    return jnp.concatenate(parts, dim)


def _pad_rows_type(x: Any, *, dim: int, placement: Placement) -> Any:
    shape = (*x.shape[:dim], placement.slots, *x.shape[dim + 1 :])
    return core.ShapedArray(shape, x.dtype, weak_type=x.weak_type)


def _pad_rows_transposed(ct: Any, x: Any, *, dim: int, placement: Placement) -> list[Any]:
    del x
    runs = [slicing.slice_in_dim(ct, first, first + count, axis=dim) for first, count in placement.runs]
    return [runs[0] if len(runs) == 1 else jnp.concatenate(runs, dim)]


def _pad_rows_batched(args: Sequence[Any], dims: Sequence[int], *, dim: int, placement: Placement) -> tuple[Any, int]:
    (x,), (d,) = args, dims
    return pad_rows(x, dim + (d <= dim), placement), d


_pad_rows_p.def_impl(_pad_rows)
_pad_rows_p.def_abstract_eval(_pad_rows_type)
mlir.register_lowering(_pad_rows_p, mlir.lower_fun(_pad_rows, multiple_results=False))
ad.deflinear2(_pad_rows_p, _pad_rows_transposed)
batching.primitive_batchers[_pad_rows_p] = _pad_rows_batched


# ---------------------------------------------------------------------------------------------------------------
# Moving between devices


def move(x: Any, here: jax.sharding.Sharding | None, there: jax.sharding.Sharding | None) -> Any:
    """``jax.device_put`` to a sharding, which under a ``vmap`` splits the dimensions that it is about.

    The cotangent goes back to ``here``. None stays where it is.
    """
    return _move_p.bind(x, here=here, there=there)


_move_p = core.Primitive("move")


def _move_batched(
    args: Sequence[Any],
    dims: Sequence[int],
    *,
    here: jax.sharding.Sharding | None,
    there: jax.sharding.Sharding | None,
) -> tuple[Any, int]:
    (x,), (dim,) = args, dims
    return move(x, _with_dimension(here, dim), _with_dimension(there, dim)), dim


def _with_dimension(where: Any, dim: int) -> Any:
    """The sharding of an array with one dimension more, which is not split."""
    if not isinstance(where, jax.sharding.NamedSharding):
        return where
    spec = [*where.spec, *[None] * (dim - len(where.spec))]
    return jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec(*spec[:dim], None, *spec[dim:]))


def _move_now(x: Any, *, here: Any, there: jax.sharding.Sharding | None) -> Any:
    del here
    return x if there is None else jax.device_put(x, there)


def _move_back(ct: Any, x: Any, *, here: Any, there: Any) -> list[Any]:
    del x
    return [move(ct, there, here)]


def _not_moved(ctx: Any, x: Any, **_: Any) -> list[Any]:
    """What is compiled has one set of devices."""
    del ctx
    return [x]


_move_p.def_impl(_move_now)
_move_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_move_p, _move_back)
batching.primitive_batchers[_move_p] = _move_batched
mlir.register_lowering(_move_p, _not_moved)


def pin(x: Any, where: jax.sharding.NamedSharding) -> Any:
    """``lax.with_sharding_constraint`` that holds under a ``vmap``, too, where JAX leaves the new dimension to XLA."""
    return _pin_p.bind(x, where=where)


_pin_p = core.Primitive("pin")


def _pin_back(ct: Any, x: Any, *, where: jax.sharding.NamedSharding) -> list[Any]:
    del x
    return [pin(ct, where)]


def _pin_batched(args: Sequence[Any], dims: Sequence[int], *, where: jax.sharding.NamedSharding) -> tuple[Any, int]:
    (x,), (dim,) = args, dims
    return pin(x, _with_dimension(where, dim)), dim


def _pinned(x: Any, *, where: jax.sharding.NamedSharding) -> Any:
    return jax.lax.with_sharding_constraint(x, where)


_pin_p.def_impl(_pinned)
_pin_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_pin_p, _pin_back)
batching.primitive_batchers[_pin_p] = _pin_batched
mlir.register_lowering(_pin_p, mlir.lower_fun(_pinned, multiple_results=False))

# ---------------------------------------------------------------------------------------------------------------
# Arrays whose types say how they are split


def split_over(x: Any) -> jax.sharding.NamedSharding | None:
    """How the type of ``x`` says that it is split, where its mesh has ``Explicit`` axes."""
    where = getattr(core.typeof(x), "sharding", None)
    explicit = where is not None and jax.sharding.AxisType.Explicit in where.mesh.axis_types
    return where if explicit else None


class SplitBatchError(Exception):
    """The axis that an enclosing ``vmap`` adds is to be split over an axis of a mesh."""


def refuse_split_batches() -> None:
    """Raises a :class:`SplitBatchError` under a ``vmap`` with ``spmd_axis_name``, or of what is typed as split."""
    trace: Any = core.trace_ctx.trace
    while trace is not None:
        if isinstance(trace, batching.BatchTrace):
            axis = trace.axis_data.spmd_name or trace.axis_data.explicit_mesh_axis
            if axis:
                raise SplitBatchError(axis[0] if isinstance(axis, tuple) and len(axis) == 1 else axis)
        trace = getattr(trace, "parent_trace", None)


def retype(x: Any, where: jax.sharding.NamedSharding | None) -> Any:
    """``x`` with a type that says it is split like that; with None, one that says nothing.

    The types of a mesh of the user's and those of a map's own do not go together.
    """
    plain = getattr(core.typeof(x), "sharding", None)
    if plain is None or (where is None and plain.mesh.empty):
        return x
    return _retype_p.bind(x, where=where or jax.sharding.NamedSharding(NO_MESH, jax.sharding.PartitionSpec()))


_retype_p = core.Primitive("retype")


def _retype_type(x: Any, *, where: jax.sharding.NamedSharding) -> Any:
    spec = jax.sharding.PartitionSpec(*where.spec, *[None] * (x.ndim - len(where.spec)))
    return x.update(sharding=jax.sharding.NamedSharding(where.mesh, spec))


def _retype_now(x: Any, *, where: jax.sharding.NamedSharding) -> Any:
    del where
    return x


def _retype_back(ct: Any, x: Any, *, where: Any) -> list[Any]:
    del where
    return [_retype_p.bind(ct, where=x.aval.sharding)]


def _retype_batched(
    axis_data: Any, args: Sequence[Any], dims: Sequence[int | None], *, where: jax.sharding.NamedSharding
) -> tuple[Any, int | None]:
    (x,), (dim,) = args, dims
    if dim is not None and axis_data.explicit_mesh_axis:
        raise SplitBatchError(axis_data.explicit_mesh_axis)
    if dim is not None and not where.mesh.empty:
        where = _with_dimension(where, dim)
    return _retype_p.bind(x, where=where), dim


def _retype_lowered(ctx: Any, x: Any, *, where: Any) -> list[Any]:
    del where
    return [mlir.lower_with_sharding_in_types(ctx, x, ctx.avals_out[0])]


_retype_p.def_impl(_retype_now)
_retype_p.def_abstract_eval(_retype_type)
ad.deflinear2(_retype_p, _retype_back)
batching.fancy_primitive_batchers[_retype_p] = _retype_batched
mlir.register_lowering(_retype_p, _retype_lowered)


# ---------------------------------------------------------------------------------------------------------------
# All to all over groups


def grouped_all_to_all(
    x: Any, axis: AxisName, split_axis: int, concat_axis: int, device_groups: tuple[tuple[int, ...], ...]
) -> Any:
    """``lax.all_to_all`` (tiled) over groups of a mesh axis, which JAX's own refuses under any ``vmap``.

    Workaround: all_to_all_over_groups.
    """
    return _grouped_all_to_all_p.bind(
        x,
        axis_name=(axis,),
        split_axis=split_axis,
        concat_axis=concat_axis,
        axis_index_groups=device_groups,
        tiled=True,
    )


_grouped_all_to_all_p = core.Primitive("grouped_all_to_all")


def _grouped_all_to_all_batched(
    axis_data: Any, args: Sequence[Any], dims: Sequence[int | None], *, split_axis: int, concat_axis: int, **params: Any
) -> tuple[Any, int | None]:
    del axis_data
    (x,), (dim,) = args, dims
    if dim is None:
        return _grouped_all_to_all_p.bind(x, split_axis=split_axis, concat_axis=concat_axis, **params), None
    split_axis, concat_axis = split_axis + (dim <= split_axis), concat_axis + (dim <= concat_axis)
    return _grouped_all_to_all_p.bind(x, split_axis=split_axis, concat_axis=concat_axis, **params), dim


def _grouped_all_to_all_transposed(ct: Any, x: Any, *, split_axis: int, concat_axis: int, **params: Any) -> list[Any]:
    del x
    return [_grouped_all_to_all_p.bind(ct, split_axis=concat_axis, concat_axis=split_axis, **params)]


_grouped_all_to_all_p.def_effectful_abstract_eval(parallel.all_to_all_p.abstract_eval)
mlir.register_lowering(_grouped_all_to_all_p, parallel._all_to_all_lowering)
ad.deflinear2(_grouped_all_to_all_p, _grouped_all_to_all_transposed)
batching.fancy_primitive_batchers[_grouped_all_to_all_p] = _grouped_all_to_all_batched


# ---------------------------------------------------------------------------------------------------------------
# Between a program that all devices along a mesh axis run alike and one that differs between them
#
# Out here a value is equal on all of them, and so is its cotangent. Inside each device has its own part of the
# whole, and of the cotangent too. JAX has the same pairs, each the other's transpose, where shard_map checks types.


def share(x: Any, axis: AxisName) -> Any:
    """Each device's own ``x``, which is equal on all; its cotangent is their sum."""
    return _share_p.bind(x, axis=axis)


def total(x: Any, axis: AxisName) -> Any:
    """The sum over the devices, equal on all."""
    return _total_p.bind(x, axis=axis)


def own_part(x: Any, axis: AxisName, dim: int) -> Any:
    """This device's part along ``dim`` of ``x``, which is equal on all."""
    return _own_part_p.bind(x, axis=axis, dim=dim)


def join_parts(x: Any, axis: AxisName, dim: int) -> Any:
    """All devices' parts, one after the other along ``dim``, equal on all."""
    return _join_parts_p.bind(x, axis=axis, dim=dim)


def equal_parts(x: Any, axis: AxisName) -> Any:
    """``x``, which every device has found alike; its cotangent goes to the first."""
    return _equal_parts_p.bind(x, axis=axis)


def _slice_of_device(x: Any, *, axis: AxisName, dim: int) -> Any:
    size = x.shape[dim] // parallel.axis_size(axis)
    return slicing.dynamic_slice_in_dim(x, parallel.axis_index(axis) * size, size, dim)


def _between(name: str, impl: Callable[..., Any], transposed: Callable[..., Any], *, factor: int = 0) -> Any:
    """A primitive that maps one array, over one mesh axis.

    Args:
        name: Its name.
        impl: What it does, in terms of JAX's functions.
        transposed: Its transpose, likewise.
        factor: 1 if the dimension ``dim`` of the result is that of the operand times the number of devices, -1 if it
            is that divided by it.
    """
    primitive = core.Primitive(name)

    def type_of(x: Any, *, axis: AxisName, dim: int = 0) -> Any:
        shape = list(x.shape)
        if factor:
            size = parallel.axis_size(axis)
            shape[dim] = shape[dim] * size if factor > 0 else shape[dim] // size
        return core.ShapedArray(shape, x.dtype, weak_type=x.weak_type), {core.NamedAxisEffect(axis)}

    def batched(axis_data: Any, args: Sequence[Any], dims: Sequence[int | None], **params: Any) -> Any:
        del axis_data
        (x,), (d,) = args, dims
        if d is not None and "dim" in params:
            params["dim"] += d <= params["dim"]
        return primitive.bind(x, **params), d

    primitive.def_effectful_abstract_eval(type_of)
    mlir.register_lowering(primitive, mlir.lower_fun(impl, multiple_results=False))
    ad.deflinear2(primitive, lambda ct, _, **params: [transposed(ct, **params)])
    batching.fancy_primitive_batchers[primitive] = batched
    return primitive


def _as_it_is(x: Any, *, axis: AxisName) -> Any:
    del axis
    return x


def _gathered(x: Any, *, axis: AxisName, dim: int) -> Any:
    return parallel.all_gather(x, axis, axis=dim, tiled=True)


def _to_first(ct: Any, *, axis: AxisName) -> Any:
    own = share(ct, axis)
    return jnp.where(parallel.axis_index(axis) == 0, own, jnp.zeros_like(own))


_share_p = _between("share", _as_it_is, total)
_total_p = _between("total", lambda x, *, axis: parallel.psum(x, axis), share)
_own_part_p = _between("own_part", _slice_of_device, join_parts, factor=-1)
_join_parts_p = _between("join_parts", _gathered, own_part, factor=1)
_equal_parts_p = _between("equal_parts", _as_it_is, _to_first)


# ---------------------------------------------------------------------------------------------------------------
# Maps inside maps


def nested_map(
    jaxpr: Jaxpr,
    args: Sequence[Any],
    *,
    name: AxisName,
    size: int,
    in_axes: Sequence[int | None],
    out_axes: Sequence[int | None],
) -> list[Any]:
    """Records a map over a named axis, inside a replica of another, as one equation.

    JAX's transformations of it are recorded likewise, so that what the outer map is lowered from still tells which
    part is mapped. Nothing but the rewriter can run it.

    Args:
        jaxpr: The program of one replica; it closes over nothing.
        args: The arguments, with the mapped axes in them.
        name: The axis.
        size: The number of replicas.
        in_axes: The mapped axis of each argument.
        out_axes: The mapped axis of each result; None for what is equal in all replicas.
    """
    params = {"name": name, "size": size, "in_axes": tuple(in_axes), "out_axes": tuple(out_axes)}
    return list(_nested_map_p.bind(*args, jaxpr=jaxpr, **params))


_nested_map_p = core.Primitive("nested_map")
_nested_map_p.multiple_results = True


def is_nested_map(eqn: Equation) -> bool:
    """Whether the equation is a :func:`nested_map`."""
    return eqn.primitive is _nested_map_p


def nesting(jaxpr: Jaxpr) -> list[list[tuple[AxisName, int]]]:
    """The maps in a program by level, outermost first: the axes and sizes of those at each level."""
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
    *avals: Any, jaxpr: Jaxpr, name: AxisName, size: int, in_axes: Any, out_axes: Any
) -> tuple[list[Any], Any]:
    del avals, in_axes
    outs = [_with_axis(var.aval, axis, size) for var, axis in zip(body(jaxpr).outvars, out_axes, strict=True)]
    return outs, core.filter_named_axis_effects(body(jaxpr).effects, {name})


def _with_axis(aval: Any, axis: int | None, size: int) -> Any:
    shape = aval.shape if axis is None else (*aval.shape[:axis], size, *aval.shape[axis:])
    return core.ShapedArray(shape, aval.dtype, weak_type=aval.weak_type)


def _nested_map_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, jaxpr: Jaxpr, name: AxisName, size: int, **axes: Any
) -> tuple[list[Any], list[Any]]:
    """Two maps: one of the results and of what their derivative needs, and a linear one of the tangents.

    What the derivative needs of the arguments as they are is taken from them, and not given back by each replica.
    """
    in_axes, out_axes = axes["in_axes"], axes["out_axes"]
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad_util.Zero]
    pushforward: list[Any] = []

    def primal(*args: Any) -> list[Any]:
        def of_moving(*some: Any) -> list[Any]:
            every = list(args)
            for i, x in zip(moving, some, strict=True):
                every[i] = x
            return run(jaxpr, every)

        outs, linear = jax.linearize(of_moving, *(args[i] for i in moving))
        residuals, treedef = jax.tree.flatten(linear)
        pushforward.append(treedef)
        return [*outs, *residuals]

    avals = [var.aval for var in body(jaxpr).invars]
    fwd, consts = trace_flat(primal, avals, {name: size})
    args, arg_axes = [*consts, *primals], (*[None] * len(consts), *in_axes)
    found = _Residuals(fwd, args, arg_axes, len(out_axes))
    results = nested_map(
        found.jaxpr, args, name=name, size=size, in_axes=arg_axes, out_axes=(*out_axes, *found.out_axes)
    )
    outs, residuals = results[: len(out_axes)], found.values(results[len(out_axes) :])
    varies = [k for k, x in enumerate(outs) if _tangent_type(x).dtype != jax.dtypes.float0]

    def tangent(*args: Any) -> list[Any]:
        linear = jax.tree.unflatten(pushforward[0], args[: len(residuals)])
        out_dots = linear(*args[len(residuals) :])
        return [out_dots[k] for k in varies]

    residual_avals = [var.aval for var in body(fwd).outvars[len(out_axes) :]]
    tangent_avals = [avals[i].to_tangent_aval() for i in moving]
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


def _tangent_type(x: Any) -> Any:
    return core.typeof(x).to_tangent_aval()


class _Residuals:
    """What the linear map of a derivative needs: arguments of the first map, and further results of it.

    Attributes:
        jaxpr: The first map, without the results that are arguments.
        out_axes: The mapped axes of the residuals among its results.
        axes: The mapped axes of all residuals.
    """

    def __init__(self, jaxpr: Jaxpr, args: Sequence[Any], arg_axes: Sequence[int | None], outs: int) -> None:
        known = {var: k for k, var in enumerate(body(jaxpr).invars)}
        residuals = body(jaxpr).outvars[outs:]
        self._from = [None if is_literal(var) else known.get(var) for var in residuals]
        self._args = args
        self.axes = [0 if k is None else arg_axes[k] for k in self._from]
        own = [var for var, k in zip(residuals, self._from, strict=True) if k is None]
        self.out_axes = [0] * len(own)
        self.jaxpr = with_results(jaxpr, [*body(jaxpr).outvars[:outs], *own])

    def values(self, results: Sequence[Any]) -> list[Any]:
        """The residuals, given the further results of the first map."""
        further = iter(results)
        return [next(further) if k is None else self._args[k] for k in self._from]


def _nested_map_transposed(
    cts: Sequence[Any], *args: Any, jaxpr: Jaxpr, name: AxisName, size: int, **axes: Any
) -> list[Any]:
    """A map of the cotangents; that of an argument which every replica has got whole is the sum over them."""
    in_axes, out_axes = axes["in_axes"], axes["out_axes"]
    linear = [i for i, x in enumerate(args) if ad.is_undefined_primal(x)]
    known = [i for i in range(len(args)) if i not in linear]
    given = [k for k, ct in enumerate(cts) if type(ct) is not ad_util.Zero]
    avals = [var.aval for var in body(jaxpr).invars]
    out_avals = [var.aval for var in body(jaxpr).outvars]

    def transposed(*args: Any) -> list[Any]:
        values, cts = args[: len(known)], dict(zip(given, args[len(known) :], strict=True))

        def of_linear(*some: Any) -> list[Any]:
            every = dict(zip(known, values, strict=True)) | dict(zip(linear, some, strict=True))
            return [run(jaxpr, [every[i] for i in range(len(every))])[k] for k in given]

        shares = [cts[k] / size if out_axes[k] is None else cts[k] for k in given]
        shares = [as_type(x.astype(out_avals[k].dtype), out_avals[k]) for x, k in zip(shares, given, strict=True)]
        types = [jax.ShapeDtypeStruct(avals[i].shape, avals[i].dtype) for i in linear]
        pulled = jax.linear_transpose(of_linear, *types)(shares)
        return [parallel.psum(x, name) if in_axes[i] is None else x for i, x in zip(linear, pulled, strict=True)]

    ct_avals = [out_avals[k] for k in given]
    back, consts = trace_flat(transposed, [*(avals[i] for i in known), *ct_avals], {name: size})
    pulled = nested_map(
        back,
        [*consts, *(args[i] for i in known), *(cts[k] for k in given)],
        name=name,
        size=size,
        in_axes=(*[None] * len(consts), *(in_axes[i] for i in known), *(out_axes[k] for k in given)),
        out_axes=[in_axes[i] for i in linear],
    )
    of = dict(zip(linear, pulled, strict=True))
    return [of.get(i) for i in range(len(args))]


def _nested_map_batched(
    axis_data: Any,
    args: Sequence[Any],
    dims: Sequence[int | None],
    *,
    jaxpr: Jaxpr,
    name: AxisName,
    size: int,
    **axes: Any,
) -> tuple[list[Any], list[int | None]]:
    """A map of the batched program; a name that the map hides is not the ``vmap``'s inside it."""
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


def _nested_map_run(*args: Any, jaxpr: Jaxpr, name: AxisName, size: int, in_axes: Any, out_axes: Any) -> list[Any]:
    """What is known while the outer map is traced."""
    run_all = jax.vmap(lambda *own: run(jaxpr, own), in_axes, list(out_axes), axis_size=size, axis_name=name)
    return list(run_all(*args))


def _nested_map_checked(_: Any, *atoms: Any, jaxpr: Jaxpr, name: AxisName, size: int, **axes: Any) -> Any:
    """For ``jax_enable_checks``, which checks every jaxpr that is made."""
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
