"""Converts ``jax.shard_map`` and ``jax.pmap`` inside a mapped function to nested maps, one for each mesh axis.

Both name devices that the outer map already uses, but their results do not depend on the devices: a ``shard_map``
slices its arguments along the axes of a mesh, runs a program on each slice, and concatenates the results.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeAlias

from jax import lax
from jax.sharding import PartitionSpec

from replicax import _jax
from replicax._engine import primitives
from replicax._jax import Equation, Jaxpr
from replicax._typing import Array, Atom, AxisName, Function, PyTree
from replicax.errors import NestedMapError

#: Primitives that only annotate an array with its sharding, or with the axes over which it may vary.
ABOUT_PLACES = ("pvary", "sharding_constraint", "reshard")

#: A dimension of a reshaped array: the position of an original dimension, or the mesh axis that it is split over.
Dimension: TypeAlias = int | AxisName


def as_nested_maps(jaxpr: Jaxpr, sizes: Mapping[Hashable, int], name: str) -> Jaxpr:
    """Replaces each ``shard_map`` in a program by nested maps.

    Args:
        jaxpr: The program of one replica.
        sizes: The mapped axis in scope, with its size.
        name: The name of the user's function.

    Raises:
        NestedMapError: A ``shard_map`` cannot run as a nested map.
    """
    if "shard_map" not in _jax.primitives(jaxpr):
        return jaxpr
    try:
        with _jax.axis_env(sizes):
            return _jax.retrace(lambda *args: _run(jaxpr, args), jaxpr, hoist=False)[0]
    except (AssertionError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        raise NestedMapError(
            f"{name} contains a jax.shard_map that cannot run inside a map ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'without a message'}). Map its function with "
            f"replicax.pmap or jax.vmap instead."
        ) from error


def _run(jaxpr: Jaxpr, args: Sequence[Array]) -> list[Array]:
    body = _jax.body(jaxpr)
    env = dict(zip([*body.constvars, *body.invars], [*_jax.constants(jaxpr), *args], strict=True))

    def read(atom: Atom) -> Array:
        return _jax.literal(atom) if _jax.is_literal(atom) else env[atom]

    for eqn in body.eqns:
        with _jax.equation_context(eqn):
            results = _equation(_jax.without_mesh(eqn), list(map(read, eqn.invars)))
        env.update(zip(eqn.outvars, results, strict=True))
    return list(map(read, body.outvars))


def _equation(eqn: Equation, args: list[Array]) -> list[Array]:
    if eqn.primitive.name == "shard_map":
        return _shard_map(eqn, args)
    if eqn.primitive.name in ABOUT_PLACES:
        return args
    if eqn.primitive.name == "psum_invariant":  # what psum becomes in shard_map if the type of its operand varies
        return list(lax.psum(args, eqn.params["axes"]))
    hoist = _jax.bears_no_constants(eqn)

    def rewritten(sub: Jaxpr) -> tuple[Jaxpr, list[Array]]:
        return _jax.retrace(lambda *args: _run(sub, args), sub, hoist=hoist)

    return _jax.bind_again(
        eqn, args, rewritten, lambda rule, _: _with_clear_errors(rule) if _jax.in_shard_map(eqn) else rule
    )


def _with_clear_errors(rule: Function) -> Function:
    """Wraps a derivative rule that was recorded inside a ``shard_map``, to explain an error of JAX.

    When JAX differentiates from outside, it compares the types of the rule's results with the recorded types. Only the
    recorded types still contain the axes over which a value varies.
    """

    @functools.wraps(rule)
    def wrapped(*args: PyTree) -> PyTree:
        try:
            return rule(*args)
        except TypeError as error:
            raise NestedMapError(
                "A map cannot be differentiated from outside if it contains a jax.shard_map that calls a function with "
                "a custom derivative rule (jax.custom_jvp or jax.custom_vjp, such as jax.nn.relu): JAX rejects the "
                "types of the rule there. Write check_vma=False in the jax.shard_map, map its function with "
                "replicax.pmap instead, or take the derivative inside the mapped function."
            ) from error

    return wrapped


def _shard_map(eqn: Equation, args: Sequence[Array]) -> list[Array]:
    params, mesh = eqn.params, eqn.params["mesh"]
    names = [name for name in mesh.axis_names if name in params["newly_manual_axes"]]
    outs = [var.aval for var in eqn.outvars]
    cut = [_cut_dimensions(spec, x.ndim, names) for spec, x in zip(params["in_specs"], args, strict=True)]
    joined = [_cut_dimensions(spec, len(y.shape), names) for spec, y in zip(params["out_specs"], outs, strict=True)]

    def over(axes: Sequence[Hashable], cut: Sequence[list[Dimension]], args: Sequence[Array]) -> list[Array]:
        """Maps over each of ``axes``. The arrays are split along these mesh axes only."""
        if not axes:
            return _run(params["jaxpr"], args)
        name, *rest = axes
        in_axes = _positions(name, cut)
        remaining = [[dim for dim in dims if dim != name] for dims in cut]
        own = [_jax.without_axis(x, axis) for x, axis in zip(args, in_axes, strict=True)]
        jaxpr, consts = _jax.trace_flat(lambda *own: over(rest, remaining, own), own, {name: mesh.shape[name]})
        out_axes = _positions(name, [[dim for dim in dims if isinstance(dim, int) or dim in axes] for dims in joined])
        # Without check_vma, JAX takes the first device's result, and does not check that all devices have an equal one.
        first = [axis is None and not params["check_vma"] for axis in out_axes]
        results = primitives.nested_map(
            jaxpr,
            [*consts, *args],
            name=name,
            size=mesh.shape[name],
            in_axes=[*[None] * len(consts), *in_axes],
            out_axes=[0 if f else axis for f, axis in zip(first, out_axes, strict=True)],
        )
        return [y[0] if f else y for y, f in zip(results, first, strict=True)]

    pieces = [lax.reshape(x, _shape(x, dims, mesh.shape)) for x, dims in zip(args, cut, strict=True)]
    return [lax.reshape(y, aval.shape) for y, aval in zip(over(names, cut, pieces), outs, strict=True)]


def _positions(name: AxisName, cut: Sequence[list[Dimension]]) -> list[int | None]:
    """Returns for each array the position of the dimension for a mesh axis, or None."""
    return [dims.index(name) if name in dims else None for dims in cut]


def _cut_dimensions(spec: PartitionSpec, rank: int, names: Sequence[Hashable]) -> list[Dimension]:
    """Returns the dimensions of an array as positions, each preceded by the mesh axes that split it."""
    dims: list[Dimension] = []
    for dim in range(rank):
        along = spec[dim] if dim < len(spec) else None
        dims += [name for name in (along if isinstance(along, tuple) else (along,)) if name in names]
        dims.append(dim)
    return dims


def _shape(x: Array, dims: Sequence[Dimension], sizes: Mapping[Hashable, int]) -> list[int]:
    """Returns the shape of ``x`` after each split dimension is reshaped to several dimensions."""
    shape, pieces = [], 1
    for dim in dims:
        if isinstance(dim, int):
            shape.append(x.shape[dim] // pieces)
            pieces = 1
        else:
            shape.append(sizes[dim])
            pieces *= sizes[dim]
    return shape
