"""Transfers of arguments: NumPy arrays, and arrays on other devices."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

import replicax
from measure import HAND, OURS, Absent, Case, Measured, Way, over
from ways import ROWS, WHOLE, by_hand, mesh, place

SMALL = "100 small NumPy leaves: at least 5 times faster than the best public call"
LARGE = "large arrays: never slower than the best public call"
MOVED = "arrays that lie elsewhere: never slower than the best public call"
COPIES = "a large NumPy array: no second host copy"
DONATED = "donated and already right buffers are not touched"

PUT = "device_put + by hand"
PMAP = "jax.pmap"
SPLIT, WHOLLY, ALIGNED = "split", "broadcast", "so aligned that the others copy nothing"
LOOSE, REVERSED = "of jax.numpy, on the first device", "on the devices in reverse order"
MEGABYTE = 2**20


def cases(_quick: bool) -> list[Case]:
    """Cases: small and large arrays, NumPy or on the first device or on the devices in reverse order."""
    best = f"{OURS} / the fastest of the others"
    fastest = (over(OURS, HAND, PUT, PMAP, most=1.0, words=best),)
    # Several calls are timed together: the first call after other work takes 1.5 times as long.
    small = (over(OURS, HAND, PUT, PMAP, most=0.2, words=best),)
    found = [
        Case(f"100 small NumPy leaves, {what}", SMALL, count, partial(_small, fun), small, calls=5)
        for what, fun in (("one result", _total), ("100 results", _double))
        for count in (2, 8)
    ]
    found += [
        Case(
            f"a NumPy array of {size} MB, {how}",
            LARGE,
            count,
            partial(_large, size, how),
            fastest,
            seconds=(12.0 if size > 64 else 5.0, 1.0),
        )
        for size, how, count in (
            *((64, SPLIT, 2), (64, SPLIT, 8), (512, SPLIT, 2), (64, WHOLLY, 2), (64, WHOLLY, 8)),
            *((64, f"{SPLIT}, {ALIGNED}", 2), (64, f"{WHOLLY}, {ALIGNED}", 2)),
        )
    ]
    found += [
        Case(
            f"{what} {where}",
            MOVED,
            2,
            partial(_moved, make, where),
            (over(OURS, PUT, HAND, PMAP, most=1.0, words=best),),
        )
        for what, make in (("an array of 64 MB", _rows), ("100 small arrays", _small_tree))
        for where in (LOOSE, "committed to the first device", REVERSED)
    ]
    found.append(Case("64 MB in place, donated", DONATED, 2, _donated, (over(OURS, HAND, most=1.02),)))
    words = f"peak memory: {OURS} / the least of the others"
    # A second copy would give 2. The limit is above 1 because the system counts freed memory with a delay.
    memory = (over(OURS, PUT, HAND, PMAP, most=1.25, words=words),)
    found.append(Case("a NumPy array of 512 MB, split", COPIES, 2, _memory, memory, before=_settle))
    return found


def _small_tree() -> list[np.ndarray]:
    """100 arrays of several shapes and dtypes, with one row per device."""
    count = jax.device_count()
    kinds = (((), np.float32), ((3,), np.int32), ((4, 4), np.float32), ((16,), np.float16))
    return [np.full((count, *shape), k % 7, dtype) for k in range(25) for shape, dtype in kinds]


def _rows(size: int = 64, offset: int = 16) -> np.ndarray:
    """16 rows that start ``offset`` bytes after a 64-byte boundary.

    If ``offset`` is 0, JAX on CPUs aliases the memory. Results are then wrong if the caller changes it during a call.
    """
    raw = np.empty(size * MEGABYTE + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    array = raw[start : start + size * MEGABYTE].view(np.float32)
    array[:] = np.arange(array.size)
    return array.reshape(16, -1)


def _double(tree: Any) -> Any:
    return jax.tree.map(lambda x: 2 * x, tree)


def _total(tree: Any) -> jax.Array:
    """Reads every argument and returns one scalar, so that transfers dominate the time."""
    return sum(x.sum().astype(jnp.float32) for x in tree)


def _small(fun: Callable[..., Any], _stack: ExitStack) -> Mapping[str, Way | Absent]:
    tree, hand, rows = _small_tree(), by_hand(fun), NamedSharding(mesh(), ROWS)
    return {
        OURS: partial(replicax.pmap(fun, axis_name="i"), tree),
        HAND: partial(hand, tree),
        PUT: lambda: hand(jax.device_put(tree, rows)),
        PMAP: partial(jax.pmap(fun), tree),
    }


def _first(row: jax.Array) -> jax.Array:
    """Does almost no work, so that transfers dominate the time."""
    return row[:1]


def _large(size: int, how: str, _stack: ExitStack) -> Mapping[str, Way | Absent]:
    """A sharded array of 16 rows; or a broadcast array, next to a small mapped argument."""
    count, array = jax.device_count(), _rows(size, 0 if ALIGNED in how else 16)
    if SPLIT in how:
        hand, where = by_hand(_first), NamedSharding(mesh(), ROWS)
        theirs = jax.pmap(jax.vmap(_first))
        return {
            OURS: partial(replicax.pmap(_first), array),
            HAND: partial(hand, array),
            PUT: lambda: hand(jax.device_put(array, where)),
            PMAP: lambda: theirs(array.reshape(count, 16 // count, -1)),
        }

    def pick(x: jax.Array, whole: jax.Array) -> jax.Array:
        return x + whole[0, 0]

    x, where = place(np.arange(16, dtype=np.float32)), NamedSharding(mesh(), WHOLE)
    hand = by_hand(pick, (ROWS, WHOLE), in_axes=(0, None))
    pairs = place(np.arange(16, dtype=np.float32).reshape(count, -1))
    return {
        OURS: partial(replicax.pmap(pick, in_axes=(0, None)), x, array),
        HAND: partial(hand, x, array),
        PUT: lambda: hand(x, jax.device_put(array, where)),
        PMAP: partial(jax.pmap(jax.vmap(pick, in_axes=(0, None)), in_axes=(0, None)), pairs, array),
    }


def _moved(make: Callable[[], Any], where: str, _stack: ExitStack) -> Mapping[str, Way | Absent]:
    """Arrays on devices other than the program's. ``jit`` accepts only uncommitted ones."""
    rows = NamedSharding(mesh(), ROWS)
    backwards = NamedSharding(Mesh(np.array(jax.devices()[::-1]), ("i",)), ROWS)
    hand, count = by_hand(_double), jax.device_count()
    if where == LOOSE:
        tree = jax.tree.map(jnp.asarray, make())
        split = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)
        taken: dict[str, Way | Absent] = {
            HAND: partial(hand, tree),
            PMAP: partial(jax.pmap(jax.vmap(_double)), split),
        }
    else:
        tree = jax.device_put(make(), backwards if where == REVERSED else jax.devices()[0])
        # JAX 0.10.2 on two simulated devices: the first call of jax.pmap may work, and a later one crash.
        taken = {HAND: Absent("refuses it"), PMAP: Absent("refuses it, or crashes")}
    ours = replicax.pmap(_double)
    return {OURS: partial(ours, tree), PUT: lambda: hand(jax.device_put(tree, rows)), **taken}


def _donated(_stack: ExitStack) -> Mapping[str, Way | Absent]:
    """Each call gets the result of the previous call."""

    def loop(step: Callable[[Any], Any]) -> Way:
        state = [place(_rows())]

        def way() -> Any:
            state[0] = step(state[0])
            return state[0]

        return way

    return {
        OURS: loop(replicax.pmap(_double, donate_argnums=0)),
        HAND: loop(by_hand(_double, donate_argnums=0)),
    }


def _memory(_stack: ExitStack) -> Mapping[str, Way | Absent]:
    """The same ways as for time; measures the peak growth of the process during a call."""
    ways = _large(512, SPLIT, _stack)
    if not Path("/proc/self/clear_refs").exists():
        return {name: Absent("no /proc here") for name in ways}
    return {name: way if isinstance(way, Absent) else partial(_grown, way) for name, way in ways.items()}


def _settle() -> None:
    """Waits until unreferenced memory is freed."""
    gc.collect()
    time.sleep(0.1)


def _grown(way: Way) -> Measured:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _kilobytes("VmRSS")
    result = jax.block_until_ready(way())
    return Measured(1024 * (_kilobytes("VmHWM") - before), result)


def _kilobytes(field: str) -> float:
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return float(found[1]) if found else 0.0
