"""Runs a program as python does, with replicax in JAX's places: what ``python -m replicax.compat`` starts.

It runs by its path, in an interpreter of its own, and imports the standard library alone: JAX reads environment
variables when it is imported, and the program may set them first.
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
    """A finder that finds some modules as the others do, and calls a function once their imports are through.

    Args:
        names: The modules.
        done: What to call when one of them has been imported and no other of them is being imported.
    """

    def __init__(self, names: Sequence[str], done: Callable[[], None]) -> None:
        self._names, self._done = names, done
        self._running: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec, with a loader that tells us when it is done; None of any other module."""
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
    """Has :func:`replicax.compat.install` called as soon as the program has imported JAX, and not before.

    Where JAX is imported because replicax is, that has to wait until replicax is imported, too.
    """

    def done() -> None:
        if "jax" not in sys.modules or finder not in sys.meta_path:  # importing replicax.compat comes here, too
            return
        sys.meta_path.remove(finder)
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = list(sys.path)
        sys.path.append(root)  # replicax may lie in a directory that only `python -m` has in its path
        try:
            importlib.import_module("replicax.compat").install()
        finally:
            sys.path[:] = path

    finder: Any = AfterImport(("jax", "replicax"), done)
    sys.meta_path.insert(0, finder)


def run(arguments: list[str]) -> None:
    """Runs ``-m MODULE …`` or ``SCRIPT …`` in the place of the module ``__main__``, as python would."""
    try:
        if arguments[0] == "-m":
            _set_path(os.getcwd())
            sys.argv = arguments[1:]
            _become_main(None, None)
            runpy._run_module_as_main(arguments[1])  # type: ignore[attr-defined]  # what python itself calls
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
    """The namespace of ``__main__``, as python gives it to a program."""
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
            compiled: CodeType | None = pkgutil.read_code(file)  # of a .pyc file
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
    """Has the program's own hook for uncaught errors see a traceback that begins in the program."""
    hook = sys.excepthook

    def show(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        sys.excepthook = hook
        while value is error and traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
            traceback = traceback.tb_next
        hook(kind, value.with_traceback(traceback), traceback)

    sys.excepthook = show


if __name__ == "__main__":
    # The program takes over the module __main__, and so what goes on in it has to lie in another one.
    spec: Any = spec_from_file_location("_replicax_bootstrap", __file__)
    bootstrap = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    bootstrap.install_after_jax()
    bootstrap.run(sys.argv[1:])
