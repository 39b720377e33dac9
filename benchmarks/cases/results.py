"""Reading results: one replica, each replica, or the whole array, compared with direct reads of the shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import numpy as np

import replicax
from measure import HAND, OURS, Absent, Case, Way, over
from ways import place

LINE = "unreplicate, local_replicas and the whole result: at the cost of the shard reads"
LIMIT = 1.15
INDEX = "x[0]"

ARRAYS = {1: "1 small array", 100: "100 small arrays"}


def cases(_quick: bool) -> list[Case]:
    """Cases: the first replica, each replica, and the whole array."""
    found = []
    for leaves, arrays in ARRAYS.items():
        for title, prepare in ((f"unreplicate, {arrays}", _first), (f"local_replicas, {arrays}", _each)):
            fresh = Fresh(leaves)
            limits = (over(OURS, HAND, most=LIMIT),)
            found.append(Case(title, LINE, 8, partial(prepare, fresh), limits, before=fresh, seconds=(4.0, 0.8)))
    for rows, title in ((16, "fetch, 64 MB"), (17, "fetch, 64 MB, 17 replicas on 8 devices")):
        fresh = Fresh(1, (rows, 2**24 // rows))
        limits = (over(OURS, HAND, most=LIMIT),)
        found.append(Case(title, LINE, 8, partial(_whole, fresh), limits, before=fresh, seconds=(4.0, 0.8)))
    return found


class Fresh:
    """Computes new results before each read, because a JAX array caches its NumPy value.

    Attributes:
        leaves: The number of arrays.
        tree: The results to read.
    """

    def __init__(self, leaves: int, shape: tuple[int, ...] = (16, 4)) -> None:
        self.leaves = leaves
        self._shape = shape
        self._program: Callable[[Any], Any] = replicax.pmap(lambda tree: jax.tree.map(lambda x: 2 * x, tree))
        self._argument: Any = None
        self.tree: Any = None

    def __call__(self) -> None:
        """Computes the results."""
        if self._argument is None:
            argument = [np.full(self._shape, k, np.float32) for k in range(self.leaves)]
            self._argument = place(argument) if self._shape[0] % jax.device_count() == 0 else argument
        self.tree = jax.block_until_ready(self._program(self._argument))


def _first(fresh: Fresh, _stack: ExitStack) -> Mapping[str, Way | Absent]:
    """By hand: one jitted function takes the first row of each first shard."""
    rows = jax.jit(lambda blocks: [block[0] for block in blocks])
    return {
        OURS: lambda: replicax.unreplicate(fresh.tree),
        HAND: lambda: rows([x.addressable_data(0) for x in fresh.tree]),
        INDEX: lambda: [x[0] for x in fresh.tree],
    }


def _each(fresh: Fresh, _stack: ExitStack) -> Mapping[str, Way | Absent]:
    count = jax.device_count()

    def by_hand() -> list[list[Any]]:
        rows = [[row for d in range(count) for row in np.asarray(x.addressable_data(d))] for x in fresh.tree]
        return [list(replica) for replica in zip(*rows, strict=True)]

    def index() -> list[list[Any]]:
        return [[np.asarray(x[r]) for x in fresh.tree] for r in range(16)]

    ways: dict[str, Way | Absent] = {OURS: lambda: replicax.local_replicas(fresh.tree), HAND: by_hand}
    return ways | ({INDEX: index} if fresh.leaves == 1 else {INDEX: Absent("takes seconds")})


def _whole(fresh: Fresh, _stack: ExitStack) -> Mapping[str, Way | Absent]:
    """By hand: concatenates the distinct shards; if the array is replicated, reads one shard."""

    def by_hand() -> np.ndarray:
        (x,) = fresh.tree
        parts = {part.index[0].start or 0: part.data for part in x.addressable_shards}
        rows = [np.asarray(parts[start]) for start in sorted(parts)]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    return {
        OURS: lambda: replicax.fetch(fresh.tree),
        HAND: by_hand,
        "np.asarray": lambda: np.asarray(fresh.tree[0]),
    }
