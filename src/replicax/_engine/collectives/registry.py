"""The collectives over a logical axis, each as a collective over its lanes and then one over its devices.

A rule takes the logical axes in scope, the operand as one replica sees it, and the parameters of JAX's primitive.
It runs once per replica too: inside the ``vmap`` over lanes and the ``shard_map`` over devices, where the lane and
device axes are bound. Lanes come first, so that the wire between devices carries the least.

Padding lanes are exact copies of a replica, and every rule keeps them so: they get what that replica gets. What
they contribute is masked, sliced off, or (where a copy cannot change the result, as in ``pmax``) harmless.

To add a collective, write one function with the parameters of its primitive under :func:`collective`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeVar

from replicax._blocks import narrow, on_data, unfolded, wide
from replicax._layout import LogicalAxes


class Result(Enum):
    """What a collective's result is to the replicas along its axis."""

    EQUAL = auto()  #: the same for all
    OWN = auto()  #: each replica's own
    AS_GIVEN = auto()  #: the same for all if the operand is


ResultOf = Callable[[Mapping[str, Any], LogicalAxes], Result]


@dataclass(frozen=True)
class Collective:
    """How a collective is made of collectives over lanes and devices.

    Attributes:
        rule: ``rule(logical, *operands, **parameters)``.
        result: What the result is to the replicas, from the primitive's parameters and the logical axes.
    """

    rule: Callable[..., Any]
    result: ResultOf


#: The collectives that replicax has, by the name of JAX's primitive.
REGISTRY: dict[str, Collective] = {}

Rule = TypeVar("Rule", bound=Callable[..., Any])


def collective(*primitives: str, result: ResultOf, sums: bool = False) -> Callable[[Rule], Rule]:
    """Registers a rule for the primitives of these names; for ``sums`` see :func:`wide`."""

    def register(rule: Rule) -> Rule:
        REGISTRY.update(dict.fromkeys(primitives, Collective(_in_bytes(rule, 4 if sums else 2), result)))
        return rule

    return register


def _in_bytes(rule: Callable[..., Any], bits: int) -> Callable[..., Any]:
    """A rule for operands of any dtype: those of no more ``bits`` go as bytes, and so does what is made of them."""

    @functools.wraps(rule)
    def carrying(logical: LogicalAxes, *operands: Any, **params: Any) -> Any:
        out = rule(logical, *(wide(x, bits) for x in operands), **params)
        return narrow(out, operands[0].dtype, bits) if operands else out

    return carrying


def equal(params: Mapping[str, Any], logical: LogicalAxes) -> Result:
    """All replicas have the same result, and with groups each group its own."""
    del logical
    return Result.EQUAL if params.get("axis_index_groups") is None else Result.OWN


def own(params: Mapping[str, Any], logical: LogicalAxes) -> Result:
    """Every replica has a result of its own."""
    del params, logical
    return Result.OWN


def moves_data(rule: Rule) -> Rule:
    """A rule that only moves data moves the data of random keys, too."""

    @functools.wraps(rule)
    def moving(logical: LogicalAxes, x: Any, **params: Any) -> Any:
        return on_data(lambda data: rule(logical, data, **params), x)

    return moving  # type: ignore[return-value]


def keeps_constants(rule: Rule) -> Rule:
    """A rule that sums, or whose transpose does, in a form that XLA survives: see :func:`unfolded`."""

    @functools.wraps(rule)
    def unfolding(logical: LogicalAxes, x: Any, **params: Any) -> Any:
        return unfolded(rule(logical, unfolded(x), **params))

    return unfolding  # type: ignore[return-value]
