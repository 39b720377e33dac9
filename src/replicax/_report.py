"""What people see in a terminal: how an array lies over its devices."""

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
from replicax.errors import AxisSpecError, NotAnArrayError

#: An array on devices or on the host.
A = TypeVar("A", Array, HostArray)

#: How many devices, replicas of a device (half as many when they are no scalars) and values of a replica are shown
#: before the middle is left out.
DEVICES, REPLICAS, VALUES = 16, 4, 3

#: Replicas that lie on the same devices have the same colour.
COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")

# A console that is no terminal may have an encoding that lacks what the picture is drawn with.
ASCII = str.maketrans({"█": "#", "·": ".", "…": "...", "–": "-"})

# A mesh that the user set (jax.set_mesh) refuses programs on a single one of its devices.
NO_MESH = Mesh(np.empty((), object), ())


def show_replicas(x: ArrayLike, name: str = "array", *, axis: int = 0, console: Console | None = None) -> None:
    """Prints a picture of how an array lies over its devices: one row a device, with the replicas that it holds.

    Nothing is gathered: of each device that is shown, a few values are read, and nothing else leaves it.

    Args:
        x: An array of shape ``(replicas, ...)`` and any dtype: what :func:`pmap` returned, any other ``jax.Array``
            (PRNG keys too), or a NumPy array, which lies on the host. In a program of several processes each shows
            its own devices.
        name: What the picture calls the array.
        axis: The axis of the replicas, where that is not the first: as ``out_axes`` said.
        console: Where to print, instead of stdout: ``rich.console.Console(file=...)`` for a file,
            ``Console(record=True)`` for HTML or SVG.

    Raises:
        NotAnArrayError: ``x`` is not one array (but, say, a tree of them), or is being traced and lies nowhere yet.
        AxisSpecError: ``x`` has no such axis, or no replica along it.

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
# What is to be shown


@dataclass(frozen=True)
class Part:
    """What one device holds of an array.

    Attributes:
        place: What to call the device.
        replicas: The replicas.
        within: Which part of each replica, as an index; empty when it is all.
        block: Their values, where they lie.
    """

    place: str
    replicas: range
    within: str
    block: Array | HostArray


def _parts(x: Array | HostArray, axis: int) -> list[Part]:
    """This process' parts of an array, in the order of their replicas."""
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
    # The index of a PRNG key's shard may go on into the words of the keys.
    bounds = [cut.indices(size)[:2] for cut, size in zip(index, shape, strict=False)]
    cuts = [":" if bound == (0, size) else "{}:{}".format(*bound) for bound, size in zip(bounds, shape, strict=True)]
    del cuts[axis]
    return f"[{', '.join(cuts)}]" if any(cut != ":" for cut in cuts) else ""


# ---------------------------------------------------------------------------------------------------------------
# The picture


def _headline(x: Array | HostArray, name: str, axis: int, devices: int) -> str:
    kind = f"{x.dtype}[{', '.join(map(str, x.shape))}]"
    replicas = _count(x.shape[axis], "replica") + (f" along axis {axis}" if axis else "")
    return f"{name}: {kind}, {replicas} on {_count(devices, 'device') if devices else 'the host'}"


def _summary(parts: Sequence[Part], size: int, devices: int) -> str:
    """What the rows have in common: JAX cuts an array into equal parts."""
    if not devices:
        return "pmap sends each device its own part."
    if not parts:
        return "None of them is this process'."
    each = len(parts[0].replicas)
    copies = devices * each // size
    if parts[0].within:
        words = "Each device holds a part of each of its replicas."
    elif each == size:
        words = f"{'Each' if devices > 1 else 'The'} device holds {'all ' * (size > 1)}{_count(size, 'replica')}."
    else:
        words = f"Each device holds {_count(each, 'replica')}" + (
            f", and each replica lies on {copies} devices." if copies > 1 else "."
        )
    return words if len(parts) == devices else f"{words} Shown are the {len(parts)} devices of this process."


def _table(parts: Sequence[Part], size: int, axis: int, width: int, text: Callable[..., Text]) -> Table:
    table = Table("device", "replicas", "", box=box.ROUNDED)
    for column in table.columns:
        column.no_wrap = True
    table.add_column("values", overflow="fold", min_width=6)  # never cut off: half a number reads as another number
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
    """The replicas among all of them, in at most ``width`` cells."""
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
# A few values, read where they lie


def _few(block: A, axis: int) -> A:
    """The first and the last values of the first and the last replicas of a block.

    Returns:
        An array of shape ``(shown replicas, shown values)``.
    """
    some = block.take(_ends(block.shape[axis], REPLICAS if block.ndim == 1 else REPLICAS // 2), axis)
    rest = [i for i in range(block.ndim) if i != axis]
    rows = some.transpose(axis, *rest).reshape(some.shape[axis], math.prod(block.shape[i] for i in rest))
    return rows.take(_ends(rows.shape[1], VALUES), 1)


def _few_there(block: jax.Array, axis: int) -> HostArray:
    """Like :func:`_few`, on the device of the block: nothing else leaves it."""
    with jax.set_mesh(NO_MESH):
        return jax.device_get(_few_jit(block, axis))


_few_jit = jax.jit(_few, static_argnums=1)


def _ends(n: int, limit: int) -> HostArray:
    return np.asarray([*range(n)] if n <= limit else [*range(limit - 1), n - 1], np.int32)


# ---------------------------------------------------------------------------------------------------------------
# Faults


def _check_array(x: object, name: str) -> None:
    if isinstance(x, jax.core.Tracer):
        raise NotAnArrayError(
            f"{name} is being traced, and lies on no device yet: {x!r:.60}. Call show_replicas outside jit, grad and "
            f"vmap, on what they return."
        )
    if not isinstance(x, jax.Array | np.ndarray):
        raise NotAnArrayError(
            f"show_replicas shows one array, and {name} is of type {type(x).__name__}. Pass a jax.Array or a NumPy "
            f"array; for all arrays of a tree, jax.tree.map(replicax.show_replicas, tree)."
        )


def _check_axis(x: Array | HostArray, name: str, axis: int) -> int:
    """The axis counted from the front."""
    axis = operator.index(axis)
    if not -x.ndim <= axis < x.ndim or not x.shape[axis]:
        raise AxisSpecError(
            f"show_replicas shows replicas along axis {axis}, and {name} of shape {x.shape} has none there. Pass what "
            f"pmap returned, and as axis its out_axes where that is not 0."
        )
    return axis % x.ndim
