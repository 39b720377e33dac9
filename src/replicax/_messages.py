"""Building blocks of error messages."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from replicax.errors import NumberTooLargeError, OptionTypeError, ReplicaxError


def as_int(which: str, value: object) -> int:
    """Converts an integer option to a Python int.

    Raises:
        OptionTypeError: ``value`` is not an integer.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise OptionTypeError(f"{which} must be an int, got {value!r:.60} of type {type(value).__name__}.") from None


def too_large(which: str, x: object) -> NumberTooLargeError:
    """Returns the error for an int that does not fit into the dtype that JAX converts it to."""
    fits = isinstance(x, int) and -(2**63) <= x < 2**63
    return NumberTooLargeError(
        f"{which} is {x}, which is too large for a 32-bit int. Enable 64-bit types with "
        f"jax.config.update('jax_enable_x64', True), or pass a float."
        if fits
        else f"{which} is {x}, which is too large for a 64-bit int. Pass a float."
    )


def nameless(error: ReplicaxError) -> ReplicaxError:
    """Marks an error whose message lacks the argument's name, because the code that raises it does not know it."""
    error.nameless = True
    return error


def text_of(error: BaseException) -> str:
    """The text of an exception; empty if its ``__str__`` raises."""
    try:
        return str(error)
    except Exception:
        return ""


def report(headline: str, faults: Sequence[str], remedy: str) -> str:
    """Returns one message for all offending arguments: headline, one line per fault, and what to write instead."""
    shown = [f"  * {fault}" for fault in faults[: MOST if len(faults) <= MOST else MOST - 1]]
    if len(faults) > len(shown):
        shown.append(f"  * and {len(faults) - len(shown)} more")
    return "\n".join([headline, *shown, remedy])


#: The maximum number of fault lines in a message.
MOST = 10
