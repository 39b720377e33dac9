"""Simulated devices: several CPU devices in one process, for development and tests on a laptop."""

from __future__ import annotations

import jax

from replicax._messages import as_int
from replicax.errors import SimulationError


def simulate_devices(count: int) -> None:
    """Makes JAX use ``count`` simulated CPU devices in this process, and no other devices.

    Simulated devices share the machine's cores: use them to test correctness, not speed. You may import JAX first, but
    call this function before JAX initializes its backends, that is, before the first array is created. The
    function also makes JAX start enough threads for these devices: see ``docs/simulated-devices.md``.

    Args:
        count: The number of devices, at least 1.

    Raises:
        OptionTypeError: ``count`` is not an int.
        SimulationError: JAX has already started with other devices, or ``count`` is less than 1.

    Example:
        >>> import replicax
        >>> replicax.simulate_devices(8)
    """
    count = as_int("simulate_devices(count)", count)
    if count < 1:
        raise SimulationError(f"simulate_devices({count}): count must be at least 1. Write simulate_devices(8).")
    try:
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        started = f"{jax.device_count()} device(s) of platform {jax.default_backend()!r}"
        if jax.default_backend() == "cpu" and jax.device_count() == count:
            return
        raise SimulationError(
            f"simulate_devices({count}): JAX has already started in this process with {started}, and cannot change "
            f"its devices any more. Call simulate_devices right after the imports, before the program creates an "
            f"array or calls jax.devices() (in a notebook: restart the kernel)."
        ) from None
