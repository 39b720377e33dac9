"""Dispatch: the overhead of a warm call over a direct call of the compiled program with the same arguments."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import numpy as np

import replicax
from measure import HAND, OURS, Absent, Case, Limit, Measured, Way, added, over
from ways import by_hand, place

ALONE = "replicax, one map for each kind of call"

MIXED_LINE = "calls of several kinds cost at most 5 % more than each of them alone"

LINE = "a warm call adds at most 2 µs + 20 ns a leaf"


def cases(_quick: bool) -> list[Case]:
    """Cases: calls with 1 and 100 arrays, in place or NumPy, and with static and keyword arguments."""
    devices = (1, 2, 8)
    plain = [
        _case(
            count,
            f"{leaves} small {'array' if leaves == 1 else 'arrays'} {where}",
            partial(_plain, leaves=leaves, numpy=where != "in place"),
            leaves,
            numpy=where != "in place",
        )
        for count in devices
        for leaves in (1, 100)
        for where in ("in place", "of NumPy")
    ]
    named = [_case(count, "1 small array in place, a static and a keyword argument", _named, 2) for count in devices]
    donated = [_case(count, "1 small array in place, donated", _donated, 1) for count in devices]
    after = [
        _mixed(count, f"{what} in place, after a call with NumPy", partial(_after, leaves=leaves))
        for count in devices
        for leaves, what in ((1, "1 small array"), (100, "100 small arrays"))
    ]
    in_turn = [
        _mixed(count, f"{what} in turn", partial(_in_turn, numpy=numpy))
        for count in devices
        for what, numpy in (("two shapes in place", False), ("in place and of NumPy", True))
    ]
    return plain + named + donated + after + in_turn


def _case(
    devices: int,
    title: str,
    prepare: Callable[[ExitStack], Mapping[str, Way | Absent]],
    leaves: int,
    *,
    numpy: bool = False,
) -> Case:
    limits, calls = _limits(leaves, numpy=numpy), _calls(leaves)
    return Case(title, LINE, devices, prepare, limits, calls=calls, seconds=(6.0, 0.8))


def _limits(leaves: int, *, numpy: bool = False) -> tuple[Limit, ...]:
    allowance = 2e-6 + 20e-9 * leaves
    words = f"({OURS} − {HAND}) / {1e6 * allowance:.2f} µs"
    # Transfers of NumPy arrays may use other threads.
    return (added(OURS, HAND, allowance, words=words, clock="wall" if numpy else "caller"),)


def _calls(leaves: int) -> int:
    """The number of calls per round. It is small, for many short rounds: other load changes within milliseconds."""
    return 20 if leaves < 100 else 2


def _plain(_stack: ExitStack, leaves: int, numpy: bool) -> Mapping[str, Way | Absent]:
    def double(tree: Any) -> Any:
        return jax.tree.map(lambda x: 2 * x, tree)

    tree = _arrays(leaves)
    argument = tree if numpy else place(tree)
    ways = {OURS: replicax.pmap(double, axis_name="i"), HAND: by_hand(double), "jax.pmap": jax.pmap(double)}
    return {name: partial(way, argument) for name, way in ways.items()}


def _power(x: jax.Array, power: int, *, scale: jax.Array) -> jax.Array:
    return scale * x**power


def _named(_stack: ExitStack) -> Mapping[str, Way | Absent]:
    """The same call in each way, and a call by hand without static and keyword arguments."""
    count = jax.device_count()
    x = place(np.arange(3 * count, dtype=np.float32).reshape(count, 3))
    scale = place(np.ones(count, np.float32))
    ours = replicax.pmap(_power, axis_name="i", static_broadcasted_argnums=1)
    theirs = jax.pmap(_power, static_broadcasted_argnums=1)

    def cubed(x: jax.Array, scale: jax.Array) -> jax.Array:
        return _power(x, 3, scale=scale)

    @partial(jax.jit, static_argnums=1)
    def alike(x: jax.Array, power: int, *, scale: jax.Array) -> jax.Array:
        return by_hand(lambda x, scale: _power(x, power, scale=scale))(x, scale)

    return {
        OURS: partial(ours, x, 3, scale=scale),
        HAND: partial(alike, x, 3, scale=scale),
        "by hand, two positions": partial(by_hand(cubed), x, scale),
        "jax.pmap": partial(theirs, x, 3, scale=scale),
    }


def _donated(_stack: ExitStack) -> Mapping[str, Way | Absent]:
    """Each call gets the result of the previous call."""
    count = jax.device_count()

    def loop(program: Callable[[jax.Array], jax.Array]) -> Way:
        state = place(np.ones((count, 3), np.float32))

        def way() -> jax.Array:
            nonlocal state
            state = program(state)
            return state

        return way

    return {
        OURS: loop(replicax.pmap(_next, axis_name="i", donate_argnums=0)),
        HAND: loop(by_hand(_next, donate_argnums=0)),
        "jax.pmap": loop(jax.pmap(_next, donate_argnums=0)),
    }


def _next(x: jax.Array) -> jax.Array:
    return 1 - x / 2


def _mixed(devices: int, title: str, prepare: Callable[[ExitStack], Mapping[str, Way | Absent]]) -> Case:
    limits = (over(OURS, ALONE, most=1.05),)
    return Case(title, MIXED_LINE, devices, prepare, limits, seconds=(6.0, 0.8))


#: The number of calls that are timed together; with arrays in place, the number after one call with NumPy.
CALLS = 20


def _after(_stack: ExitStack, leaves: int) -> Mapping[str, Way | Absent]:
    """Calls with arrays in place, after an untimed call with NumPy arrays, of the same map or of another map."""
    host = _arrays(leaves)
    there = place(host)
    mixed, alone, other = (replicax.pmap(_doubling(), axis_name="i") for _ in range(3))
    for _ in range(3):
        jax.block_until_ready([mixed(host), other(host), alone(there)])
    return {OURS: partial(_repeat, mixed, there, mixed, host), ALONE: partial(_repeat, alone, there, other, host)}


def _repeat(mapped: Callable[..., Any], there: Any, first: Callable[..., Any], host: Any) -> Measured:
    jax.block_until_ready(first(host))
    start = time.perf_counter()
    for _ in range(CALLS):
        result = mapped(there)
    jax.block_until_ready(result)
    return Measured((time.perf_counter() - start) / CALLS, result)


def _in_turn(_stack: ExitStack, numpy: bool) -> Mapping[str, Way | Absent]:
    """Alternates two kinds of calls, of one map or of two maps."""
    first, second = place(_arrays(1)), _arrays(1) if numpy else place(_arrays(1, columns=4))
    mixed, one, other = (replicax.pmap(_doubling(), axis_name="i") for _ in range(3))
    return {OURS: partial(_turns, mixed, first, mixed, second), ALONE: partial(_turns, one, first, other, second)}


def _turns(one: Callable[..., Any], first: Any, other: Callable[..., Any], second: Any) -> Any:
    for _ in range(CALLS):
        results = one(first), other(second)
    return results


def _doubling() -> Callable[[Any], Any]:
    """Returns a new function each time, because maps of the same function share programs."""
    return lambda tree: jax.tree.map(lambda x: 2 * x, tree)


def _arrays(leaves: int, columns: int = 3) -> list[np.ndarray[Any, Any]]:
    count = jax.device_count()
    return [np.arange(columns * count, dtype=np.float32).reshape(count, columns) + k for k in range(leaves)]
