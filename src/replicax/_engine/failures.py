"""Callbacks that fail: what the user's Python raised in one replica, kept until the whole program can raise it.

A callback that raises in one replica while the others wait for it in a collective would leave them waiting: XLA ends
the process after a minute. So a :class:`Guarded` callback raises nothing. It returns zeros and the number of its
failure, which the program carries along as data, and raises on every device after its last collective.
Workaround: failing_callbacks.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from replicax._layout.layout import LogicalAxis
from replicax._messages import text_of
from replicax._typing import ArrayLike, HostArray, ShapeAndDtype
from replicax.errors import CallbackError

#: No failure.
NONE = 0


@dataclass(frozen=True)
class Guarded:
    """A callback that returns the number of its failure after its results, instead of raising.

    It takes the number of an earlier failure on its device (then it is not called), its place along each mapped axis,
    whether it runs at all if ``conditional``, and the callback's own operands. A vectorized callback's operands have
    the batch dimensions first.

    Attributes:
        call: The callback: from flat operands to flat results.
        results: The types of its results.
        ranks: The number of dimensions of each operand, without those of a batch.
        axes: The mapped axes.
        widths: How many replicas a place stands for, along each axis.
        conditional: Whether an operand says if it runs.
        name: What the user calls the mapped function.
    """

    call: Callable[..., Sequence[ArrayLike]]
    results: tuple[ShapeAndDtype, ...]
    ranks: tuple[int, ...]
    axes: tuple[LogicalAxis, ...]
    widths: tuple[int, ...]
    conditional: bool
    name: str

    def __call__(self, earlier: ArrayLike, *flat: ArrayLike) -> tuple[HostArray, ...]:
        places, operands = flat[: len(self.axes)], flat[len(self.axes) :]
        runs = True
        if self.conditional:
            runs, operands = bool(np.any(operands[0])), operands[1:]
        ranks = (*[0] * len(places), *self.ranks)
        dimensions = (np.shape(x)[: np.ndim(x) - rank] for x, rank in zip((*places, *operands), ranks, strict=True))
        batch, failed = np.broadcast_shapes(*dimensions), int(np.max(earlier))
        results = None
        if runs and failed == NONE:
            try:
                results = self._checked(self.call(*operands), batch)
            except BaseException as error:  # a KeyboardInterrupt, too, would leave the other devices waiting
                failed = _record(error, f"A callback of {self.name} raised {{}} in {self._describe(places)}")
        if results is None:
            results = [np.zeros((*batch, *x.shape), x.dtype) for x in self.results]
        return (*results, np.full(batch, failed, np.int32))

    def _checked(self, given: Sequence[ArrayLike], batch: tuple[int, ...]) -> list[HostArray]:
        """The results as arrays; XLA would fail on any of another type, outside of the ``try``."""
        arrays = [np.asarray(x) for x in given]
        if len(arrays) != len(self.results):
            raise TypeError(
                f"the callback returned {len(arrays)} results, but result_shape_dtypes has {len(self.results)}"
            )
        for k, (x, aval) in enumerate(zip(arrays, self.results, strict=True)):
            if x.dtype != aval.dtype and x.dtype.itemsize == 8 and np.can_cast(x.dtype, aval.dtype, "same_kind"):
                arrays[k] = x = x.astype(aval.dtype)  # as JAX does with results of 64 bits
            if (x.shape, x.dtype) != ((*batch, *aval.shape), aval.dtype):
                raise TypeError(
                    f"result {k} of the callback is {x.dtype}{list(x.shape)}, but result_shape_dtypes says "
                    f"{aval.dtype}{[*batch, *aval.shape]}"
                )
        return arrays

    def _describe(self, places: Sequence[ArrayLike]) -> str:
        """Which replicas the callback was called for, and of what."""
        where = []
        for axis, width, place in zip(self.axes, self.widths, places, strict=True):
            first, last = axis.placement.replica_at[[int(np.min(place)), int(np.max(place)) + width - 1]]
            which = f"replica {first}" if last <= first else f"replicas {first} to {last}"
            where.append(f"{which} of {axis.name!r}" if isinstance(axis.name, str) else which)
        return ", ".join(where)


# ---------------------------------------------------------------------------------------------------------------
# Failures, by their numbers


@dataclass(frozen=True)
class _Failure:
    error: BaseException
    what: str


#: Numbers count down, so that the largest of several failures of one run is the first.
_numbers = itertools.count(2**31 - 1, -1)
_failures: dict[int, _Failure] = {}
_lock = threading.Lock()

#: So many failures are kept: those of more devices than run at once, and of runs that nobody has waited for.
_KEPT = 1024


def _record(error: BaseException, what: str) -> int:
    with _lock:
        number = next(_numbers)
        _failures[number] = _Failure(error, what)
        while len(_failures) > _KEPT:
            del _failures[next(iter(_failures))]
    return number


def raise_failure(number: ArrayLike, *_: ArrayLike) -> None:
    """Raises the failure of this number, in the words and with the traceback of the user's Python.

    Raises:
        CallbackError: always, but for ``NONE``.
    """
    failed = int(np.max(number))
    if failed == NONE:
        return
    failure = _failures.get(failed)
    if failure is None:
        raise CallbackError(
            "A callback raised an exception. Its text is lost, because many more callbacks have failed since. Read "
            "results sooner to see the first failure."
        )
    text = text_of(failure.error)
    raised = failure.what.format(type(failure.error).__name__)
    raise CallbackError(f"{raised}: {text}" if text else raised).with_traceback(failure.error.__traceback__)
