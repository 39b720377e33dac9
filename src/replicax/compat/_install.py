"""replicax in JAX's places, and JAX back in its own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from replicax.compat._functions import device_put_replicated, device_put_sharded, pmap

#: The attributes of ``jax`` that are taken, and what takes them.
_OURS: dict[str, Callable[..., Any]] = {
    "pmap": pmap,
    "device_put_replicated": device_put_replicated,
    "device_put_sharded": device_put_sharded,
}

_ABSENT = object()

#: What the attributes were before; empty while nothing is installed.
_before: dict[str, Any] = {}


def install() -> None:
    """Puts :func:`replicax.compat.pmap` in the place of ``jax.pmap``, for the rest of the program.

    ``jax.device_put_replicated`` and ``jax.device_put_sharded``, which JAX 0.10 removed, come back, too. They are
    plain attributes of ``jax``, which a mock can patch. Call it before the modules that use them are imported: a
    ``from jax import pmap`` takes what it finds. A second call changes nothing.

    Warns:
        RuntimeWarning: modules have taken JAX's own ``pmap`` already.

    Example:
        >>> import jax
        >>> from replicax import compat
        >>> compat.install()
        >>> jax.pmap is compat.pmap
        True
        >>> compat.uninstall()
    """
    for name, ours in _OURS.items():
        present = vars(jax).get(name, _ABSENT)
        if present is _before.setdefault(name, present):  # and not what a mock has put there since
            setattr(jax, name, ours)
    _warn_of_those_who_took(_before["pmap"])


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
    for name, thing in _before.items():
        if thing is not _ABSENT:
            setattr(jax, name, thing)
        elif name in vars(jax):
            delattr(jax, name)
    _before.clear()


@contextmanager
def installed() -> Iterator[None]:
    """:func:`install` for the length of a ``with`` block, or of a function that it decorates.

    Example:
        >>> import jax, numpy as np
        >>> from replicax import compat
        >>> with compat.installed():
        ...     y = jax.pmap(lambda x: 2 * x)(np.arange(12.0))  # 12 replicas on any number of devices
        >>> y.shape
        (12,)
    """
    outermost = not _before
    install()
    try:
        yield
    finally:
        if outermost:
            uninstall()


def _warn_of_those_who_took(original: object) -> None:
    took = sorted(
        name
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] != "jax" and getattr(module, "__dict__", {}).get("pmap") is original
    )
    if took:
        warnings.warn(
            f"These modules have taken JAX's own pmap already, with `from jax import pmap`, and keep it: "
            f"{', '.join(took)}. Call replicax.compat.install() before they are imported, or set REPLICAX_COMPAT=1.",
            RuntimeWarning,
            stacklevel=3,
        )
