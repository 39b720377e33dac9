"""The registry of collectives, with one rule for each.

A rule takes the logical axes in scope, the operand of one replica, and the parameters of JAX's primitive. It is traced
inside the ``vmap`` over lanes and the ``shard_map`` over devices, where the lane and device axes are bound. It combines
the lanes of each device first, so that devices exchange as few bytes as possible.

Padding lanes are exact copies of a replica. Every rule keeps this invariant: a padding lane gets the result of the
replica that it copies. Rules mask or slice off the operands of padding lanes, unless a copy does not change the result
(as in ``pmax``).

To add a collective, decorate its rule with :func:`collective`, in the file of its family: see CONTRIBUTING.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeVar

from replicax import _jax
from replicax._engine.blocks import narrow, on_data, wide, without_folding
from replicax._layout.layout import LogicalAxes, LogicalAxis
from replicax._typing import Array, Function, Params, ShapeAndDtype
from replicax.errors import UnsupportedCollectiveError


class Result(Enum):
    """Whether the result of a collective is equal in all replicas along its axis."""

    EQUAL = auto()  #: equal in all replicas
    PER_REPLICA = auto()  #: each replica has its own result
    AS_GIVEN = auto()  #: equal in all replicas if the operand is


ResultOf = Callable[[Params, LogicalAxes], Result]


@dataclass(frozen=True)
class Collective:
    """A collective, with all information that the engine, ``replicax.testing`` and error messages need.

    ``rule``, ``definition`` and ``wire`` take the parameters of the primitive by keyword. Parameters that the rule does
    not name are checked: see :meth:`known`.

    Attributes:
        primitives: JAX's primitives for the collective, including the asynchronous ones that start it.
        awaited_by: JAX's primitives that wait for a started collective, and return its result.
        names: The names by which users call it.
        rule: ``rule(logical, *operands, **parameters)``: the result of one replica, on lanes and devices.
        result: ``result(parameters, logical)``: whether the result is equal in all replicas.
        definition: ``definition(size, *rows, **parameters)``: the results of all replicas, from all operands. Both
            have shape ``(replicas, ...)``. It shares no code with the rule.
        wire: ``wire(axis, *operands, **parameters)``: the total bytes that devices send each other, for a collective
            over one mapped axis. Operands need only a shape and a dtype.
        by_groups: Whether XLA runs it separately in each group of devices, so that no group waits for another.
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
        """The names of the collective, as the subject of a sentence in an error message."""
        first, *others = self.names
        return f"{first}, or {' or '.join(others)}," if others else first

    @functools.cached_property
    def parameters(self) -> frozenset[str] | None:
        """The parameters that the rule names; None if it accepts any."""
        takes = inspect.signature(self.rule).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in takes):
            return None
        return frozenset(p.name for p in takes if p.kind is p.KEYWORD_ONLY)

    def on_lanes(self, logical: LogicalAxes, operands: Sequence[Array], params: Params) -> Array:
        """Returns the result of one replica, from the rule."""
        return self.rule(logical, *operands, **self.known(params))

    def on_rows(self, size: int, rows: Sequence[Array], params: Params) -> Array:
        """Returns the results of all replicas, from the definition."""
        return self.definition(size, *rows, **self.known(params))

    def bytes_sent(self, axis: LogicalAxis, operands: Sequence[ShapeAndDtype], params: Params) -> int:
        """Returns the number of bytes that devices send each other."""
        return self.wire(axis, *operands, **self.known(params))

    def known(self, params: Params) -> dict[str, Any]:
        """Drops the parameters that the rule does not name. Their values must be None or False.

        Raises:
            UnsupportedCollectiveError: A parameter of a later JAX version has another value.
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


#: The supported collectives, by the name of JAX's primitive.
REGISTRY: dict[str, Collective] = {}

#: JAX's primitives that wait for a started collective.
AWAITING: set[str] = set()

#: Collectives that JAX does not support in a mapped function: the reason, by the name of the primitive.
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
    """Returns a decorator that registers a rule with the other attributes of its :class:`Collective`.

    Args:
        primitives: The names of JAX's primitives.
        result: Whether the result is equal in all replicas: :func:`equal`, :func:`per_replica`, or another function.
        definition: The results of all replicas at once.
        wire: The bytes that devices send each other.
        names: The names by which users call it; by default, the name of the first primitive.
        awaited_by: The names of the primitives that wait for a started collective.
        by_groups: Whether XLA runs the collective in each group of devices separately.
        sums: Whether the collective adds numbers. If so, 4-bit integers are sent as bytes: see :func:`wide`.
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
    """Registers primitives that JAX does not support in a mapped function, with the reason and a remedy."""
    REFUSED.update(dict.fromkeys(primitives, because))


def unsupported(primitive: str, axes: Sequence[Hashable]) -> UnsupportedCollectiveError:
    """Returns the error for a primitive that is not in the registry."""
    names = sorted({name for entry in REGISTRY.values() for name in entry.names})
    reason = REFUSED.get(primitive, "Use one of these instead, for example all_gather and indexing.")
    return UnsupportedCollectiveError(
        f"{primitive} over the mapped axis {', '.join(map(repr, axes))}: replicax has no rule for this collective. "
        f"It has rules for {', '.join(names)}. {reason}"
    )


# ---------------------------------------------------------------------------------------------------------------
# Parts of entries


def equal(params: Params, logical: LogicalAxes) -> Result:
    """The result is equal in all replicas. With groups, it is equal only within each group."""
    del logical
    return Result.EQUAL if params.get("axis_index_groups") is None else Result.PER_REPLICA


def per_replica(params: Params, logical: LogicalAxes) -> Result:
    """Each replica has its own result."""
    del params, logical
    return Result.PER_REPLICA


def _in_bytes(rule: Function, bits: int) -> Function:
    """Wraps a rule: converts integer operands of at most ``bits`` bits to bytes, and the result back."""

    @functools.wraps(rule)
    def carrying(logical: LogicalAxes, *operands: Array, **params: Any) -> Array:
        out = rule(logical, *(wide(x, bits) for x in operands), **params)
        return narrow(out, operands[0].dtype, bits) if operands else out

    return carrying


def moves_data(rule: Rule) -> Rule:
    """Wraps a rule that only moves data, so that it also accepts typed PRNG keys."""

    @functools.wraps(rule)
    def moving(logical: LogicalAxes, x: Array, **params: Any) -> Array:
        return on_data(lambda data: rule(logical, data, **params), x)

    return moving  # type: ignore[return-value]


def keeps_constants(rule: Rule) -> Rule:
    """Wraps a rule that sums, or whose transpose sums, with an optimization barrier: see :func:`without_folding`."""

    @functools.wraps(rule)
    def unfolding(logical: LogicalAxes, x: Array, **params: Any) -> Array:
        return without_folding(rule(logical, without_folding(x), **params))

    return unfolding  # type: ignore[return-value]
