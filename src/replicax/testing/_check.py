"""Compares a program under ``pmap`` with a reference."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from replicax._messages import report
from replicax._pmap import pmap
from replicax._typing import Args, Array, ArrayLike, DType, Function, KeyPath, PyTree
from replicax.errors import MismatchError


def check(
    fun: Function,
    *args: PyTree,
    axis_name: Hashable | None = None,
    in_axes: PyTree = 0,
    out_axes: PyTree = 0,
    axis_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    reference: Function = jax.vmap,
    derivatives: bool = False,
    rtol: float | None = None,
    kwargs: Mapping[str, PyTree] | None = None,
) -> None:
    """Checks that ``pmap(fun)`` computes what ``jax.vmap(fun)`` computes.

    Structures, shapes and dtypes must be equal. Values must agree up to rounding, elementwise: |ours − expected|
    ≤ ``rtol`` · (|expected| + min(1, the largest magnitude in the array)). Weak types and signs of zeros may differ.

    Args:
        fun: The program of one replica.
        args: Its positional arguments, with the mapped axis: arrays of shape ``(replicas, ...)`` for ``in_axes=0``.
        axis_name: As in :func:`replicax.pmap`.
        in_axes: As in :func:`replicax.pmap`.
        out_axes: As in :func:`replicax.pmap`.
        axis_size: As in :func:`replicax.pmap`.
        devices: As in :func:`replicax.pmap`.
        reference: The reference: ``jax.vmap``, or :func:`lockstep` if ``vmap`` has no rule or a wrong rule.
        derivatives: Whether to also compare the gradients of a weighted sum of all results with respect to all
            floating-point arguments. At least one argument must be floating-point.
        rtol: The relative tolerance. The default is about 1e-5 for float32, and twice the machine epsilon for dtypes of
            at most 16 bits.
        kwargs: Keyword arguments: arrays of shape ``(replicas, ...)``.

    Raises:
        MismatchError: lists every result or gradient that differs, and by how much; or ``derivatives`` is set and no
            argument is floating-point.
        ReplicaxError: any error of :func:`replicax.pmap`.

    Example:
        >>> import jax, numpy as np, replicax.testing
        >>> replicax.testing.check(lambda x: x - jax.lax.pmean(x, "i"), np.arange(12.0), axis_name="i")
    """
    options = {"axis_name": axis_name, "in_axes": in_axes, "out_axes": out_axes, "axis_size": axis_size}
    options = {key: value for key, value in options.items() if value is not None or key in ("in_axes", "out_axes")}
    mapped = pmap(fun, devices=devices, **options)
    right = reference(fun, **options)
    compiled = jax.jit if reference is jax.vmap else _as_it_is  # another reference may need concrete values
    kwargs = dict(kwargs or {})
    compare(lambda path: f"result{keystr(path)}", mapped(*args, **kwargs), compiled(right)(*args, **kwargs), rtol)
    if derivatives:
        ours = gradient(mapped, args, kwargs, _as_it_is)
        theirs = gradient(right, args, kwargs, compiled)
        compare(lambda path: f"derivative by {path[0].key}", ours, theirs, rtol)


def _as_it_is(fun: Function) -> Function:
    return fun


def gradient(
    fun: Function,
    args: Args,
    kwargs: Mapping[str, PyTree],
    compiled: Callable[[Function], Function],
) -> dict[str, jax.Array]:
    """The gradient of a weighted sum of all floating-point results, by each floating-point argument.

    Each element has its own weight, so that swapped elements change the gradient.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path((args, dict(kwargs)))
    leaves = [x for _, x in paths]
    smooth = [i for i, x in enumerate(leaves) if _is_differentiable(x)]
    if not smooth:
        raise MismatchError(
            "derivatives=True, but no argument is floating-point, so there is no derivative to compare. Pass a "
            "floating-point argument, or leave derivatives out."
        )

    def scalar(values: Sequence[jax.Array]) -> jax.Array:
        changed = list(leaves)
        for i, value in zip(smooth, values, strict=True):
            changed[i] = value
        changed_args, changed_kwargs = jax.tree.unflatten(treedef, changed)
        total = jnp.float32(0)
        for k, x in enumerate(jax.tree.leaves(fun(*changed_args, **changed_kwargs))):
            if _is_differentiable(x):
                weight = np.cos(np.arange(x.size) + k).reshape(x.shape).astype(np.float32)
                total += jnp.sum(jnp.real(x).astype(jnp.float32) * weight)
                total += jnp.sum(jnp.imag(x).astype(jnp.float32) * weight)
        return total

    gradients = compiled(jax.grad(scalar))([jnp.asarray(leaves[i]) for i in smooth])
    return {_argument(paths[i][0]): gradient for i, gradient in zip(smooth, gradients, strict=True)}


def _argument(path: KeyPath) -> str:
    """``args[0]['w']`` for a positional argument's leaf, ``['scale']`` for a keyword argument's."""
    return ("args" if path[0].idx == 0 else "kwargs") + keystr(path[1:])


def _is_differentiable(x: ArrayLike) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact))


def compare(label: Callable[[KeyPath], str], ours: PyTree, theirs: PyTree, rtol: float | None = None) -> None:
    """Compares two pytrees of arrays leaf by leaf. ``label`` maps the path of a leaf to its name in the message.

    Raises:
        MismatchError: lists every leaf that differs.
    """
    if (structure := jax.tree.structure(ours)) != (expected := jax.tree.structure(theirs)):
        raise MismatchError(
            f"{label(())}: pmap returns the structure {structure}, but the reference returns {expected}."
        )
    paths = jax.tree_util.tree_leaves_with_path(ours)
    faults = [
        f"{label(path)}: {fault}"
        for (path, x), y in zip(paths, jax.tree.leaves(theirs), strict=True)
        if (fault := difference(x, y, rtol))
    ]
    if faults:
        raise MismatchError(report("pmap and the reference computed different values:", faults, ""))


def difference(ours: Array, theirs: Array, rtol: float | None = None) -> str | None:
    """Describes the difference between two arrays; None if they agree."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return f"pmap returns {ours.dtype}{list(ours.shape)}, but the reference {theirs.dtype}{list(theirs.shape)}"
    if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
        ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
    x, y = np.asarray(ours), np.asarray(theirs)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        wrong = x != y
    else:
        tolerance = _tolerance(x.dtype) if rtol is None else rtol
        wide = np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64
        x, y = x.astype(wide), y.astype(wide)
        finite = np.isfinite(y)
        near_zero = min(1.0, float(np.max(np.abs(y[finite]), initial=0.0)))
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        with np.errstate(invalid="ignore"):
            wrong = ~(same | (finite & (np.abs(x - y) <= tolerance * (near_zero + np.abs(y)))))
    if not wrong.any():
        return None
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"{int(wrong.sum())} of {x.size} elements differ, first at {at}: {x[at]}, but the reference has {y[at]}"


def _tolerance(dtype: DType) -> float:
    """The default relative tolerance: a sum in another order may differ by some units in the last place."""
    return (100 if jnp.finfo(dtype).bits > 16 else 2) * float(jnp.finfo(dtype).eps)
