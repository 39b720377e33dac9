"""Many small host arrays travel as one, and are told apart inside the program.

What a small array costs on its way to a device is a matter of arrays and devices, not of bytes. So those of a call
are laid side by side, a row for each replica, in one array for each dtype; the program for such calls is that of the
replica behind a few slices. The user's function is not traced again, but a program is compiled for it, and so it is
made when the same arguments come from the host for the second time, and of programs of moderate size.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import lax

from replicax import _jax
from replicax._engine.lowering import lower
from replicax._engine.outputs import Outputs
from replicax._engine.replica import Replica, trace_replica
from replicax._engine.spec import Inputs, ProgramSpec
from replicax._layout.axes import check_spec, one_replica_type
from replicax._runtime.executable import Executable
from replicax._typing import Array, ArrayLike, Axes, DType, HostArray

#: From so many arrays on packing pays.
MANY = 8

#: Arrays of more bytes go by themselves.
LARGE = 1 << 16

#: What arrays of all usual dtypes are sent as.
WORD = np.dtype(np.uint32)

#: Up to so many bytes an array is tiny to XLA, and up to so many tiny arrays are sent in the place of one.
TINY, FEW = 512, 8

#: A program of more equations is not compiled a second time.
EQUATIONS = 2_000


@dataclasses.dataclass(frozen=True)
class Run:
    """Arrays of one dtype, side by side in a group.

    Attributes:
        dtype: Their dtype on the devices.
        leaves: Which of the arguments they are.
        axes: Their mapped axes; None for those that go whole to every replica.
        shapes: Their shapes, as a replica sees them.
        words: Where they lie in the group's rows.
        rows: The number of replicas, if each has a row of its own, as a shape.
    """

    dtype: DType
    leaves: Sequence[int]
    axes: Axes
    shapes: Sequence[tuple[int, ...]]
    words: slice
    rows: tuple[int, ...]

    @functools.cached_property
    def _flat(self) -> list[tuple[int, tuple[int, ...]]]:
        """Which arrays are no rows of numbers yet, and what they are as such."""
        return [(k, (*self.rows, math.prod(shape))) for k, shape in enumerate(self.shapes) if len(shape) != 1]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(math.prod(shape) for shape in self.shapes))

    @functools.cached_property
    def _turned(self) -> list[tuple[int, int]]:
        return [(k, axis) for k, axis in enumerate(self.axes) if axis]

    def pack_into(self, packed: HostArray, leaves: Sequence[ArrayLike]) -> None:
        """Writes the arrays into their place."""
        chosen = [leaves[i] for i in self.leaves]
        for k, axis in self._turned:
            chosen[k] = np.moveaxis(chosen[k], axis, 0)
        for k, shape in self._flat:
            chosen[k] = chosen[k].reshape(shape)
        out = packed[..., self.words].view(self.dtype)[..., : self._ends[-1]]
        np.concatenate(chosen, axis=-1, out=out, casting="unsafe")

    def unpack(self, row: Array) -> list[Array]:
        """The arrays of one replica."""
        numbers = _numbers(row[self.words], self.dtype)
        parts = jax.numpy.split(numbers, self._ends)[:-1]
        return [x.reshape(shape) for x, shape in zip(parts, self.shapes, strict=True)]


def _numbers(words: Array, dtype: DType) -> Array:
    """The bits of whole words as numbers of any width."""
    if dtype == words.dtype:
        return words
    if dtype.kind == "b":
        return _numbers(words, np.dtype(np.uint8)) != 0
    if dtype.itemsize > words.dtype.itemsize:
        words = words.reshape(-1, dtype.itemsize // words.dtype.itemsize)
    return lax.bitcast_convert_type(words, dtype).reshape(-1)


class Group(NamedTuple):
    """Arrays that go together: those that are all mapped, or none.

    Attributes:
        runs: What lies in a row.
        mapped: Whether each replica has a row of its own.
        dtype: That of its words.
    """

    runs: Sequence[Run]
    mapped: bool
    dtype: DType

    @property
    def leaves(self) -> list[int]:
        """Which of the arguments they are."""
        return [i for run in self.runs for i in run.leaves]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of what :meth:`pack` returns."""
        return *self.runs[0].rows, self.runs[-1].words.stop

    def pack(self, leaves: Sequence[ArrayLike]) -> HostArray:
        """The arrays side by side: (replicas, words of one), or (words,) of those that go whole."""
        packed = np.empty(self.shape, self.dtype)
        for run in self.runs:
            run.pack_into(packed, leaves)
        return packed

    def unpack(self, row: Array) -> list[Array]:
        """The arrays of one replica."""
        # What follows is compiled as if they were arguments, and so computes the same to the last bit.
        return list(lax.optimization_barrier([x for run in self.runs for x in run.unpack(row)]))


@dataclasses.dataclass(frozen=True)
class Packed:
    """A program that takes many of its arguments packed.

    Attributes:
        executable: The program.
        kept: The arguments that it takes as they are, before the packed ones.
        groups: Which go together.
    """

    executable: Executable
    kept: Sequence[int]
    groups: Sequence[Group]

    def leaves(self, leaves: Sequence[ArrayLike]) -> list[ArrayLike]:
        """The arguments of :attr:`executable`."""
        return [*(leaves[i] for i in self.kept), *(group.pack(leaves) for group in self.groups)]

    def names(self, every: Callable[[], Sequence[str]]) -> Callable[[], Sequence[str]]:
        """What the user calls the arguments of :attr:`executable` that are kept."""
        return lambda: [every()[i] for i in self.kept]


def packed(executable: Executable, leaves: Sequence[ArrayLike]) -> Packed | None:
    """The program for a call with these arguments that takes those of the host packed, where that pays."""
    kinds, known = tuple(map(type, leaves)), executable.packings
    if kinds not in known:
        known[kinds] = _NOT_YET if len(_small(executable.spec, kinds)) >= MANY else None
    elif known[kinds] is _NOT_YET:  # there was such a call before, so that there may be more of them
        known[kinds] = _pack(executable.spec, leaves, _small(executable.spec, kinds))
    found = known[kinds]
    return None if found is _NOT_YET else found


def may_be_packed(executable: Executable, leaves: Sequence[ArrayLike]) -> bool:
    """Whether a next call with such arguments takes them packed."""
    return executable.packings.get(tuple(map(type, leaves))) is not None


def _small(program: ProgramSpec, kinds: Sequence[type]) -> list[int]:
    """Which arguments of these types are small arrays, if the program is one of moderate size."""
    if kinds.count(np.ndarray) < MANY or _jax.equations(program.replica.jaxpr, EQUATIONS) == EQUATIONS:
        return []
    sizes = [x.size * x.dtype.itemsize for x in program.inputs.types]
    return [i for i, kind in enumerate(kinds) if kind is np.ndarray and 0 < sizes[i] <= LARGE]


_NOT_YET = object()


def _pack(program: ProgramSpec, leaves: Sequence[ArrayLike], which: Sequence[int]) -> Packed:
    chosen = set(which)
    kept = [i for i in range(len(leaves)) if i not in chosen]
    own_types = [one_replica_type(x, axis) for x, axis in zip(program.inputs.types, program.inputs.axes, strict=True)]
    groups = _groups(program, own_types, which)
    replica, axis = program.replica, program.layout.axis

    def unpacked(*arguments: Array) -> list[Array]:
        own: dict[int, Array] = dict(zip(kept, arguments, strict=False))
        for group, row in zip(groups, arguments[len(kept) :], strict=True):
            own.update(zip(group.leaves, group.unpack(row), strict=True))
        return _jax.run(replica.jaxpr, [own[i] for i in range(len(own))], replica.consts)

    rows = [jax.ShapeDtypeStruct(group.shape, group.dtype) for group in groups]
    own_rows = [jax.ShapeDtypeStruct(group.shape[-1:], group.dtype) for group in groups]
    arguments = [*(own_types[i] for i in kept), *own_rows]
    traced = trace_replica(unpacked, arguments, {}, (), axis.name, axis.size)
    inputs = Inputs(
        (*(program.inputs.types[i] for i in kept), *rows),
        (*(program.inputs.axes[i] for i in kept), *(0 if group.mapped else None for group in groups)),
        tuple(kept.index(i) for i in program.inputs.donated if i in kept),
    )
    outputs = Outputs(check_spec("out_axes", list(program.out_axes)), program.policy)
    flat = Replica(traced.jaxpr, traced.consts, jax.tree.leaves(replica.out))
    return Packed(Executable(lower(flat, program.layout, inputs, outputs, program.name)), kept, groups)


def _groups(program: ProgramSpec, own_types: Sequence[jax.ShapeDtypeStruct], which: Sequence[int]) -> list[Group]:
    """Which arguments go together: those that are all mapped, or none, as words of 32 bits where their dtype has bits.

    XLA on CPUs runs a program whose arrays are all tiny at once, and any other as a graph of tasks, which takes 1 µs
    for each (``execute_sequential_buffer_threshold`` in its ``thunk_executor.cc``). So few bytes are kept that small on
    a single device; on several, sending one more array takes longer.
    """
    together: dict[tuple[DType, bool], list[int]] = {}
    for i in sorted(which, key=lambda i: str(program.inputs.types[i].dtype)):
        dtype = program.inputs.types[i].dtype
        together.setdefault((WORD if _has_bits(dtype) else dtype, program.inputs.axes[i] is not None), []).append(i)
    groups: list[Group] = []
    for (word, mapped), every in together.items():
        lanes = program.layout.axis.lanes if mapped else 1
        sizes = [lanes * own_types[i].size * program.inputs.types[i].dtype.itemsize for i in every]
        alone = program.layout.mesh.size == 1
        parts = _cut(every, sizes) if alone and sum(sizes) <= FEW * TINY else [every]
        rows = (program.layout.size,) if mapped else ()
        groups.extend(Group(_runs(program, own_types, some, word, rows), mapped, word) for some in parts)
    return groups


def _has_bits(dtype: DType) -> bool:
    return dtype.kind in "biuf" and dtype.itemsize <= 8


def _runs(
    program: ProgramSpec,
    own_types: Sequence[jax.ShapeDtypeStruct],
    which: Sequence[int],
    word: DType,
    rows: tuple[int, ...],
) -> list[Run]:
    runs: list[Run] = []
    for dtype, some in itertools.groupby(which, lambda i: program.inputs.types[i].dtype):
        leaves = list(some)
        numbers = sum(own_types[i].size for i in leaves)
        start = runs[-1].words.stop if runs else 0
        stop = start - (-numbers * dtype.itemsize // word.itemsize)
        shapes = [own_types[i].shape for i in leaves]
        runs.append(Run(dtype, leaves, [program.inputs.axes[i] for i in leaves], shapes, slice(start, stop), rows))
    return runs


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
