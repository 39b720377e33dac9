"""Runs a program like python does. It imports only the standard library, since the program may not want the rest."""

from __future__ import annotations

import io
import os
import pkgutil
import runpy
import sys
from importlib.machinery import SourceFileLoader
from types import CodeType, TracebackType
from typing import Any


def run(arguments: list[str], caller: str) -> None:
    """Runs ``-m MODULE …`` or ``SCRIPT …`` as ``__main__``, like python does.

    Args:
        arguments: The words after ``python``.
        caller: The file that calls this function. Its frames do not appear in the program's tracebacks.
    """
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
            code = code_of(script)
            _set_path(os.path.dirname(os.path.realpath(script)))
            sys.argv = arguments
            exec(code, _become_main(script, SourceFileLoader("__main__", script)))
    except SystemExit:
        raise
    except BaseException as error:
        _hide_frames(error, {__file__, caller})
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


def code_of(script: str) -> CodeType:
    """The code of a script, or of a ``.pyc`` file."""
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


def _hide_frames(error: BaseException, files: set[str]) -> None:
    """Removes the frames of some files from the traceback for ``sys.excepthook``."""
    hook = sys.excepthook

    def show(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        sys.excepthook = hook
        while value is error and traceback is not None and traceback.tb_frame.f_code.co_filename in files:
            traceback = traceback.tb_next
        hook(kind, value.with_traceback(traceback), traceback)

    sys.excepthook = show
