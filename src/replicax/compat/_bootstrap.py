"""Runs a program like python does, and installs replicax as soon as the program imports JAX.

``python -m replicax.compat`` runs this file as a script in a new interpreter. It imports only the standard library:
JAX reads environment variables on import, and the program may set them before it imports JAX.
"""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import CodeType, ModuleType, TracebackType
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


def run(arguments: list[str]) -> None:
    """Runs ``-m MODULE …`` or ``SCRIPT …`` as ``__main__``, like python does."""
    try:
        if arguments[0] == "-m":
            _set_path(os.getcwd())
            sys.argv = arguments[1:]
            _become_main(None, None)
            runpy._run_module_as_main(arguments[1])  # type: ignore[attr-defined]  # python itself calls this
        elif pkgutil.get_importer(arguments[0]) is not None:  # a directory or a zip file
            _set_path(os.path.abspath(arguments[0]))
            sys.argv = arguments
            _become_main(None, None)
            runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
        else:
            script = os.path.abspath(arguments[0])
            code = _code_of(script)
            _set_path(os.path.dirname(os.path.realpath(script)))
            sys.argv = arguments
            exec(code, _become_main(script, SourceFileLoader("__main__", script)))
    except SystemExit:
        raise
    except BaseException as error:
        _hide_our_frames(error)
        raise


def _set_path(first: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = first


def _become_main(file: str | None, loader: SourceFileLoader | None) -> dict[str, Any]:
    """Resets the namespace of ``__main__`` to its state at the start of a program."""
    namespace = vars(sys.modules["__main__"])
    builtins, annotated = namespace["__builtins__"], "__annotations__" in namespace
    namespace.clear()
    namespace.update(__name__="__main__", __doc__=None, __package__=None, __loader__=loader, __spec__=None)
    if annotated:  # before Python 3.14
        namespace["__annotations__"] = {}
    namespace["__builtins__"] = builtins
    if file is not None:
        namespace.update(__file__=file, __cached__=None)
    return namespace


def _code_of(script: str) -> CodeType:
    try:
        with io.open_code(script) as file:
            compiled: CodeType | None = pkgutil.read_code(file)  # None unless it is a .pyc file
            if compiled is not None:
                return compiled
            file.seek(0)
            source = file.read()
    except OSError as error:
        print(f"{sys.executable}: can't open file {script!r}: [Errno {error.errno}] {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    code: CodeType = compile(source, script, "exec", dont_inherit=True)
    return code


def _hide_our_frames(error: BaseException) -> None:
    """Removes this file's frames from the traceback for ``sys.excepthook``."""
    hook = sys.excepthook

    def show(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        sys.excepthook = hook
        while value is error and traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
            traceback = traceback.tb_next
        hook(kind, value.with_traceback(traceback), traceback)

    sys.excepthook = show


if __name__ == "__main__":
    # The program resets the namespace of __main__, so the code of this file must run in another module.
    spec: Any = spec_from_file_location("_replicax_bootstrap", __file__)
    bootstrap = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    bootstrap.install_after_jax()
    bootstrap.run(sys.argv[1:])
