"""Collectives of 2-bit and 4-bit integers, each dtype in its own process, because XLA may crash on them.

``python narrow.py DTYPE REPLICAS DEVICES`` prints which results differ from the reference, which uses int32.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import replicax
from replicax import pmap
from replicax.testing import lockstep

AXIS = "i"


def size():
    return lax.axis_size(AXIS)


def halves():
    return [list(range(size() // 2)), list(range(size() // 2, size()))]


def shift():
    return [(k, (k + 1) % size()) for k in range(size())]


def for_each(x):
    """(replicas, 4): rotations of ``x``."""
    return jnp.stack([jnp.roll(x, k) for k in range(size())])


def ragged(x):
    n, ones = size(), jnp.ones(size(), jnp.int32)
    rows, output, at = for_each(x).reshape(-1)[:n], jnp.zeros(n, x.dtype), jnp.arange(n, dtype=jnp.int32)
    return lax.ragged_all_to_all(rows, output, at, ones, ones * lax.axis_index(AXIS), ones, axis_name=AXIS)


#: Each collective by name, as a function of an array of shape (4,).
COLLECTIVES = {
    "psum": lambda x: lax.psum(x, AXIS),
    "psum, groups": lambda x: lax.psum(x, AXIS, axis_index_groups=halves()),
    "psum of products": lambda x: lax.psum(jnp.dot(x[:, None], x[None]), AXIS),
    "pmax": lambda x: lax.pmax(x, AXIS),
    "pmin, groups": lambda x: lax.pmin(x, AXIS, axis_index_groups=halves()),
    "ppermute": lambda x: lax.ppermute(x, AXIS, shift()),
    "ppermute, partial": lambda x: lax.ppermute(x, AXIS, shift()[:2]),
    "pshuffle": lambda x: lax.pshuffle(x, AXIS, list(range(size()))[::-1]),
    "pbroadcast": lambda x: lax.pbroadcast(x, AXIS, 1),
    "all_gather": lambda x: lax.all_gather(x, AXIS),
    "all_gather, tiled": lambda x: lax.all_gather(x, AXIS, tiled=True),
    "all_gather, groups": lambda x: lax.all_gather(x, AXIS, axis_index_groups=halves()),
    "psum_scatter": lambda x: lax.psum_scatter(for_each(x), AXIS),
    "psum_scatter, groups": lambda x: lax.psum_scatter(for_each(x)[: size() // 2], AXIS, axis_index_groups=halves()),
    "all_to_all": lambda x: lax.all_to_all(for_each(x), AXIS, 0, 0),
    "all_to_all, tiled": lambda x: lax.all_to_all(for_each(x).reshape(-1), AXIS, 0, 0, tiled=True),
    "all_to_all, tiled, groups": lambda x: lax.all_to_all(
        for_each(x)[: size() // 2], AXIS, 0, 1, tiled=True, axis_index_groups=halves()
    ),
    "ragged_all_to_all": ragged,
    "one after the other": lambda x: lax.all_gather(lax.ppermute(lax.all_gather(x, AXIS), AXIS, shift()), AXIS),
    "scan": lambda x: lax.scan(lambda c, _: (lax.ppermute(c, AXIS, shift()), lax.pmax(c, AXIS)), x, None, 3),
    "jit": lambda x: jax.jit(lambda x: lax.all_gather(x, AXIS))(x),
}


def rows(dtype, n):
    return (np.arange(4 * n).reshape(n, 4) % 3 - (dtype == "int2")).astype(dtype)


def results(x):
    return {name: collective(x) for name, collective in COLLECTIVES.items()}


def compare(ours, right, dtype):
    """Prints the names of results that differ. The int32 reference is truncated to ``dtype``."""
    for name, expected in right.items():
        pairs = zip(jax.tree.leaves(ours[name]), jax.tree.leaves(expected), strict=True)
        if not all(
            np.array_equal(np.asarray(a).astype("int32"), np.asarray(b).astype(dtype).astype("int32")) for a, b in pairs
        ):
            print(name)


def main(dtype, n, d):
    """Compares all collectives. If the replicas are padded, the narrow dtype is used only inside the map."""
    devices, x = jax.devices()[:d], rows(dtype, n)
    right = lockstep(results, axis_name=AXIS)(x.astype("int32"))
    inside = pmap(lambda x: jax.tree.map(lambda y: y.astype("int8"), results(x.astype(dtype))), AXIS, devices=devices)
    compare(inside(x.astype("int8")), right, dtype)
    if n % d == 0:
        mapped, twice = pmap(results, AXIS, devices=devices), np.stack([x, x], 1)
        for _ in range(3):
            compare(mapped(x), right, dtype)
        compare(jax.vmap(mapped, 1, 1)(twice), jax.tree.map(lambda y: np.stack([y, y], 1), right), dtype)
    ours = nested(lambda fun, name: pmap(fun, name, **{"devices": devices} if name == AXIS else {}), x[:6])
    theirs = nested(lambda fun, name: jax.vmap(fun, axis_name=name), jnp.asarray(x[:6].astype("int32")))
    compare(ours, theirs, dtype)
    print("done")


def nested(mapped, x):
    """A map of size 3, which does not divide the devices, inside a map of size 2."""
    inner = lambda x: {"inside": lax.all_gather(x, "j"), "both": lax.pmax(x, (AXIS, "j")), "none": x}
    outer = lambda x: mapped(inner, "j")(x) | {"joined": mapped(lambda x: x, "j")(x)[::-1]}
    return mapped(outer, AXIS)(x.reshape(2, 3, 4))


if __name__ == "__main__":
    replicax.simulate_devices(8)
    main(sys.argv[1], *map(int, sys.argv[2:]))
