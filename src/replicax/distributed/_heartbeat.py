"""A watchdog on the steps of a process."""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from replicax._messages import as_int
from replicax.errors import OptionTypeError
from replicax_cli.gang import BEAT, NO_STEP

#: Seconds between two looks at the time.
_PAUSE = 0.5

#: Seconds by which a look may be late; after more, this process did not run.
_FROZEN = 1.0


class _Watchdog:
    """Ends this process if a step does not come in time.

    Attributes:
        deadline: The time, of ``time.monotonic``, until which the next step must come.
        step: The last step.
    """

    deadline = float("inf")
    step = 0

    def __init__(self) -> None:
        folder = os.environ.get("REPLICAX_RUN")
        self._file = None if folder is None else os.open(Path(folder).with_suffix(".beat"), os.O_WRONLY | os.O_CREAT)
        self._waits = 0.0
        threading.Thread(target=self._watch, name="replicax heartbeat", daemon=True).start()
        atexit.register(self.stop)

    def beat(self, step: int, timeout: float) -> None:
        """Notes that a step is done, and that the next one must come within ``timeout`` seconds."""
        self.step, self._waits, self.deadline = step, timeout, time.monotonic() + timeout
        self._write()

    def stop(self) -> None:
        """Waits for no step any more."""
        self.deadline = float("inf")
        self._write()

    def _write(self) -> None:
        if self._file is not None:
            os.pwrite(self._file, BEAT.pack(self.deadline, self.step), 0)

    def _watch(self) -> None:
        woke = time.monotonic()
        while (left := self.deadline - woke) > 0:
            time.sleep(min(left, _PAUSE))
            woke, before = time.monotonic(), woke
            if woke - before > _PAUSE + _FROZEN:  # the process was frozen, for example with its container
                self.deadline += woke - before
                self._write()
        print(
            f"replicax: no step for {self._waits:g} seconds after step {self.step}. This process ends with status "
            f"{NO_STEP}. Its threads are here:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr)
        os._exit(NO_STEP)


_watchdogs: list[_Watchdog] = []


def heartbeat(step: int | None, *, timeout: float | None = None) -> None:
    """Notes that this process has finished a step, and ends the process if the next call does not come in time.

    Call it once in each step, after the process has waited for the results of the step, for example for the loss. The
    first call starts the watch, so a slow first compilation does not count. If the next call does not come within
    ``timeout`` seconds, the process prints where each of its threads is, and ends with exit status 124. A launcher then
    restarts the program. ``replicax launch`` also ends a process that cannot do this itself, because it is stopped or
    does not release Python's global lock.

    Args:
        step: The number of the step. None stops the watch, for example before a long evaluation.
        timeout: The time in seconds until the next call; that of ``replicax launch --heartbeat`` when None, or 60.

    Raises:
        OptionTypeError: ``step`` is not an int, or ``timeout`` is not a positive number.

    Example:
        >>> import replicax
        >>> replicax.distributed.heartbeat(1, timeout=100)  # step 1 is done
        >>> replicax.distributed.heartbeat(None)  # all steps are done
    """
    if step is None:
        for watchdog in _watchdogs:
            watchdog.stop()
        return
    number = as_int("step", step)
    if not -(1 << 63) <= number < 1 << 63:
        raise OptionTypeError(f"heartbeat: step is the number of a step, got {number}.")
    seconds = float(os.environ.get("REPLICAX_HEARTBEAT", 60)) if timeout is None else timeout
    if not isinstance(seconds, int | float) or not seconds > 0:
        raise OptionTypeError(f"heartbeat: timeout is the number of seconds until the next step, got {timeout!r}.")
    if not _watchdogs:
        _watchdogs.append(_Watchdog())
    _watchdogs[0].beat(number, seconds)
