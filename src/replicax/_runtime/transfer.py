"""Copies host arrays to devices. Each byte is copied once, before the call returns."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy import ndarray

from replicax import _jax
from replicax._jax import cpp
from replicax._jax.cpp import ArrayImpl
from replicax._layout.placement import Placement
from replicax._messages import nameless, too_large
from replicax._typing import ArrayLike, DType, HostArray, PyTree
from replicax.errors import UnconvertedArrayError

#: Arrays up to this many bytes are copied twice, which is not slower than one copy into aligned memory.
SMALL = 1 << 16

#: Arrays of at least this many bytes are copied by several threads.
LARGE = 1 << 20


def put(
    x: ArrayLike, sharding: jax.sharding.Sharding, axis: int | None = None, placement: Placement | None = None
) -> ArrayLike:
    """Copies an array or a scalar to devices. The caller may change the array as soon as ``put`` returns.

    On CPUs, JAX may alias the memory of a NumPy array and read it while the program runs. ``put`` therefore copies
    every byte, and only once, even if several CPU devices get the same block:
    https://github.com/jax-ml/jax/issues/37830. Workaround: shared_memory.

    Args:
        x: The array.
        sharding: The target sharding.
        axis: The axis to pad; None for no padding.
        placement: The replica of each slot. Its row is copied to the slot.
    """
    host = plain(x) if isinstance(x, ndarray) else _as_numpy(x)
    if axis is None or placement is None:
        shape, block = host.shape, host.__getitem__
    else:
        shape = (*host.shape[:axis], placement.slots, *host.shape[axis + 1 :])
        block = functools.partial(_block, host, axis, placement)
    if host.dtype == jax.dtypes.float0:  # the tangent dtype of integers, which has no device buffer
        return np.zeros(shape, host.dtype)
    where = _spread(sharding, shape, host.dtype, jax.config.jax_enable_x64)
    blocks = list(map(block, where.indices))
    ours = True
    if host.nbytes <= SMALL:
        blocks = [block.copy() for block in blocks]
    elif where.on_host:
        blocks = _copies(blocks, where.type.dtype)
    elif 1 < len(blocks) < len(where.devices) or 0 in host.strides:
        blocks = [np.array(block) for block in blocks]  # XLA cannot transfer a buffer that only some devices share
    else:
        ours = False
    return cpp.put_blocks(where.type, sharding, [blocks[k] for k in where.block_of], where.devices, in_place=ours)


def _as_numpy(x: ArrayLike) -> HostArray:
    try:
        return np.asarray(x, _jax.typeof(x).dtype)
    except OverflowError:
        raise nameless(too_large("An argument", x)) from None


def copy_small(tree: PyTree) -> PyTree:
    """Copies the small NumPy arrays of a pytree."""
    kind = type(tree)
    if kind is ndarray and tree.nbytes <= SMALL and tree.dtype.isnative:
        return tree.copy()
    if kind is ArrayImpl:
        return tree
    if kind is list:
        return [copy_small(x) for x in tree]
    if isinstance(tree, ndarray):
        if isinstance(tree, np.ma.MaskedArray):
            return _jax.Masked(tree)
        host = plain(tree)
        return host.copy() if kind is not ndarray and host.nbytes <= SMALL else host
    return tree if jax.tree_util.all_leaves((tree,)) else jax.tree.map(copy_small, tree)


def plain(x: HostArray) -> HostArray:
    """Converts an array of a NumPy subclass (such as a memory map) to a plain ``np.ndarray`` in native byte order.

    Raises:
        UnconvertedArrayError: ``x`` is a masked array.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise nameless(
            UnconvertedArrayError(
                f"pmap arguments must be arrays, but an argument of shape {x.shape} is a NumPy masked array, and JAX "
                f"would ignore the mask. Write x.filled(0)."
            )
        )
    return np.asarray(native(x))


def native(x: PyTree) -> PyTree:
    """Converts a NumPy array to native byte order, which JAX's C++ code assumes. Returns other objects unchanged."""
    if isinstance(x, np.ndarray) and not x.dtype.isnative and x.dtype.kind in "iufc":
        return x.astype(x.dtype.newbyteorder("="))
    return x


def is_small(x: object) -> bool:
    """Whether :func:`copy_small` copies ``x``."""
    return type(x) is np.ndarray and 0 < x.nbytes <= SMALL


class _Spread(NamedTuple):
    """How an array is split over devices.

    Attributes:
        type: The type of the array.
        devices: The addressable devices.
        indices: The index of each distinct block.
        block_of: For each device, its position in ``indices``.
        on_host: Whether all devices are CPUs.
    """

    type: Any
    devices: Sequence[jax.Device]
    indices: Sequence[tuple[slice, ...]]
    block_of: Sequence[int]
    on_host: bool


@functools.lru_cache(maxsize=4096)
def _spread(sharding: jax.sharding.Sharding, shape: tuple[int, ...], dtype: DType, x64: bool) -> _Spread:
    each = sharding.addressable_devices_indices_map(shape)
    ends = [tuple((along.start, along.stop) for along in index) for index in each.values()]
    different = list(dict.fromkeys(ends))
    indices = [tuple(itertools.starmap(slice, index)) for index in different]
    on_host = all(device.platform == "cpu" for device in each)
    return _Spread(_jax.array_type(shape, dtype, x64), list(each), indices, [*map(different.index, ends)], on_host)


def _block(host: HostArray, axis: int, placement: Placement, index: tuple[slice, ...]) -> HostArray:
    """The rows of one device's slots along an axis; a view if the rows are contiguous."""
    start, stop, _ = index[axis].indices(placement.slots)
    rows = placement.replica_at[start:stop]
    if rows[-1] - rows[0] + 1 < len(rows):
        return host.take(rows, axis)
    return host[(*[slice(None)] * axis, slice(rows[0], rows[-1] + 1))]


def _copies(blocks: Sequence[HostArray], dtype: DType) -> list[HostArray]:
    """Copies blocks into memory that is aligned for XLA, so that a CPU device can use it without another copy."""
    copies = []
    for block in blocks:
        raw = np.empty(block.size * dtype.itemsize + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        copies.append(raw[start : start + block.size * dtype.itemsize].view(dtype).reshape(block.shape))
    if sum(block.nbytes for block in blocks) < LARGE:
        for copy, block in zip(copies, blocks, strict=True):
            np.copyto(copy, block, "unsafe")
        return copies
    each = -(-(os.cpu_count() or 1) // len(blocks))
    parts = [part for pair in zip(copies, blocks, strict=True) for part in _cut(*pair, each)]
    list(_threads().map(lambda part: np.copyto(part[0], part[1], "unsafe"), parts))  # list() waits for all parts
    return copies


def _cut(copy: HostArray, block: HostArray, times: int) -> list[tuple[HostArray, HostArray]]:
    """Splits both arrays into ``times`` parts along the longest axis."""
    axis = int(np.argmax(block.shape))
    return list(zip(np.array_split(copy, times, axis), np.array_split(block, times, axis), strict=True))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "replicax-copy")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked process does not inherit threads

_ALIGNMENT = 64
