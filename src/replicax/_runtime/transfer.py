"""From host memory to devices: each byte copied once, and never read again after the call."""

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

#: Up to so many bytes, copying an array twice takes no longer than copying it to where a device can use it.
SMALL = 1 << 16

#: From so many bytes on, several threads copy an array.
LARGE = 1 << 20


def put(
    x: ArrayLike, sharding: jax.sharding.Sharding, axis: int | None = None, placement: Placement | None = None
) -> ArrayLike:
    """An array or a scalar on its devices, as it is now: its owner may change it as soon as this returns.

    JAX reads a NumPy array in its owner's memory where it can, on CPUs, and does so while a program runs. Here every
    byte is copied once, also where several devices are one CPU and get the same:
    https://github.com/jax-ml/jax/issues/37830. Workaround: shared_memory.

    Args:
        x: The array.
        sharding: Where it has to lie.
        axis: The axis that has to be padded.
        placement: Which row of it each slot gets.
    """
    host = plain(x) if isinstance(x, ndarray) else _as_numpy(x)
    if axis is None or placement is None:
        shape, block = host.shape, host.__getitem__
    else:
        shape = (*host.shape[:axis], placement.slots, *host.shape[axis + 1 :])
        block = functools.partial(_block, host, axis, placement)
    if host.dtype == jax.dtypes.float0:  # the type of the derivatives of integers, which holds nothing
        return np.zeros(shape, host.dtype)
    where = _spread(sharding, shape, host.dtype, jax.config.jax_enable_x64)
    blocks = list(map(block, where.indices))
    ours = True
    if host.nbytes <= SMALL:
        blocks = [block.copy() for block in blocks]
    elif where.on_host:
        blocks = _copies(blocks, where.type.dtype)
    elif 1 < len(blocks) < len(where.devices) or 0 in host.strides:
        blocks = [np.array(block) for block in blocks]  # XLA cannot copy memory that only some devices share
    else:
        ours = False
    return cpp.put_blocks(where.type, sharding, [blocks[k] for k in where.block_of], where.devices, in_place=ours)


def _as_numpy(x: ArrayLike) -> HostArray:
    try:
        return np.asarray(x, _jax.typeof(x).dtype)
    except OverflowError:
        raise nameless(too_large("An argument", x)) from None


def copy_small(tree: PyTree) -> PyTree:
    """A tree with copies of the small NumPy arrays in it."""
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
    """A NumPy array, or one of a subclass (a memory map, a matrix), of NumPy's own class and native.

    Raises:
        UnconvertedArrayError: it is masked.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise nameless(
            UnconvertedArrayError(
                f"pmap maps arrays, and an argument of shape {x.shape} is a masked array of NumPy's, of which JAX "
                f"would lose the mask. Write x.filled(0)."
            )
        )
    return np.asarray(native(x))


def native(x: PyTree) -> PyTree:
    """A NumPy array in this machine's order of bytes, of which C++ takes all to be; anything else as it is."""
    if isinstance(x, np.ndarray) and not x.dtype.isnative and x.dtype.kind in "iufc":
        return x.astype(x.dtype.newbyteorder("="))
    return x


def is_small(x: object) -> bool:
    """Whether :func:`copy_small` copies it."""
    return type(x) is np.ndarray and 0 < x.nbytes <= SMALL


class _Spread(NamedTuple):
    """How an array lies over devices: its type, the devices, the different blocks, which each has, and on what."""

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
    """The rows of one device's slots along an axis, as they lie where they follow each other."""
    start, stop, _ = index[axis].indices(placement.slots)
    rows = placement.replica_at[start:stop]
    if rows[-1] - rows[0] + 1 < len(rows):
        return host.take(rows, axis)
    return host[(*[slice(None)] * axis, slice(rows[0], rows[-1] + 1))]


def _copies(blocks: Sequence[HostArray], dtype: DType) -> list[HostArray]:
    """The blocks in memory of ours, so aligned that it can serve as that of a CPU device."""
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
    list(_threads().map(lambda part: np.copyto(part[0], part[1], "unsafe"), parts))  # done when all are
    return copies


def _cut(copy: HostArray, block: HostArray, times: int) -> list[tuple[HostArray, HostArray]]:
    """The two in so many parts, along the axis that is the longest."""
    axis = int(np.argmax(block.shape))
    return list(zip(np.array_split(copy, times, axis), np.array_split(block, times, axis), strict=True))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "replicax-copy")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked process has none of these threads

_ALIGNMENT = 64
