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

#: JAX's own functions, even if ``jax.devices`` is patched.
devices, local_devices = xla_bridge.devices, xla_bridge.local_devices

#: Whether JAX's backends are initialized in this process.
devices_are_known = xla_bridge.backends_are_initialized


def make_cpu_client_by(around: Callable[[Callable[[], Client]], Client]) -> None:
    """Makes JAX create its CPU client through ``around``, which gets JAX's own factory.

    Does nothing if this version of JAX has no such factory.
    """
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        factories: Any = vars(sys.modules["jax._src.xla_bridge"])["_backend_factories"]
        before = factories["cpu"]
        factories["cpu"] = dataclasses.replace(before, factory=functools.partial(around, before.factory))
