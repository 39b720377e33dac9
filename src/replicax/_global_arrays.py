"""Conversions between the rows of one process and global arrays, which have the rows of all processes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.blocks import on_data, real_rows
from replicax._engine.levels import pad_rows
from replicax._engine.replica import no_arrays
from replicax._layout.layout import layout
from replicax._layout.processes import Share, by_process, layout_over_processes, replicas_of_processes
from replicax._messages import as_int, report
from replicax._runtime.global_arrays import boundary, on_all, own_copy
from replicax._runtime.options import check_devices
from replicax._runtime.processes import agree_on_arrays, tell_others
from replicax._runtime.transfer import put
from replicax._typing import Array, ArrayLike, OneArray, PyTree
from replicax.errors import MappedSizeError, ProcessesError, UnsupportedTransformationError

Tree = TypeVar("Tree")


@overload
def to_global(tree: OneArray, axis: int | None = ..., *, devices: Sequence[jax.Device] | None = ...) -> Array: ...


@overload
def to_global(tree: Tree, axis: int | None = ..., *, devices: Sequence[jax.Device] | None = ...) -> Tree: ...


def to_global(tree: Tree, axis: int | None = 0, *, devices: Sequence[jax.Device] | None = None) -> Tree:
    """Makes global arrays from the rows of all processes.

    Under ``jax.jit``, arrays are global. A map of global arrays is over all of their rows, and its results are global.
    All processes must call ``to_global`` together. It may be differentiated.

    Args:
        tree: A pytree of arrays of any dtype, ``(own rows, ...)`` for ``axis=0``. The number of rows may differ between
            processes. Arrays that are global already are returned unchanged.
        axis: The axis of the rows. None for arrays that are equal in all processes, such as parameters.
        devices: The devices of all processes to use; all devices when None.

    Returns:
        The same pytree of ``jax.Array``, ``(rows of all processes, ...)`` for ``axis=0``: first the rows of process 0,
        then those of process 1. N rows on D devices are sharded over the devices. JAX has no uneven sharding: if D does
        not divide N, there are gcd(N, D) equal shards, each on D / gcd(N, D) devices. With one process, the
        result has the same values, sharded over its devices.

    Raises:
        NotAnArrayError: lists every leaf that is not an array.
        OptionTypeError: ``axis`` is not an int or None, or ``devices`` is not a list.
        DevicesError: ``devices`` is empty, contains a non-device or a duplicate, or mixes platforms.
        MappedSizeError: an array has no such axis, or no process has a row.
        ProcessesError: the processes pass arrays of different types, or different arrays with ``axis=None``, or a
            process does not call ``to_global``.
        UnsupportedTransformationError: the call is inside ``jax.jit``, over several processes.

    Example:
        >>> import numpy as np, replicax
        >>> replicax.to_global(np.arange(3.0))
        Array([0., 1., 2.], dtype=float32)
    """
    where = tuple(jax.devices()) if devices is None else check_devices(devices)
    try:
        leaves, at = _checked("to_global", tree, axis)
    except Exception as error:
        tell_others(by_process(where), "calls to_global", error)
        raise
    _refuse_traced("to_global", "Call it on the arguments of the jitted function.")
    if _jax.staging():  # in one process
        return tree
    local = {k: x for k, x in enumerate(leaves) if not _jax.over_processes(x)}
    whole = NamedSharding(Mesh(np.asarray(where, dtype=object), "devices"), PartitionSpec())
    for (k, x), shares in zip(local.items(), agree_on_arrays(by_process(where), list(local.values()), at), strict=True):
        leaves[k] = on_all(jnp.asarray(x), whole) if at is None else _joined(x, at % np.ndim(x), tuple(shares))
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _joined(x: ArrayLike, axis: int, shares: tuple[Share, ...]) -> Array:
    between = _between(shares, axis)
    placement = between.layout.local.axis.placement
    if isinstance(x, jax.Array) or placement.size == 0:
        padded = pad_rows(jnp.asarray(x), axis, placement)
    else:
        padded = put(x, between.boundary.own, axis, placement)
    rows = on_data(functools.partial(primitives.to_all, boundary=between.boundary), padded)
    return rows if not between.layout.axis.padding else between.drop_padding(rows)


@overload
def to_local(tree: OneArray, axis: int | None = ...) -> Array: ...


@overload
def to_local(tree: Tree, axis: int | None = ...) -> Tree: ...


def to_local(tree: Tree, axis: int | None = 0) -> Tree:
    """Returns this process's rows of global arrays.

    These are the rows that :func:`replicax.distributed.replicas` assigns to this process: N rows, split over the
    processes in proportion to their devices. All processes must call ``to_local`` together. It may be differentiated.

    Args:
        tree: A pytree of global arrays of any dtype, ``(rows of all processes, ...)`` for ``axis=0``. Arrays of this
            process are returned unchanged.
        axis: The axis of the rows. None for arrays that are replicated on all devices: returns the copy of this
            process.

    Returns:
        The same pytree with ``jax.Array`` on the devices of this process, ``(own rows, ...)`` for ``axis=0``.

    Raises:
        NotAnArrayError: lists every leaf that is not an array.
        OptionTypeError: ``axis`` is not an int or None.
        MappedSizeError: an array has no such axis.
        ProcessesError: ``axis`` is None, and an array is split over the processes; or no device of an array belongs to
            this process.
        UnsupportedTransformationError: the call is inside ``jax.jit``, over several processes.

    Example:
        >>> import jax.numpy as jnp, replicax
        >>> replicax.to_local(jnp.arange(3.0))
        Array([0., 1., 2.], dtype=float32)
    """
    leaves, at = _checked("to_local", tree, axis)
    _refuse_traced("to_local", "Call it on the results of the jitted function.")
    own = [
        x if not _jax.over_processes(x) else own_copy(x) if at is None else _own_rows(x, at % x.ndim) for x in leaves
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), own)


def _own_rows(x: Array, axis: int) -> Array:
    value, _ = _jax.outermost_value(x)
    processes = by_process(tuple(sorted(value.sharding.device_set, key=_number)))
    if jax.process_index() not in [share.process for share in processes]:
        raise ProcessesError(
            f"to_local: an array of shape {x.shape} is only on devices of other processes, so this process has none "
            f"of its rows. Call to_local only in processes whose devices hold the array."
        )
    ranges = replicas_of_processes(x.shape[axis], [len(share.devices) for share in processes])
    shares = [Share(share.process, share.devices, len(rows)) for share, rows in zip(processes, ranges, strict=True)]
    between = _between(tuple(shares), axis)
    padded = between.add_padding(x) if between.layout.axis.padding else x
    own = on_data(functools.partial(primitives.to_own, boundary=between.boundary), padded)
    return on_data(functools.partial(real_rows, dim=axis, placement=between.layout.local.axis.placement), own)


def _number(device: jax.Device) -> int:
    return int(device.id)


class _Between:
    """Where the rows of each process are in a global array over all devices.

    Args:
        shares: The rows and devices of each process.
        axis: The axis of the rows.
    """

    def __init__(self, shares: Sequence[Share], axis: int) -> None:
        self.layout = layout_over_processes("rows", shares, jax.process_index(), use_all_devices=True)
        self.boundary, placement = boundary(self.layout, axis), self.layout.axis.placement
        devices = [device for share in shares for device in share.devices]
        result = layout("rows", placement.size, devices, use_all_devices=True).result_sharding(axis)
        whole = self.layout.sharding(None)

        # On whole arrays, because XLA splits N rows unevenly, and communicates more. Workaround: rows_split_unevenly.
        def drop(x: Array) -> Array:
            return on_data(lambda x: real_rows(primitives.pin(x, whole), axis, placement), x)

        def add(x: Array) -> Array:
            return on_data(lambda x: primitives.pad_rows(primitives.pin(x, whole), axis, placement), x)

        self.drop_padding = _jax.always_jit(drop, out_shardings=result)
        self.add_padding = _jax.always_jit(add, out_shardings=self.boundary.every)


@functools.lru_cache(maxsize=256)
def _between(shares: tuple[Share, ...], axis: int) -> _Between:
    return _Between(shares, axis)


def _refuse_traced(caller: str, remedy: str) -> None:
    if _jax.staging() and jax.process_count() > 1:
        raise UnsupportedTransformationError(
            f"{caller} cannot be called inside jit, scan and the like, where arrays are global. {remedy}"
        )


def _checked(caller: str, tree: PyTree, axis: int | None) -> tuple[list[ArrayLike], int | None]:
    """The leaves and the axis of a call, both valid."""
    at = None if axis is None else as_int("axis", axis)
    leaves = jax.tree.leaves(tree)
    named = [(f"tree{keystr(path)}", x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    faults = {name: x for name, x in named if not (isinstance(x, jax.Array | bool) or _jax.is_array_type(x))}
    if faults:
        raise no_arrays(f"{caller} needs arrays; these are not:", faults, "Remove them from the tree.")
    short = [
        f"{name} has the shape {np.shape(x)}"
        for name, x in named
        if at is not None and not -np.ndim(x) <= at < np.ndim(x)
    ]
    if short:
        raise MappedSizeError(
            report(f"{caller}: these arrays have no axis {at}:", short, "Pass arrays of rows, or axis=None.")
        )
    return leaves, at
