"""What a deterministic map refuses, and its inner maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence

import jax

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.primitives import callbacks as callback_primitives
from replicax._engine.replica import Replica
from replicax._jax import Equation, Jaxpr
from replicax._typing import Array, ArrayLike
from replicax.errors import UnsupportedCallbackError, UnsupportedCollectiveError


def deterministic(replica: Replica, sizes: Mapping[Hashable, int], name: str) -> Replica:
    """Returns a program whose bits do not depend on the devices, if its lanes run one after the other.

    Inner maps become ``vmap``, so each runs whole on the device of its outer replica.

    Args:
        replica: The traced program of one replica.
        sizes: The mapped axis, with its size.
        name: The name of the user's function.

    Raises:
        UnsupportedCallbackError: The program calls back into Python, and uses what Python returns.
        UnsupportedCollectiveError: The program draws random numbers that depend on the device, or uses a ``jax.Ref``,
            or an inner map contains a collective that JAX does not have under ``vmap``.
    """
    for eqn in _equations(replica.jaxpr, set()):
        _refuse(eqn, name)
    if primitives.NESTED_MAP not in replica.primitives:
        return replica
    try:
        with _jax.axis_env(sizes):
            jaxpr = _jax.retrace(
                lambda *args: _jax.run_with(replica.jaxpr, args, INNER_MAPS), replica.jaxpr, hoist=False
            )[0]
    except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedCollectiveError(
            f"{name} is mapped with deterministic=True, where an inner map runs as jax.vmap, which raises "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'without a message'}. Communicate "
            f"over one axis after the other, or leave deterministic out."
        ) from error
    return dataclasses.replace(replica, jaxpr=jaxpr, consts=list(_jax.constants(jaxpr)))


def _equations(jaxpr: Jaxpr, seen: set[int]) -> Iterator[Equation]:
    """Yields the equations of a jaxpr at any depth."""
    if id(jaxpr) not in seen:
        seen.add(id(jaxpr))
        for eqn in _jax.body(jaxpr).eqns:
            yield eqn
            for sub in _jax.sub_jaxprs(eqn):
                yield from _equations(sub, seen)


def _refuse(eqn: Equation, name: str) -> None:
    if callback_primitives.is_callback(eqn) and eqn.outvars:
        raise UnsupportedCallbackError(
            f"{name} is mapped with deterministic=True, and calls {_jax.equation_name(eqn)}: replicax cannot know that "
            f"Python returns the same bits in every process. Compute it with jax.numpy, or before the call, and pass "
            f"it as a mapped argument. (jax.debug.callback, which returns nothing, is supported.)"
        )
    if _jax.makes_references(eqn):
        raise UnsupportedCollectiveError(
            f"{name} is mapped with deterministic=True, and uses a jax.Ref, which replicas cannot use one after the "
            f"other. Carry the value through the loop instead, or leave deterministic out."
        )
    if eqn.primitive.name == "rng_uniform":
        raise UnsupportedCollectiveError(
            f"{name} is mapped with deterministic=True, and calls lax.rng_uniform, whose numbers depend on the device. "
            f"Use jax.random, with a key for each replica."
        )


def _vectorized(eqn: Equation, args: Sequence[ArrayLike]) -> list[Array]:
    """Runs an inner map as ``vmap``. A result that is equal in all replicas is that of the first."""
    (jaxpr,), axes = _jax.sub_jaxprs(eqn), eqn.params["out_axes"]
    run = jax.vmap(
        lambda *own: _jax.run_with(jaxpr, own, INNER_MAPS),
        eqn.params["in_axes"],
        [axis or 0 for axis in axes],
        axis_size=eqn.params["size"],
        axis_name=eqn.params["name"],
    )
    return [y[0] if axis is None else y for y, axis in zip(run(*args), axes, strict=True)]


#: Inner maps become ``vmap``.
INNER_MAPS = {primitives.NESTED_MAP: _vectorized}
