"""The rows that a process loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr

from replicax._arrays import check_arrays
from replicax._layout.processes import by_process, replicas_of_processes
from replicax._messages import as_int, report
from replicax._runtime.options import check_devices
from replicax._typing import PyTree
from replicax.errors import DevicesError, MappedSizeError


def replicas(axis_size: int, *, devices: Sequence[jax.Device] | None = None) -> range:
    """Returns the replicas that this process runs, out of ``axis_size`` replicas of all processes.

    The replicas are split in proportion to the devices of each process. A script that loads only these rows and passes
    them to :func:`replicax.pmap` runs unchanged with any number of processes.

    Args:
        axis_size: The number of replicas of all processes.
        devices: The devices of the map; all devices when None.

    Returns:
        The numbers of the replicas of this process. With one process, ``range(axis_size)``. It can be empty if there
        are fewer replicas than processes.

    Raises:
        OptionTypeError: ``axis_size`` is not an int, or ``devices`` is not a list.
        MappedSizeError: ``axis_size`` is less than 1.
        DevicesError: ``devices`` is empty, contains a non-device or a duplicate, mixes platforms, or has no device of
            this process.

    Example:
        >>> import replicax
        >>> replicax.distributed.replicas(12)
        range(0, 12)
    """
    size = as_int("axis_size", axis_size)
    if size < 1:
        raise MappedSizeError(f"replicas: axis_size is the number of replicas and must be at least 1, got {size}.")
    shares = by_process(tuple(jax.devices()) if devices is None else check_devices(devices))
    ranges = replicas_of_processes(size, [len(share.devices) for share in shares])
    for share, own in zip(shares, ranges, strict=True):
        if share.process == jax.process_index():
            return own
    raise DevicesError(f"replicas: none of the {len(shares)} devices belongs to process {jax.process_index()}.")


def pad_rows(tree: PyTree, rows: int) -> tuple[PyTree, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Fills a short batch with copies of its last row, and returns which rows are real.

    All calls of a map with one number of rows share a compiled program. So pad the last, short batch of an epoch, and
    weight its results with the mask.

    Args:
        tree: A pytree of arrays of shape ``(batch, ...)`` and any dtype, with one batch size of at most ``rows``.
        rows: The number of rows to fill up to.

    Returns:
        The same pytree with NumPy arrays of shape ``(rows, ...)``, and the mask, bool of shape ``(rows,)``, True for
        the rows of ``tree``. PRNG keys stay ``jax.Array``. Rows are zeros if the batch is empty.

    Raises:
        NotAnArrayError: lists every leaf that is not an array.
        OptionTypeError: ``rows`` is not an int.
        MappedSizeError: the arrays have no leading axis, different batch sizes, or more than ``rows`` rows.

    Example:
        >>> import numpy as np, replicax
        >>> replicax.distributed.pad_rows(np.array([5, 6]), 4)
        (array([5, 6, 6, 6]), array([ True,  True, False, False]))
    """
    check_arrays("pad_rows", tree)
    rows, leaves = as_int("rows", rows), jax.tree.leaves(tree)
    sizes = {np.shape(x)[0] if np.ndim(x) else rows + 1 for x in leaves}
    size = max(sizes, default=rows + 1)
    if len(sizes) != 1 or size > rows:
        paths = jax.tree_util.tree_leaves_with_path(tree)
        raise MappedSizeError(
            report(
                f"pad_rows needs arrays with the same number of rows along axis 0, at most {rows}:",
                [f"tree{keystr(path)} of shape {np.shape(x)}" for path, x in paths] or ["the tree has no arrays"],
                "Pass arrays of one batch, and a number of rows that is at least its size.",
            )
        )

    def padded(x: Any) -> Any:
        if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(x))
            return jax.random.wrap_key_data(jax.numpy.asarray(padded(data)), impl=jax.random.key_impl(x))
        host = np.asarray(x)
        more = host[-1:] if size else np.zeros((1, *host.shape[1:]), host.dtype)
        return np.concatenate([host, np.repeat(more, rows - size, 0)])

    return jax.tree.map(padded, tree), np.arange(rows) < size
