"""``REPLICAX_COMPAT=1``: :func:`replicax.compat.install` as soon as a program has imported JAX, and not before.

``replicax_compat.pth`` imports this module when an interpreter starts in whose environment the variable is set. It
imports nothing itself but the standard library: JAX reads environment variables when it is imported, and the program
may want to set them first.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

VARIABLE = "REPLICAX_COMPAT"


class AfterImport:
    """A finder that finds JAX as the others do, and has replicax installed when its import is through.

    Where JAX is imported because replicax is, that has to wait until replicax is imported, too.
    """

    def __init__(self) -> None:
        self._running: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec, with a loader that tells us when it is done; None of any other module."""
        if name not in ("jax", "replicax"):
            return None
        for finder in sys.meta_path:
            if isinstance(finder, AfterImport) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                self._watch(spec)
                return spec
        return None

    def _watch(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        if not hasattr(loader, "exec_module"):  # a namespace, which no installed JAX is
            return
        execute = loader.exec_module

        def and_then(module: ModuleType) -> None:
            self._running.add(spec.name)
            try:
                execute(module)
            finally:
                self._running.discard(spec.name)
            if not self._running and "jax" in sys.modules:
                self._install()

        loader.exec_module = and_then

    def _install(self) -> None:
        if self not in sys.meta_path:  # done, or on the way: importing replicax.compat comes here, too
            return
        sys.meta_path.remove(self)
        try:
            importlib.import_module("replicax.compat").install()
        except Exception as error:
            warnings.warn(
                f"{VARIABLE} is set, but replicax could not be imported ({type(error).__name__}: {error}), so that "
                f"jax.pmap stays JAX's own.",
                RuntimeWarning,
                stacklevel=2,
            )


def start(value: str) -> None:
    """Does what the variable asks for: nothing, or replicax after JAX."""
    if value.lower() in ("", "0", "false"):
        return
    if value.lower() not in ("1", "true"):
        warnings.warn(
            f"{VARIABLE}={value!r} is neither 1 nor 0, so that jax.pmap stays JAX's own. Write {VARIABLE}=1.",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    if not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())


start(os.environ.get(VARIABLE, ""))
