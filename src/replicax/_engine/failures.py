"""Stores the exceptions of failed callbacks, and raises them after the program's last collective.

If a callback raises in one replica while other replicas wait for that replica in a collective, XLA ends the process
after a minute. So a :class:`Guarded` callback does not raise. It returns zeros and a failure number. The program
carries this number to its end, and raises the exception on every device after the last collective.
Workaround: failing_callbacks.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from replicax._layout.layout import LogicalAxis
from replicax._messages import text_of
from replicax._typing import ArrayLike, HostArray, ShapeAndDtype
from replicax.errors import CallbackError

#: The failure number that means "no failure".
NONE = 0


@dataclass(frozen=True)
class Guarded:
    """A callback that returns a failure number after its results, instead of raising.

    Its operands are: an earlier failure number of the device (if this is not ``NONE``, the callback does not run); a
    slot for each mapped axis; a bool if ``conditional``; then the operands of the user's callback. If the callback is
    vectorized, its operands have the batch dimensions first.

    Attributes:
        call: The user's callback, from flat operands to flat results.
        results: The types of the results.
        ranks: The number of dimensions of each operand, without batch dimensions.
        axes: The mapped axes.
        widths: For each axis, the number of consecutive slots that one call covers. The operand is the first of them.
        conditional: Whether a bool operand decides if the callback runs.
        name: The name of the user's function, for error messages.
    """

    call: Callable[..., Sequence[ArrayLike]]
    results: tuple[ShapeAndDtype, ...]
    ranks: tuple[int, ...]
    axes: tuple[LogicalAxis, ...]
    widths: tuple[int, ...]
    conditional: bool
    name: str

    def __call__(self, earlier: ArrayLike, *flat: ArrayLike) -> tuple[HostArray, ...]:
        if not jax.sharding.get_abstract_mesh().empty:
            # Under jax.disable_jit, the mesh of the map is set here, and JAX computes with no array on another device.
            # The operands are on the first CPU. JAX accepts NumPy arrays.
            earlier, flat = np.asarray(earlier), tuple(map(np.asarray, flat))
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
            except BaseException as error:  # KeyboardInterrupt too: otherwise the other devices keep waiting
                failed = _record(error, f"A callback of {self.name} raised {{}} in {self._describe(places)}")
        if results is None:
            results = [np.zeros((*batch, *x.shape), x.dtype) for x in self.results]
        return (*results, np.full(batch, failed, np.int32))

    def _checked(self, given: Sequence[ArrayLike], batch: tuple[int, ...]) -> list[HostArray]:
        """Returns the results as arrays of the declared types.

        XLA also checks the types, but its error could not be caught and recorded.
        """
        arrays = [np.asarray(x) for x in given]
        if len(arrays) != len(self.results):
            raise TypeError(
                f"the callback returned {len(arrays)} results, but result_shape_dtypes has {len(self.results)}"
            )
        for k, (x, aval) in enumerate(zip(arrays, self.results, strict=True)):
            if x.dtype != aval.dtype and x.dtype.itemsize == 8 and np.can_cast(x.dtype, aval.dtype, "same_kind"):
                arrays[k] = x = x.astype(aval.dtype)  # JAX also converts 64-bit results
            if (x.shape, x.dtype) != ((*batch, *aval.shape), aval.dtype):
                raise TypeError(
                    f"result {k} of the callback is {x.dtype}{list(x.shape)}, but result_shape_dtypes says "
                    f"{aval.dtype}{[*batch, *aval.shape]}"
                )
        return arrays

    def _describe(self, places: Sequence[ArrayLike]) -> str:
        """Names the replicas for which the callback ran, for an error message."""
        where = []
        for axis, width, place in zip(self.axes, self.widths, places, strict=True):
            first, last = axis.placement.replica_at[[int(np.min(place)), int(np.max(place)) + width - 1]]
            which = f"replica {first}" if last <= first else f"replicas {first} to {last}"
            where.append(f"{which} of {axis.name!r}" if isinstance(axis.name, str) else which)
        return ", ".join(where)


# ---------------------------------------------------------------------------------------------------------------
# Stored failures, by number


@dataclass(frozen=True)
class _Failure:
    error: BaseException
    what: str


#: Failure numbers count down, so the earliest of several failures has the largest number, and ``pmax`` selects it. Each
#: process has numbers of its own: those with its index as the remainder of the distance from the highest number.
_numbers = itertools.count()
_HIGHEST, _PROCESSES, _TURNS = 2**31 - 1, 4096, 2**19 - 1
_failures: dict[int, _Failure] = {}
_lock = threading.Lock()

#: How many failures to store. One run can fail on several devices, and users may start many runs without waiting.
_KEPT = 1024


def _record(error: BaseException, what: str) -> int:
    with _lock:
        number = _HIGHEST - _PROCESSES * (next(_numbers) % _TURNS) - jax.process_index()
        _failures[number] = _Failure(error, what)
        while len(_failures) > _KEPT:
            del _failures[next(iter(_failures))]
    return number


def raise_failure(number: ArrayLike, *_: ArrayLike) -> None:
    """Raises the failure with this number, with the message and the traceback of the user's exception.

    Raises:
        CallbackError: ``number`` is not ``NONE``.
    """
    failed = int(np.max(np.asarray(number)))  # as an array of JAX it may be on another device than the map
    if failed == NONE:
        return
    process = (_HIGHEST - failed) % _PROCESSES
    if process != jax.process_index():
        raise CallbackError(f"A callback raised an exception in process {process}. See its output.")
    failure = _failures.get(failed)
    if failure is None:
        raise CallbackError(
            "A callback raised an exception. Its text is lost, because many more callbacks have failed since. Read "
            "results sooner to see the first failure."
        )
    text = text_of(failure.error)
    raised = failure.what.format(type(failure.error).__name__)
    raise CallbackError(f"{raised}: {text}" if text else raised).with_traceback(failure.error.__traceback__)
