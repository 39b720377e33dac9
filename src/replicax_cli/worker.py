"""Runs the program of one process of a gang.

The launcher runs this file as a script. It imports only the standard library: JAX reads environment variables on
import, and the program may set them before it imports JAX.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import signal
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


def run(arguments: list[str]) -> None:
    """Runs ``-m MODULE …`` or ``SCRIPT …``, and notes when it fails.

    If it fails and is connected to other processes, this process ends at once: JAX would make it wait for the others,
    which may wait for this one.
    """
    _end_with_the_launcher()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what a killed process printed is seen
    try:
        _module("_replicax_program", Path(__file__).with_name("program.py")).run(arguments, __file__)
    except BaseException as error:
        status = _status(error)
        if status:
            _note_the_time()
        if not status or not _is_connected():
            raise
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        elif not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        flush_files()
        os._exit(status)


def _end_with_the_launcher() -> None:
    """Has Linux kill this process when the launcher dies, in case that the guard of the launcher is dead, too."""
    parent = os.environ.get("REPLICAX_PARENT")
    if sys.platform == "linux" and parent == str(os.getppid()):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if parent != str(os.getppid()):
            os._exit(1)


def _status(error: BaseException) -> int:
    """The exit status with which Python ends after an exception."""
    if not isinstance(error, SystemExit):
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    if error.code is None:
        return 0
    if not isinstance(error.code, int):
        return 1
    return (error.code if abs(error.code) < 1 << 31 else -1) & 0xFF


def _note_the_time() -> None:
    """Records when the program ended: of several that fail, the launcher reports the first."""
    if "REPLICAX_RUN" in os.environ:
        Path(os.environ["REPLICAX_RUN"]).with_suffix(".left").write_text(str(time.monotonic()))


def _is_connected() -> bool:
    jax: Any = sys.modules.get("jax")
    try:
        return bool(jax and jax.distributed.is_initialized())
    except AttributeError:  # JAX is not imported completely
        return False


def flush_files() -> None:
    """Writes what is still in the buffers of open files."""
    for thing in gc.get_objects():
        if isinstance(thing, io.TextIOWrapper | io.BufferedWriter | io.BufferedRandom):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
                thing.flush()


def _module(name: str, path: Path) -> Any:
    """A module from a file, under a name that does not hide a module of the program."""
    spec: Any = spec_from_file_location(name, path)
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    # The program resets the namespace of __main__, so the code of this file must run in another module.
    _module("_replicax_worker", Path(__file__)).run(sys.argv[1:])
