"""Arguments and results of vmappable types: types that define rules for ``jax.vmap``, such as sparse matrices."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from replicax import _jax
from replicax._typing import Array, Axes, Function, PyTree, PyTreeDef
from replicax.errors import AxisSpecError, NotAnArrayError


def one_of(value: PyTree, spec: PyTree) -> tuple[list[int | None], PyTree]:
    """Returns the mapped axis of each array in an argument, and the value that one replica gets.

    Args:
        value: The argument.
        spec: Its entry in ``in_axes``.

    Raises:
        AxisSpecError: The type does not accept this entry.
        NotAnArrayError: The type's rule for ``jax.vmap`` computes new arrays.
    """
    into, _ = _jax.vmap_rules(type(value))

    def rule(value: PyTree, part: Function) -> PyTree:
        return into(part, lambda: 0, value, spec)

    def row(x: Array, axis: int) -> Array:
        return lax.index_in_dim(x, 0, axis, keepdims=False)

    return _mapped("in_axes", value, spec, rule, row)


def all_of(own: PyTree, spec: PyTree, size: int) -> tuple[list[int | None], PyTree]:
    """Returns the mapped axis of each array in a result, and the stacked value of all replicas.

    Args:
        own: The result of one replica.
        spec: Its entry in ``out_axes``.
        size: The number of replicas.

    Raises:
        AxisSpecError: The type does not accept this entry.
        NotAnArrayError: The type's rule for ``jax.vmap`` computes new arrays.
    """
    _, back = _jax.vmap_rules(type(own))

    def rule(own: PyTree, part: Function) -> PyTree:
        return back(lambda _, x, axis: part(x, axis), size, own, spec)

    def stack(x: Array, axis: int) -> Array:
        return jnp.repeat(jnp.expand_dims(x, axis), size, axis)

    return _mapped("out_axes", own, spec, rule, stack)


def _mapped(
    which: str, value: PyTree, spec: PyTree, rule: Function, change: Function
) -> tuple[list[int | None], PyTree]:
    """Traces a type's rule for ``jax.vmap``, and checks that the rule only adds or removes mapped axes."""
    leaves, tree = jax.tree.flatten(value)
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(_jax.typeof, leaves)]
    axes: list[int | None] = [None] * len(types)

    def noting(*arrays: Array) -> PyTree:
        def part(x: Array, axis: int | None) -> Array:
            if axis is None:
                return x
            axes[_index(x, arrays, type(value))] = axis
            return change(x, axis)

        return rule(tree.unflatten(arrays), part)

    try:
        changed = jax.eval_shape(noting, *types)
    except (AxisSpecError, NotAnArrayError):
        raise
    except (TypeError, ValueError) as error:
        raise AxisSpecError(
            f"{which} has {spec!r} for a {type(value).__name__}: {error} Write an entry that jax.vmap accepts, too."
        ) from None
    _check_order(type(value), types, axes, jax.tree.leaves(changed), tree, rule)
    return axes, changed


def _check_order(
    kind: type,
    types: Sequence[jax.ShapeDtypeStruct],
    axes: Axes,
    changed: Sequence[jax.ShapeDtypeStruct],
    tree: PyTreeDef,
    rule: Function,
) -> None:
    """Checks that a rule returns exactly the arrays that it was given, in the same order."""

    def exchanging(*arrays: Array) -> list[Array]:
        given, put = arrays[: len(types)], arrays[len(types) :]

        def part(x: Array, axis: int | None) -> Array:
            return x if axis is None else put[_index(x, given, kind)]

        return jax.tree.leaves(rule(tree.unflatten(given), part))

    if len(types) != len(changed):
        raise _computes(kind)
    expected = [k if axis is None else k + len(types) for k, axis in enumerate(axes)]
    if _jax.passed_on(exchanging, [*types, *changed]) != expected:
        raise _computes(kind)


def _index(x: Array, arrays: Sequence[Array], kind: type) -> int:
    for k, y in enumerate(arrays):
        if x is y:
            return k
    raise _computes(kind)


def _computes(kind: type) -> NotAnArrayError:
    return NotAnArrayError(
        f"The jax.vmap rule of {kind.__name__} computes on its arrays, but pmap supports only rules that select the "
        f"mapped axes. Pass the arrays instead, and create the {kind.__name__} inside the mapped function."
    )
