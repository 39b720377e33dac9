"""Many small host arrays travel as one, and are told apart inside the program.

What a small array costs on its way to a device is a matter of arrays and devices, not of bytes. So those of a call
are laid side by side, a row for each replica, in one array for each dtype; the program for such calls is that of the
replica behind a few slices. The user's function is not traced again, but a program is compiled for it, and so it is
made when the same arguments come from the host for the second time, and of programs of moderate size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from replicax import _jax
from replicax._axes import check_spec, one_replica_type
from replicax._lowering import Program, Replica, lower, trace_replica

#: From so many arrays on packing pays.
MANY = 8

#: Arrays of more bytes go by themselves.
LARGE = 1 << 16

#: Up to so many bytes an array is tiny to XLA, and up to so many tiny arrays are sent in the place of one.
TINY, FEW = 512, 8

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

    def type(self, size: int | None = None) -> jax.ShapeDtypeStruct:
        """The type of what :meth:`pack` returns for so many replicas, or of one replica's part of it."""
        rows = () if size is None or not self.mapped else (size,)
        return jax.ShapeDtypeStruct((*rows, sum(map(math.prod, self.shapes))), self.dtype)

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
        """The arguments of :attr:`program`."""
        size = self.program.layout.size
        return [*(leaves[i] for i in self.kept), *(group.pack(leaves, size) for group in self.groups)]

    def names(self, every: Callable[[], Sequence[str]]) -> Callable[[], Sequence[str]]:
        """What the user calls the arguments of :attr:`program` that are kept."""
        return lambda: [every()[i] for i in self.kept]


def packed(program: Program, leaves: Sequence[Any]) -> Packed | None:
    """The program for a call with these arguments that takes those of the host packed, where that pays."""
    kinds, known = tuple(map(type, leaves)), program.packings
    if kinds not in known:
        known[kinds] = _NOT_YET if len(_small(program, kinds)) >= MANY else None
    elif known[kinds] is _NOT_YET:  # there was such a call before, so that there may be more of them
        known[kinds] = _pack(program, leaves, _small(program, kinds))
    found = known[kinds]
    return None if found is _NOT_YET else found


def may_be_packed(program: Program, leaves: Sequence[Any]) -> bool:
    """Whether a next call with such arguments takes them packed."""
    return program.packings.get(tuple(map(type, leaves))) is not None


def comes_packed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether so many arguments are NumPy arrays that they may go packed; those in place are seen at a glance."""
    if not any(_starts_with_host_array(tree) for tree in (*args, *kwargs.values())):
        return False
    return list(map(type, jax.tree.leaves((args, kwargs)))).count(np.ndarray) >= MANY


def _starts_with_host_array(tree: Any) -> bool:
    while isinstance(tree, list | tuple | dict) and tree:
        tree = next(iter(tree.values() if isinstance(tree, dict) else tree))
    return not isinstance(tree, jax.Array)


def _small(program: Program, kinds: Sequence[type]) -> list[int]:
    """Which arguments of these types are small arrays, if the program is one of moderate size."""
    if kinds.count(np.ndarray) < MANY or _jax.equations(program.replica.jaxpr, EQUATIONS) == EQUATIONS:
        return []
    sizes = [x.size * x.dtype.itemsize for x in program.types]
    return [i for i, kind in enumerate(kinds) if kind is np.ndarray and 0 < sizes[i] <= LARGE]


_NOT_YET = object()


def _pack(program: Program, leaves: Sequence[Any], which: Sequence[int]) -> Packed:
    chosen = set(which)
    kept = [i for i in range(len(leaves)) if i not in chosen]
    own_types = [one_replica_type(x, axis) for x, axis in zip(program.types, program.in_axes, strict=True)]
    groups = _groups(program, own_types, which)
    replica, axis = program.replica, program.layout.axis

    def unpacked(*arguments: Any) -> list[Any]:
        own: dict[int, Any] = dict(zip(kept, arguments, strict=False))
        for group, row in zip(groups, arguments[len(kept) :], strict=True):
            own.update(zip(group.leaves, group.unpack(row), strict=True))
        return _jax.run(replica.jaxpr, [own[i] for i in range(len(own))], replica.consts)

    arguments = [*(own_types[i] for i in kept), *(group.type() for group in groups)]
    traced = trace_replica(unpacked, arguments, {}, (), axis.name, axis.size)
    lowered = lower(
        Replica(traced.jaxpr, traced.consts, replica.out),
        program.layout,
        [*(program.in_axes[i] for i in kept), *(0 if group.mapped else None for group in groups)],
        check_spec("out_axes", jax.tree.unflatten(program.out_tree, program.out_axes)),
        [*(program.types[i] for i in kept), *(group.type(axis.size) for group in groups)],
        [kept.index(i) for i in program.donated if i in kept],
        program.name,
        program.agreeing,
    )
    return Packed(lowered, kept, groups)


def _groups(program: Program, own_types: Sequence[Any], which: Sequence[int]) -> list[Group]:
    """Which arguments go together: those of one dtype that are all mapped, or none.

    XLA on CPUs runs a program whose arrays are all tiny at once, and any other as a graph of tasks, which takes 1 µs
    for each (``execute_sequential_buffer_threshold`` in its ``thunk_executor.cc``). So few bytes are kept that small on
    a single device; on several, sending one more array takes longer.
    """
    together: dict[Any, list[int]] = {}
    for i in which:
        together.setdefault((program.types[i].dtype, program.in_axes[i] is None), []).append(i)
    groups: list[Group] = []
    for (dtype, whole), every in together.items():
        lanes = 1 if whole else program.layout.axis.lanes
        sizes = [lanes * own_types[i].size * dtype.itemsize for i in every]
        alone = program.layout.mesh.size == 1
        parts = _cut(every, sizes) if alone and sum(sizes) <= FEW * TINY else [every]
        groups.extend(
            Group(some, [program.in_axes[i] for i in some], [own_types[i].shape for i in some], dtype) for some in parts
        )
    return groups


def _cut(leaves: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Arrays of such sizes in groups that are tiny, as far as an array is."""
    groups: list[list[int]] = []
    room = 0
    for leaf, size in zip(leaves, sizes, strict=True):
        if size > room:
            groups.append([])
            room = TINY
        groups[-1].append(leaf)
        room -= size
    return groups
