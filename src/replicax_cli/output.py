"""The output of the processes of a gang."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import re
import sys
import threading
from pathlib import Path
from typing import IO

#: How many of the last lines of a process are kept.
_KEPT = 20

#: Bytes that are read at once.
_BLOCK = 1 << 16

#: A line that is longer, in bytes, is passed on in pieces.
_LONGEST = 1 << 20

#: The end of a line, or a carriage return, as of a progress bar.
_END = re.compile(rb"\r?\n|\r(?=[^\n])")

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
        self._from_srun = list[bytes]()

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

    def first_match(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """The first match of a pattern in what ``srun`` has printed about its tasks."""
        return pattern.search(b"".join(self._from_srun))

    def _copy(self, source: IO[bytes], target: IO[bytes]) -> None:
        rest = b""
        with source:
            while block := os.read(source.fileno(), _BLOCK):
                *pieces, rest = _pieces(rest + block)
                if len(rest) >= _LONGEST:
                    pieces, rest = [*pieces, rest + b"\n"], b""
                if not self._write(target, pieces):
                    return  # the process gets EPIPE, as without a launcher
        if rest:
            self._write(target, [rest + b"\n"])

    def _write(self, target: IO[bytes], pieces: list[bytes]) -> bool:
        self._tail.extend(piece for piece in pieces if piece.endswith(b"\n"))
        self._from_srun += [piece for piece in pieces if piece.startswith(b"srun: error:")]
        try:
            with _lock:
                target.write(b"".join(self._prefix + piece for piece in pieces))
                target.flush()
        except (OSError, ValueError):
            reader.left = True
            return False
        return True


def _pieces(text: bytes) -> list[bytes]:
    """Splits a text after each line and each carriage return. The last piece has no end, and may be empty."""
    ends = [0, *(found.end() for found in _END.finditer(text)), len(text)]
    return [text[first:last] for first, last in itertools.pairwise(ends)]


class _Reader:
    """Whoever reads the output of the launcher.

    Attributes:
        left: Whether nobody reads it any more.
    """

    left = False


reader = _Reader()


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
            file.seek(max(0, self._path.stat().st_size - _BLOCK))
            return b"".join(file.read().splitlines(keepends=True)[-_KEPT:])

    def first_match(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """The first match of a pattern in what the process has printed."""
        return pattern.search(self._path.read_bytes())
