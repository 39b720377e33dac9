"""Runs the program of one process of a gang.

The launcher runs this file as a script. It imports only the standard library: JAX reads environment variables on
import, and the program may set them before it imports JAX.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


def run(arguments: list[str]) -> None:
    """Runs ``-m MODULE …`` or ``SCRIPT …``, and ends this process at once if its status is not 0.

    JAX makes a process that ends wait for the others. They may in turn wait for this one, until JAX's timeout.
    """
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what a killed process printed is seen
    try:
        _program().run(arguments, __file__)
    except SystemExit as error:
        status = error.code
        if not isinstance(status, int | None):
            print(status, file=sys.stderr)
        if status:
            _leave(status if isinstance(status, int) else 1)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        _leave(130 if isinstance(error, KeyboardInterrupt) else 1)


def _leave(status: int) -> None:
    """Ends this process, and records when: of several that end, the launcher reports the first."""
    if "REPLICAX_RUN" in os.environ:
        Path(os.environ["REPLICAX_RUN"]).with_suffix(".left").write_text(str(time.monotonic()))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status & 0xFF)


def _program() -> Any:
    """The module ``program`` of this folder, under a name that does not hide a module of the program."""
    spec: Any = spec_from_file_location("_replicax_program", Path(__file__).with_name("program.py"))
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    # The program resets the namespace of __main__, so the code of this file must run in another module.
    own: Any = spec_from_file_location("_replicax_worker", __file__)
    worker = sys.modules[own.name] = module_from_spec(own)
    own.loader.exec_module(worker)
    worker.run(sys.argv[1:])
