"""Prints how an array is sharded over devices."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from replicax._typing import Array, ArrayLike, HostArray
from replicax.errors import AxisSpecError, DeletedArrayError, NotAnArrayError

#: An array on devices or on the host.
A = TypeVar("A", Array, HostArray)

#: At most this many devices, replicas per device (half as many for non-scalars) and values per replica are shown.
DEVICES, REPLICAS, VALUES = 16, 4, 3

#: Devices with the same replicas get the same colour.
COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")

# The encoding of a console may lack the drawing characters.
ASCII = str.maketrans({"█": "#", "·": ".", "…": "...", "–": "-"})

# Under jax.set_mesh, JAX rejects a program on a single device of that mesh.
NO_MESH = Mesh(np.empty((), object), ())


def show_replicas(x: ArrayLike, name: str = "array", *, axis: int = 0, console: Console | None = None) -> None:
    """Prints how an array is sharded: one row per device, with the replicas that the device holds.

    Nothing is gathered: only the few printed values are copied from each device.

    Args:
        x: An array of shape ``(replicas, ...)`` and any dtype: a result of :func:`pmap`, any other ``jax.Array``
            (PRNG keys, too), or a NumPy array. If there are several processes, each prints its own devices.
        name: The name of the array in the output.
        axis: The replica axis: the ``out_axes`` of the map.
        console: The console to print to, instead of stdout: ``rich.console.Console(file=...)`` for a file,
            ``Console(record=True)`` for HTML or SVG.

    Raises:
        NotAnArrayError: ``x`` is not an array (a pytree, for example), or is a tracer.
        TypeError: ``axis`` is not an int.
        AxisSpecError: ``x`` does not have this axis, or the axis has size 0.
        DeletedArrayError: ``x`` was donated or deleted.

    Example:
        >>> import numpy as np, replicax
        >>> replicax.simulate_devices(8)
        >>> replicax.show_replicas(replicax.pmap(lambda x: 2 * x)(np.arange(12)), "y")
        y: int32[12], 12 replicas on 6 devices
        ╭────────┬──────────┬──────────────┬────────╮
        │ device │ replicas │              │ values │
        ├────────┼──────────┼──────────────┼────────┤
        │ cpu:0  │ 0–1      │ ██·········· │ 0 2    │
        │ cpu:1  │ 2–3      │ ··██········ │ 4 6    │
        │ cpu:2  │ 4–5      │ ····██······ │ 8 10   │
        │ cpu:3  │ 6–7      │ ······██···· │ 12 14  │
        │ cpu:4  │ 8–9      │ ········██·· │ 16 18  │
        │ cpu:5  │ 10–11    │ ··········██ │ 20 22  │
        ╰────────┴──────────┴──────────────┴────────╯
        Each device holds 2 replicas.
    """
    _check_array(x, name)
    axis = _check_axis(x, name, axis)
    console = console or Console()
    parts = _parts(x, axis)
    text = _plain if console.options.ascii_only else Text
    devices = len(x.sharding.device_set) if isinstance(x, jax.Array) else 0
    console.print(text(_headline(x, name, axis, devices), style="bold"))
    console.print(_table(parts, x.shape[axis], axis, min(32, console.width // 4), text))
    console.print(text(_summary(parts, x.shape[axis], devices), style="dim"))


def _plain(content: str, style: str = "") -> Text:
    return Text(content.translate(ASCII), style)


# ---------------------------------------------------------------------------------------------------------------
# The shards


@dataclass(frozen=True)
class Part:
    """The shard of an array on one device.

    Attributes:
        place: The name of the device.
        replicas: The replicas in the shard.
        within: Which part of each replica the shard holds, as an index; empty if it holds whole replicas.
        block: The values of the shard.
    """

    place: str
    replicas: range
    within: str
    block: Array | HostArray


def _parts(x: Array | HostArray, axis: int) -> list[Part]:
    """Returns the addressable shards of an array, ordered by replica."""
    if not isinstance(x, jax.Array):
        return [Part("host", range(x.shape[axis]), "", x)]
    parts = [
        Part(
            f"{shard.device.platform}:{shard.device.id}",
            range(*shard.index[axis].indices(x.shape[axis])),
            _within(shard.index, x.shape, axis),
            shard.data,
        )
        for shard in x.addressable_shards
    ]
    return sorted(parts, key=lambda part: part.replicas.start)


def _within(index: Sequence[slice], shape: Sequence[int], axis: int) -> str:
    # The index of a PRNG key shard may also cover the words of the keys.
    bounds = [cut.indices(size)[:2] for cut, size in zip(index, shape, strict=False)]
    cuts = [":" if bound == (0, size) else "{}:{}".format(*bound) for bound, size in zip(bounds, shape, strict=True)]
    del cuts[axis]
    return f"[{', '.join(cuts)}]" if any(cut != ":" for cut in cuts) else ""


# ---------------------------------------------------------------------------------------------------------------
# The output


def _headline(x: Array | HostArray, name: str, axis: int, devices: int) -> str:
    kind = f"{x.dtype}[{', '.join(map(str, x.shape))}]"
    replicas = _count(x.shape[axis], "replica") + (f" along axis {axis}" if axis else "")
    here = f" of process {jax.process_index()}" if devices and jax.process_count() > 1 else ""
    return f"{name}: {kind}, {replicas} on {_count(devices, 'device') if devices else 'the host'}{here}"


def _summary(parts: Sequence[Part], size: int, devices: int) -> str:
    """Returns the last line. In JAX, all shards of an array have the same shape, so one sentence describes all rows."""
    if not devices:
        return "pmap copies to each device its own part."
    if not parts:
        return "No device of this process holds a part of it."
    each = len(parts[0].replicas)
    copies = devices * each // size
    if parts[0].within:
        words = "Each device holds a part of each replica in its row."
    elif each == size:
        words = f"{'Each' if devices > 1 else 'The'} device holds {'all ' * (size > 1)}{_count(size, 'replica')}."
    else:
        words = f"Each device holds {_count(each, 'replica')}" + (
            f", and each replica is on {copies} devices." if copies > 1 else "."
        )
    return words if len(parts) == devices else f"{words} The table shows the {len(parts)} devices of this process."


def _table(parts: Sequence[Part], size: int, axis: int, width: int, text: Callable[..., Text]) -> Table:
    table = Table("device", "replicas", "", box=box.ROUNDED)
    for column in table.columns:
        column.no_wrap = True
    table.add_column("values", overflow="fold", min_width=6)  # fold, because a truncated number is a wrong number
    groups = sorted({part.replicas.start for part in parts})

    def add(part: Part) -> None:
        span = f"{_span(part.replicas)} {part.within}"
        colour = COLOURS[groups.index(part.replicas.start) % len(COLOURS)]
        cells = part.place, span, _bar(part.replicas, size, width), _values(part, axis)
        table.add_row(*(text(cell, style=colour) for cell in cells))

    left_out = parts[DEVICES // 2 : -DEVICES // 2] if len(parts) > DEVICES else []
    for part in parts[: DEVICES // 2 if left_out else None]:
        add(part)
    if left_out:
        span = _span(range(left_out[0].replicas.start, left_out[-1].replicas.stop))
        table.add_row(*(text(cell, style="dim") for cell in (f"… {len(left_out)} more", span, "…", "…")))
        for part in parts[-DEVICES // 2 :]:
            add(part)
    return table


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _span(replicas: range) -> str:
    return f"{replicas[0]}–{replicas[-1]}" if len(replicas) > 1 else str(replicas[0])


def _bar(replicas: range, size: int, width: int) -> str:
    """Returns a bar of at most ``width`` cells, in which the cells of ``replicas`` are marked."""
    width = min(size, width)
    start = replicas.start * width // size
    stop = max(start + 1, replicas.stop * width // size)
    return "·" * start + "█" * (stop - start) + "·" * (width - stop)


def _values(part: Part, axis: int) -> str:
    block = part.block
    if jax.numpy.issubdtype(block.dtype, jax.dtypes.prng_key):
        block = jax.random.key_data(block)
    few = _few_there(block, axis) if isinstance(block, jax.Array) else _few(block, axis)
    numbers = [[_number(value) for value in row] for row in few]
    in_each = block.size // len(part.replicas)
    each = [row[0] if block.ndim == 1 else f"[{_elided(row, in_each)}]" for row in numbers]
    return _elided(each, len(part.replicas))


def _number(value: np.generic) -> str:
    value = value.item()
    return f"{value:.5g}" if isinstance(value, float | complex) else str(value)


def _elided(shown: Sequence[str], n: int) -> str:
    return " ".join(shown if len(shown) == n else [*shown[:-1], "…", shown[-1]])


# ---------------------------------------------------------------------------------------------------------------
# Reading a few values


def _few(block: A, axis: int) -> A:
    """Returns the first and last values of the first and last replicas of a shard.

    Returns:
        An array of shape ``(shown replicas, shown values)``.
    """
    some = block.take(_ends(block.shape[axis], REPLICAS if block.ndim == 1 else REPLICAS // 2), axis)
    rest = [i for i in range(block.ndim) if i != axis]
    rows = some.transpose(axis, *rest).reshape(some.shape[axis], math.prod(block.shape[i] for i in rest))
    return rows.take(_ends(rows.shape[1], VALUES), 1)


def _few_there(block: jax.Array, axis: int) -> HostArray:
    """Runs :func:`_few` on the device of the shard, and copies only the result to the host."""
    with jax.set_mesh(NO_MESH):
        return jax.device_get(_few_jit(block, axis))


_few_jit = jax.jit(_few, static_argnums=1)


def _ends(n: int, limit: int) -> HostArray:
    return np.asarray([*range(n)] if n <= limit else [*range(limit - 1), n - 1], np.int32)


# ---------------------------------------------------------------------------------------------------------------
# Validation


def _check_array(x: object, name: str) -> None:
    if isinstance(x, jax.core.Tracer):
        raise NotAnArrayError(
            f"show_replicas needs a concrete array, but {name} is a tracer: {x!r:.60}. Call show_replicas outside "
            f"jit, grad and vmap, on their results."
        )
    if not isinstance(x, jax.Array | np.ndarray):
        raise NotAnArrayError(
            f"show_replicas needs one array, but {name} is of type {type(x).__name__}. Pass a jax.Array or a NumPy "
            f"array. For all arrays of a tree, write jax.tree.map(replicax.show_replicas, tree)."
        )
    if isinstance(x, np.ndarray) and x.dtype.kind not in "biufcV":
        raise NotAnArrayError(
            f"show_replicas needs an array of numbers, but {name} has dtype {x.dtype}. Convert it, as in "
            f"np.asarray({name}, dtype=float)."
        )
    if isinstance(x, jax.Array) and x.is_deleted():
        raise DeletedArrayError(f"show_replicas cannot read {name}: it was donated or deleted.")


def _check_axis(x: Array | HostArray, name: str, axis: int) -> int:
    """Returns the axis as a non-negative int."""
    axis = operator.index(axis)
    if not -x.ndim <= axis < x.ndim or not x.shape[axis]:
        raise AxisSpecError(
            f"show_replicas needs at least one replica along axis {axis}, but {name} has shape {x.shape}. Pass a "
            f"result of pmap, with axis equal to its out_axes."
        )
    return axis % x.ndim
