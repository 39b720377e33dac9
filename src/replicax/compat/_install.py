"""replicax in JAX's places, and JAX back in its own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh

from replicax import _jax
from replicax._typing import Function
from replicax.compat._functions import device_put_replicated, device_put_sharded, pmap
from replicax.compat._helpers import Helpers
from replicax.compat._virtual import FUNCTIONS, REAL, guarded_mesh, see, seen, wanted
from replicax.errors import ReplicasError

#: The attributes of ``jax`` that are taken, and what takes them.
_OURS: dict[str, Function] = {
    "pmap": pmap,
    "device_put_replicated": device_put_replicated,
    "device_put_sharded": device_put_sharded,
}

_ABSENT = object()

#: What the attributes were before; empty while nothing is installed.
_before: dict[str, Any] = {}
_helpers: list[Helpers] = []
_mesh = Mesh.__new__


def install(replicas: int | None = None) -> None:
    """Puts :func:`replicax.compat.pmap` in the place of ``jax.pmap``, for the rest of the program.

    ``jax.device_put_replicated`` and ``jax.device_put_sharded``, which JAX 0.10 removed, come back, too. They are
    plain attributes of ``jax``, which a mock can patch. Call it before the modules that use them are imported: a
    ``from jax import pmap`` takes what it finds. A second call changes nothing.

    With ``replicas`` the program sees that many devices, by ``jax.devices``, ``jax.local_devices``,
    ``jax.device_count`` and ``jax.local_device_count``: lists in which a device stands for several replicas. JAX
    itself and orbax see those that there are. The functions of flax, chex and kfac-jax that build a mesh of all
    devices, or read one shard, are replaced by such as work on any layout, and ``jax.sharding.Mesh`` refuses a device
    that stands in it several times.

    Args:
        replicas: The number of devices that the program is to see, at least as many as there are. The environment's
            REPLICAX_REPLICAS when None; without one of the two those that there are.

    Raises:
        OptionTypeError: ``replicas`` is no int.
        ReplicasError: ``replicas`` is less than 1; or JAX has started already; or another number is installed.

    Warns:
        RuntimeWarning: modules have taken JAX's own functions already.

    Example:
        >>> import jax
        >>> from replicax import compat
        >>> compat.install()
        >>> jax.pmap is compat.pmap
        True
        >>> compat.uninstall()
    """
    _install(wanted(replicas), later=False)


def _install(replicas: int | None, *, later: bool) -> None:
    """Takes the places; with ``later`` also after the program has seen other devices."""
    if _before and replicas not in (None, now := seen()):
        raise ReplicasError(
            f"replicas={replicas}: replicax is installed already, with replicas={now}, and what the program has "
            f"counted so far would be wrong. Install it once, or call replicax.compat.uninstall() in between."
        )
    if not _before and replicas is not None and not later and _jax.devices_are_known():
        raise ReplicasError(
            f"replicas={replicas}: the program has used JAX's devices already (made an array, or counted them), and "
            f"what it knows of them would be wrong. Call replicax.compat.install right after the imports, or run the "
            f"program with python -m replicax.compat --replicas {replicas}."
        )
    if not _before:
        see(replicas)
        _helpers.append(Helpers())
        _helpers[0].install()
        setattr(Mesh, "__new__", staticmethod(guarded_mesh(_mesh)))  # noqa: B010  # as mypy has it
    ours = _OURS | (FUNCTIONS if seen() is not None else {})
    for name, function in ours.items():
        present = vars(jax).get(name, _ABSENT)
        if present is _before.setdefault(name, present):  # and not what a mock has put there since
            setattr(jax, name, function)
    _warn_of_those_who_took(_before)


def uninstall() -> None:
    """Puts back what :func:`install` found, also where that was nothing. Without an install it does nothing.

    Example:
        >>> import jax
        >>> from replicax import compat
        >>> compat.install()
        >>> compat.uninstall()
        >>> hasattr(jax, "device_put_sharded")
        False
    """
    if not _before:
        return
    for name, thing in _before.items():
        if thing is not _ABSENT:
            setattr(jax, name, thing)
        elif name in vars(jax):
            delattr(jax, name)
    _before.clear()
    _helpers.pop().uninstall()
    setattr(Mesh, "__new__", staticmethod(_mesh))  # noqa: B010
    see(None)


@contextmanager
def installed(replicas: int | None = None) -> Iterator[None]:
    """:func:`install` for the length of a ``with`` block, or of a function that it decorates.

    Args:
        replicas: As of :func:`install`, also where JAX has started.

    Raises:
        OptionTypeError: as :func:`install`.
        ReplicasError: ``replicas`` is less than 1; or another number is installed.

    Example:
        >>> import jax, numpy as np
        >>> from replicax import compat
        >>> with compat.installed():
        ...     y = jax.pmap(lambda x: 2 * x)(np.arange(12.0))  # 12 replicas on any number of devices
        >>> y.shape
        (12,)
    """
    outermost = not _before
    _install(wanted(replicas), later=True)
    try:
        yield
    finally:
        if outermost:
            uninstall()


def _warn_of_those_who_took(originals: Mapping[str, object]) -> None:
    took = sorted(
        f"{name} ({attribute})"
        for name, module in list(sys.modules.items())
        for attribute, original in originals.items()
        if name.partition(".")[0] not in REAL
        and original is not _ABSENT
        and getattr(module, "__dict__", {}).get(attribute) is original
    )
    if took:
        warnings.warn(
            f"These modules have taken JAX's own functions already, with `from jax import …`, and keep them: "
            f"{', '.join(took)}. Call replicax.compat.install() before they are imported, or run the program with "
            f"python -m replicax.compat.",
            RuntimeWarning,
            stacklevel=4,
        )
