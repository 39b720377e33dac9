"""What the cases over several processes run in each process: calls of one way, timed together."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import replicax
from measure import HAND, OURS
from replicax._runtime import agreement

AXIS = "i"
BARE = "jit(shard_map) of global arrays"
GLOBAL = "replicax, of global arrays"

#: An axis of replicas, or the axes of lanes and devices.
Axis = str | tuple[str, str]


def _trained(tree: Sequence[jax.Array], axis: Axis) -> list[jax.Array]:
    """A step of a small MLP. The first array is the batch of a replica, the others are layers of 64 x 64 weights."""
    x, *weights = [array.reshape(64, 64) for array in tree]

    def loss(weights: Sequence[jax.Array]) -> jax.Array:
        return jnp.mean(functools.reduce(lambda h, w: jnp.tanh(h @ w), weights, x) ** 2)

    each = zip(weights, lax.pmean(jax.grad(loss)(weights), axis), strict=True)
    return [x.reshape(-1), *((w - 0.1 * gradient).reshape(-1) for w, gradient in each)]


#: The programs, by name: from arrays of each replica, and the name of the axis, to others.
PROGRAMS: dict[str, Callable[[list[jax.Array], Axis], list[jax.Array]]] = {
    "double": lambda tree, _: jax.tree.map(lambda x: 2 * x, tree),
    "psum": lambda tree, axis: lax.psum(tree, axis),
    "step": lambda tree, axis: jax.tree.map(lambda x: x - 0.1 * lax.pmean(x, axis), tree),
    "training": _trained,
}


def seconds(way: str, program: str, leaves: int, size: int, calls: int, lanes: int = 1) -> tuple[float, float]:
    """The seconds of a call, and the sum of its last result.

    Args:
        way: The way.
        program: The name of the program.
        leaves: The number of arrays.
        size: The number of float32 numbers of one replica in each array.
        calls: The number of calls that are timed together.
        lanes: The number of replicas on each device.
    """
    function, args = _prepared(way, program, leaves, size, lanes)
    start = time.perf_counter()
    for _ in range(calls):
        result = function(args)
    jax.block_until_ready(result)
    each = (time.perf_counter() - start) / calls
    first = jax.tree.leaves(result)[0]
    return each, float(np.asarray(first.addressable_data(0)).sum())


@functools.cache
def _prepared(way: str, program: str, leaves: int, size: int, lanes: int) -> tuple[Callable[..., Any], list[Any]]:
    devices, function = jax.local_devices(), PROGRAMS[program]
    ours = replicax.pmap(lambda tree: function(tree, AXIS), AXIS)
    where = NamedSharding(Mesh(np.array(devices), AXIS), PartitionSpec(AXIS))
    rows = np.random.default_rng(jax.process_index()).uniform(size=(lanes * len(devices), size)).astype(np.float32)
    local = [jax.device_put(rows, where) for _ in range(leaves)]
    if way == OURS:
        return ours, local
    mesh = Mesh(np.array(jax.devices()), AXIS)
    everywhere = NamedSharding(mesh, PartitionSpec(AXIS))

    def one_device(blocks: list[Any]) -> list[Any]:
        if lanes == 1:
            return [y[None] for y in function([x[0] for x in blocks], AXIS)]
        return jax.vmap(lambda tree: function(tree, ("lanes", AXIS)), axis_name="lanes")(blocks)

    specs = PartitionSpec(AXIS)
    bare = jax.jit(jax.shard_map(one_device, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False))
    shape = (lanes * len(jax.devices()), size)
    to_global = functools.partial(_converted, shape=shape, where=everywhere)
    if way in (BARE, GLOBAL):
        return bare if way == BARE else ours, [to_global(x) for x in local]
    to_local = functools.partial(_converted, shape=rows.shape, where=where)

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
OF_GLOBAL_ARRAYS = (GLOBAL, BARE)
