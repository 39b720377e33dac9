"""The devices of each process on this host, without JAX."""

from __future__ import annotations

import glob
import importlib.metadata
from collections.abc import Mapping, Sequence


class TooFewDevicesError(ValueError):
    """More devices are asked for than this host has."""


def shares(processes: int, each: int | None, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment variables that give each process its devices.

    GPUs are divided equally; the first processes get the rest. CPU devices are simulated.

    Args:
        processes: The number of processes.
        each: The number of devices of a process; None for an equal share of the GPUs, or one CPU device.
        environment: The environment of the launcher.

    Raises:
        TooFewDevicesError: There are fewer GPUs than asked for, or than processes.
    """
    count = _gpus(environment)
    if not count:
        return [simulated(each)] * processes
    sizes = [count // processes + (k < count % processes) for k in range(processes)] if each is None else None
    sizes = sizes or [each or 0] * processes
    if sum(sizes) > count or not all(sizes):
        raise TooFewDevicesError(
            f"{processes} processes with {each or 'at least 1'} GPU{'s' * ((each or 1) > 1)} each need "
            f"{processes * (each or 1)} GPUs, but this host has {count}. Start fewer processes, or set "
            f"JAX_PLATFORMS=cpu to simulate devices on CPUs."
        )
    starts = [sum(sizes[:k]) for k in range(processes)]
    return [_ids(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def simulated(count: int | None) -> dict[str, str]:
    """The environment variable that simulates CPU devices."""
    return {} if count is None else {"JAX_NUM_CPU_DEVICES": str(count)}


def share_on_node(each: int | None, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that give this process its devices, if another launcher has started it.

    Args:
        each: The number of devices of a process; None for what JAX chooses.
        environment: The environment, with the index of this process on its node.
    """
    if each is None:
        return {}
    index = next((int(environment[name]) for name in _LOCAL_INDEX if environment.get(name, "").isdigit()), 0)
    own_only = "SLURM_GPUS_PER_TASK" in environment  # Slurm shows each process its own GPUs only
    first = 0 if own_only else index * each
    return simulated(each) | _ids(range(first, first + each))


#: Variables with the index of a process on its node.
_LOCAL_INDEX = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")


def _ids(devices: Sequence[int]) -> dict[str, str]:
    return {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, devices))}


def _gpus(environment: Mapping[str, str]) -> int:
    """The number of GPUs that JAX will see; 0 if it will use CPUs."""
    if environment.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return 0
    plugins = {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}
    for kind, variable, files in (
        ("cuda", "CUDA_VISIBLE_DEVICES", "/dev/nvidia[0-9]*"),
        ("rocm", "ROCR_VISIBLE_DEVICES", "/dev/dri/renderD*"),
    ):
        if any(kind in name for name in plugins):
            visible = environment.get(variable)
            found = len(glob.glob(files)) if visible is None else len([x for x in visible.split(",") if x.strip()])
            if found:
                return found
    return 0
