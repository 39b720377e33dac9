"""Runs fewer lanes at once, where all lanes at once need more memory than there is."""

from __future__ import annotations

import logging
import math
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from replicax import _jax
from replicax._engine.spec import ProgramSpec
from replicax._jax import Jaxpr
from replicax._runtime.executable import Executable
from replicax._typing import ArrayLike

logger = logging.getLogger("replicax")

#: The share of the free memory that a program may need. The rest is for what XLA's figure lacks.
MARGIN = 0.9

#: The share of the free memory from which on a program may run out of memory.
RISK = 0.25


def free(devices: Sequence[jax.Device]) -> int | None:
    """The free memory of each of this process's devices, in bytes; None if unknown.

    On CPUs, it is the part of a device in what is left of the memory of the machine, of the limits of its control
    groups, and of the limits of the process.
    """
    own = [device for device in devices if device.process_index == jax.process_index()]
    if not own:
        return None
    if own[0].platform == "cpu":
        left = list(_left_on_host())
        return max(0, min(left)) // len(own) if left else None
    stats = [device.memory_stats() or {} for device in own]
    left = [each["bytes_limit"] - each["bytes_in_use"] for each in stats if each.get("bytes_limit")]
    return min(left, default=None)


def least(said: Sequence[tuple[str, int | None]]) -> int | None:
    """The free memory of a device that all processes can count on, given the host and the free memory of each."""
    hosts = [host for host, _ in said]
    known = [left // hosts.count(host) for host, left in said if left is not None]
    return min(known) if len(known) == len(said) else None


def of_this_process(devices: Sequence[jax.Device]) -> tuple[str, int | None]:
    """What a process tells the others: its host and its free memory. GPUs are not shared, so they have no host."""
    on_cpu = any(device.platform == "cpu" for device in devices)
    return platform.node() if on_cpu else f"process {jax.process_index()}", free(devices)


def fitting(program: Executable, again: Callable[[int], Executable], left: int | None) -> Executable:
    """Returns the program with the largest number of lanes at once for which the memory suffices.

    Args:
        program: The program as the rule for all programs chose it.
        again: Returns the program with another number of lanes at once.
        left: The free memory of each device, in bytes; None if unknown.
    """
    plan = program.spec.lanes
    if left is None or plan.at_once == 1:
        return program
    most = _most(program.spec)
    program.may_not_fit = most > RISK * left
    while most > MARGIN * left and program.spec.lanes.at_once > 1:
        at_once, needed = program.spec.lanes.at_once, _needed(program)
        if needed <= MARGIN * left:
            break
        share = 0.5 if math.isinf(needed) else min(MARGIN * left / needed, (at_once - 1) / at_once)
        smaller = again(_divisor(plan.lanes, max(1, int(at_once * share))))
        if smaller.spec.lanes.at_once >= at_once:  # the program runs in one piece
            return program
        program = smaller
        program.may_not_fit = program.spec.lanes.at_once > 1
        logger.info(
            "%s: %d replicas at once need %s on a device, and %s are free. It runs %d at once.",
            program.spec.name,
            at_once,
            "more memory than there is" if math.isinf(needed) else f"{needed / 2**20:,.0f} MiB",
            f"{left / 2**20:,.0f} MiB",
            program.spec.lanes.at_once,
        )
    return program


def ran_out(error: BaseException) -> bool:
    """Whether XLA raised an error because memory did not suffice."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def may_run_again(program: Executable, leaves: Sequence[ArrayLike]) -> bool:
    """Whether a call that ran out of memory can run with fewer lanes at once: its arguments are still there."""
    return (
        program.may_not_fit
        and program.spec.lanes.at_once > 1
        and not program.spec.over_processes
        and not jax.config.jax_disable_jit
        and not any(isinstance(x, jax.Array) and x.is_deleted() for x in leaves)
    )


def _needed(program: Executable) -> float:
    """The bytes that a device needs besides the arguments of a program; infinite if XLA cannot compile it for that."""
    try:
        found = program.compiled.memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if not ran_out(error):
            raise
        return math.inf
    if found is None:  # the platform does not say
        return 0
    return float(found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes)


def fewer(lanes: int, at_once: int) -> int:
    """The number of lanes at once to try when memory did not suffice.

    It is much smaller: if memory suffices on some devices and not on others, these wait in a collective.
    """
    return _divisor(lanes, max(1, at_once // 4))


def _divisor(lanes: int, most: int) -> int:
    """A number of lanes at once, at most ``most``: a divisor of the number of lanes, if there is one near ``most``."""
    return next((k for k in range(most, (most + 1) // 2 - 1, -1) if lanes % k == 0), most)


def _most(spec: ProgramSpec) -> int:
    """The bytes of all values that all lanes of a device compute, which is more than XLA keeps at a time."""
    return spec.lanes.at_once * _bytes(spec.replica.jaxpr, {})


def _bytes(jaxpr: Jaxpr, known: dict[int, int]) -> int:
    if id(jaxpr) not in known:
        total = 0
        for eqn in _jax.body(jaxpr).eqns:
            total += sum(_size(var.aval) for var in eqn.outvars)
            total += sum(_bytes(sub, known) for sub in _jax.sub_jaxprs(eqn))
        known[id(jaxpr)] = total
    return known[id(jaxpr)]


def _size(aval: object) -> int:
    shape, dtype = getattr(aval, "shape", None), getattr(aval, "dtype", None)
    return 0 if shape is None or dtype is None else math.prod(shape) * getattr(dtype, "itemsize", 8)


# ---------------------------------------------------------------------------------------------------------------
# The memory of a host


def _left_on_host() -> Iterator[int]:
    """What each limit leaves to this process, in bytes."""
    if found := re.search(r"MemAvailable:\s+(\d+) kB", _text("/proc/meminfo")):
        yield int(found[1]) * 1024
    yield from _left_of_control_groups(_text("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    limits, status = _text("/proc/self/limits"), _text("/proc/self/status")
    for limit, field in (("address space", "VmSize"), ("data size", "VmData")):
        most, used = re.search(rf"Max {limit} +(\d+)", limits), re.search(rf"{field}:\s+(\d+) kB", status)
        if most and used:
            yield int(most[1]) - int(used[1]) * 1024


def _left_of_control_groups(groups: str, root: Path) -> Iterator[int]:
    """What the control groups of this process leave to it, in bytes. Cached files count as free.

    Args:
        groups: The text of ``/proc/self/cgroup``. For its format and for the files below, see ``cgroups(7)`` and
            https://docs.kernel.org/admin-guide/cgroup-v2.html.
        root: Where the control groups are mounted.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, (most, used, cached) = (root, _V2) if controllers == "" else (root / "memory", _V1)
        group = top / path.lstrip("/")
        # In a container, the path may be that of the host, where only the top of it is mounted.
        for where in dict.fromkeys((top, group, *(p for p in group.parents if p.is_relative_to(top)))):
            limit, usage = _text(where / most).strip(), _text(where / used).strip()
            if limit.isdecimal() and usage.isdecimal():
                files = re.search(rf"^{cached} (\d+)$", _text(where / "memory.stat"), re.MULTILINE)
                yield int(limit) - int(usage) + (int(files[1]) if files else 0)


#: The files of a control group with the limit and the memory in use, and the line of ``memory.stat`` for cached files.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
