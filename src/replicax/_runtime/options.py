"""The validated options of ``pmap``."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import jax

from replicax._engine.lanes import AUTO, VECTORIZED, Auto, Lanes
from replicax._engine.outputs import Outputs
from replicax._layout.axes import Chosen, Spec
from replicax._messages import report
from replicax.errors import DevicesError, NestedMapError, OptionTypeError, UnknownBackendError


@dataclass(frozen=True)
class Options:
    """The validated options of ``pmap``, which are the same for every call.

    Attributes:
        axis_name: The user's name for the mapped axis, or ``ANONYMOUS``.
        in_axes: The mapped axes of the positional arguments.
        outputs: ``out_axes``, and the policy for results with ``out_axes=None``.
        static: The static arguments.
        donated: The donated arguments.
        devices: The devices to use, or None for all devices of the backend.
        backend: The platform to use, or None for JAX's default.
        axis_size: The number of replicas, or None to infer it from the arguments.
        lanes: How many replicas a device runs at once, None for all of them; ``AUTO`` leaves it to replicax.
        deterministic: Whether the bits of the results must not depend on the devices.
    """

    axis_name: Hashable
    in_axes: Spec
    outputs: Outputs
    static: Chosen
    donated: Chosen
    devices: tuple[jax.Device, ...] | None
    backend: str | None
    axis_size: int | None
    lanes: Lanes | Auto = AUTO
    deterministic: bool = False

    def resolve_devices(self) -> tuple[jax.Device, ...]:
        """The devices that the map may use. Initializes JAX's backends, so it is called only when a program is built.

        Raises:
            UnknownBackendError: JAX does not have the backend.
            DevicesError: a device does not belong to the backend.
        """
        if self.devices is not None and self.backend is None:
            return self.devices
        try:
            known = tuple(jax.devices(self.backend))
        except RuntimeError as error:
            if self.backend is None:
                raise
            raise UnknownBackendError(
                f"backend={self.backend!r}: this installation of JAX has no such backend ({error}). Name an "
                f"available backend, such as {jax.default_backend()!r}, or leave backend out."
            ) from None
        if self.devices is None:
            return known
        foreign = [repr(device) for device in self.devices if device not in known]
        if foreign:
            raise DevicesError(
                report(
                    f"All devices must belong to backend={self.backend!r}; these do not:",
                    foreign,
                    "Pass either devices or backend, not both.",
                )
            )
        return self.devices

    def refuse_inner(self, name: str) -> None:
        """Rejects the options of the outermost map for the function ``name``, which is mapped inside another map.

        Raises:
            NestedMapError: ``devices``, ``backend``, ``lanes`` or ``deterministic`` is set.
        """
        chosen = [which for which in ("devices", "backend") if getattr(self, which) is not None]
        chosen += ["lanes"] * (isinstance(self.lanes, int) and not self.deterministic)  # deterministic implies 1
        chosen += ["deterministic"] * self.deterministic
        if chosen:
            raise NestedMapError(
                f"Nested pmap with explicit {' and '.join(chosen)} argument. {name} is mapped inside another mapped "
                f"function. An inner map runs on the devices of the outer map, all of its replicas at once on each. "
                f"Leave the argument out here, and pass it to the outermost pmap."
            )


def check_lanes(lanes: str | int) -> Lanes | Auto:
    """Validates ``lanes`` and returns how many lanes a device runs at once, None for all of them, or ``AUTO``.

    Raises:
        OptionTypeError: ``lanes`` is not one of the words, and not a positive int.
    """
    if isinstance(lanes, str) and lanes in _LANES:
        return _LANES[lanes]
    try:
        at_once = 0 if isinstance(lanes, bool) else operator.index(lanes)  # type: ignore[arg-type]
    except TypeError:
        at_once = 0
    if at_once < 1:
        raise OptionTypeError(
            f"lanes says how a device runs its replicas: {', '.join(map(repr, _LANES))}, or how many at a time, at "
            f"least 1; got {lanes!r:.60}."
        )
    return at_once


def check_deterministic(deterministic: bool, lanes: str | int) -> Lanes | Auto:
    """Validates ``deterministic`` and ``lanes``, and returns how many lanes a device runs at once, as above.

    Raises:
        OptionTypeError: ``deterministic`` is not a bool, or ``lanes`` contradicts it, or is invalid.
    """
    if not isinstance(deterministic, bool):
        raise OptionTypeError(f"deterministic must be True or False, got {deterministic!r:.60}.")
    chosen = check_lanes(lanes)
    if deterministic and chosen not in (AUTO, 1):
        raise OptionTypeError(
            f"deterministic=True runs the replicas of a device one after the other, and lanes is {lanes!r}. Leave "
            f"lanes out, or write lanes='sequential'."
        )
    return 1 if deterministic else chosen


_LANES: dict[str, Lanes | Auto] = {"auto": AUTO, "vectorized": VECTORIZED, "sequential": 1}


def check_devices(devices: Sequence[jax.Device]) -> tuple[jax.Device, ...]:
    """Validates ``devices`` and returns them as a tuple.

    Raises:
        OptionTypeError: ``devices`` is not a sequence.
        DevicesError: ``devices`` is empty, contains a non-device or a duplicate, or mixes platforms.
    """
    if isinstance(devices, str) or not isinstance(devices, Iterable):
        raise OptionTypeError(f"devices must be a list of devices, got {devices!r:.60}. Write [device] for one.")
    given = tuple(devices)
    if not given:
        raise DevicesError(
            "The 'devices' argument to pmap must be non-empty, or None. Pass some of jax.devices(), or leave devices "
            "out to use all of them."
        )
    faults = [
        f"devices[{i}] is {d!r}, which is not a device" for i, d in enumerate(given) if not isinstance(d, jax.Device)
    ]
    faults = faults or [f"{d!r} appears {given.count(d)} times" for d in dict.fromkeys(given) if given.count(d) > 1]
    platforms = sorted({d.platform for d in given}) if not faults else []
    if len(platforms) > 1:
        faults = [f"the devices are of the platforms {', '.join(platforms)}"]
    if faults:
        raise DevicesError(
            report(
                "devices must contain devices of one platform, each once:",
                faults,
                "Pass some of jax.devices(), or leave devices out to use all of them.",
            )
        )
    return given
