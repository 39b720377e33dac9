"""The devices that a program sees under ``install(replicas=N)``: N entries, several for each real device."""

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

#: Packages that see the real devices, because they place or save arrays.
REAL = ("jax", "jaxlib", "orbax", "replicax")

#: The number of devices that the program sees; None for the real number.
_replicas: int | None = None


def wanted(replicas: int | None) -> int | None:
    """The number of replicas from the argument or from the environment; None if neither is set.

    Raises:
        OptionTypeError: ``replicas`` is not an int.
        ReplicasError: the number is less than 1, or the environment variable is not a number.
    """
    if replicas is not None:
        return _at_least_one(as_int("replicas", replicas), replicas, "replicas", "replicas=8")
    said = os.environ.get(VARIABLE)
    return number(said, VARIABLE, f"{VARIABLE}=8") if said else None


def number(said: str, where: str, right: str) -> int:
    """Parses a number of replicas.

    Args:
        said: The text.
        where: The name of its source, for the message.
        right: An example of a valid setting, for the message.

    Raises:
        ReplicasError: the text is not a number, or the number is less than 1.
    """
    return _at_least_one(int(said) if said.strip().isdecimal() else 0, said, where, right)


def _at_least_one(count: int, said: object, where: str, right: str) -> int:
    if count < 1:
        raise ReplicasError(
            f"{where} must be the number of devices that the program sees, at least 1, got {said!r}. Write {right}."
        )
    return count


def see(replicas: int | None) -> None:
    """Sets the number of devices that the program sees; None for the real devices."""
    global _replicas
    _replicas = replicas


def seen() -> int | None:
    """The number of devices that the program sees; None for the real number."""
    return _replicas


def _stand_ins(real: list[jax.Device]) -> list[jax.Device]:
    """The list that the program sees instead of the real devices: entry r is device ``r // lanes``, as in maps."""
    if _replicas is None or real[0].client is not _jax.devices()[0].client:  # another platform, such as CPU next to GPU
        return real
    if jax.process_count() > 1:
        raise ReplicasError(
            f"replicas={_replicas}: this run has {jax.process_count()} processes, but replicas supports only one "
            f"process. Leave replicas out."
        )
    if _replicas < len(real):
        raise ReplicasError(
            f"replicas={_replicas}: there are {len(real)} devices, and the program cannot see fewer. Write "
            f"replicas={len(real)} or more, or hide devices from JAX, for example with CUDA_VISIBLE_DEVICES."
        )
    lanes = -(-_replicas // len(real))
    return [real[r // lanes] for r in range(_replicas)]


def program_devices() -> list[jax.Device]:
    """The local devices as the program sees them."""
    return _stand_ins(_jax.local_devices())


def padded() -> bool:
    """Whether a map over all devices that the program sees has padding lanes, so its results do not shard evenly."""
    real = len(_jax.devices())
    return _replicas is not None and _replicas % -(-_replicas // real) != 0


def _for(asking: FrameType, real: list[jax.Device]) -> list[jax.Device]:
    """The devices for a caller: real ones for the packages in ``REAL``, else those that the program sees."""
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


#: The replacements of attributes of ``jax``.
FUNCTIONS: dict[str, Function] = {
    "devices": _devices,
    "local_devices": _local_devices,
    "device_count": _device_count,
    "local_device_count": _local_device_count,
}


# ---------------------------------------------------------------------------------------------------------------
# Lists with duplicate devices


def distinct(devices: Sequence[jax.Device]) -> tuple[tuple[jax.Device, ...], int]:
    """The distinct devices of a list, and the length of the list.

    Raises:
        OptionTypeError: ``devices`` is not a list.
        DevicesError: ``devices`` is empty, contains a non-device, or mixes platforms.
    """
    if isinstance(devices, str) or not isinstance(devices, Iterable):
        return check_devices(devices), 0
    given = tuple(devices)
    real = [d for i, d in enumerate(given) if not any(d is earlier for earlier in given[:i])]
    return check_devices(real), len(given)


def guarded_mesh(original: Function) -> Function:
    """``Mesh.__new__`` that rejects duplicate devices. JAX accepts them, and fails later."""

    @functools.wraps(original)
    def new(cls: type[Mesh], devices: Sequence[jax.Device] | HostArray, *args: object, **kwargs: object) -> Mesh:
        times = Counter(map(id, flat := np.asarray(devices, dtype=object).ravel()))
        if len(times) < flat.size:
            raise DevicesError(
                report(
                    "A Mesh must contain each device once, but:",
                    [f"{d!r} appears {times[id(d)]} times" for d in {id(d): d for d in flat}.values()][:8],
                    "Under replicax.compat.install(replicas=…), jax.devices() contains a device once per replica. Pass "
                    "that list only to pmap, device_put_replicated and device_put_sharded. For a mesh, write "
                    "list(dict.fromkeys(jax.devices())), the real devices.",
                )
            )
        return original(cls, devices, *args, **kwargs)

    return new
