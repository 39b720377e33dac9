"""Counts the bytes that all devices together send each other, for a collective over one mapped axis.

A reduction counts as one lane's operand sent by each device, whatever algorithm the backend uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from replicax._layout.exchange import DeviceGroups, Exchange, Table, exchange, wants_of
from replicax._layout.layout import LogicalAxis
from replicax._typing import ShapeAndDtype


def size_in_bytes(x: ShapeAndDtype, without: Sequence[int] = ()) -> int:
    """Returns the bytes of one replica's operand, without the dimensions in ``without``.

    An element of fewer than 8 bits counts as one byte.
    """
    rest = [length for dim, length in enumerate(x.shape) if dim not in without]
    return math.prod(rest) * int(x.dtype.itemsize)


def nothing(axis: LogicalAxis, *operands: object, **params: object) -> int:
    """Returns 0: devices do not communicate."""
    del axis, operands, params
    return 0


def reduced(axis: LogicalAxis, lane: int) -> int:
    """Returns the bytes of a reduction over all devices, to which each device contributes ``lane`` bytes."""
    return axis.devices * lane if axis.devices > 1 else 0


def gathered(axis: LogicalAxis, lane: int, whole: DeviceGroups | None = None) -> int:
    """Returns the bytes if each device sends ``lane`` bytes per lane to every other device of its group.

    Args:
        axis: The mapped axis.
        lane: The bytes of one lane.
        whole: The groups of devices; None for one group of all devices.
    """
    counts = [axis.devices] if whole is None else map(len, whole)
    return sum(devices * (devices - 1) for devices in counts) * axis.lanes * lane


def sent(plan: Exchange) -> int:
    """Returns the number of items that devices send each other."""
    return sum(len(shift.pairs) * shift.send.shape[1] for shift in plan.shifts)


def fetched(axis: LogicalAxis, wants: Table, items: int = 1) -> int:
    """Returns the number of items that devices send each other in ``fetch``, so that each replica gets its items."""
    return sent(exchange(wants_of(axis, wants, items), axis.lanes * items))
