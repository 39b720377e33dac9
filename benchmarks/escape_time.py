"""An escape-time loop over 4,096 points on two devices: replicas that leave a loop at different times.

Every point goes round until it escapes. ``jit(vmap)`` with sharded input asks all devices in every round whether any
point is still in; a map asks nobody, since the loop communicates nothing. Run: ``make bench``.
"""

from __future__ import annotations

import platform
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from measure import interleaved, ratio

import replicax

LIMIT = 20_000  # long enough that the cost of the call itself is small beside the loop's
POINTS = 4096
DEVICES = 2
ROUNDS = 15


def escape_time(c: jax.Array) -> jax.Array:
    """How many rounds of z → z² + c a point takes to leave the disc of radius 2, at most LIMIT.

    Args:
        c: The point: its two coordinates, of shape (2,).

    Returns:
        The number of rounds, an int32 scalar.
    """

    def goes_on(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        rounds, x, y = state
        return (rounds < LIMIT) & (x * x + y * y <= 4)

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        rounds, x, y = state
        return rounds + 1, x * x - y * y + c[0], 2 * x * y + c[1]

    return lax.while_loop(goes_on, step, (jnp.int32(0), jnp.float32(0), jnp.float32(0)))[0]


def main() -> int:
    """Prints the ratios; the exit status says whether both limits are met."""
    replicax.simulate_devices(DEVICES)
    side = int(POINTS**0.5)
    x, y = np.meshgrid(np.linspace(-2, 1, side), np.linspace(-1.5, 1.5, side))
    points = np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)

    mesh = Mesh(np.array(jax.devices()), ("i",))
    rows = PartitionSpec("i")
    sharded = jax.device_put(points, NamedSharding(mesh, rows))
    by_hand = jax.jit(jax.shard_map(jax.vmap(escape_time), mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    vmapped = jax.jit(jax.vmap(escape_time))
    mapped = replicax.pmap(escape_time)
    expected = np.asarray(vmapped(points))
    for way in (mapped, by_hand, vmapped):
        np.testing.assert_array_equal(way(sharded), expected)

    ways = {"replicax": mapped, "shard_map(vmap)": by_hand, "jit(vmap), sharded": vmapped}
    seconds = interleaved({name: partial(way, sharded) for name, way in ways.items()}, ROUNDS)
    faster, against_hand = (
        ratio(seconds, "jit(vmap), sharded", "replicax"),
        ratio(seconds, "replicax", "shard_map(vmap)"),
    )
    met = faster.median >= 4, against_hand.low <= 1
    print(f"escape time of {POINTS} points on {DEVICES} simulated devices, {ROUNDS} rounds, interleaved")
    print(f"  jit(vmap) with sharded input / replicax: {faster}; limit: at least 4: {'met' if met[0] else 'NOT MET'}")
    print(
        f"  replicax / shard_map(vmap) by hand:      {against_hand}; limit: 1, to within the spread: "
        f"{'met' if met[1] else 'NOT MET'}"
    )
    for name, each in seconds.items():
        print(f"    {name}: {1000 * sorted(each)[len(each) // 2]:.2f} ms")
    print(f"  Python {platform.python_version()}, JAX {jax.__version__}, {platform.machine()}")
    return not all(met)


if __name__ == "__main__":
    sys.exit(main())
