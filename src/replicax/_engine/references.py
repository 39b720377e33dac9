"""Refuses a ``jax.Ref`` that was created outside the mapped function: each device would write to its own copy."""

from __future__ import annotations

from collections.abc import Sequence

from replicax import _jax
from replicax._messages import report
from replicax._typing import PyTree, ShapeAndDtype
from replicax.errors import NotAnArrayError

OWN = "References that the mapped function creates itself, with jax.new_ref, are supported."


def refuse_passed(names: Sequence[str], values: Sequence[PyTree]) -> None:
    """Refuses references among the arguments.

    Raises:
        NotAnArrayError: lists every argument that is a reference.
    """
    faults = [f"{name} of shape {x.shape}" for name, x in zip(names, values, strict=True) if _jax.is_reference(x)]
    if faults:
        name = faults[0].split(" of shape ")[0]
        raise NotAnArrayError(
            report(
                "pmap arguments must be arrays; these are references to arrays (jax.Ref):",
                faults,
                f"Pass the value and return the new value, as in {name} = jax.new_ref(pmap(f)({name}[...])). {OWN}",
            )
        )


def refuse_closed_over(name: str, consts: Sequence[ShapeAndDtype]) -> None:
    """Refuses references that the function ``name`` closes over.

    Raises:
        NotAnArrayError: lists the shape and dtype of every such reference.
    """
    faults = [f"one of shape {x.shape} and dtype {x.dtype}" for x in consts if _jax.is_reference(x)]
    if faults:
        raise NotAnArrayError(
            report(
                f"{name} must not close over references to arrays (jax.Ref), but uses:",
                faults,
                "Pass the value, ref[...], as an argument (with None in in_axes to pass it whole to every replica), "
                f"and return the new value. {OWN}",
            )
        )
