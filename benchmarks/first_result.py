"""The time to a program's first result, with JAX's persistent compilation cache.

The compile-time cases run this file in a new process: ``first_result.py WAY FOLDER EQUATIONS``. It prints one line of
JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.monitoring
import numpy as np

import replicax
from measure import HAND, OURS
from ways import by_hand
from workloads import AXIS, LANES, large

Program = Callable[..., Any]


def mapped(program: Program, count: int | None = None) -> Program:
    """Maps with replicax, on the first ``count`` devices."""
    return replicax.pmap(program, axis_name=AXIS, devices=None if count is None else jax.devices()[:count])


def hand_mapped(program: Program, count: int | None = None) -> Program:
    """Maps by hand, with collectives over the axes of devices and lanes."""
    return by_hand(partial(program, axis=(AXIS, LANES)), lanes=LANES, count=count)


WAYS = {OURS: mapped, HAND: hand_mapped}


def main() -> None:
    """Prints the time, the cache hits and misses, and the sum of the result."""
    name, folder, equations = sys.argv[1:]
    replicax.simulate_devices(2)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    counts: Counter[str] = Counter()
    jax.monitoring.register_event_listener(lambda event, **_: counts.update([event]))
    x = np.linspace(0, 1, 8 * 16, dtype=np.float32).reshape(8, 16)
    jax.devices()
    start = time.perf_counter()
    result = jax.block_until_ready(WAYS[name](partial(large, equations=int(equations)))(x))
    seconds = time.perf_counter() - start
    hits, misses = (counts[f"/jax/compilation_cache/cache_{what}"] for what in ("hits", "misses"))
    print(json.dumps({"seconds": seconds, "hits": hits, "misses": misses, "sum": float(np.asarray(result).sum())}))


if __name__ == "__main__":
    main()
