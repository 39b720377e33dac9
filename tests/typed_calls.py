"""Typing tests: ``make check`` runs mypy on this file. The file is never run."""

from collections.abc import Callable
from typing import Any, assert_type

import jax
import numpy as np

import replicax


def step(state: dict[str, jax.Array], rate: float) -> tuple[dict[str, jax.Array], jax.Array]:
    """The program of a replica."""
    raise NotImplementedError


State = tuple[dict[str, jax.Array], jax.Array]

# A call, a decorator, and a decorator with options keep the type of the result.
assert_type(replicax.pmap(step), replicax.MappedFunction[State])
assert_type(replicax.pmap(step, "i", in_axes=(0, None), donate_argnums=0), replicax.MappedFunction[State])
assert_type(replicax.pmap(step)({}, 0.1), State)


@replicax.pmap
def plain(x: jax.Array) -> jax.Array:
    """The program of a replica."""
    return x


@replicax.pmap(axis_name="i", static_broadcasted_argnames=("power",))
def with_options(x: jax.Array, *, power: int) -> jax.Array:
    """The program of a replica."""
    return x**power


assert_type(plain, replicax.MappedFunction[jax.Array])
assert_type(plain(np.ones(8)), jax.Array)
assert_type(with_options(np.ones(8), power=2), jax.Array)
assert_type(replicax.compat.pmap(step), replicax.MappedFunction[State])


def maps(fun: Callable[..., jax.Array]) -> replicax.MappedFunction[jax.Array]:
    """Applies the decorator with options as a function."""
    return replicax.pmap(axis_name="i")(fun)


assert_type(plain.__wrapped__(jax.numpy.ones(3)), jax.Array)

# Helpers keep the type of the tree.
tree: dict[str, jax.Array] = {"w": jax.numpy.zeros((8, 3))}
assert_type(replicax.replicate(tree, 8), dict[str, jax.Array])
assert_type(replicax.unreplicate(tree), dict[str, jax.Array])
assert_type(replicax.local_replicas(tree), list[dict[str, jax.Array]])

# One array is an array on the devices, or on the host, whichever it was.
Host = np.ndarray[Any, Any]
assert_type(replicax.replicate(np.ones(3), 8), jax.Array)
assert_type(replicax.replicate(0.1), jax.Array)
assert_type(replicax.shard(np.ones((8, 3))), jax.Array)
assert_type(replicax.unreplicate(plain(np.ones(8))), jax.Array)
assert_type(replicax.unreplicate(np.ones((8, 3))), Host)
assert_type(replicax.fetch(plain(np.ones(8))), Host)
assert_type(replicax.to_global(np.ones(8)), jax.Array)
assert_type(replicax.to_local(plain(np.ones(8))), jax.Array)
assert_type(replicax.local_replicas(plain(np.ones(8))), list[Host])
assert_type(replicax.compat.device_put_replicated(0.1, jax.devices()), jax.Array)
assert_type(replicax.compat.device_put_sharded([np.ones(3)] * 8, jax.devices()), jax.Array)
assert_type(replicax.compat.device_put_sharded([tree] * 8, jax.devices()), dict[str, jax.Array])

# The exceptions are exceptions under both names.
try:
    plain(np.ones(8))
except replicax.errors.MappedSizeError as error:
    assert_type(error, replicax.errors.MappedSizeError)
except (replicax.DeletedArrayError, replicax.AxisSpecError) as error:
    assert_type(error, replicax.errors.ReplicaxError)

# Wrong calls are errors.
replicax.pmap(step, axis_nam="i")  # type: ignore[call-overload]
replicax.pmap(step, donate_argnums="state")  # type: ignore[arg-type]
replicax.pmpa(plain)(np.ones(8))  # type: ignore[operator]
replicax.pmap(step)({}, 0.1).shape  # type: ignore[attr-defined]  # noqa: B018


def ahead_of_time(x: jax.ShapeDtypeStruct) -> Any:
    """The stages of a program."""
    lowered = plain.lower(x)
    assert_type(plain.explain_cache_miss(x), str)
    return lowered.compile()
