"""``ppermute`` and ``pbroadcast``."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replicax._engine.blocks import as_unbatched, block, fetch, gather, only_axis, size_of, without_folding
from replicax._engine.collectives.arguments import Names, as_names, direct, shown
from replicax._engine.collectives.registry import Result, collective, equal, moves_data, refuse
from replicax._engine.collectives.wire import fetched, reduced, size_in_bytes
from replicax._layout.exchange import NOTHING, Table
from replicax._layout.layout import LogicalAxes, LogicalAxis
from replicax._typing import Array, Params, ShapeAndDtype
from replicax.errors import CollectiveArgumentError


def result_of_permutation(params: Params, logical: LogicalAxes) -> Result:
    """Returns whether the result of a permutation is equal in all replicas.

    A replica that receives nothing gets zeros. If every replica receives a value, equal operands give equal results.
    """
    axis = only_axis(logical, as_names(params["axis_name"]))
    return Result.AS_GIVEN if axis is not None and len(params["perm"]) == axis.size else Result.PER_REPLICA


def _permuted_rows(size: int, x: jax.Array, *, perm: Sequence[tuple[int, int]], **_: object) -> jax.Array:
    del size
    rows = [jnp.zeros_like(x[0])] * len(x)
    for source, destination in perm:
        rows[destination] = x[source]
    return jnp.stack(rows)


def _wire_of_permutation(axis: LogicalAxis, x: ShapeAndDtype, *, perm: Sequence[tuple[int, int]], **_: object) -> int:
    return size_in_bytes(x) * fetched(axis, permutation(perm, axis.size)[:, None])


@collective(
    "ppermute",
    "ppermute_start",
    names=("ppermute", "pshuffle"),
    awaited_by=("ppermute_done",),
    result=result_of_permutation,
    definition=_permuted_rows,
    wire=_wire_of_permutation,
)
@moves_data
def ppermute(logical: LogicalAxes, x: Array, *, axis_name: Names | Hashable, perm: Sequence[tuple[int, int]]) -> Array:
    """Returns the operand of the source replica, or zeros. Devices send only what another device needs."""
    names = as_names(axis_name)
    sources = permutation(perm, size_of(logical, names))
    if (name := direct(only_axis(logical, names))) is not None:
        moved = [(int(source), r) for r, source in enumerate(sources) if source != NOTHING]
        if any(source != r for source, r in moved):
            return lax.ppermute(x, name, moved)
    return fetch(logical, names, x[None], sources[:, None])[0]


def permutation(perm: Sequence[tuple[int, int]], size: int) -> Table:
    """Returns the source of each replica, as ``(replicas,)``, or :data:`NOTHING` for a replica that receives nothing.

    As in JAX, a negative index counts from the end.

    Raises:
        CollectiveArgumentError: An index is out of range, or two pairs have the same source or destination.
    """
    try:
        flat = np.fromiter(map(operator.index, chain.from_iterable(perm)), np.int64)
        pairs = flat.reshape(-1, 2)
        whole = set(map(len, perm)) <= {2}
    except (OverflowError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CollectiveArgumentError(
            f"ppermute: perm={perm!r:.200} must be a list of pairs (source, destination) of replica indices."
        )
    sends, receives = (pairs % size).T
    out_of_range = list(pairs[((pairs < -size) | (pairs >= size)).any(1)])
    if out_of_range or len(np.unique(sends)) < len(pairs) or len(np.unique(receives)) < len(pairs):
        raise CollectiveArgumentError(
            f"ppermute: perm={shown(perm)} must hold pairs (source, destination) of replica indices from 0 to "
            f"{size - 1}, with no source and no destination twice. "
            + (
                f"Out of range: {shown(out_of_range)}. (JAX has no ppermute over several axes if a vmap inside the "
                f"mapped function binds one of them: communicate over one axis after the other.)"
                if out_of_range
                else "To send to several replicas, use all_gather."
            )
        )
    sources = np.full(size, NOTHING)
    sources[receives] = sends
    return sources


def _row_of_source(size: int, x: jax.Array, *, source: int, **_: object) -> jax.Array:
    return jnp.stack([x[source]] * size)


def _wire_of_broadcast(axis: LogicalAxis, x: ShapeAndDtype, **_: object) -> int:
    return reduced(axis, size_in_bytes(x))


@collective("pbroadcast", result=equal, definition=_row_of_source, wire=_wire_of_broadcast)
@moves_data
def pbroadcast(logical: LogicalAxes, x: Array, *, axis_name: Names | Hashable, source: int) -> Array:
    """Returns the operand of replica ``source`` in all replicas.

    As in JAX's definition, this is a sum in which all other replicas contribute zero.

    Raises:
        CollectiveArgumentError: ``source`` is not the index of a replica.
    """
    names = as_names(axis_name)
    size = size_of(logical, names)
    if not 0 <= source < size:
        raise CollectiveArgumentError(f"pbroadcast: source={source} must be a replica index from 0 to {size - 1}.")
    axis = only_axis(logical, names)
    if axis is None:
        return gather(logical, names, x)[source]
    if axis.ordered:  # the sum turns -0.0 into 0.0, if there are several devices
        return as_unbatched(axis, fetch(logical, names, x[None], np.full((size, 1), source))[0])
    device, lane = divmod(int(axis.placement.slot_of[source]), axis.lanes)
    x = block(axis, x)[lane]
    if axis.device_axis is None:
        return x
    here = lax.axis_index(axis.device_axis) == device
    sent = lax.select(jnp.broadcast_to(here, x.shape), x, jnp.zeros_like(x))
    return without_folding(lax.psum(without_folding(sent), axis.device_axis)).astype(x.dtype)


refuse(
    "psend",
    because="JAX supports one-sided sends only on GPUs, without a vmap rule. Send and receive with ppermute.",
)
refuse(
    "precv",
    because="JAX supports one-sided receives only on GPUs, without a vmap rule. Send and receive with ppermute.",
)
