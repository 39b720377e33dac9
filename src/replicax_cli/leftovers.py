"""Ends what a gang leaves behind: children of its processes, and all of it if the launcher itself is killed.

A gang's processes and their children have a mark in the environment variable ``REPLICAX_LAUNCH``. The launcher starts
this file as a process of its own, the guard, and holds a pipe to it. When the pipe closes, the guard kills every
process with the mark of the launcher, and removes the launcher's folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

#: The marks of the launchers above a process, separated by colons.
MARK = "REPLICAX_LAUNCH"


def start_guard(mark: str, folder: str) -> subprocess.Popen[bytes]:
    """Starts the guard of a launcher.

    Args:
        mark: The mark of the processes to kill.
        folder: The folder to remove.

    Returns:
        The guard. It acts when its stdin is closed.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, mark, folder], stdin=subprocess.PIPE, start_new_session=True
    )


def kill_marked(mark: str) -> None:
    """Kills all processes with a mark, but this one. Needs ``/proc``, so it does nothing on macOS."""
    for _ in range(50):
        found = _marked(mark)
        for process in found:
            with contextlib.suppress(OSError):  # it has ended
                os.kill(process, signal.SIGKILL)
        if not found:
            return
        time.sleep(0.02)


def _marked(mark: str) -> list[int]:
    """The processes with a mark, but this one."""
    try:
        running = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    return [process for process in running if process != os.getpid() and mark in _marks(process)]


def _marks(process: int) -> list[str]:
    try:
        with open(f"/proc/{process}/environ", "rb") as file:
            variables = file.read().split(b"\0")
    except OSError:
        return []
    mine = f"{MARK}=".encode()
    return next((v.removeprefix(mine).decode().split(":") for v in variables if v.startswith(mine)), [])


def _guard(mark: str, folder: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    kill_marked(mark)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _guard(*sys.argv[1:])
