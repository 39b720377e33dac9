"""The collectives over a logical axis, each as a collective over its lanes and then one over its devices.

A rule takes the logical axes in scope, the operand as one replica sees it, and the parameters of JAX's primitive.
It runs once per replica too: inside the ``vmap`` over lanes and the ``shard_map`` over devices, where the lane and
device axes are bound. Lanes come first, so that the wire between devices carries the least.

Padding lanes are exact copies of a replica, and every rule keeps them so: they get what that replica gets. What
they contribute is masked, sliced off, or (where a copy cannot change the result, as in ``pmax``) harmless.

To add a collective, write its rule under :func:`collective`, in the file of its family: see CONTRIBUTING.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeVar

from replicax import _jax
from replicax._engine.blocks import narrow, on_data, unfolded, wide
from replicax._layout.layout import LogicalAxes, LogicalAxis
from replicax._typing import Array, Function, Params, ShapeAndDtype
from replicax.errors import UnsupportedCollectiveError


class Result(Enum):
    """What a collective's result is to the replicas along its axis."""

    EQUAL = auto()  #: the same for all
    PER_REPLICA = auto()  #: each replica has its own
    AS_GIVEN = auto()  #: the same for all if the operand is


ResultOf = Callable[[Params, LogicalAxes], Result]


@dataclass(frozen=True)
class Collective:
    """One collective: all that the engine, the reference and the messages know of it.

    ``rule``, ``definition`` and ``wire`` take the parameters of the primitive by keyword. Of a parameter that the
    rule does not name, nobody knows what it means: see :meth:`known`.

    Attributes:
        primitives: JAX's primitives for it, those that only start it included.
        awaited_by: JAX's primitives that wait for one that has been started, and return its result.
        names: What users call it.
        rule: ``rule(logical, *operands, **parameters)``: the result of one replica, on lanes and devices.
        result: What the result is to the replicas, from the primitive's parameters and the logical axes.
        definition: ``definition(size, *rows, **parameters)``: the same for all replicas at once, in the terms of
            NumPy: of operands of shape ``(replicas, ...)`` results of such a shape. It shares no code with the rule.
        wire: ``wire(axis, *operands, **parameters)``: the bytes that devices send each other, all together, where
            the collective is over one mapped axis alone; of the operands it takes shape and dtype.
        by_groups: Whether XLA carries it out among each group of devices by itself: the groups need not come at the
            same time.
    """

    primitives: tuple[str, ...]
    awaited_by: tuple[str, ...]
    names: tuple[str, ...]
    rule: Function
    result: ResultOf
    definition: Function
    wire: Callable[..., int]
    by_groups: bool

    @property
    def called(self) -> str:
        """What a sentence about it begins with."""
        first, *others = self.names
        return f"{first}, or {' or '.join(others)}," if others else first

    @functools.cached_property
    def parameters(self) -> frozenset[str] | None:
        """The parameters that the rule names; None if it takes whatever there is."""
        takes = inspect.signature(self.rule).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in takes):
            return None
        return frozenset(p.name for p in takes if p.kind is p.KEYWORD_ONLY)

    def on_lanes(self, logical: LogicalAxes, operands: Sequence[Array], params: Params) -> Array:
        """The result, as one replica sees it."""
        return self.rule(logical, *operands, **self.known(params))

    def on_rows(self, size: int, rows: Sequence[Array], params: Params) -> Array:
        """The results of all replicas by the definition."""
        return self.definition(size, *rows, **self.known(params))

    def bytes_sent(self, axis: LogicalAxis, operands: Sequence[ShapeAndDtype], params: Params) -> int:
        """How many bytes devices send each other."""
        return self.wire(axis, *operands, **self.known(params))

    def known(self, params: Params) -> dict[str, Any]:
        """The parameters without those that the rule does not name, which must be None or False.

        Raises:
            UnsupportedCollectiveError: a parameter of a later JAX says something.
        """
        named = self.parameters
        if named is None:
            return dict(params)
        for name, value in params.items():
            if name not in named and value is not None and value is not False:
                raise UnsupportedCollectiveError(
                    f"{self.called} has the parameter {name}={value!r:.60} in JAX {_jax.VERSION}, which this release "
                    f"of replicax does not support. Leave {name} out of the call, or install a newer release of "
                    f"replicax."
                )
        return {name: value for name, value in params.items() if name in named}


#: The collectives that replicax has, by the name of JAX's primitive.
REGISTRY: dict[str, Collective] = {}

#: JAX's primitives that wait for a collective that has been started.
AWAITING: set[str] = set()

#: Why JAX itself has no meaning for a collective in a mapped function, by the name of the primitive.
REFUSED: dict[str, str] = {}

Rule = TypeVar("Rule", bound=Function)


def collective(
    *primitives: str,
    result: ResultOf,
    definition: Function,
    wire: Callable[..., int],
    names: Sequence[str] = (),
    awaited_by: Sequence[str] = (),
    by_groups: bool = False,
    sums: bool = False,
) -> Callable[[Rule], Rule]:
    """Registers a rule, with all else that there is to know about a collective: see :class:`Collective`.

    Args:
        primitives: The names of JAX's primitives.
        result: What the result is to the replicas: :func:`equal`, :func:`per_replica`, or a function of your own.
        definition: What all replicas together compute.
        wire: The bytes that devices send each other.
        names: What users call it; by default, as the first primitive.
        awaited_by: The names of the primitives that wait for it.
        by_groups: Whether groups of devices need not come at the same time.
        sums: Whether it adds up numbers, and so whether those of four bits have to travel as bytes: see :func:`wide`.
    """

    def register(rule: Rule) -> Rule:
        entry = Collective(
            primitives=primitives,
            awaited_by=tuple(awaited_by),
            names=tuple(names) or primitives[:1],
            rule=_in_bytes(rule, 4 if sums else 2),
            result=result,
            definition=definition,
            wire=wire,
            by_groups=by_groups,
        )
        REGISTRY.update(dict.fromkeys(primitives, entry))
        AWAITING.update(awaited_by)
        return rule

    return register


def refuse(*primitives: str, because: str) -> None:
    """Registers primitives that JAX itself has no meaning for in a mapped function, with what to write instead."""
    REFUSED.update(dict.fromkeys(primitives, because))


def unsupported(primitive: str, axes: Sequence[Hashable]) -> UnsupportedCollectiveError:
    """What is raised for a primitive that is not in the registry."""
    names = sorted({name for entry in REGISTRY.values() for name in entry.names})
    reason = REFUSED.get(primitive, "Use one of these instead, for example all_gather and indexing.")
    return UnsupportedCollectiveError(
        f"{primitive} over the mapped axis {', '.join(map(repr, axes))}: replicax has no rule for this collective. "
        f"It has rules for {', '.join(names)}. {reason}"
    )


# ---------------------------------------------------------------------------------------------------------------
# What entries are made of


def equal(params: Params, logical: LogicalAxes) -> Result:
    """All replicas have the same result, and with groups each group its own."""
    del logical
    return Result.EQUAL if params.get("axis_index_groups") is None else Result.PER_REPLICA


def per_replica(params: Params, logical: LogicalAxes) -> Result:
    """Every replica has a result of its own."""
    del params, logical
    return Result.PER_REPLICA


def _in_bytes(rule: Function, bits: int) -> Function:
    """A rule for operands of any dtype: those of no more ``bits`` go as bytes, and so does what is made of them."""

    @functools.wraps(rule)
    def carrying(logical: LogicalAxes, *operands: Array, **params: Any) -> Array:
        out = rule(logical, *(wide(x, bits) for x in operands), **params)
        return narrow(out, operands[0].dtype, bits) if operands else out

    return carrying


def moves_data(rule: Rule) -> Rule:
    """A rule that only moves data moves the data of random keys, too."""

    @functools.wraps(rule)
    def moving(logical: LogicalAxes, x: Array, **params: Any) -> Array:
        return on_data(lambda data: rule(logical, data, **params), x)

    return moving  # type: ignore[return-value]


def keeps_constants(rule: Rule) -> Rule:
    """A rule that sums, or whose transpose does, in a form that XLA survives: see :func:`unfolded`."""

    @functools.wraps(rule)
    def unfolding(logical: LogicalAxes, x: Array, **params: Any) -> Array:
        return unfolded(rule(logical, unfolded(x), **params))

    return unfolding  # type: ignore[return-value]
