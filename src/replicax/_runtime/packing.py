"""Transfers many small host arrays as one array, which the program splits again.

The cost of a small transfer depends on the number of arrays and devices, not on bytes. So the small arrays of a call
are concatenated, one row per replica, into one array per dtype. The program for such calls slices the row and runs the
same replica jaxpr. The user's function is not traced again, but XLA compiles a second program. So packing starts with
the second call of the same kind, and only for programs of moderate size.
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

#: The minimum number of small arrays for packing.
MANY = 8

#: Arrays with more bytes are not packed.
LARGE = 1 << 16

#: The dtype of packed arrays, for all common dtypes.
WORD = np.dtype(np.uint32)

#: The maximum number of bytes of an array that is tiny to XLA, and the maximum number of tiny arrays to send instead of
#: one larger array.
TINY, FEW = 512, 8

#: Programs with this many equations or more are not compiled a second time.
EQUATIONS = 2_000


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive arrays of one dtype in a group.

    Attributes:
        dtype: The dtype of the arrays on the devices.
        leaves: The indices of the argument leaves.
        axes: The mapped axis of each array; None if it is not mapped.
        shapes: The shape of each array in one replica.
        words: The slice of the group's packed row with these arrays.
        rows: ``(replicas,)`` if the arrays are mapped, else ``()``.
    """

    dtype: DType
    leaves: Sequence[int]
    axes: Axes
    shapes: Sequence[tuple[int, ...]]
    words: slice
    rows: tuple[int, ...]

    @functools.cached_property
    def _flat(self) -> list[tuple[int, tuple[int, ...]]]:
        """The arrays that need a reshape to one row per replica, with that shape."""
        return [(k, (*self.rows, math.prod(shape))) for k, shape in enumerate(self.shapes) if len(shape) != 1]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(math.prod(shape) for shape in self.shapes))

    @functools.cached_property
    def _turned(self) -> list[tuple[int, int]]:
        return [(k, axis) for k, axis in enumerate(self.axes) if axis]

    def pack_into(self, packed: HostArray, leaves: Sequence[ArrayLike]) -> None:
        """Writes the arrays into the packed array."""
        chosen = [leaves[i] for i in self.leaves]
        for k, axis in self._turned:
            chosen[k] = np.moveaxis(chosen[k], axis, 0)
        for k, shape in self._flat:
            chosen[k] = chosen[k].reshape(shape)
        out = packed[..., self.words].view(self.dtype)[..., : self._ends[-1]]
        np.concatenate(chosen, axis=-1, out=out, casting="unsafe")

    def unpack(self, row: Array) -> list[Array]:
        """Splits the packed row of one replica into arrays."""
        numbers = _numbers(row[self.words], self.dtype)
        parts = jax.numpy.split(numbers, self._ends)[:-1]
        return [x.reshape(shape) for x, shape in zip(parts, self.shapes, strict=True)]


def _numbers(words: Array, dtype: DType) -> Array:
    """Reinterprets words as numbers of ``dtype``."""
    if dtype == words.dtype:
        return words
    if dtype.kind == "b":
        return _numbers(words, np.dtype(np.uint8)) != 0
    if dtype.itemsize > words.dtype.itemsize:
        words = words.reshape(-1, dtype.itemsize // words.dtype.itemsize)
    return lax.bitcast_convert_type(words, dtype).reshape(-1)


class Group(NamedTuple):
    """Arrays that are packed into one: all of them are mapped, or none.

    Attributes:
        runs: The runs of arrays, in order.
        mapped: Whether each replica has its own row.
        dtype: The dtype of the packed array.
    """

    runs: Sequence[Run]
    mapped: bool
    dtype: DType

    @property
    def leaves(self) -> list[int]:
        """The indices of the argument leaves."""
        return [i for run in self.runs for i in run.leaves]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the packed array."""
        return *self.runs[0].rows, self.runs[-1].words.stop

    def pack(self, leaves: Sequence[ArrayLike]) -> HostArray:
        """Packs the arrays into shape ``(replicas, words)``, or ``(words,)`` if they are not mapped."""
        packed = np.empty(self.shape, self.dtype)
        for run in self.runs:
            run.pack_into(packed, leaves)
        return packed

    def unpack(self, row: Array) -> list[Array]:
        """Splits the packed row of one replica into arrays."""
        # With the barrier, XLA compiles the rest as for unpacked arguments, so results are bitwise the same.
        return list(lax.optimization_barrier([x for run in self.runs for x in run.unpack(row)]))


@dataclasses.dataclass(frozen=True)
class Packed:
    """A program with packed arguments.

    Attributes:
        executable: The program.
        kept: The indices of the arguments that are not packed. The program takes them first.
        groups: The groups of packed arguments.
    """

    executable: Executable
    kept: Sequence[int]
    groups: Sequence[Group]

    def leaves(self, leaves: Sequence[ArrayLike]) -> list[ArrayLike]:
        """The arguments of :attr:`executable`."""
        return [*(leaves[i] for i in self.kept), *(group.pack(leaves) for group in self.groups)]

    def names(self, every: Callable[[], Sequence[str]]) -> Callable[[], Sequence[str]]:
        """The names of the arguments that are not packed, for messages."""
        return lambda: [every()[i] for i in self.kept]


def packed(executable: Executable, leaves: Sequence[ArrayLike]) -> Packed | None:
    """The program with packed host arguments for this call; None if the call is not packed."""
    kinds, known = tuple(map(type, leaves)), executable.packings
    if kinds not in known:
        known[kinds] = _NOT_YET if len(_small(executable.spec, kinds)) >= MANY else None
    elif known[kinds] is _NOT_YET:  # the second call of this kind
        known[kinds] = _pack(executable.spec, leaves, _small(executable.spec, kinds))
    found = known[kinds]
    return None if found is _NOT_YET else found


def may_be_packed(executable: Executable, leaves: Sequence[ArrayLike]) -> bool:
    """Whether the next call with such arguments is packed."""
    return executable.packings.get(tuple(map(type, leaves))) is not None


def _small(program: ProgramSpec, kinds: Sequence[type]) -> list[int]:
    """The indices of the small NumPy arrays; empty if the program is too large to compile twice."""
    if (
        program.layout.axis.ordered
        or kinds.count(np.ndarray) < MANY
        or _jax.equations(program.replica.jaxpr, EQUATIONS) == EQUATIONS
    ):
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
    spec = lower(flat, program.layout, inputs, outputs, program.name, program.lanes.at_once)
    return Packed(Executable(spec), kept, groups)


def _groups(program: ProgramSpec, own_types: Sequence[jax.ShapeDtypeStruct], which: Sequence[int]) -> list[Group]:
    """Groups the arguments by dtype and by whether they are mapped. Common dtypes are packed as 32-bit words.

    On CPUs, XLA runs a program sequentially if all of its arrays are tiny, and otherwise as a task graph, at 1 µs per
    task (``execute_sequential_buffer_threshold`` in XLA's ``thunk_executor.cc``). So on a single device, a few KB are
    split into tiny groups. On several devices, an additional transfer costs more than the task graph.
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
    """Splits arrays into tiny groups; an array that is not tiny gets its own group."""
    groups: list[list[int]] = []
    room = 0
    for leaf, size in zip(leaves, sizes, strict=True):
        if size > room:
            groups.append([])
            room = TINY
        groups[-1].append(leaf)
        room -= size
    return groups
