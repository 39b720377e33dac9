"""Equations that call back into Python."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax._src import dispatch

from replicax._jax.aliases import Equation
from replicax._typing import Array, ArrayLike, PyTree


def needs_one_mesh(primitives: set[str]) -> bool:
    """Whether a program with these primitives must use one mesh throughout, as callbacks with results require."""
    return any(primitive.name in primitives for primitive in dispatch.prim_requires_devices_during_lowering)


def has_side_effect(eqn: Equation) -> bool:
    """Whether the equation is a callback with a side effect: a debug print or callback, or an ``io_callback``."""
    return eqn.primitive.name in ("debug_callback", "debug_print", "io_callback")


def bind_callback_where(eqn: Equation, args: Sequence[ArrayLike], runs: Array) -> list[Array]:
    """Binds a :func:`has_side_effect` equation so that Python is called only where ``runs`` is true.

    Where ``runs`` is false, the results of an ``io_callback`` are zeros.
    """
    if eqn.primitive.name == "io_callback":
        results = eqn.params["result_avals"]

        def call(run: Array, *args: Array) -> PyTree:
            if run:
                return eqn.params["callback"](*args)
            return tuple(np.zeros(aval.shape, aval.dtype) for aval in results)

        with eqn.ctx.manager:
            return list(eqn.primitive.bind(runs, *args, **{**eqn.params, "callback": call}))

    def show(run: Array, *args: Array) -> None:
        if run:
            eqn.primitive.impl(*args, **eqn.params)

    jax.debug.callback(show, runs, *args, ordered=_is_ordered(eqn))
    return []


def _is_ordered(eqn: Equation) -> bool:
    return any("Ordered" in type(effect).__name__ for effect in eqn.effects)
