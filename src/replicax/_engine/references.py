"""Refuses ``jax.Ref`` from outside of the mapped function: each device would write to its own copy."""

from __future__ import annotations

from collections.abc import Sequence

from replicax import _jax
from replicax._messages import report
from replicax._typing import PyTree, ShapeAndDtype
from replicax.errors import NotAnArrayError

OWN = "A reference that the mapped function makes itself, with jax.new_ref, may be read and written there."


def refuse_passed(names: Sequence[str], values: Sequence[PyTree]) -> None:
    """Refuses references among the arguments.

    Raises:
        NotAnArrayError: An argument is a reference. The message names each of them.
    """
    faults = [f"{name} of shape {x.shape}" for name, x in zip(names, values, strict=True) if _jax.is_reference(x)]
    if faults:
        name = faults[0].split(" of shape ")[0]
        raise NotAnArrayError(
            report(
                "pmap maps arrays, and these arguments are references to arrays (jax.Ref):",
                faults,
                f"Pass the values and return the new ones, as in {name} = jax.new_ref(pmap(f)({name}[...])). {OWN}",
            )
        )


def refuse_closed_over(name: str, consts: Sequence[ShapeAndDtype]) -> None:
    """Refuses references from outside that the function ``name`` reads or writes.

    Raises:
        NotAnArrayError: The function closes over a reference. The message has the shape of each of them.
    """
    faults = [f"one of shape {x.shape} and dtype {x.dtype}" for x in consts if _jax.is_reference(x)]
    if faults:
        raise NotAnArrayError(
            report(
                f"{name} reads or writes references to arrays (jax.Ref) that are not its own:",
                faults,
                "Pass the value, ref[...], as an argument (with None in in_axes every replica gets it whole), and "
                f"return what is to be written. {OWN}",
            )
        )
