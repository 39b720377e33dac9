"""Runs a program like python does, and installs replicax as soon as the program imports JAX.

``python -m replicax.compat`` runs this file as a script in a new interpreter. It imports only the standard library:
JAX reads environment variables on import, and the program may set them before it imports JAX.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any


class AfterImport:
    """An import hook that calls a function after some modules have been imported.

    Args:
        names: The names of the modules.
        done: Called when one of the modules has been imported and none of them is still being imported.
    """

    def __init__(self, names: Sequence[str], done: Callable[[], None]) -> None:
        self._names, self._done = names, done
        self._running: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a watched module, from the other finders, with a wrapped loader; None for other modules."""
        if name not in self._names:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                self._watch(spec)
                return spec
        return None

    def _watch(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        if not hasattr(loader, "exec_module"):  # a namespace package
            return
        execute = loader.exec_module

        def and_then(module: ModuleType) -> None:
            self._running.add(spec.name)
            try:
                execute(module)
            finally:
                self._running.discard(spec.name)
            if not self._running:
                self._done()

        loader.exec_module = and_then


def install_after_jax() -> None:
    """Calls :func:`replicax.compat.install` as soon as the program has imported JAX.

    If the program imports JAX by importing replicax, the call waits until replicax has been imported, too.
    """

    def done() -> None:
        if "jax" not in sys.modules or finder not in sys.meta_path:  # the import below also triggers this function
            return
        sys.meta_path.remove(finder)
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = list(sys.path)
        sys.path.append(root)  # replicax may be in a directory that only `python -m` adds to sys.path
        try:
            importlib.import_module("replicax.compat").install()
        finally:
            sys.path[:] = path

    finder: Any = AfterImport(("jax", "replicax"), done)
    sys.meta_path.insert(0, finder)


def _module(name: str, path: str) -> Any:
    """A module from a file, whatever ``sys.path`` is."""
    spec: Any = spec_from_file_location(name, path)
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    # The program resets the namespace of __main__, so the code of this file must run in another module.
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    _module("_replicax_bootstrap", __file__).install_after_jax()
    _module("_replicax_program", os.path.join(root, "replicax_cli", "program.py")).run(sys.argv[1:], __file__)
