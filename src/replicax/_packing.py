"""Many small host arrays travel as one, and are told apart inside the program.

What a small array costs on its way to a device is a matter of arrays and devices, not of bytes. So those of a call
are laid side by side, a row for each replica, in one array for each dtype; the program for such calls is that of the
replica behind a few slices. The user's function is not traced again, but a program is compiled for it, and so it is
made when the same arguments come from the host for the second time, and of programs of moderate size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.dtypes import float0

from replicax import _jax
from replicax._axes import check_spec, one_replica_type
from replicax._lowering import Program, Replica, lower, trace_replica
from replicax._transfer import put

#: From so many arrays on packing pays.
MANY = 8

#: Arrays of more bytes go by themselves.
LARGE = 1 << 16

#: A program of more equations is not compiled a second time.
EQUATIONS = 2_000


class Group(NamedTuple):
    """Arrays of one dtype that go together.

    Attributes:
        leaves: Which of the arguments they are.
        axes: Their mapped axes; None for those that go whole to every replica.
        shapes: Their shapes, as a replica sees them.
        dtype: Their dtype on the devices.
    """

    leaves: Sequence[int]
    axes: Sequence[int | None]
    shapes: Sequence[tuple[int, ...]]
    dtype: np.dtype[Any]

    @property
    def mapped(self) -> bool:
        """Whether each replica has a row of its own."""
        return self.axes[0] is not None

    def pack(self, leaves: Sequence[Any], size: int) -> np.ndarray[Any, Any]:
        """The arrays side by side: (replicas, elements of one), or (elements,) of those that go whole."""
        rows = []
        for i, axis, shape in zip(self.leaves, self.axes, self.shapes, strict=True):
            x = leaves[i]
            if axis:
                x = np.moveaxis(x, axis, 0)
            rows.append(x.reshape(-1) if axis is None else x.reshape(size, math.prod(shape)))
        return np.concatenate(rows, axis=-1, dtype=self.dtype, casting="unsafe")

    def unpack(self, row: Any) -> list[Any]:
        """The arrays of one replica."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1].tolist()
        parts = jax.numpy.split(row, ends)
        # What follows is compiled as if they were arguments, and so computes the same to the last bit.
        return list(lax.optimization_barrier([x.reshape(shape) for x, shape in zip(parts, self.shapes, strict=True)]))


@dataclasses.dataclass(frozen=True)
class Packed:
    """A program that takes many of its arguments packed.

    Attributes:
        program: The program.
        kept: The arguments that it takes as they are, before the packed ones.
        groups: Which go together.
    """

    program: Program
    kept: Sequence[int]
    groups: Sequence[Group]

    def leaves(self, leaves: Sequence[Any]) -> list[Any]:
        """The arguments of :attr:`program`, those that are packed on their devices."""
        where, first = self.program.layout, len(self.kept)
        arguments = [leaves[i] for i in self.kept]
        for group, sharding in zip(self.groups, self.program.in_shardings[first:], strict=False):
            rows = group.pack(leaves, where.size)
            padded = 0 if group.mapped and where.axis.padding else None
            arguments.append(put(rows, sharding, padded, where.padded_size, owned=True))
        return arguments

    def names(self, every: Callable[[], Sequence[str]]) -> Callable[[], Sequence[str]]:
        """What the user calls the arguments of :attr:`program` that are kept."""
        return lambda: [every()[i] for i in self.kept]


def _small(leaves: Sequence[Any]) -> list[int]:
    return [i for i, x in enumerate(leaves) if type(x) is np.ndarray and x.nbytes <= LARGE and x.dtype != float0]


def worth_packing(leaves: Sequence[Any]) -> bool:
    """Whether so many arguments are small arrays of the host that they go packed."""
    return len(_small(leaves)) >= MANY


def packed(program: Program, leaves: Sequence[Any]) -> Packed | None:
    """The program for a call with these arguments that takes those of the host packed, where that pays."""
    small = _small(leaves)
    if len(small) < MANY:
        return None
    which, known = tuple(small), program.packings
    if which not in known:
        known[which] = None  # the first such call: perhaps there is no other
    elif known[which] is None and _jax.equations(program.replica.jaxpr, EQUATIONS) < EQUATIONS:
        known[which] = _pack(program, leaves, which)
    return known[which]


def _pack(program: Program, leaves: Sequence[Any], which: Sequence[int]) -> Packed:
    kept = [i for i in range(len(leaves)) if i not in set(which)]
    types = [_jax.typeof(x) for x in leaves]
    types = [jax.ShapeDtypeStruct(t.shape, t.dtype, weak_type=t.weak_type) for t in types]
    one = [one_replica_type(aval, axis) for aval, axis in zip(types, program.in_axes, strict=False)]
    together: dict[Any, list[int]] = {}
    for i in which:
        together.setdefault((types[i].dtype, program.in_axes[i] is None), []).append(i)
    groups = [
        Group(every, [program.in_axes[i] for i in every], [one[i].shape for i in every], dtype)
        for (dtype, _), every in together.items()
    ]
    replica, axis = program.replica, program.layout.axis

    def unpacked(*arguments: Any) -> list[Any]:
        own: dict[int, Any] = dict(zip(kept, arguments, strict=False))
        for group, row in zip(groups, arguments[len(kept) :], strict=True):
            own.update(zip(group.leaves, group.unpack(row), strict=True))
        return _jax.run(replica.jaxpr, [own[i] for i in range(len(own))], replica.consts)

    lengths = [sum(map(math.prod, group.shapes)) for group in groups]
    rows = [jax.ShapeDtypeStruct((n,), group.dtype) for n, group in zip(lengths, groups, strict=True)]
    traced = trace_replica(unpacked, [*(one[i] for i in kept), *rows], {}, (), axis.name, axis.size)
    every_row = [
        jax.ShapeDtypeStruct((axis.size, *row.shape) if group.mapped else row.shape, row.dtype)
        for row, group in zip(rows, groups, strict=True)
    ]
    lowered = lower(
        Replica(traced.jaxpr, traced.consts, replica.out),
        program.layout,
        [*(program.in_axes[i] for i in kept), *(0 if group.mapped else None for group in groups)],
        check_spec("out_axes", jax.tree.unflatten(program.out_tree, program.out_axes)),
        [*(types[i] for i in kept), *every_row],
        [kept.index(i) for i in program.donated if i in kept],
        program.name,
        program.agreeing,
    )
    return Packed(lowered, kept, groups)
