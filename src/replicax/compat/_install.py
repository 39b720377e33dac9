"""Replaces functions of ``jax``, and restores them."""

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

#: The attributes of ``jax`` that are replaced, with their replacements.
_OURS: dict[str, Function] = {
    "pmap": pmap,
    "device_put_replicated": device_put_replicated,
    "device_put_sharded": device_put_sharded,
}

_ABSENT = object()

#: The original attributes; empty while nothing is installed.
_before: dict[str, Any] = {}
_helpers: list[Helpers] = []
_mesh = Mesh.__new__


def install(replicas: int | None = None) -> None:
    """Replaces ``jax.pmap`` by :func:`replicax.compat.pmap`, for the rest of the program.

    Also restores ``jax.device_put_replicated`` and ``jax.device_put_sharded``, which JAX 0.10 removed. All three are
    plain attributes of ``jax``, which a mock can patch. Call ``install`` before the modules that use them are
    imported: ``from jax import pmap`` keeps the function that it imports. A second call has no effect.

    With ``replicas``, ``jax.devices``, ``jax.local_devices``, ``jax.device_count`` and ``jax.local_device_count``
    report that many devices: the lists contain a real device several times, once per replica. JAX itself and orbax
    still see the real devices. Functions of flax, chex and kfac-jax that build a mesh of all devices, or read one
    shard, are replaced by functions that work with any number of replicas per device. ``jax.sharding.Mesh`` rejects
    duplicate devices.

    Args:
        replicas: The number of devices that the program sees, at least the number of real devices. When None, the
            environment variable REPLICAX_REPLICAS; if that is not set, the program sees the real devices.

    Raises:
        OptionTypeError: ``replicas`` is not an int.
        ReplicasError: ``replicas`` or REPLICAX_REPLICAS is not a number of at least 1, JAX has already initialized
            its devices, or another number is installed.

    Warns:
        RuntimeWarning: some modules have already imported JAX's own functions.

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
    """Installs the replacements. With ``later``, ``replicas`` may be set after the program has used JAX's devices."""
    if _before and replicas not in (None, now := seen()):
        raise ReplicasError(
            f"replicas={replicas}: replicax is already installed, with replicas={now}, and the program may have used "
            f"that number. Install it once, or call replicax.compat.uninstall() first."
        )
    if not _before and replicas is not None and not later and _jax.devices_are_known():
        raise ReplicasError(
            f"replicas={replicas}: the number of devices cannot change after the program has used JAX's devices "
            f"already (created an array, or counted devices). Call replicax.compat.install right after the imports, "
            f"or run the program with python -m replicax.compat --replicas {replicas}."
        )
    if not _before:
        see(replicas)
        _helpers.append(Helpers())
        _helpers[0].install()
        setattr(Mesh, "__new__", staticmethod(guarded_mesh(_mesh)))  # noqa: B010  # mypy rejects an assignment
    ours = _OURS | (FUNCTIONS if seen() is not None else {})
    for name, function in ours.items():
        present = vars(jax).get(name, _ABSENT)
        if present is _before.setdefault(name, present):  # do not overwrite a mock
            setattr(jax, name, function)
    _warn_of_those_who_took(_before)


def uninstall() -> None:
    """Restores the attributes of ``jax``, and deletes those that did not exist. No effect if nothing is installed.

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
    """:func:`install` as a context manager or decorator. Uninstalls at the end, unless it was already installed.

    Args:
        replicas: As in :func:`install`. Allowed after JAX has initialized its devices.

    Raises:
        OptionTypeError: ``replicas`` is not an int.
        ReplicasError: ``replicas`` or REPLICAX_REPLICAS is not a number of at least 1, or another number is installed.

    Warns:
        RuntimeWarning: some modules have already imported JAX's own functions.

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
            f"These modules have imported JAX's own functions already, with `from jax import …`, and keep them: "
            f"{', '.join(took)}. Call replicax.compat.install() before they are imported, or run the program with "
            f"python -m replicax.compat.",
            RuntimeWarning,
            stacklevel=4,
        )
