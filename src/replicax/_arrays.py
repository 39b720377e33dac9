"""Trees of arrays that lie one replica beside the other: made, split and read without a gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.tree_util import keystr

from replicax import _jax
from replicax._engine.replica import no_arrays
from replicax._jax import cpp
from replicax._layout.layout import layout
from replicax._messages import as_int, report
from replicax._pmap import pmap
from replicax._runtime.options import check_devices
from replicax._typing import ArrayLike, PyTree
from replicax.errors import AxisSpecError, DeletedArrayError, MappedSizeError

Tree = TypeVar("Tree")


def replicate(tree: Tree, axis_size: int | None = None, *, devices: Sequence[jax.Device] | None = None) -> Tree:
    """One copy of every array for each replica, spread over the devices.

    What ``jax.device_put_replicated`` was for: a state to start training from. Each device gets the array once and
    makes the copies for its own replicas, so no device ever holds all of them.

    Args:
        tree: A pytree of arrays and scalars of any shapes ``(...)``.
        axis_size: The number of replicas; that of the devices when None.
        devices: The devices; all of them when None.

    Returns:
        The same tree, its arrays of shape ``(replicas, ...)``, lying where :func:`pmap` would put results.

    Raises:
        NotAnArrayError: naming every leaf that is no array.
        MappedSizeError: ``axis_size`` is less than 1.

    Example:
        >>> import numpy as np, replicax
        >>> replicax.replicate({"w": np.ones(3)}, 4)["w"].shape
        (4, 3)
    """
    check_arrays("replicate", tree)
    if axis_size is None:
        axis_size = len(jax.devices() if devices is None else check_devices(devices))
    if as_int("axis_size", axis_size) < 1:
        raise MappedSizeError(f"replicate into {axis_size} copies: axis_size is the number of replicas, at least 1.")
    return pmap(_identity, in_axes=None, axis_size=axis_size, devices=devices)(tree)


def _identity(tree: Tree) -> Tree:
    return tree


def shard(tree: Tree, axis_size: int | None = None, *, devices: Sequence[jax.Device] | None = None) -> Tree:
    """Splits the leading axis of every array into one part for each replica.

    What a batch needs before :func:`pmap`: each device is sent its own part alone.

    Args:
        tree: A pytree of arrays of shapes ``(batch, ...)``, of batch sizes that ``axis_size`` divides.
        axis_size: The number of replicas; that of the devices when None.
        devices: The devices; all of them when None.

    Returns:
        The same tree, its arrays of shape ``(replicas, batch // replicas, ...)``, spread over the devices.

    Raises:
        MappedSizeError: naming every array whose leading axis does not divide, or that has none; or ``axis_size`` is
            less than 1.

    Example:
        >>> import numpy as np, replicax
        >>> replicax.shard(np.zeros((12, 5)), 4).shape
        (4, 3, 5)
    """
    check_arrays("shard", tree)
    devices = tuple(jax.devices()) if devices is None else check_devices(devices)
    size = len(devices) if axis_size is None else as_int("axis_size", axis_size)
    if size < 1:
        raise MappedSizeError(f"shard into {size} parts: axis_size is the number of replicas, at least 1.")
    paths = jax.tree_util.tree_leaves_with_path(tree)
    faults = [
        f"tree{keystr(path)} of shape {np.shape(x)}" for path, x in paths if np.ndim(x) < 1 or np.shape(x)[0] % size
    ]
    if faults:
        raise MappedSizeError(
            report(
                f"shard cannot split these arrays into {size} equal parts along their leading axis:",
                faults,
                "Drop or repeat some rows, or choose an axis_size that divides the batch.",
            )
        )
    where = layout("replicas", size, devices).result_sharding(0)

    def place(x: ArrayLike) -> jax.Array:
        # Of a NumPy array a copy, since JAX may alias its memory.
        own = x if isinstance(x, jax.Array) else np.array(x)
        return jax.device_put(own.reshape(size, own.shape[0] // size, *own.shape[1:]), where)

    with _jax.own_mesh():
        return jax.tree.map(place, tree)


def unreplicate(tree: Tree) -> Tree:
    """The first replica's arrays, read on the device where they lie.

    Args:
        tree: A pytree of arrays of shapes ``(replicas, ...)``.

    Returns:
        The same tree, its arrays of shapes ``(...)``; a ``jax.Array`` stays on the first replica's device.

    Raises:
        AxisSpecError: naming every leaf that has no leading axis, or none of its replicas in this process.
        DeletedArrayError: naming every array without a buffer.

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


def local_replicas(tree: Tree) -> list[Tree]:
    """Each replica's arrays, of the replicas that lie on this process' devices, without a gather.

    Args:
        tree: A pytree of arrays of shapes ``(replicas, ...)``.

    Returns:
        One tree for each replica, in order, of NumPy arrays of shapes ``(...)`` (NumPy scalars for ``()``), read
        device by device, on a CPU without a copy. PRNG keys, which NumPy has no type for, stay ``jax.Array``.

    Raises:
        AxisSpecError: naming every leaf that has no leading axis.
        DeletedArrayError: naming every array without a buffer.
        MappedSizeError: the leaves differ in their number of replicas.

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
                "local_replicas takes arrays with the same number of replicas along axis 0:",
                [f"tree{keystr(path)} of shape {np.shape(x)}" for path, x in paths],
                "Read them one by one.",
            )
        )
    return [jax.tree.unflatten(treedef, replica) for replica in zip(*rows, strict=True)]


def fetch(tree: Tree) -> Tree:
    """The arrays on the host, each part of them read once where it lies.

    What ``np.asarray`` does to each array, and ``jax.device_get`` to all; for many small ones in about half the time.

    Args:
        tree: A pytree of arrays of any shapes ``(...)``, such as what :func:`pmap` returns.

    Returns:
        The same tree, of NumPy arrays of the same shapes and dtypes, to be read and not written: on a CPU one that lies
        whole on a device is not copied. PRNG keys, which NumPy has no type for, stay ``jax.Array``.

    Raises:
        NotAnArrayError: naming every leaf that is no array.
        DeletedArrayError: naming every array without a buffer.

    Example:
        >>> import numpy as np, replicax
        >>> replicax.fetch(replicax.pmap(lambda x: 2 * x)(np.arange(3.0)))
        array([0., 2., 4.], dtype=float32)
    """
    leaves, treedef = jax.tree.flatten(tree)
    check_arrays("fetch", tree, leaves)
    _check_deleted("fetch", tree, leaves)
    return jax.tree.unflatten(treedef, list(map(_whole, leaves, _parts_of_all(leaves))))


def _whole(x: ArrayLike, parts: Parts | None) -> ArrayLike:
    if parts is None or not parts.plain:
        return np.asarray(x)
    if parts.keys:
        return x
    blocks = [np.asarray(x.addressable_data(k)) for k in parts.numbers]
    return np.concatenate(blocks, parts.dims[0]) if parts.dims else blocks[0]


# ---------------------------------------------------------------------------------------------------------------
# Parts


@dataclass(frozen=True)
class Parts:
    """Which of an array's shards make up what this process has of it, each part once however many devices hold it.

    Attributes:
        dims: The dimensions that it is split along.
        numbers: The numbers of the shards, in order.
        device: The device of the first.
        keys: Whether the array is one of PRNG keys, which NumPy has no type for.
        plain: Whether the parts are all of the array, split along one dimension at most.
    """

    dims: tuple[int, ...]
    numbers: tuple[int, ...]
    device: jax.Device
    keys: bool
    plain: bool

    @property
    def have_rows(self) -> bool:
        """Whether each part has all of its replicas' rows."""
        return self.dims in ((), (0,))


#: The parts of arrays by sharding and shape, which are few; reading shards one by one to find out costs more than them.
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
    """The parts of each array, None for what is on the host; copies that take time are started."""
    found = [_parts(x) if _is_array(x) else None for x in leaves]
    for x, parts in zip(leaves, found, strict=True):
        if parts is not None and parts.device.platform != "cpu" and not parts.keys:
            x.copy_to_host_async()
    return found


def _rows(x: ArrayLike, parts: Parts | None) -> list[ArrayLike]:
    """The rows of an array along axis 0 that this process has."""
    if parts is None or not parts.have_rows:
        return list(np.asarray(x))
    blocks = (x.addressable_data(k) for k in parts.numbers)
    if parts.keys:
        return [block[i] for block in blocks for i in range(block.shape[0])]
    return [row for block in blocks for row in np.asarray(block)]


def _is_array(x: object) -> bool:
    """Whether it is a ``jax.Array``, which Python finds out slowly of all but the usual class."""
    return type(x) is cpp.ArrayImpl or isinstance(x, jax.Array)


@_jax.api_boundary
def check_arrays(caller: str, tree: PyTree, leaves: Sequence[object] | None = None) -> None:
    """Refuses a tree (of these leaves, where they are known) that holds something without a value as an array.

    Raises:
        NotAnArrayError: naming every such leaf.
    """
    if all(map(_has_value, jax.tree.leaves(tree) if leaves is None else leaves)):
        return
    faults = {f"tree{keystr(path)}": x for path, x in jax.tree_util.tree_leaves_with_path(tree) if not _has_value(x)}
    if faults:
        raise no_arrays(
            f"{caller} takes arrays that have values, and these have none:",
            faults,
            "Take out of the tree what is no array of numbers; under jit, map with pmap instead.",
        )


def _has_value(x: object) -> bool:
    if type(x) is cpp.ArrayImpl:
        return True
    return (isinstance(x, jax.Array | bool) or _jax.is_array_type(x)) and not isinstance(x, jax.core.Tracer)


def _check_deleted(caller: str, tree: PyTree, leaves: Sequence[ArrayLike]) -> None:
    """Refuses arrays without a buffer.

    Raises:
        DeletedArrayError: naming each.
    """
    if any(_is_deleted(x) for x in leaves):
        raise DeletedArrayError(
            report(
                f"{caller} cannot read these arrays:",
                [
                    f"tree{keystr(path)} has no buffer any more: it was donated, or deleted"
                    for path, x in jax.tree_util.tree_leaves_with_path(tree)
                    if _is_deleted(x)
                ],
                "Read the result of the call that an array was donated to.",
            )
        )


def _is_deleted(x: ArrayLike) -> bool:
    return _is_array(x) and x.is_deleted()


@_jax.api_boundary
def _check_leading_axis(caller: str, tree: PyTree, leaves: Sequence[ArrayLike]) -> None:
    check_arrays(caller, tree, leaves)
    _check_deleted(caller, tree, leaves)
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
                f"{caller} takes arrays whose leading axis is the replicas, and these have none:",
                faults,
                "Pass what pmap or replicate returned.",
            )
        )
