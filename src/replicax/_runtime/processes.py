"""Programs over several processes: what the processes compare before they build one, and before it runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from replicax import _jax
from replicax._engine.spec import ProgramSpec, with_rows
from replicax._layout.axes import Leaf, mapped_size, one_replica_type
from replicax._layout.processes import Share, by_process, replicas_of_processes
from replicax._messages import report, text_of
from replicax._runtime import agreement, memory
from replicax._runtime.arguments import Call, function_name
from replicax._runtime.executable import Executable
from replicax._runtime.options import Options
from replicax._runtime.signature import Rows, Signature
from replicax._typing import ArrayLike, Axes, Function, ShapeAndDtype
from replicax._version import __version__
from replicax.errors import DevicesError, MappedSizeError, ProcessesError


def rows_of(options: Options, in_axes: Axes, named: Sequence[Leaf], leaves: Sequence[ArrayLike]) -> Rows:
    """Which rows the arguments of a call hold.

    Raises:
        DevicesError: None of the devices of the map belongs to this process.
        ProcessesError: Some mapped arguments are over several processes and others are not, or an array of this process
            would enter a program over several processes.
    """
    if jax.process_count() == 1 or _jax.tracing_replica():
        return Rows.ALL
    processes = {device.process_index for device in options.resolve_devices()}
    if jax.process_index() not in processes:
        which = ", ".join(map(str, sorted(processes)))
        raise DevicesError(
            f"Process {jax.process_index()} calls a map, but all of its devices belong to process {which}. Pass "
            f"devices of every process that calls the map, or call it only in process {which}."
        )
    if len(processes) == 1:
        return Rows.ALL
    if _jax.staging():
        _refuse_local(named, leaves)
        return Rows.ALL
    each = zip(named, in_axes, leaves, strict=True)
    over = {leaf.name: _jax.over_processes(x) for leaf, axis, x in each if axis is not None}
    if len({*over.values()}) == 2:
        kinds = {True: "of all processes (a global array)", False: "of this process"}
        raise ProcessesError(
            report(
                "The mapped arguments must all have the rows of this process, or must all be global arrays:",
                [f"{name} has the rows {kinds[everywhere]}" for name, everywhere in over.items()],
                "Convert some of them: replicax.to_global(x) has the rows of all processes, replicax.to_local(x) those "
                "of this one.",
            )
        )
    return Rows.GLOBAL if any(over.values()) else Rows.OWN


def _refuse_local(named: Sequence[Leaf], leaves: Sequence[ArrayLike]) -> None:
    """Refuses arrays of this process in a traced program over several processes."""
    local = [leaf.name for leaf, x in zip(named, leaves, strict=True) if _jax.on_own_devices(x)]
    if local:
        raise ProcessesError(
            report(
                "Inside jit, scan and the like, arrays are global, and these are arrays of this process:",
                local,
                "Convert them outside of jit, and pass them to the jitted function: x = replicax.to_global(x). Or map "
                "over the devices of this process only: pmap(f, devices=jax.local_devices()).",
            )
        )


def own_size(options: Options, in_axes: Axes, leaves: Sequence[Leaf]) -> int:
    """The number of replicas of this process: that of its mapped arguments, or its share of ``axis_size``."""
    if any(axis is not None for axis in in_axes):
        return mapped_size(in_axes, leaves, None, least=0)
    size, shares = mapped_size(in_axes, leaves, options.axis_size), by_process(options.resolve_devices())
    ranges = replicas_of_processes(size, [len(share.devices) for share in shares])
    return len(ranges[[share.process for share in shares].index(jax.process_index())])


class TellingOthers:
    """A context manager. Tells the other processes of a map about an exception, so that they do not wait in vain."""

    __slots__ = ("_fun", "_options")

    def __init__(self, options: Options, fun: Function) -> None:
        self._options, self._fun = options, fun

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, ProcessesError) or jax.process_count() == 1:
            return
        if _jax.tracing_replica() or _jax.staging():
            return
        with contextlib.suppress(DevicesError):
            tell_others(by_process(self._options.resolve_devices()), f"calls {function_name(self._fun)}", error)


def tell_others(shares: Sequence[Share], what: str, error: BaseException) -> None:
    """Tells the other processes that this one has raised."""
    processes = [share.process for share in shares]
    if len(processes) > 1 and jax.process_index() in processes:
        agreement.tell(processes, f"{type(error).__name__}: {text_of(error)}".splitlines()[0], what)


def agree_on_rows(options: Options, call: Call, signature: Signature) -> tuple[list[Share], int | None]:
    """Compares the call with those of the other processes.

    Returns:
        The replicas of each process, empty for global arrays; and the free memory of a device that all processes can
        count on, in bytes, None if unknown.

    Raises:
        ProcessesError: The processes make different calls or use different versions or settings, or one does not join.
        MappedSizeError: No process has a replica, or ``axis_size`` is another number.
    """
    devices = options.resolve_devices()
    shares, what = by_process(devices), _described(call.name, signature)
    own = {
        "versions": f"replicax {__version__}, JAX {_jax.VERSION}",
        "call": what,
        "settings": {name: repr(value) for name, value in signature.settings.items()},
        "replicas": signature.size,
        "axis_size": options.axis_size,
        "unmapped": _unmapped(call, signature),
        "memory": memory.of_this_process(devices),
    }
    every = agreement.exchange([share.process for share in shares], own, f"calls {what}")
    _compare(every, "versions", "The processes use different versions:", "Install the same versions on every host.")
    remedy = (
        "All processes must call the same maps in the same order, with arguments of the same types in one replica. "
        "Only the number of replicas may differ."
    )
    _compare(every, "call", "The processes do not call the same map:", remedy)
    _compare(every, "axis_size", "The processes pass different values of axis_size:", remedy)
    _compare_settings({process: said["settings"] for process, said in every.items()})
    _compare(
        every,
        "unmapped",
        "The processes pass different values of arguments with in_axes=None (these are digests of the values):",
        "Every replica gets the whole argument, so it must be equal in all processes. Pass what differs as a mapped "
        "argument.",
    )
    left = memory.least([said["memory"] for said in every.values()])
    if signature.rows is Rows.GLOBAL:
        return [], left
    rows = {process: said["replicas"] for process, said in every.items()}
    total, axis_size = sum(rows.values()), options.axis_size
    if total == 0 or axis_size not in (None, total):
        raise MappedSizeError(
            report(
                "pmap needs at least one replica:"
                if total == 0
                else f"axis_size is {axis_size}, but the processes have {total} replicas in total:",
                [f"process {process} has {count} replicas" for process, count in rows.items()],
                "Map a non-empty axis in at least one process."
                if total == 0
                else "axis_size is the number of replicas of all processes. Correct it, or leave it out.",
            )
        )
    return [Share(share.process, share.devices, rows[share.process]) for share in shares], left


def _described(name: str, signature: Signature) -> str:
    """The call in one line: the type of each argument in one replica, and the static values."""
    leaves = [
        f"{leaf.name}: {_jax.typeof(one_replica_type(leaf.aval, axis)).str_short()}"
        + ("" if axis is None else f" mapped along {axis}")
        for leaf, axis in zip(signature.leaves, signature.in_axes, strict=True)
    ]
    static = [f"{name}={agreement.without_addresses(repr(value))}" for name, value in signature.static.items()]
    of = f" of global arrays of {signature.size} rows" if signature.rows is Rows.GLOBAL else ""
    return f"{name}({', '.join([*leaves, *static])}){of}"


def _unmapped(call: Call, signature: Signature) -> dict[str, str]:
    """Digests of the small arguments that every replica gets whole. Abstract arguments have none."""
    leaves = jax.tree.leaves((call.dynamic, call.kwargs))
    each = zip(signature.leaves, signature.in_axes, leaves, strict=True)
    return {leaf.name: _digest_of(x, leaf.aval) for leaf, axis, x in each if axis is None}


def _digest_of(x: ArrayLike, aval: ShapeAndDtype) -> str:
    """A digest of a small array; an empty text for a large one, or one that has no value here."""
    value, _ = _jax.outermost_value(x)
    if not _has_value(value) or math.prod(aval.shape) * aval.dtype.itemsize > _SMALL:
        return ""
    return agreement.digest(value if isinstance(value, jax.Array) else np.asarray(value, aval.dtype))[:8]


def _has_value(x: ArrayLike) -> bool:
    """Whether this process can read the value of ``x``."""
    return not isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer) and not _jax.over_processes(x)


#: Arguments of up to this many bytes are compared.
_SMALL = 1 << 16


def _compare_settings(every: Mapping[int, Mapping[str, str]]) -> None:
    first = next(iter(every.values()))
    differ = [name for name in first if len({said.get(name) for said in every.values()}) > 1]
    faults = [f"process {p}: {name} is {said.get(name)}" for name in differ for p, said in every.items()]
    if faults:
        remedy = "Use the same settings in all processes."
        raise ProcessesError(report("The processes have different settings of JAX:", faults, remedy))


def _compare(every: Mapping[int, Mapping[str, Any]], key: str, headline: str, remedy: str) -> None:
    if len({str(said[key]) for said in every.values()}) > 1:
        faults = [f"process {process}: {said[key]}" for process, said in every.items()]
        raise ProcessesError(report(headline, faults, remedy))


def agree_on_arrays(shares: Sequence[Share], arrays: Sequence[ArrayLike], axis: int | None) -> list[list[Share]]:
    """Compares the arrays of this process with those of the others. Returns the rows of each process, for each array.

    Arrays without rows (``axis`` is None) must be equal.

    Raises:
        ProcessesError: The arrays have different types, or differ; or a process does not join.
        MappedSizeError: No process has a row.
    """
    types = [_jax.typeof(x) for x in arrays]
    sizes = [1 if axis is None else x.shape[axis] for x in types]
    if len(shares) == 1 or not arrays:
        return [[Share(share.process, share.devices, size) for share in shares] for size in sizes]
    names = [with_rows(x, None if axis is None else axis % x.ndim, 1) for x in types]
    of_one = ", ".join(_jax.typeof(x).str_short() for x in names)
    own = {
        "types": f"({of_one})" if axis is None else f"({of_one}), of one row along axis {axis}",
        "values": [*map(_digest_of, arrays, types)] if axis is None else None,
        "rows": sizes,
    }
    every = agreement.exchange([share.process for share in shares], own, f"calls to_global with ({of_one})")
    remedy = "Only the number of rows may differ."
    _compare(every, "types", "The processes pass arrays of different types to to_global:", remedy)
    remedy = "Pass equal arrays, or the axis of the rows."
    _compare(every, "values", "The processes pass different arrays to to_global, with axis=None (digests):", remedy)
    rows = [[said["rows"][k] for said in every.values()] for k in range(len(arrays))]
    if not all(map(sum, rows)):
        raise MappedSizeError("to_global: no process has a row. Pass a non-empty array in at least one process.")
    return [[Share(share.process, share.devices, n) for share, n in zip(shares, each, strict=True)] for each in rows]


def agree_on_program(options: Options, name: str, build: Callable[[], Executable]) -> Executable:
    """Builds a program, and compares it with those of the other processes.

    Raises:
        ProcessesError: The programs differ, or the function has raised in another process.
    """
    processes = [share.process for share in by_process(options.resolve_devices())]
    try:
        program = build()
        digests = _digests(program.spec)
    except Exception as error:
        said = f"{type(error).__name__}: {text_of(error)}"
        _tell(processes, {"error": said.splitlines()[0]}, name)
        raise
    every = agreement.exchange(processes, digests, f"has traced {name}")
    errors = [f"process {p}: {said['error']}" for p, said in every.items() if "error" in said]
    if errors:
        raise ProcessesError(
            report(
                f"{name} cannot run, because tracing it has raised in another process:",
                errors,
                "See the output of that process.",
            )
        )
    own = every[jax.process_index()]
    differ = [what for what in own if len({said.get(what) for said in every.values()}) > 1]
    if differ:
        raise ProcessesError(
            report(
                f"{name} is not the same program in all processes. The programs differ in:",
                [
                    f"{what}: "
                    + ", ".join(f"process {p} has {said.get(what, 'none')[:8]}" for p, said in every.items())
                    for what in differ
                ],
                "(The numbers are digests.) The function must not depend on the process: no jax.process_index() in it, "
                "no global variable or closed-over array that differs. Pass what differs as a mapped argument. Or the "
                "processes call different functions of this name: they must call the same maps in the same order.",
            )
        )
    return program


def _tell(processes: Sequence[int], said: Mapping[str, str], name: str) -> None:
    """Tells the other processes that this one raises. Ignores their statements."""
    try:
        agreement.exchange(processes, said, f"has raised while tracing {name}")
    except ProcessesError:
        return


def _digests(spec: ProgramSpec) -> dict[str, str]:
    options = spec.inputs.axes, spec.out_axes, spec.inputs.donated, spec.policy, spec.layout.axis.placement
    return {
        "the traced program": agreement.digest(spec.replica.jaxpr),
        "the values of closed-over arrays": agreement.digest(*filter(_has_value, spec.replica.consts)),
        "in_axes, out_axes or donated arguments": agreement.digest(options),
        "lanes": agreement.digest(spec.lanes),
        "deterministic": agreement.digest(spec.layout.axis.ordered),
    }
