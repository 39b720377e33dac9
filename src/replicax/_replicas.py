"""Trees of arrays that lie one replica beside the other: made, split and read without a gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.tree_util import keystr

from replicax import _jax
from replicax._dispatch import check_devices
from replicax._errors import AxisSpecError, MappedSizeError, NotAnArrayError, as_int, report
from replicax._layout import layout
from replicax._lowering import describe_type
from replicax._pmap import pmap

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

    Example:
        >>> import numpy as np, replicax
        >>> replicax.replicate({"w": np.ones(3)}, 4)["w"].shape
        (4, 3)
    """
    check_arrays("replicate", tree)
    if axis_size is None:
        axis_size = len(jax.devices() if devices is None else check_devices(devices))
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

    def place(x: Any) -> jax.Array:
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

    Example:
        >>> import numpy as np, replicax
        >>> replicax.unreplicate(replicax.replicate(np.arange(3.0)))
        Array([0., 1., 2.], dtype=float32)
    """
    _check_leading_axis("unreplicate", tree)
    leaves, treedef = jax.tree.flatten(tree)
    blocks = [_blocks(x)[0] if isinstance(x, jax.Array) else x for x in leaves]
    with _jax.own_mesh():
        return jax.tree.unflatten(treedef, [_first(x) if isinstance(x, jax.Array) else x[0] for x in blocks])


_first = jax.jit(lambda block: block[0])


def local_replicas(tree: Tree) -> list[Tree]:
    """Each replica's arrays, of the replicas that lie on this process' devices, without a gather.

    Args:
        tree: A pytree of arrays of shapes ``(replicas, ...)``.

    Returns:
        One tree for each replica, in order, of NumPy arrays of shapes ``(...)`` (NumPy scalars for ``()``), read
        device by device, on a CPU without a copy. PRNG keys, which NumPy has no type for, stay ``jax.Array``.

    Raises:
        AxisSpecError: naming every leaf that has no leading axis.
        MappedSizeError: the leaves differ in their number of replicas.

    Example:
        >>> import numpy as np, replicax
        >>> [float(x) for x in replicax.local_replicas(replicax.pmap(lambda x: 2 * x)(np.arange(3.0)))]
        [0.0, 2.0, 4.0]
    """
    _check_leading_axis("local_replicas", tree)
    leaves, treedef = jax.tree.flatten(tree)
    rows = [[row for block in _blocks(x) for row in _rows(block)] for x in leaves]
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


def _blocks(x: Any) -> list[Any]:
    """This process' parts of an array along axis 0, in order, each part once however many devices hold it."""
    if not isinstance(x, jax.Array):
        return [x]
    parts: dict[int, jax.Array] = {}
    for part in x.addressable_shards:
        start, stop, _ = part.index[0].indices(x.shape[0])
        if (stop - start, *x.shape[1:]) != part.data.shape:  # split along another axis too: no device has a row
            return [np.asarray(x)]
        parts.setdefault(start, part.data)
    return [parts[start] for start in sorted(parts)]


def _rows(block: Any) -> Sequence[Any]:
    if isinstance(block, jax.Array) and jax.numpy.issubdtype(block.dtype, jax.dtypes.prng_key):
        return [block[i] for i in range(block.shape[0])]
    return list(np.asarray(block))


def check_arrays(caller: str, tree: Any) -> None:
    """Refuses a tree that holds something without a value as an array.

    Raises:
        NotAnArrayError: naming every such leaf.
    """
    faults = [
        f"tree{keystr(path)} {describe_type(x)}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if isinstance(x, jax.core.Tracer) or not (_jax.is_array_type(x) or isinstance(x, bool))
    ]
    if faults:
        raise NotAnArrayError(
            report(
                f"{caller} takes arrays that have values, and these have none:",
                faults,
                "Take out of the tree what is no array of numbers; under jit, map with pmap instead.",
            )
        )


def _check_leading_axis(caller: str, tree: Any) -> None:
    check_arrays(caller, tree)
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
