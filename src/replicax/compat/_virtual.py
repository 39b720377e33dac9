"""The devices that a program sees under ``install(replicas=N)``: N of them, where a real one stands for several."""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from types import FrameType

import jax
import numpy as np
from jax.sharding import Mesh

from replicax import _jax
from replicax._messages import as_int, report
from replicax._runtime.options import check_devices
from replicax._typing import Function, HostArray
from replicax.errors import DevicesError, ReplicasError

VARIABLE = "REPLICAX_REPLICAS"

#: Packages that go on seeing the real devices: they place arrays and save them, which is not the program's business.
REAL = ("jax", "jaxlib", "orbax", "replicax")

#: The number of devices that the program is to see; None where that is the real one.
_replicas: int | None = None


def wanted(replicas: int | None) -> int | None:
    """The number of replicas that was asked for, in the call or in the environment; None if it was not.

    Raises:
        OptionTypeError: it is no int.
        ReplicasError: it is less than 1, or the environment has no number.
    """
    if replicas is not None:
        return _at_least_one(as_int("replicas", replicas), replicas, "replicas", "replicas=8")
    said = os.environ.get(VARIABLE)
    return number(said, VARIABLE, f"{VARIABLE}=8") if said else None


def number(said: str, where: str, right: str) -> int:
    """The number of replicas that a text names.

    Args:
        said: The text.
        where: What the user calls it.
        right: What to write instead.

    Raises:
        ReplicasError: it is no number, or less than 1.
    """
    return _at_least_one(int(said) if said.strip().isdecimal() else 0, said, where, right)


def _at_least_one(count: int, said: object, where: str, right: str) -> int:
    if count < 1:
        raise ReplicasError(
            f"{where} is {said!r}, and must be the number of devices that the program is to see, 1 or more. "
            f"Write {right}."
        )
    return count


def see(replicas: int | None) -> None:
    """Lets the program see that many devices; with None the real ones."""
    global _replicas
    _replicas = replicas


def seen() -> int | None:
    """The number of devices that the program is to see; None where that is the real one."""
    return _replicas


def _stand_ins(real: list[jax.Device]) -> list[jax.Device]:
    """The list that the program sees in place of real devices: replica r on device ``r // L``, where maps have it."""
    if _replicas is None or real[0].client is not _jax.devices()[0].client:  # such as the CPU beside a GPU
        return real
    if jax.process_count() > 1:
        raise ReplicasError(
            f"replicas={_replicas}: this run has {jax.process_count()} processes, and devices can stand for several "
            f"replicas in a run of one process alone. Leave replicas out."
        )
    if _replicas < len(real):
        raise ReplicasError(
            f"replicas={_replicas}: there are {len(real)} devices, and the program cannot see fewer of them. Write "
            f"replicas={len(real)} or more, or hide devices from JAX, as with CUDA_VISIBLE_DEVICES."
        )
    lanes = -(-_replicas // len(real))
    return [real[r // lanes] for r in range(_replicas)]


def program_devices() -> list[jax.Device]:
    """The devices of this process as the program sees them."""
    return _stand_ins(_jax.local_devices())


def padded() -> bool:
    """Whether the devices have more lanes than the program sees devices, so that results are not split evenly."""
    real = len(_jax.devices())
    return _replicas is not None and _replicas % -(-_replicas // real) != 0


def _for(asking: FrameType, real: list[jax.Device]) -> list[jax.Device]:
    """What the one who asks is to see."""
    package = str(asking.f_globals.get("__name__")).partition(".")[0]
    return real if package in REAL else _stand_ins(real)


@functools.wraps(_jax.devices)
def _devices(backend: str | None = None) -> list[jax.Device]:
    return _for(sys._getframe(1), _jax.devices(backend))


@functools.wraps(_jax.local_devices)
def _local_devices(
    process_index: int | None = None, backend: str | None = None, host_id: int | None = None
) -> list[jax.Device]:
    return _for(sys._getframe(1), _jax.local_devices(process_index, backend, host_id))


@functools.wraps(jax.device_count)
def _device_count(backend: str | None = None) -> int:
    return len(_for(sys._getframe(1), _jax.devices(backend)))


@functools.wraps(jax.local_device_count)
def _local_device_count(backend: str | None = None) -> int:
    return len(_for(sys._getframe(1), _jax.local_devices(backend=backend)))


#: What takes the place of which attribute of ``jax``.
FUNCTIONS: dict[str, Function] = {
    "devices": _devices,
    "local_devices": _local_devices,
    "device_count": _device_count,
    "local_device_count": _local_device_count,
}


# ---------------------------------------------------------------------------------------------------------------
# Lists in which a device stands several times


def distinct(devices: Sequence[jax.Device]) -> tuple[tuple[jax.Device, ...], int]:
    """The devices of a list, each once, and the length of the list.

    Raises:
        OptionTypeError: it is no list.
        DevicesError: it is empty, or holds something that is no device, or devices of several platforms.
    """
    if isinstance(devices, str) or not isinstance(devices, Iterable):
        return check_devices(devices), 0
    given = tuple(devices)
    real = [d for i, d in enumerate(given) if not any(d is earlier for earlier in given[:i])]
    return check_devices(real), len(given)


def guarded_mesh(original: Function) -> Function:
    """``Mesh.__new__`` that refuses a device that stands several times, which JAX takes, and fails on later."""

    @functools.wraps(original)
    def new(cls: type[Mesh], devices: Sequence[jax.Device] | HostArray, *args: object, **kwargs: object) -> Mesh:
        times = Counter(map(id, flat := np.asarray(devices, dtype=object).ravel()))
        if len(times) < flat.size:
            raise DevicesError(
                report(
                    "A Mesh has each device once, and here",
                    [f"{d!r} stands in it {times[id(d)]} times" for d in {id(d): d for d in flat}.values()][:8],
                    "Under replicax.compat.install(replicas=…) jax.devices() is a list in which a device stands for "
                    "several replicas: pmap, device_put_replicated and device_put_sharded take it. For a mesh write "
                    "list(dict.fromkeys(jax.devices())), which are the real devices.",
                )
            )
        return original(cls, devices, *args, **kwargs)

    return new
