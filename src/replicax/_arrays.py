"""Functions that create, shard and read pytrees of arrays with a leading replica axis."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from replicax import _jax
from replicax._engine.replica import no_arrays
from replicax._jax import cpp
from replicax._layout.layout import layout
from replicax._messages import as_int, report
from replicax._pmap import pmap
from replicax._runtime.options import check_devices
from replicax._typing import Array, ArrayLike, HostArray, OneArray, PyTree
from replicax.errors import AxisSpecError, DeletedArrayError, MappedSizeError

Tree = TypeVar("Tree")


@overload
def replicate(tree: OneArray, axis_size: int | None = ..., *, devices: Sequence[jax.Device] | None = ...) -> Array: ...


@overload
def replicate(tree: Tree, axis_size: int | None = ..., *, devices: Sequence[jax.Device] | None = ...) -> Tree: ...


def replicate(tree: Tree, axis_size: int | None = None, *, devices: Sequence[jax.Device] | None = None) -> Tree:
    """Copies every array once per replica, sharded over the devices.

    Replaces ``jax.device_put_replicated``, for example for the initial training state. Each device receives the
    array once, and copies it for its own replicas.

    Args:
        tree: A pytree of arrays and scalars of any shape ``(...)`` and dtype.
        axis_size: The number of replicas; the number of devices when None.
        devices: The devices; all devices when None.

    Returns:
        The same pytree with ``jax.Array`` leaves of shape ``(replicas, ...)`` and the same dtypes, sharded like results
        of :func:`pmap`.

    Raises:
        NotAnArrayError: lists every leaf that is not an array.
        DeletedArrayError: lists every array that was donated or deleted.
        UnsupportedDtypeError: an array has a 2-bit dtype, and the replicas need padding.
        OptionTypeError: ``axis_size`` is not an int, or ``devices`` is not a list.
        MappedSizeError: ``axis_size`` is less than 1.
        DevicesError: ``devices`` is empty, contains a non-device or a duplicate, or mixes platforms.

    Example:
        >>> import numpy as np, replicax
        >>> replicax.replicate({"w": np.ones(3)}, 4)["w"].shape
        (4, 3)
    """
    check_arrays("replicate", tree)
    if axis_size is None:
        axis_size = len(_all_devices() if devices is None else check_devices(devices))
    if as_int("axis_size", axis_size) < 1:
        raise MappedSizeError(
            f"replicate: axis_size is the number of replicas and must be at least 1, got {axis_size}."
        )
    where = devices if devices is not None or jax.process_count() == 1 else jax.local_devices()
    return pmap(_identity, in_axes=None, axis_size=axis_size, devices=where)(tree)


def _all_devices() -> tuple[jax.Device, ...]:
    """The default devices: all; with several processes, those of this process."""
    return tuple(jax.devices() if jax.process_count() == 1 else jax.local_devices())


def _identity(tree: Tree) -> Tree:
    return tree


@overload
def shard(tree: OneArray, axis_size: int | None = ..., *, devices: Sequence[jax.Device] | None = ...) -> Array: ...


@overload
def shard(tree: Tree, axis_size: int | None = ..., *, devices: Sequence[jax.Device] | None = ...) -> Tree: ...


def shard(tree: Tree, axis_size: int | None = None, *, devices: Sequence[jax.Device] | None = None) -> Tree:
    """Splits the leading axis of every array into one equal part per replica.

    Prepares a batch for :func:`pmap`. Each device receives only its own shard.

    Args:
        tree: A pytree of arrays of shape ``(batch, ...)`` and any dtype. ``axis_size`` must divide ``batch``.
        axis_size: The number of replicas; the number of devices when None.
        devices: The devices; all devices when None.

    Returns:
        The same pytree with ``jax.Array`` leaves of shape ``(replicas, batch // replicas, ...)`` and the same dtypes,
        sharded over the devices.

    Raises:
        DeletedArrayError: lists every array that was donated or deleted.
        NotAnArrayError: lists every leaf that is not an array.
        OptionTypeError: ``axis_size`` is not an int, or ``devices`` is not a list.
        MappedSizeError: lists every array that has no leading axis, or whose leading axis is not divisible by
            ``axis_size``; or ``axis_size`` is less than 1.
        DevicesError: ``devices`` is empty, contains a non-device or a duplicate, or mixes platforms.

    Example:
        >>> import numpy as np, replicax
        >>> replicax.shard(np.zeros((12, 5)), 4).shape
        (4, 3, 5)
    """
    check_arrays("shard", tree)
    check_deleted("shard", tree, jax.tree.leaves(tree))
    devices = _all_devices() if devices is None else check_devices(devices)
    size = len(devices) if axis_size is None else as_int("axis_size", axis_size)
    if size < 1:
        raise MappedSizeError(f"shard: axis_size is the number of replicas and must be at least 1, got {size}.")
    paths = jax.tree_util.tree_leaves_with_path(tree)
    faults = [
        f"tree{keystr(path)} of shape {np.shape(x)}" for path, x in paths if np.ndim(x) < 1 or np.shape(x)[0] % size
    ]
    if faults:
        raise MappedSizeError(
            report(
                f"shard cannot split these arrays into {size} equal parts along their leading axis:",
                faults,
                "Drop or repeat some rows, or choose an axis_size that divides the batch size.",
            )
        )
    where = layout("replicas", size, devices).result_sharding(0)

    def place(x: ArrayLike) -> jax.Array:
        # JAX may alias the memory of a NumPy array, so copy it.
        own = x if isinstance(x, jax.Array) else np.array(x)
        return jax.device_put(own.reshape(size, own.shape[0] // size, *own.shape[1:]), where)

    with _jax.own_mesh():
        return jax.tree.map(place, tree)


@overload
def unreplicate(tree: HostArray) -> HostArray: ...


@overload
def unreplicate(tree: Tree) -> Tree: ...


def unreplicate(tree: Tree) -> Tree:
    """Returns the arrays of the first replica, without a gather.

    Args:
        tree: A pytree of arrays of shape ``(replicas, ...)`` and any dtype.

    Returns:
        The same pytree with leaves of shape ``(...)`` and the same dtypes. A ``jax.Array`` stays on the device of the
        first replica.

    Raises:
        NotAnArrayError: lists every leaf that is not an array.
        AxisSpecError: lists every leaf that has no leading axis or an empty one.
        DeletedArrayError: lists every array that was donated or deleted.

    Example:
        >>> import numpy as np, replicax
        >>> replicax.unreplicate(replicax.replicate(np.arange(3.0)))
        Array([0., 1., 2.], dtype=float32)
    """
    leaves, treedef = jax.tree.flatten(tree)
    _check_leading_axis("unreplicate", tree, leaves)
    by_device: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        if not _is_array(x) or not (parts := _parts(x)).have_rows:
            leaves[i] = np.asarray(x)[0]
            continue
        leaves[i] = x.addressable_data(parts.numbers[0])
        by_device.setdefault(parts.device, []).append(i)
    with _jax.own_mesh():
        for on_one in by_device.values():
            for i, x in zip(on_one, _first([leaves[i] for i in on_one]), strict=True):
                leaves[i] = x
    return jax.tree.unflatten(treedef, leaves)


_first = jax.jit(lambda blocks: [block[0] for block in blocks])


@overload
def local_replicas(tree: Array | HostArray) -> list[HostArray]: ...


@overload
def local_replicas(tree: Tree) -> list[Tree]: ...


def local_replicas(tree: PyTree) -> list[Any]:
    """Returns a list with one pytree for each replica on the devices of this process, without a gather.

    Args:
        tree: A pytree of arrays of shape ``(replicas, ...)`` and any dtype.

    Returns:
        The pytrees, in the order of the replicas. Their leaves are NumPy arrays of shape ``(...)`` and the same dtypes
        (NumPy scalars for shape ``()``). On a CPU, arrays are not copied. PRNG keys stay ``jax.Array``, because NumPy
        has no dtype for them.

    Raises:
        NotAnArrayError: lists every leaf that is not an array.
        AxisSpecError: lists every leaf that has no leading axis or an empty one.
        DeletedArrayError: lists every array that was donated or deleted.
        MappedSizeError: the leaves have different numbers of replicas.

    Example:
        >>> import numpy as np, replicax
        >>> [float(x) for x in replicax.local_replicas(replicax.pmap(lambda x: 2 * x)(np.arange(3.0)))]
        [0.0, 2.0, 4.0]
    """
    leaves, treedef = jax.tree.flatten(tree)
    _check_leading_axis("local_replicas", tree, leaves)
    rows = list(map(_rows, leaves, _parts_of_all(leaves)))
    if len({len(r) for r in rows}) > 1:
        paths = jax.tree_util.tree_leaves_with_path(tree)
        raise MappedSizeError(
            report(
                "local_replicas needs arrays with the same number of replicas along axis 0; these differ:",
                [f"tree{keystr(path)} of shape {np.shape(x)}" for path, x in paths],
                "Call local_replicas once for each number of replicas.",
            )
        )
    return [jax.tree.unflatten(treedef, replica) for replica in zip(*rows, strict=True)]


@overload
def fetch(tree: OneArray) -> HostArray: ...


@overload
def fetch(tree: Tree) -> Tree: ...


def fetch(tree: Tree) -> Tree:
    """Copies arrays to the host, each shard once.

    A result of a map over several processes is fetched without the others. An array over devices of several processes
    is gathered from them, so all of them must fetch it.

    Same result as ``jax.device_get``; takes about half the time for many small arrays.

    Args:
        tree: A pytree of arrays of any shape ``(...)`` and dtype, such as a result of :func:`pmap`.

    Returns:
        The same pytree with NumPy arrays of the same shapes and dtypes. Do not write to these arrays: on a CPU, an
        array that is complete on one device is not copied. PRNG keys stay ``jax.Array``, because NumPy has no dtype
        for them.

    Raises:
        NotAnArrayError: lists every leaf that is not an array.
        DeletedArrayError: lists every array that was donated or deleted.

    Example:
        >>> import numpy as np, replicax
        >>> replicax.fetch(replicax.pmap(lambda x: 2 * x)(np.arange(3.0)))
        array([0., 2., 4.], dtype=float32)
    """
    leaves, treedef = jax.tree.flatten(tree)
    check_arrays("fetch", tree, leaves)
    check_deleted("fetch", tree, leaves)
    return jax.tree.unflatten(treedef, list(map(_whole, leaves, _parts_of_all(leaves))))


@functools.cache
def _gathered(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Returns the function that copies an array over several processes to all of their devices."""
    return _jax.always_jit(_identity, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _whole(x: ArrayLike, parts: Parts | None) -> ArrayLike:
    if _is_array(x) and not x.is_fully_addressable and isinstance(x.sharding, NamedSharding):
        x = _gathered(x.sharding.mesh)(x).addressable_data(0)  # every process has a copy
        parts = _parts(x)
    if parts is None or not parts.plain:
        return np.asarray(x)
    if parts.keys:
        return x
    blocks = [np.asarray(x.addressable_data(k)) for k in parts.numbers]
    return np.concatenate(blocks, parts.dims[0]) if parts.dims else blocks[0]


# ---------------------------------------------------------------------------------------------------------------
# Shards


@dataclass(frozen=True)
class Parts:
    """The distinct shards of an array that this process can address. A shard on several devices is listed once.

    Attributes:
        dims: The sharded dimensions.
        numbers: The indices of the distinct shards, in order of their position in the array.
        device: The device of the first shard.
        keys: Whether the array contains PRNG keys, which have no NumPy dtype.
        plain: Whether the shards cover the array, and at most one dimension is sharded.
    """

    dims: tuple[int, ...]
    numbers: tuple[int, ...]
    device: jax.Device
    keys: bool
    plain: bool

    @property
    def have_rows(self) -> bool:
        """Whether each shard holds whole rows along axis 0."""
        return self.dims in ((), (0,))


#: Parts, cached by sharding, shape and dtype: computing them costs more than reading the shards.
_KNOWN: dict[Any, Parts] = {}


def _parts(x: jax.Array) -> Parts:
    key = x.sharding, x.shape, x.dtype
    parts = _KNOWN.get(key)
    if parts is None:
        if len(_KNOWN) >= _ENOUGH:
            _KNOWN.clear()
        parts = _KNOWN[key] = _find_parts(x)
    return parts


_ENOUGH = 1024


def _find_parts(x: jax.Array) -> Parts:
    shards = x.addressable_shards
    dims = tuple(d for d, n in enumerate(x.shape) if any(s.data.shape[d] != n for s in shards))
    starts = [tuple(s.index[d].indices(x.shape[d])[0] for d in dims) for s in shards]
    order: dict[tuple[int, ...], int] = {}
    for k, start in enumerate(starts):
        order.setdefault(start, k)
    numbers = tuple(order[start] for start in sorted(order))
    device = next(iter(shards[numbers[0]].data.devices()))
    keys = jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
    return Parts(dims, numbers, device, keys, x.is_fully_addressable and len(dims) <= 1)


def _parts_of_all(leaves: Sequence[ArrayLike]) -> list[Parts | None]:
    """The parts of each array, None for a NumPy array or scalar. Starts asynchronous copies from accelerators."""
    found = [_parts(x) if _is_array(x) else None for x in leaves]
    for x, parts in zip(leaves, found, strict=True):
        if parts is not None and parts.device.platform != "cpu" and not parts.keys:
            x.copy_to_host_async()
    return found


def _rows(x: ArrayLike, parts: Parts | None) -> list[ArrayLike]:
    """The rows along axis 0 that this process can address."""
    if parts is None or not parts.have_rows:
        return list(np.asarray(x))
    blocks = (x.addressable_data(k) for k in parts.numbers)
    if parts.keys:
        return [block[i] for block in blocks for i in range(block.shape[0])]
    return [row for block in blocks for row in np.asarray(block)]


def _is_array(x: object) -> bool:
    """Whether ``x`` is a ``jax.Array``. The comparison of types comes first, because ``isinstance`` is slow here."""
    return type(x) is cpp.ArrayImpl or isinstance(x, jax.Array)


@_jax.api_boundary
def check_arrays(caller: str, tree: PyTree, leaves: Sequence[object] | None = None) -> None:
    """Checks that all leaves of a pytree are concrete arrays or scalars.

    Args:
        caller: The name of the public function, for the message.
        tree: The pytree.
        leaves: Its leaves, if they are already known.

    Raises:
        NotAnArrayError: lists every leaf that is not a concrete array.
    """
    if all(map(_has_value, jax.tree.leaves(tree) if leaves is None else leaves)):
        return
    faults = {f"tree{keystr(path)}": x for path, x in jax.tree_util.tree_leaves_with_path(tree) if not _has_value(x)}
    if faults:
        raise no_arrays(
            f"{caller} needs concrete arrays; these are not:",
            faults,
            "Remove everything that is not a numeric array from the tree. Under jit, use pmap instead.",
        )


def _has_value(x: object) -> bool:
    if type(x) is cpp.ArrayImpl:
        return True
    return (isinstance(x, jax.Array | bool) or _jax.is_array_type(x)) and not isinstance(x, jax.core.Tracer)


def check_deleted(caller: str, tree: PyTree, leaves: Sequence[ArrayLike]) -> None:
    """Checks that no array was donated or deleted.

    Raises:
        DeletedArrayError: lists every such array.
    """
    if any(_is_deleted(x) for x in leaves):
        raise DeletedArrayError(
            report(
                f"{caller} cannot read these arrays:",
                [
                    f"tree{keystr(path)} was donated or deleted"
                    for path, x in jax.tree_util.tree_leaves_with_path(tree)
                    if _is_deleted(x)
                ],
                "Use the result of the call that the array was donated to.",
            )
        )


def _is_deleted(x: ArrayLike) -> bool:
    return _is_array(x) and x.is_deleted()


@_jax.api_boundary
def _check_leading_axis(caller: str, tree: PyTree, leaves: Sequence[ArrayLike]) -> None:
    check_arrays(caller, tree, leaves)
    check_deleted(caller, tree, leaves)
    if all((x.shape if type(x) is cpp.ArrayImpl else np.shape(x))[:1] > (0,) for x in leaves):
        return
    faults = [
        f"tree{keystr(path)}, of type {type(x).__name__} and shape {np.shape(x)}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if np.ndim(x) < 1 or np.shape(x)[0] < 1
    ]
    if faults:
        raise AxisSpecError(
            report(
                f"{caller} needs arrays of shape (replicas, ...); these have no such axis:",
                faults,
                "Pass a result of pmap, shard or replicate.",
            )
        )
