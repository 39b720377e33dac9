"""The signals that a launcher gets."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType

#: These start the end of a gang.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

#: These are only passed on.
OTHERS = (signal.SIGUSR1, signal.SIGUSR2)


class Signals:
    """A context in which signals are collected, and wake the launcher. A child that ends wakes it, too."""

    def __enter__(self) -> Signals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {
            number: signal.signal(number, _nothing)
            for number in (*ENDING, *OTHERS, signal.SIGCHLD)
            if signal.getsignal(number) != signal.SIG_IGN  # as under nohup
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._read)
        os.close(self._write)

    def wait(self, timeout: float) -> list[signal.Signals]:
        """Waits for a signal or a child that ends, at most ``timeout`` seconds, and returns the signals."""
        select.select([self._read], [], [], timeout)
        try:
            numbers = os.read(self._read, 4096)
        except BlockingIOError:
            return []
        return [signal.Signals(number) for number in numbers if number != signal.SIGCHLD]


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler, since Python does not wake up for a signal that has the default one."""
