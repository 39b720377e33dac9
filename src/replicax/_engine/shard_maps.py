"""``jax.shard_map`` and ``jax.pmap`` inside a mapped function: maps inside the map, one for each axis of their mesh.

Both are about devices that the map itself is on. But what they compute does not depend on devices: a ``shard_map``
cuts its arguments along the axes of a mesh, runs a program on each piece, and joins the results.
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

#: What says where an array lies, or that it may vary, and does nothing to it.
ABOUT_PLACES = ("pvary", "sharding_constraint", "reshard")

#: A dimension of an array as a position, or the mesh axis that a dimension is cut along.
Dimension: TypeAlias = int | AxisName


def as_nested_maps(jaxpr: Jaxpr, sizes: Mapping[Hashable, int], name: str) -> Jaxpr:
    """The program with a map in the place of each ``shard_map``.

    Args:
        jaxpr: The program of one replica.
        sizes: The mapped axis that it may communicate over.
        name: The name of the user's function.

    Raises:
        NestedMapError: a ``shard_map`` does what no map can do.
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
    if eqn.primitive.name == "psum_invariant":  # psum, of what shard_map's types say to vary
        return list(lax.psum(args, eqn.params["axes"]))
    hoist = _jax.bears_no_constants(eqn)

    def rewritten(sub: Jaxpr) -> tuple[Jaxpr, list[Array]]:
        return _jax.retrace(lambda *args: _run(sub, args), sub, hoist=hoist)

    return _jax.bind_again(eqn, args, rewritten, lambda rule, _: _explained(rule) if _jax.in_shard_map(eqn) else rule)


def _explained(rule: Function) -> Function:
    """A derivative rule that was recorded inside a ``shard_map``, which JAX runs when it differentiates from outside.

    It compares the types of what the rule returns, which do not say any more over which axes they vary, with those
    that it has recorded.
    """

    @functools.wraps(rule)
    def explained(*args: PyTree) -> PyTree:
        try:
            return rule(*args)
        except TypeError as error:
            raise NestedMapError(
                "A map cannot be differentiated from outside if it contains a jax.shard_map that calls a function with "
                "a custom derivative rule (jax.custom_jvp or jax.custom_vjp, such as jax.nn.relu): JAX rejects the "
                "types of the rule there. Write check_vma=False in the jax.shard_map, map its function with "
                "replicax.pmap instead, or take the derivative inside the mapped function."
            ) from error

    return explained


def _shard_map(eqn: Equation, args: Sequence[Array]) -> list[Array]:
    params, mesh = eqn.params, eqn.params["mesh"]
    names = [name for name in mesh.axis_names if name in params["newly_manual_axes"]]
    outs = [var.aval for var in eqn.outvars]
    cut = [_cut_dimensions(spec, x.ndim, names) for spec, x in zip(params["in_specs"], args, strict=True)]
    joined = [_cut_dimensions(spec, len(y.shape), names) for spec, y in zip(params["out_specs"], outs, strict=True)]

    def over(axes: Sequence[Hashable], cut: Sequence[list[Dimension]], args: Sequence[Array]) -> list[Array]:
        """A map over each of the axes, of arrays that have those and no others of their cut dimensions."""
        if not axes:
            return _run(params["jaxpr"], args)
        name, *rest = axes
        in_axes = _places(name, cut)
        remaining = [[dim for dim in dims if dim != name] for dims in cut]
        own = [_jax.without_axis(x, axis) for x, axis in zip(args, in_axes, strict=True)]
        jaxpr, consts = _jax.trace_flat(lambda *own: over(rest, remaining, own), own, {name: mesh.shape[name]})
        out_axes = _places(name, [[dim for dim in dims if isinstance(dim, int) or dim in axes] for dims in joined])
        # Where JAX does not check that a result is equal on all devices, it is the first one's.
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


def _places(name: AxisName, cut: Sequence[list[Dimension]]) -> list[int | None]:
    """Where each array has the dimension that is cut along a mesh axis; None where it has none."""
    return [dims.index(name) if name in dims else None for dims in cut]


def _cut_dimensions(spec: PartitionSpec, rank: int, names: Sequence[Hashable]) -> list[Dimension]:
    """The dimensions of an array as positions, each after the names of the mesh axes that it is cut along."""
    dims: list[Dimension] = []
    for dim in range(rank):
        along = spec[dim] if dim < len(spec) else None
        dims += [name for name in (along if isinstance(along, tuple) else (along,)) if name in names]
        dims.append(dim)
    return dims


def _shape(x: Array, dims: Sequence[Dimension], sizes: Mapping[Hashable, int]) -> list[int]:
    """The shape of an array whose cut dimensions are several."""
    shape, pieces = [], 1
    for dim in dims:
        if isinstance(dim, int):
            shape.append(x.shape[dim] // pieces)
            pieces = 1
        else:
            shape.append(sizes[dim])
            pieces *= sizes[dim]
    return shape
