"""Converts and checks the axis names and groups of collectives."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import chain

from replicax._layout.exchange import Groups, groups
from replicax._layout.layout import LogicalAxes, LogicalAxis
from replicax._typing import IndexGroups
from replicax.errors import CollectiveArgumentError

Names = Sequence[Hashable]


def as_names(axis_name: Names | Hashable) -> Names:
    """Returns the axis names of a collective as a tuple."""
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def direct(axis: LogicalAxis | None) -> Hashable | None:
    """Returns the mesh axis if JAX's collective over it is enough (one replica per device, no padding), else None."""
    return axis.device_axis if axis is not None and axis.lanes == 1 and not axis.padding else None


def split_axes(logical: LogicalAxes, axes: Names) -> tuple[list[LogicalAxis], tuple[int, ...], tuple[Hashable, ...]]:
    """Splits ``axes`` into logical axes, array dimensions (ints for axes of an inner ``vmap``) and other axis names."""
    ours = [logical[name] for name in axes if name in logical]
    positional = tuple(name for name in axes if isinstance(name, int))
    foreign = tuple(name for name in axes if name not in logical and not isinstance(name, int))
    return ours, positional, foreign


def groups_of(primitive: str, axis_index_groups: IndexGroups, size: int, *, of_one_size: bool) -> Groups | None:
    """Converts ``axis_index_groups`` to tables. Returns None if all replicas are one group.

    Args:
        primitive: The name of the collective, for error messages.
        axis_index_groups: The groups.
        size: The number of replicas.
        of_one_size: Whether all groups must have the same size.

    Raises:
        CollectiveArgumentError: The groups do not cover each replica exactly once, or have different sizes.
    """
    if axis_index_groups is None:
        return None
    if sorted(chain.from_iterable(axis_index_groups)) != list(range(size)):
        raise CollectiveArgumentError(
            f"{primitive}: axis_index_groups={shown(axis_index_groups)} must contain each replica index from 0 to "
            f"{size - 1} exactly once."
        )
    if of_one_size and len(set(map(len, axis_index_groups))) > 1:
        raise CollectiveArgumentError(
            f"{primitive}: the groups of axis_index_groups={shown(axis_index_groups)} must have the same size, because "
            f"the shape of the result depends on it. Only psum, pmax and pmin accept groups of different sizes."
        )
    return groups([group for group in axis_index_groups if group], size)


def shown(argument: Iterable[Iterable[int]]) -> str:
    """Formats groups or pairs for an error message."""
    text = str([list(map(int, item)) for item in argument])
    return text if len(text) < 200 else f"{text[:197]}..."
