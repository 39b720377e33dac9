"""How a device runs its replicas: one after the other, a few at a time, or all at once, beside loops by hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import replicax
from lane_workloads import AXIS, Arguments, Program, chains, convolutions, dense, ensemble, escape_time
from measure import HAND, Absent, Case, Limit, Way, over

OWN_WORK = "lanes, where replicas differ in work: the default at most 1.10 × the fastest way"
GRADIENTS = "lanes, sums of gradients: the default at most 1.10 × the fastest way"

DEFAULT = "the default"
TUNED = "as tune says"
ONE_BY_ONE = 'lanes="sequential"'
SOME = "lanes=16"
AT_ONCE = 'lanes="vectorized"'
VMAP = "jit(vmap)"
ONE_DEVICE = "lax.map on one device"

#: The programs of each line: the title, replicas, devices, and the package that it needs.
APART = {
    ensemble: [
        ("ODE solves with adaptive steps (diffrax)", 37, 8),
        ("ODE solves with adaptive steps (diffrax)", 1000, 2),
    ],
    chains: [("NUTS chains (blackjax)", 12, 8)],
    escape_time: [("escape times", 1000, 2)],
}
SUMS = {dense: ("gradients of an MLP", 64, 8), convolutions: ("gradients of a convolutional net", 64, 8)}
NEEDS: Mapping[Any, str] = {ensemble: "diffrax", chains: "blackjax"}


def cases(quick: bool) -> list[Case]:
    """Cases: programs whose replicas differ in work, and averaged gradients."""
    found = [
        Case(
            f"{title}, {replicas:,} on {devices}",
            OWN_WORK,
            devices,
            partial(_apart, workload, replicas),
            _limits((ONE_BY_ONE, AT_ONCE, SOME), (HAND, VMAP, ONE_DEVICE)),
            seconds=(10.0, 2.0),
            tolerance=None,
        )
        for workload, rows in APART.items()
        for title, replicas, devices in rows
    ]
    for workload, (title, replicas, devices) in SUMS.items():
        ways, limits = partial(_sums, workload, replicas), _limits((ONE_BY_ONE, AT_ONCE), (HAND, VMAP))
        if not quick:
            found.append(Case(title, GRADIENTS, devices, ways, limits, seconds=(15.0, 2.0), tolerance=1e-3))
    return found


def _limits(ours: Sequence[str], others: Sequence[str]) -> tuple[Limit, ...]:
    on_one = [name for name in others if name != HAND]
    return (
        over(DEFAULT, *ours, HAND, most=1.10, words=f"{DEFAULT} / the fastest on these devices"),
        over(DEFAULT, *on_one, most=1.10, words=f"{DEFAULT} / the fastest on one device"),
        over(TUNED, *ours, most=1.10, words=f"{TUNED} / the fastest lanes"),
        over(ONE_BY_ONE, HAND, most=1.10),
        over(ONE_BY_ONE, AT_ONCE, most=None),
    )


def _apart(
    workload: Callable[[int], tuple[Program, Arguments]], replicas: int, stack: ExitStack
) -> Mapping[str, Way | Absent]:
    del stack
    package = NEEDS.get(workload)
    if package and importlib.util.find_spec(package) is None:
        every = DEFAULT, TUNED, ONE_BY_ONE, SOME, AT_ONCE, HAND, VMAP, ONE_DEVICE
        return dict.fromkeys(every, Absent("not installed"))
    program, args = workload(replicas)
    mesh = Mesh(np.array(jax.devices()), "devices")
    lanes = -(-replicas // mesh.size)

    def loop(*rows: Any) -> Any:
        return jax.lax.map(lambda own: program(*own), rows)

    compiled = _on_devices(loop, mesh, PartitionSpec("devices"))

    def by_hand() -> Any:  # from NumPy arrays, like the other ways
        spare = lanes * mesh.size - replicas
        return compiled(*_placed([np.concatenate([x, np.repeat(x[-1:], spare, 0)]) for x in args], mesh))

    ours = {
        way: partial(replicax.pmap(program, AXIS, lanes=how), *args)
        for way, how in _lanes(replicax.pmap(program, AXIS), args).items()
        if how != 16 or lanes > 16
    }
    return ours | {
        HAND: by_hand,
        VMAP: partial(jax.jit(jax.vmap(program)), *args),
        ONE_DEVICE: partial(jax.jit(loop), *args),
    }


def _sums(
    workload: Callable[[int], tuple[Program, Arguments]], replicas: int, stack: ExitStack
) -> Mapping[str, Way | Absent]:
    del stack
    gradient, args = workload(replicas)
    mesh = Mesh(np.array(jax.devices()), "devices")
    placed = _placed(args, mesh)

    def averaged(*own: Any) -> Any:
        return jax.lax.pmean(gradient(*own), AXIS)

    def accumulated(*rows: Any) -> Any:
        types = jax.eval_shape(gradient, *(x[0] for x in rows))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
        total, _ = jax.lax.scan(lambda total, own: (jax.tree.map(jnp.add, total, gradient(*own)), None), zeros, rows)
        return jax.tree.map(lambda x: jax.lax.psum(x, "devices") / replicas, total)

    ours = _lanes(replicax.pmap(averaged, AXIS, out_axes=None), placed)
    return {
        way: partial(replicax.pmap(averaged, AXIS, out_axes=None, lanes=how), *placed)
        for way, how in ours.items()
        if way != SOME
    } | {
        HAND: partial(_on_devices(accumulated, mesh, PartitionSpec()), *placed),
        VMAP: partial(jax.jit(jax.vmap(averaged, axis_name=AXIS, out_axes=None)), *args),
    }


def _lanes(mapped: Any, args: Arguments) -> dict[str, Any]:
    """The values of ``lanes`` to measure."""
    tuned = replicax.tune(mapped, *args, seconds=2.0)
    return {DEFAULT: "auto", TUNED: tuned, ONE_BY_ONE: "sequential", SOME: 16, AT_ONCE: "vectorized"}


def _on_devices(program: Program, mesh: Mesh, out: PartitionSpec) -> Program:
    rows = PartitionSpec("devices")
    return jax.jit(jax.shard_map(program, mesh=mesh, in_specs=rows, out_specs=out, check_vma=False))


def _placed(args: Sequence[Any], mesh: Mesh) -> list[jax.Array]:
    return [jax.device_put(x, NamedSharding(mesh, PartitionSpec("devices"))) for x in args]
