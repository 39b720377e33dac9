"""The output of the processes of a gang."""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import threading
from pathlib import Path
from typing import IO

#: How many of the last lines of a process are kept.
_KEPT = 20

#: A line that is longer, in bytes, is passed on in pieces.
_LONGEST = 1 << 16

_lock = threading.Lock()


def say(text: str) -> None:
    """Prints a message of the launcher itself."""
    with _lock, contextlib.suppress(OSError):  # nobody reads it any more
        print(f"replicax launch: {text}", file=sys.stderr, flush=True)


class Pumped:
    """Copies what a process prints to the output of this process, with a prefix before each line.

    A slow reader slows the process, as without a launcher. Nothing is dropped.

    Args:
        prefix: Stands before each line.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix, self._threads = prefix.encode(), list[threading.Thread]()
        self._tail: collections.deque[bytes] = collections.deque(maxlen=_KEPT)

    def start(self, source: IO[bytes], target: IO[bytes]) -> None:
        """Starts to copy a pipe."""
        thread = threading.Thread(target=self._copy, args=(source, target), daemon=True)
        thread.start()
        self._threads.append(thread)

    def finish(self, timeout: float) -> bool:
        """Waits until all is copied, and returns whether it is."""
        for thread in self._threads:
            thread.join(timeout)
        return not any(thread.is_alive() for thread in self._threads)

    def last_lines(self) -> bytes:
        """The last lines that the process has printed."""
        return b"".join(self._tail)

    def _copy(self, source: IO[bytes], target: IO[bytes]) -> None:
        rest = b""
        with source:
            while block := os.read(source.fileno(), _LONGEST):
                *lines, rest = (rest + block).split(b"\n")
                if len(rest) >= _LONGEST:
                    lines, rest = [*lines, rest], b""
                if not self._write(target, lines):
                    return  # the process gets EPIPE, as without a launcher
        if rest:
            self._write(target, [rest])

    def _write(self, target: IO[bytes], lines: list[bytes]) -> bool:
        whole = [line + b"\n" for line in lines]
        self._tail.extend(whole)
        try:
            with _lock:
                target.write(b"".join(self._prefix + line for line in whole))
                target.flush()
        except (OSError, ValueError):
            return False
        return True


class Logged:
    """Writes what a process prints to a file.

    Args:
        path: The file. Its folder is created.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self.file = path.open("wb")

    def finish(self, timeout: float) -> bool:
        """Closes the file, and returns True."""
        del timeout
        self.file.close()
        return True

    def last_lines(self) -> bytes:
        """The last lines that the process has printed."""
        with self._path.open("rb") as file:
            file.seek(max(0, self._path.stat().st_size - _LONGEST))
            return b"".join(file.read().splitlines(keepends=True)[-_KEPT:])
