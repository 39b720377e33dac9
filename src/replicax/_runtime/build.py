"""Computes the signature of a call, and builds the program for a signature."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.determinism import deterministic
from replicax._engine.lanes import AUTO, Auto, Lanes
from replicax._engine.lowering import lower
from replicax._engine.nested import Recorded, record
from replicax._engine.replica import Replica, trace_replica
from replicax._engine.spec import Inputs
from replicax._layout.axes import Leaf, mapped_size, match_in_axes, one_replica_type
from replicax._layout.layout import layout, replicas_of
from replicax._layout.processes import Share, layout_over_processes
from replicax._runtime import memory
from replicax._runtime.arguments import Call
from replicax._runtime.executable import Executable
from replicax._runtime.options import Options
from replicax._runtime.own_rows import OwnRows
from replicax._runtime.processes import agree_on_program, agree_on_rows, own_size, rows_of
from replicax._runtime.signature import Rows, Signature
from replicax._typing import ArrayLike, Function
from replicax.errors import UnsupportedTransformationError


def signature_of(options: Options, call: Call, leaves: Sequence[ArrayLike]) -> Signature:
    """The signature of a call: everything that its program is compiled for.

    Raises:
        AxisSpecError: ``in_axes`` does not match the arguments.
        MappedSizeError: the arguments do not agree on one number of replicas.
    """
    args, every = call.by_position(), call.parameter_names()
    named = [Leaf(name, shape_of(x)) for name, x in zip(call.leaf_names(), leaves, strict=True)]
    static = {where for where, _, _ in call.static} | {*options.static.positions}
    in_axes, own_tree = match_in_axes(options.in_axes, args, call.kwargs, every, static, named)
    rows = rows_of(options, in_axes, named, leaves)
    own = rows is Rows.OWN
    return Signature(
        rows=rows,
        size=own_size(options, in_axes, named) if own else mapped_size(in_axes, named, options.axis_size),
        leaves=tuple(named),
        in_axes=tuple(in_axes),
        tree=jax.tree.structure((call.dynamic, call.kwargs)),
        own_tree=own_tree,
        roots={(0, k): every[i] for k, i in enumerate(args)} | {(1, name): name for name in call.kwargs},
        static={every[i] if isinstance(i, int) else i: value for i, _, value in call.static},
        settings=_jax.settings(),
        surroundings="inside another mapped function"
        if _jax.tracing_replica()
        else ("eagerly" if _jax.eager() else "inside a transformation such as jit, grad or vmap"),
    )


def shape_of(x: ArrayLike) -> jax.ShapeDtypeStruct:
    """The shape, dtype and weak type of an array."""
    aval = _jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def build(options: Options, call: Call, signature: Signature, *, use_all_devices: bool) -> Executable | Recorded:
    """Traces and lowers the function for one signature.

    Args:
        options: The options of the map.
        call: The call that needs the program.
        signature: The signature of the call.
        use_all_devices: Whether the program spans all devices, even if fewer could run all replicas.

    Returns:
        The executable. Inside a replica of another map: the recorded inner map, which is lowered with the outer one.
    """
    if _jax.tracing_replica():
        options.refuse_inner(call.name)
        axis, replica = replicas_of(options.axis_name, signature.size), _trace(options, call, signature, signature.size)
        return record(replica, axis, signature.in_axes, options.outputs, call.name)
    if options.deterministic:
        _refuse_other_compilers(call.name)
    if signature.rows is Rows.ALL:
        return _lowered(options, call, signature, use_all_devices=use_all_devices)
    shares, left = agree_on_rows(options, call, signature)
    lowered = functools.partial(_lowered, options, call, signature, shares, left=left, use_all_devices=not shares)
    return agree_on_program(options, call.name, lowered)


def _lowered(
    options: Options,
    call: Call,
    signature: Signature,
    shares: Sequence[Share] = (),
    *,
    left: int | None = None,
    use_all_devices: bool,
) -> Executable:
    """Traces and lowers the function.

    Args:
        options: The options of the map.
        call: The call that needs the program.
        signature: The signature of the call.
        shares: The replicas of each process, if each passes its own rows.
        left: The free memory of each device over several processes, in bytes; None if unknown.
        use_all_devices: Whether the program spans all devices, even if fewer could run all replicas.
    """
    devices = options.resolve_devices()
    inputs = Inputs(tuple(leaf.aval for leaf in signature.leaves), signature.in_axes, call.donated(options.donated))
    size = sum(share.replicas for share in shares) or signature.size
    replica = _trace(options, call, signature, size)
    if options.deterministic:
        replica = deterministic(replica, {options.axis_name: size}, call.name)
    how: Any = {
        "nesting": primitives.nesting(replica.jaxpr),
        "avoid_user_names": not _jax.eager(),
        "ordered": options.deterministic,
    }
    if shares:
        where = layout_over_processes(options.axis_name, shares, jax.process_index(), **how)
    else:
        where = layout(options.axis_name, signature.size, devices, use_all_devices=use_all_devices, **how)

    def lowered(lanes: Lanes | Auto) -> Executable:
        spec = lower(replica, where, inputs, options.outputs, call.name, lanes)
        return OwnRows(spec) if shares else Executable(spec)

    executable = lowered(options.lanes)
    if not _jax.eager():
        return executable
    if options.lanes is AUTO:
        if signature.rows is Rows.ALL:
            left = memory.free(where.mesh.devices.ravel())
        executable = memory.fitting(executable, lowered, left)
    _ = executable.traced  # trace now: under this thread's lock, and before any argument is moved
    return executable


def _refuse_other_compilers(name: str) -> None:
    """Refuses a deterministic map that something else than replicax would compile.

    Raises:
        UnsupportedTransformationError: The call is inside a transformation, or under ``jax.disable_jit``.
    """
    if jax.config.jax_disable_jit:
        raise UnsupportedTransformationError(
            f"{name} is mapped with deterministic=True, and called under jax.disable_jit, where operations have other "
            f"bits than in a compiled program. Call it outside, or leave deterministic out."
        )
    if not _jax.eager():
        raise UnsupportedTransformationError(
            f"{name} is mapped with deterministic=True, and called inside jit, grad, vmap or another transformation, "
            f"whose program XLA compiles without the options that make the bits equal. Transform inside the mapped "
            f"function, as in pmap(jax.grad(f), deterministic=True), or leave deterministic out."
        )


def _trace(options: Options, call: Call, signature: Signature, size: int) -> Replica:
    types = (one_replica_type(leaf.aval, a) for leaf, a in zip(signature.leaves, signature.in_axes, strict=True))
    dynamic, kwargs = jax.tree.unflatten(signature.own_tree, types)
    by_position = dict(zip(call.positions, dynamic, strict=True))
    static = {where: value for where, _, value in call.static}
    by_position |= {i: value for i, value in static.items() if isinstance(i, int)}
    return trace_replica(
        _bound(call.fun, {name: value for name, value in static.items() if isinstance(name, str)}),
        [by_position[i] for i in range(len(by_position))],
        kwargs,
        call.static_positions,
        options.axis_name,
        size,
    )


def _bound(fun: Function, static: Mapping[str, object]) -> Function:
    """``fun`` with its static keyword arguments bound."""
    if not static:
        return fun

    @functools.wraps(fun)
    def bound(*args: Any, **kwargs: Any) -> Any:
        return fun(*args, **kwargs, **static)

    return bound
