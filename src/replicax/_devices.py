"""Simulated devices: several CPU devices in one process, to write and test programs for many on a laptop."""

from __future__ import annotations

import jax

from replicax._messages import as_int
from replicax.errors import SimulationError


def simulate_devices(count: int) -> None:
    """Makes this process see ``count`` CPU devices, and no others.

    They share the machine's cores: they show that a program is right, not how fast it would be on real devices.
    Call it before JAX first looks for devices, that is, before the first array is made; an import is no harm. JAX then
    gets the threads that so many devices need: see the README.

    Args:
        count: The number of devices, at least 1.

    Raises:
        SimulationError: JAX has started already, with other devices; or ``count`` is less than 1.

    Example:
        >>> import replicax
        >>> replicax.simulate_devices(8)
    """
    count = as_int("simulate_devices(count)", count)
    if count < 1:
        raise SimulationError(f"simulate_devices({count}): there has to be at least one device.")
    try:
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        started = f"{jax.device_count()} device(s) of platform {jax.default_backend()!r}"
        if jax.default_backend() == "cpu" and jax.device_count() == count:
            return
        raise SimulationError(
            f"simulate_devices({count}): JAX has already started in this process, with {started}, and cannot change "
            f"them any more. Call simulate_devices before anything makes an array or asks for devices, best right "
            f"after the imports (in a notebook: restart the kernel)."
        ) from None
