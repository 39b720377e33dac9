"""What the cases over several processes run in each process: calls of one way, timed together."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import replicax
from measure import HAND, OURS
from replicax._runtime import agreement

AXIS = "i"
BARE = "jit(shard_map) of global arrays"

#: The programs, by name: from one array of each replica to another.
PROGRAMS: dict[str, Callable[..., Any]] = {
    "double": lambda tree: jax.tree.map(lambda x: 2 * x, tree),
    "psum": lambda tree: lax.psum(tree, AXIS),
    "step": lambda tree: jax.tree.map(lambda x: x - 0.1 * lax.pmean(x, AXIS), tree),
}


def seconds(way: str, program: str, leaves: int, size: int, calls: int) -> tuple[float, float]:
    """The seconds of a call, and the sum of its last result.

    Args:
        way: The way.
        program: The name of the program.
        leaves: The number of arrays.
        size: The number of float32 numbers of one replica in each array.
        calls: The number of calls that are timed together.
    """
    function, args = _prepared(way, program, leaves, size)
    start = time.perf_counter()
    for _ in range(calls):
        result = function(args)
    jax.block_until_ready(result)
    each = (time.perf_counter() - start) / calls
    first = jax.tree.leaves(result)[0]
    return each, float(np.asarray(first.addressable_data(0)).sum())


@functools.cache
def _prepared(way: str, program: str, leaves: int, size: int) -> tuple[Callable[..., Any], list[Any]]:
    devices = jax.local_devices()
    where = NamedSharding(Mesh(np.array(devices), AXIS), PartitionSpec(AXIS))
    rows = np.random.default_rng(jax.process_index()).uniform(size=(len(devices), size)).astype(np.float32)
    local = [jax.device_put(rows, where) for _ in range(leaves)]
    if way == OURS:
        return replicax.pmap(PROGRAMS[program], AXIS), local
    mesh = Mesh(np.array(jax.devices()), AXIS)
    everywhere = NamedSharding(mesh, PartitionSpec(AXIS))

    def one_device(blocks: list[Any]) -> list[Any]:
        return [y[None] for y in PROGRAMS[program]([x[0] for x in blocks])]

    specs = PartitionSpec(AXIS)
    bare = jax.jit(jax.shard_map(one_device, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False))
    shape = (len(jax.devices()), size)
    to_global = functools.partial(_converted, shape=shape, where=everywhere)
    if way == BARE:
        return bare, [to_global(x) for x in local]
    to_local = functools.partial(_converted, shape=(len(devices), size), where=where)

    def by_hand(tree: list[Any]) -> list[Any]:
        return [to_local(y) for y in bare([to_global(x) for x in tree])]

    return by_hand, local


def _converted(x: jax.Array, shape: tuple[int, ...], where: NamedSharding) -> jax.Array:
    return jax.make_array_from_single_device_arrays(shape, where, [shard.data for shard in x.addressable_shards])


def agreement_seconds(calls: int) -> tuple[float, float]:
    """The seconds of the exchanges before the first run of a signature, and how many there are."""
    processes: Sequence[int] = range(jax.process_count())
    start = time.perf_counter()
    for _ in range(calls):
        for _ in range(2):
            agreement.exchange(processes, {"call": "f(x: float32[3])"}, "calls f")
    return (time.perf_counter() - start) / calls, 2.0


WAYS = (OURS, HAND, BARE)
