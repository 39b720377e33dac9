"""The replacements of ``jax.pmap``, ``jax.device_put_replicated`` and ``jax.device_put_sharded``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar, overload

import jax
import numpy as np
from jax import lax
from jax.tree_util import keystr

from replicax import _jax
from replicax._arrays import check_arrays, replicate
from replicax._engine.outputs import OutputPolicy
from replicax._layout.axes import takes_position
from replicax._layout.layout import layout
from replicax._messages import report
from replicax._pmap import MappedFunction
from replicax._pmap import pmap as mapped
from replicax._typing import Array, ArrayLike, Function, HostArray, OneArray, PyTree
from replicax.compat._virtual import distinct
from replicax.errors import OptionTypeError, ShardsError

R = TypeVar("R")
Tree = TypeVar("Tree")


def pmap(
    fun: Callable[..., R],
    axis_name: Hashable | None = None,
    *,
    in_axes: PyTree = 0,
    out_axes: PyTree = 0,
    static_broadcasted_argnums: int | Iterable[int] = (),
    devices: Sequence[jax.Device] | None = None,
    backend: str | None = None,
    axis_size: int | None = None,
    donate_argnums: int | Iterable[int] = (),
) -> MappedFunction[R]:
    """:func:`replicax.pmap` with the signature of ``jax.pmap`` and the ``out_axes=None`` semantics of JAX.

    As in JAX, results with ``out_axes=None`` may differ between replicas: each device keeps the value of its first
    replica, and reading the array returns the value of replica 0.

    Args:
        fun: The program of one replica.
        axis_name: The name of the mapped axis, for collectives.
        in_axes: The mapped axis of each positional argument.
        out_axes: The position of the mapped axis in each result.
        static_broadcasted_argnums: The positions of arguments that are compile-time constants.
        devices: The devices to use; all devices of the backend when None. Duplicates count once.
        backend: The platform to use.
        axis_size: The number of replicas. Required only if no argument is mapped.
        donate_argnums: The positions of arguments whose buffers the program may reuse.

    Returns:
        A callable that runs ``fun`` for all replicas, on arrays of shape ``(replicas, ...)`` for axis 0.

    Raises:
        ReplicaxError: the errors of :func:`replicax.pmap`, except ``DivergentOutputError``.

    Example:
        >>> import jax.numpy as jnp
        >>> from replicax import compat
        >>> compat.pmap(lambda x: 2 * x, out_axes=None)(jnp.array([3.0, 4.0]))
        Array(6., dtype=float32)
    """
    checked = mapped(
        fun,
        axis_name,
        in_axes=in_axes,
        out_axes=out_axes,
        static_broadcasted_argnums=static_broadcasted_argnums,
        devices=None if devices is None else distinct(devices)[0],
        backend=backend,
        axis_size=axis_size,
        donate_argnums=_that_exist(fun, donate_argnums),
    )
    outputs = dataclasses.replace(checked.options.outputs, policy=OutputPolicy.TAKE_FIRST)
    return MappedFunction(fun, dataclasses.replace(checked.options, outputs=outputs))


def _that_exist(fun: Function, positions: int | Iterable[int]) -> tuple[int, ...]:
    """The donated positions that the function has. ``jax.pmap`` ignores the others."""
    numbers = tuple(positions) if isinstance(positions, Iterable) else (positions,)
    return tuple(i for i in numbers if not isinstance(i, int) or takes_position(fun, i))


@overload
def device_put_replicated(x: OneArray, devices: Sequence[jax.Device]) -> Array: ...


@overload
def device_put_replicated(x: Tree, devices: Sequence[jax.Device]) -> Tree: ...


def device_put_replicated(x: Tree, devices: Sequence[jax.Device]) -> Tree:
    """Copies every array to each device, like ``jax.device_put_replicated`` before JAX 0.10.

    Each device receives one copy. Neither a device nor the host ever holds the stack of all copies.

    Args:
        x: A pytree of arrays and scalars of any shape ``(...)`` and dtype.
        devices: The devices. A device that appears k times stands for k replicas and gets k rows.

    Returns:
        The same pytree with ``jax.Array`` leaves of shape ``(len(devices), ...)`` and the same dtypes, row i on
        ``devices[i]``. If a device appears several times, the arrays are sharded like results of :func:`pmap`.

    Raises:
        NotAnArrayError: lists every leaf that is not an array.
        OptionTypeError: ``devices`` is not a list.
        DevicesError: ``devices`` is empty, contains a non-device, or mixes platforms.

    Example:
        >>> import jax, numpy as np
        >>> from replicax import compat
        >>> compat.device_put_replicated({"w": np.ones(3)}, jax.devices()[:4])["w"].shape
        (4, 3)
    """
    real, count = distinct(devices)
    check_arrays("device_put_replicated", x)
    if len(real) < count:  # each real device receives one copy, and copies it for its replicas
        return replicate(x, count, devices=real)
    with _jax.own_mesh():
        return jax.tree.map(lambda leaf: _rows_on([leaf] * count, real), x)


@overload
def device_put_sharded(shards: Sequence[OneArray], devices: Sequence[jax.Device]) -> Array: ...


@overload
def device_put_sharded(shards: Sequence[Tree], devices: Sequence[jax.Device]) -> Tree: ...


def device_put_sharded(shards: Sequence[Tree], devices: Sequence[jax.Device]) -> Tree:
    """Copies one pytree to each device, like ``jax.device_put_sharded`` before JAX 0.10.

    Each device receives only its own shard. Neither a device nor the host ever holds the stack of all shards.

    Args:
        shards: A list of pytrees, one per device, with the same structure, shapes ``(...)`` and dtypes.
        devices: The devices. A device that appears k times stands for k replicas and gets k shards.

    Returns:
        One pytree of the same structure with ``jax.Array`` leaves of shape ``(len(devices), ...)`` and the same
        dtypes. Row i has the values of ``shards[i]`` and is on ``devices[i]``. If a device appears several times, the
        arrays are sharded like results of :func:`pmap`.

    Raises:
        OptionTypeError: ``shards`` or ``devices`` is not a list.
        ShardsError: the number of shards is not the number of devices, or shards differ in structure, shape or dtype.
        NotAnArrayError: lists every leaf that is not an array.
        DevicesError: ``devices`` is empty, contains a non-device, or mixes platforms.

    Example:
        >>> import jax, numpy as np
        >>> from replicax import compat
        >>> compat.device_put_sharded([{"x": np.ones(3)}, {"x": np.zeros(3)}], jax.devices()[:2])["x"].shape
        (2, 3)
    """
    if isinstance(shards, str) or not isinstance(shards, Sequence):
        raise OptionTypeError(
            f"device_put_sharded: shards must be a list with one tree of arrays per device, got "
            f"{type(shards).__name__}. If its elements are the shards, write list(shards)."
        )
    real, count = distinct(devices)
    if len(shards) != count:
        raise ShardsError(
            f"device_put_sharded needs one shard per device, got {len(shards)} shards for {count} devices. Pass one "
            f"shard per device. Or pass an array of any length directly to pmap, which shards it."
        )
    check_arrays("device_put_sharded", list(shards))
    _check_alike(shards)
    with _jax.own_mesh():
        return jax.tree.map(lambda *leaves: _rows_on(leaves, real), *shards)


def put_rows(x: Array | HostArray, devices: Sequence[jax.Device]) -> jax.Array:
    """Shards an array of shape ``(replicas, ...)`` like results of :func:`pmap`. Copies a NumPy array."""
    where = layout("replicas", len(x), distinct(devices)[0]).result_sharding(0)
    with _jax.own_mesh():
        return jax.device_put(x if isinstance(x, jax.Array) else np.array(x), where)


def _as_row(x: ArrayLike) -> Array | HostArray:
    """Adds a leading axis of size 1, on the same device. Copies a NumPy array, because JAX may alias its memory."""
    return lax.expand_dims(x, (0,)) if isinstance(x, jax.Array) else np.array(x)[None]


def _rows_on(rows: Sequence[ArrayLike], devices: tuple[jax.Device, ...]) -> Array:
    """One array from the rows of all replicas, sharded over the devices; weakly typed if the first row is."""
    where = layout("replicas", len(rows), devices).result_sharding(0)
    shape = len(rows), *np.shape(rows[0])
    held = where.addressable_devices_indices_map(shape)
    parts = jax.device_put([list(map(_as_row, rows[index[0]])) for index in held.values()], list(held))
    blocks = [part[0] if len(part) == 1 else _joined(part) for part in parts]
    whole = jax.make_array_from_single_device_arrays(shape, where, blocks)
    return _jax.as_type(whole, _jax.typeof(rows[0]))


_joined = jax.jit(lambda rows: jax.numpy.concatenate(rows))


def _check_alike(shards: Sequence[PyTree]) -> None:
    trees = [jax.tree.structure(shard) for shard in shards]
    faults = [f"shards[{i}] is {tree}, and shards[0] is {trees[0]}" for i, tree in enumerate(trees) if tree != trees[0]]
    if not faults:
        first, *others = (jax.tree_util.tree_leaves_with_path(shard) for shard in shards)
        types = [_jax.typeof(x) for _, x in first]
        faults = [
            f"shards[{i}]{keystr(path)} is {_jax.typeof(x).str_short()}, and shards[0]{keystr(path)} is "
            f"{aval.str_short()}"
            for i, other in enumerate(others, 1)
            for (path, x), aval in zip(other, types, strict=True)
            if (_jax.typeof(x).shape, _jax.typeof(x).dtype) != (aval.shape, aval.dtype)
        ]
    if faults:
        raise ShardsError(
            report(
                "device_put_sharded needs shards of the same structure, shapes and dtypes; these differ:",
                faults,
                "Pad or cast the shards to one shape and dtype first.",
            )
        )
