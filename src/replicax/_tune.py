"""Measures which ``lanes`` is fastest."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from replicax import _jax
from replicax._layout.axes import Chosen
from replicax._layout.processes import by_process
from replicax._pmap import MappedFunction
from replicax._runtime import agreement
from replicax._runtime.options import check_lanes
from replicax._typing import PyTree
from replicax.errors import NotAFunctionError, OptionTypeError, UnsupportedTransformationError

R = TypeVar("R")


def tune(mapped: MappedFunction[R], *args: PyTree, seconds: float = 5.0, **kwargs: PyTree) -> str | int:
    """Measures which ``lanes`` runs a map fastest on this machine, as a value to pass to ``pmap``.

    It compiles the map for ``"vectorized"``, ``"sequential"`` and some numbers of lanes, and calls them in turn. A way
    that needs more memory than there is does not take part. Over several processes, all call ``tune`` together, and
    the first decides. Callbacks of the map are called many times.

    Args:
        mapped: The callable that ``pmap`` returned. Its own ``lanes`` does not matter.
        args: Positional arguments of a call. Donated arguments are kept.
        seconds: How long to measure, apart from compilation.
        kwargs: Keyword arguments of a call.

    Returns:
        ``"vectorized"``, ``"sequential"``, or the number of lanes that a device runs at once.

    Raises:
        NotAFunctionError: ``mapped`` is not a callable that ``pmap`` returned.
        OptionTypeError: ``seconds`` is not a positive number.
        UnsupportedTransformationError: the call is inside ``jit``, ``grad`` or another transformation.
        ReplicaxError: a call with these arguments is invalid.

    Example:
        >>> import jax, numpy as np, replicax
        >>> square = replicax.pmap(lambda x: x**2)
        >>> lanes = replicax.tune(square, np.arange(1000.0), seconds=0.1)
        >>> square = replicax.pmap(lambda x: x**2, lanes=lanes)
    """
    if not isinstance(mapped, MappedFunction):
        raise NotAFunctionError(
            f"tune needs the callable that replicax.pmap returns, got {mapped!r:.60} of type {type(mapped).__name__}."
        )
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise OptionTypeError(f"tune: seconds is how long to measure, got {seconds!r:.60}.")
    if not _jax.eager():
        raise UnsupportedTransformationError(
            "tune measures calls, and cannot be called inside jit, grad, vmap and the like. Call it outside, with "
            "arguments of the same shapes."
        )
    processes = [share.process for share in by_process(mapped.options.resolve_devices())]

    def of_the_first(value: Any) -> Any:
        """The value of the first process, in all of them."""
        if len(processes) == 1:
            return value
        return agreement.exchange(processes, {"value": value}, "calls tune")[processes[0]]["value"]

    calls: dict[str | int, Callable[[], float]]
    calls = {lanes: functools.partial(_call, m, args, kwargs) for lanes, m in _ways(mapped, args, kwargs).items()}
    _warm_up(calls, keep_all=len(processes) > 1)
    rounds = of_the_first(max(1, int(seconds / sum(call() for call in calls.values()))))
    in_turn = [{lanes: call() for lanes, call in calls.items()} for _ in range(rounds)]
    fastest: str | int = of_the_first(min(calls, key=lambda lanes: statistics.median(each[lanes] for each in in_turn)))
    return fastest


def _ways(mapped: MappedFunction[R], args: Any, kwargs: Any) -> dict[str | int, MappedFunction[R]]:
    """The map with each ``lanes`` that can make a difference."""
    count = mapped.trace(*args, **kwargs).lanes.lanes
    words: list[str | int] = ["sequential" if mapped.options.deterministic else "vectorized"]
    if count > 1 and not mapped.options.deterministic:
        words += ["sequential", *(1 << k for k in range(1, 12) if 1 << k < count)]
    kept = dataclasses.replace(mapped.options, donated=Chosen())
    return {
        lanes: MappedFunction(mapped.__wrapped__, dataclasses.replace(kept, lanes=check_lanes(lanes)))
        for lanes in words
    }


def _call(mapped: MappedFunction[R], args: Any, kwargs: Any) -> float:
    """The time of one call, in seconds."""
    start = time.perf_counter()
    jax.block_until_ready(mapped(*args, **kwargs))
    return time.perf_counter() - start


def _warm_up(calls: dict[str | int, Callable[[], float]], *, keep_all: bool) -> None:
    """Compiles each way, and removes those for which there is not enough memory."""
    for lanes, call in list(calls.items()):
        try:
            call()
        except jax.errors.JaxRuntimeError as error:
            if keep_all or len(calls) == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            del calls[lanes]
