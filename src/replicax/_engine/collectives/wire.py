"""What crosses between devices, in bytes: of all devices together, for a collective over one mapped axis.

A reduction counts what devices put into it, one lane's operand each, however a backend then goes about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from replicax._layout.exchange import DeviceGroups, Exchange, Table, exchange, wants_of
from replicax._layout.layout import LogicalAxis
from replicax._typing import ShapeAndDtype


def size_in_bytes(x: ShapeAndDtype, without: Sequence[int] = ()) -> int:
    """The bytes of an operand of one replica, with some of its dimensions reduced; no number has less than one."""
    rest = [length for dim, length in enumerate(x.shape) if dim not in without]
    return math.prod(rest) * int(x.dtype.itemsize)


def nothing(axis: LogicalAxis, *operands: object, **params: object) -> int:
    """Of what each device knows by itself."""
    del axis, operands, params
    return 0


def reduced(axis: LogicalAxis, lane: int) -> int:
    """Each device puts as many bytes into a reduction of all devices."""
    return axis.devices * lane if axis.devices > 1 else 0


def gathered(axis: LogicalAxis, lane: int, whole: DeviceGroups | None = None) -> int:
    """Each device sends that much of each of its lanes to all others, or to those of its group of whole devices."""
    counts = [axis.devices] if whole is None else map(len, whole)
    return sum(devices * (devices - 1) for devices in counts) * axis.lanes * lane


def sent(plan: Exchange) -> int:
    """How many items devices send each other."""
    return sum(len(shift.pairs) * shift.send.shape[1] for shift in plan.shifts)


def fetched(axis: LogicalAxis, wants: Table, items: int = 1) -> int:
    """How many items devices send each other, so that each replica has what it wants: see ``fetch``."""
    return sent(exchange(wants_of(axis, wants, items), axis.lanes * items))
