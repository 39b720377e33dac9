"""What the user asked of ``pmap``, checked."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import jax

from replicax._engine.outputs import Outputs
from replicax._layout.axes import Chosen, Spec
from replicax._messages import report
from replicax.errors import DevicesError, NestedMapError, OptionTypeError, UnknownBackendError


@dataclass(frozen=True)
class Options:
    """What the user asked of ``pmap``, checked: the part of a signature that does not change between calls.

    Attributes:
        axis_name: The user's name of the mapped axis (or the name of one without a name).
        in_axes: The mapped axes of the positional arguments.
        outputs: The mapped axes of the result, and what one without a mapped axis is.
        static: The static arguments.
        donated: The donated arguments.
        devices: The devices to use, or None for all of the backend.
        backend: The platform to use, or None for JAX's default.
        axis_size: The number of replicas, or None to read it off the arguments.
    """

    axis_name: Hashable
    in_axes: Spec
    outputs: Outputs
    static: Chosen
    donated: Chosen
    devices: tuple[jax.Device, ...] | None
    backend: str | None
    axis_size: int | None

    def resolve_devices(self) -> tuple[jax.Device, ...]:
        """The devices that replicas may lie on; the first moment that JAX's backends are touched."""
        if self.devices is not None and self.backend is None:
            return self.devices
        try:
            known = tuple(jax.devices(self.backend))
        except RuntimeError as error:
            if self.backend is None:
                raise
            raise UnknownBackendError(
                f"backend={self.backend!r}: JAX has no such backend here ({error}). Name one that it has, such as "
                f"{jax.default_backend()!r}, or leave backend out."
            ) from None
        if self.devices is None:
            return known
        foreign = [repr(device) for device in self.devices if device not in known]
        if foreign:
            raise DevicesError(
                report(
                    f"devices and backend={self.backend!r} contradict each other:",
                    [f"{device} is not a device of that backend" for device in foreign],
                    "Give one of the two.",
                )
            )
        return self.devices

    def refuse_inner_devices(self, name: str) -> None:
        """Refuses devices of its own for ``name``, which is mapped inside another mapped function.

        Raises:
            NestedMapError: there are some.
        """
        chosen = [which for which in ("devices", "backend") if getattr(self, which) is not None]
        if chosen:
            raise NestedMapError(
                f"Nested pmap with explicit {' and '.join(chosen)} argument. {name} is mapped inside another mapped "
                f"function, whose devices its replicas share out. Leave it out here, and give it to the outermost pmap."
            )


def check_devices(devices: Sequence[jax.Device]) -> tuple[jax.Device, ...]:
    """The devices as a tuple.

    Raises:
        OptionTypeError: it is no sequence.
        DevicesError: it is empty, or holds something that is no device, one twice, or devices of several platforms.
    """
    if isinstance(devices, str) or not isinstance(devices, Iterable):
        raise OptionTypeError(f"devices must be a list of devices, and is {devices!r:.60}. Write [device] for one.")
    given = tuple(devices)
    if not given:
        raise DevicesError(
            "The 'devices' argument to pmap must be non-empty, or None. Pass some of jax.devices(), or leave devices "
            "out to use all of them."
        )
    faults = [
        f"devices[{i}] is {d!r}, which is no device" for i, d in enumerate(given) if not isinstance(d, jax.Device)
    ]
    faults = faults or [
        f"{d!r} stands in it {given.count(d)} times" for d in dict.fromkeys(given) if given.count(d) > 1
    ]
    platforms = sorted({d.platform for d in given}) if not faults else []
    if len(platforms) > 1:
        faults = [f"its devices are of the platforms {', '.join(platforms)}"]
    if faults:
        raise DevicesError(
            report(
                "devices must be one or more different devices of one platform:",
                faults,
                "Pass some of jax.devices(), or leave devices out to use all of them.",
            )
        )
    return given
