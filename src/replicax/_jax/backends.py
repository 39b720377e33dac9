"""JAX's devices, and the client of its CPU devices."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

from jax._src import xla_bridge

from replicax._jax.aliases import Client

#: JAX's own, whatever stands in their places in ``jax``.
devices, local_devices = xla_bridge.devices, xla_bridge.local_devices

#: Whether anybody has made an array or asked for devices in this process.
devices_are_known = xla_bridge.backends_are_initialized


def make_cpu_client_by(around: Callable[[Callable[[], Client]], Client]) -> None:
    """Has JAX make its client of CPU devices by ``around`` from now on, which is given what makes it.

    Where JAX keeps that elsewhere, nothing happens.
    """
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        factories: Any = vars(sys.modules["jax._src.xla_bridge"])["_backend_factories"]
        before = factories["cpu"]
        factories["cpu"] = dataclasses.replace(before, factory=functools.partial(around, before.factory))
