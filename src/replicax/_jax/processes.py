"""Programs over the devices of several processes, and the key-value service that the processes share."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax._src import clusters, core, distributed, tree_util
from jax._src.lib import _jax as jaxlib
from jax.sharding import NamedSharding

from replicax._typing import Array, PyTree


def client() -> Any:
    """The client of ``jax.distributed``'s service; None before ``jax.distributed.initialize``."""
    return distributed.global_state.client


def use_address(own: str) -> None:
    """Makes the CPU collectives of this process listen on an address of its host.

    By default, gloo listens on the address that the host's name resolves to, which on many hosts is a loopback
    address, so that other hosts cannot connect. A test in ``tests/test_initialize.py`` shows this without replicax.
    """
    with contextlib.suppress(AttributeError):
        made = jaxlib.make_gloo_tcp_collectives
        jaxlib.make_gloo_tcp_collectives = functools.partial(made, hostname=own)


def on_own_shards(
    compiled: jax.stages.Compiled,
    in_types: Sequence[jax.ShapeDtypeStruct],
    in_shardings: Sequence[NamedSharding],
    whole: NamedSharding,
) -> jax.stages.Compiled:
    """Returns a compiled program that takes this process's part of each argument, as an array on its own devices.

    A program over several processes takes arrays over all of their devices, but a process holds only its own shards of
    them. XLA does not look at the rest, so it may as well get the same shards in an array of this process alone.

    Args:
        compiled: The program.
        in_types: The type of this process's part of each argument.
        in_shardings: The sharding of this process's part of each argument.
        whole: The sharding of constants, on this process's devices.
    """
    params = compiled._params
    constants = [jax.device_put(x, whole) for x in params.const_args]
    unloaded = compiled._executable._unloaded_executable
    avals = [*map(core.typeof, constants), *(core.ShapedArray(x.shape, x.dtype) for x in in_types)]
    shardings = [*[whole] * len(constants), *in_shardings]
    kept = sorted(unloaded.kept_var_idx)
    executable = dataclasses.replace(
        unloaded,
        input_avals=[avals[k] for k in kept],
        input_shardings=[shardings[k] for k in kept],
        all_args_info=None,
    ).load()
    own = copy.copy(compiled)
    own._executable, own._params = executable, params._replace(executable=executable, const_args=constants)
    return own


def call_unchecked(compiled: jax.stages.Compiled, *args: Array) -> Sequence[Array]:
    """Runs a program without JAX's check of the arguments."""
    return compiled._executable.unsafe_call(*compiled._params.const_args, *args)


def own_part(x: Any) -> Any:
    """Returns this process's part of an array over several processes, as an array on its own devices.

    Everything else is returned unchanged: arrays of this process, tracers, and float0.
    """
    if not isinstance(x, jaxlib.ArrayImpl):
        if isinstance(x, jax.core.Tracer) or not jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jax.random.wrap_key_data(own_part(x._base_array), impl=x.dtype._impl)
    sharding = x.sharding
    found = _parts.get((id(sharding), x.shape, x.dtype))
    if found is None:
        if len(_parts) >= _ENOUGH:
            _parts.clear()
        found = _parts[id(sharding), x.shape, x.dtype] = sharding, _part_of(x)
    if found[1] is None:
        return x
    aval, own = found[1]
    return jaxlib.ArrayImpl(aval, own, x._arrays, committed=True, _skip_checks=True)


#: The type and the sharding of this process's part, None for an array of this process. The key is the identity of the
#: sharding of the array, which the value keeps alive, with its shape and dtype.
_parts: dict[tuple[int, tuple[int, ...], Any], tuple[Any, tuple[core.ShapedArray, NamedSharding] | None]] = {}
_ENOUGH = 4096


def _part_of(x: Array) -> tuple[core.ShapedArray, NamedSharding] | None:
    if x.is_fully_addressable:
        return None
    mesh, spec, here = x.sharding.mesh, x.sharding.spec, jax.process_index()
    own = [devices for devices in mesh.devices if np.ravel(devices)[0].process_index == here]
    shape = list(x.shape)
    if mesh.axis_names[0] in spec:
        axis = list(spec).index(mesh.axis_names[0])
        shape[axis] = shape[axis] * len(own) // len(mesh.devices)
    where = jax.sharding.Mesh(np.asarray(own, dtype=object), mesh.axis_names)
    return core.ShapedArray(shape, x.dtype, weak_type=x.aval.weak_type), NamedSharding(where, spec)


def own_parts(tree: PyTree) -> PyTree:
    """Returns this process's part of each array of a pytree, see :func:`own_part`."""
    leaves, structure = tree_util.dispatch_registry.flatten(tree, None)
    return structure.unflatten(map(own_part, leaves))


def detected_cluster(
    address: str | None, count: int | None, index: int | None, devices: Sequence[int] | None
) -> tuple[str | None, str | None, int | None, int | None, Sequence[int] | None]:
    """Completes how processes find each other with what JAX detects: Slurm, Open MPI, Kubernetes, TPU pods.

    Returns:
        The name of the launcher, None if JAX does not recognize one; the address of the coordinator; the number of
        processes; the index of this one; its devices.
    """
    said = address, count, index, devices
    try:
        launchers = clusters.ClusterEnv._cluster_types
        found = next((x for x in launchers if not x.opt_in_only_method and x.is_env_present()), None)
        if found is None:
            return None, *said
        return found.name, *clusters.ClusterEnv.auto_detect_unset_distributed_params(*said, None, 300)
    except (AttributeError, TypeError):  # another version of JAX: its own initialize detects the launcher
        return None, *said
