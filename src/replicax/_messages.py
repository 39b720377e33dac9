"""What messages are made of."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from replicax.errors import NumberTooLargeError, OptionTypeError, ReplicaxError


def as_int(which: str, value: object) -> int:
    """An option that is a whole number, as Python's own int.

    Raises:
        OptionTypeError: it is none.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise OptionTypeError(
            f"{which} must be an int, and is {value!r:.60}, of type {type(value).__name__}."
        ) from None


def too_large(which: str, x: object) -> NumberTooLargeError:
    """What is raised where JAX finds that an int does not fit."""
    return NumberTooLargeError(
        f"{which} is {x}, which is too large for a 32-bit int. Enable 64-bit types with "
        f"jax.config.update('jax_enable_x64', True), or pass a float."
    )


def nameless(error: ReplicaxError) -> ReplicaxError:
    """The error, marked as one about an argument whose name is not known here."""
    error.nameless = True
    return error


def text_of(error: BaseException) -> str:
    """An exception's text; none where its own ``__str__`` fails."""
    try:
        return str(error)
    except Exception:
        return ""


def report(headline: str, faults: Sequence[str], remedy: str) -> str:
    """One message for all offending arguments: what was given, one line a fault, and what to write instead."""
    shown = [f"  * {fault}" for fault in faults[: MOST if len(faults) <= MOST else MOST - 1]]
    if len(faults) > len(shown):
        shown.append(f"  * and {len(faults) - len(shown)} more")
    return "\n".join([headline, *shown, remedy])


#: A message shows at most so many faults.
MOST = 10
