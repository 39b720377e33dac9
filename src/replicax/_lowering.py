"""From a function and the types of its arguments to one compiled program on a mesh of devices."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.tree_util import keystr

from replicax import _cpp, _jax, _primitives
from replicax._axes import Spec, match_out_axes
from replicax._blocks import real_rows, unfolded
from replicax._callbacks import guard, raise_after, refuse_ordered
from replicax._errors import (
    DivergentOutputError,
    NestedMapError,
    NotAnArrayError,
    UnboundAxisError,
    UnconvertedArrayError,
    UnsupportedCollectiveError,
    UnsupportedDtypeError,
    report,
    text_of,
)
from replicax._layout import Layout, LogicalAxis, Scope, Splits
from replicax._levels import OneReplica, Part, comes_in_parts, equal_on, over_lanes, own_on, own_rows, pad_rows
from replicax._references import refuse_closed_over
from replicax._rewrite import Rewriter, one_value
from replicax._shard_maps import as_nested_maps
from replicax._varying import NOWHERE, Analysis, Varying


class Anonymous:
    """The name of a mapped axis that the user gave none: no collective can name it."""

    def __repr__(self) -> str:
        return "an unnamed mapped axis"

    def __reduce__(self) -> str:
        return "ANONYMOUS"  # there is one


ANONYMOUS = Anonymous()


@dataclass(frozen=True)
class Replica:
    """The program of one replica, traced.

    Attributes:
        jaxpr: The program, its collectives over the user's axis.
        consts: The arrays that the function closed over.
        out: Its result: a tree of ``jax.ShapeDtypeStruct``.
    """

    jaxpr: _jax.Jaxpr
    consts: Sequence[Any]
    out: Any

    @cached_property
    def primitives(self) -> set[str]:
        """The names of all primitives in the program."""
        return _jax.primitives(self.jaxpr)

    @property
    def closes_over_tracers(self) -> bool:
        """Whether the program belongs to the call of an enclosing transformation, and no other call may reuse it."""
        return any(isinstance(const, jax.core.Tracer) for const in self.consts)


def trace_replica(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    static: Sequence[int],
    name: Hashable,
    size: int,
) -> Replica:
    """Traces ``fun`` as one replica runs it.

    Args:
        fun: The user's function.
        args: The positional arguments of one replica: trees of ``jax.ShapeDtypeStruct``, static ones as they are.
        kwargs: The keyword arguments, likewise.
        static: The positions of the static arguments.
        name: The user's name of the mapped axis.
        size: The number of replicas.

    Raises:
        UnboundAxisError: a collective names an axis that no map binds.
        NotAnArrayError: a result is no array.
        UnsupportedCollectiveError: the function casts to a type that JAX has inside ``jax.shard_map`` alone.
        NestedMapError: it has a ``jax.shard_map`` in it that does what no map can do.
    """

    @functools.wraps(fun)
    def checked(*args: Any, **kwargs: Any) -> Any:
        out = fun(*args, **kwargs)
        _check_results(out)
        return out

    try:
        with _jax.replica_traced():
            jaxpr, consts, out = _jax.trace(checked, args, kwargs, static, {name: size})
    except UnboundAxisError:
        raise  # of a map inside
    except NameError as error:
        unbound = _jax.unbound_axis_name(error)
        if unbound is None:
            raise
        raise _unbound(unbound, name).with_traceback(error.__traceback__) from None
    except AssertionError as error:
        if not _jax.is_about_shard_map_types(error):
            _explain(error)
            raise
        raise UnsupportedCollectiveError(
            "pcast, or all_gather with to=, in a mapped function: JAX knows whether a value varies over an axis only "
            "inside jax.shard_map, and jax.vmap refuses both, too. Leave the pcast out (here every value may differ "
            "between replicas as it is) and call all_gather without to=."
        ).with_traceback(error.__traceback__) from None
    except (NotImplementedError, TypeError, ValueError) as error:
        _explain(error)
        if not _jax.is_about_explicit_meshes(error):
            raise
        raise NestedMapError(
            "A jax.shard_map in the mapped function is over a mesh that jax.set_mesh has set, or one with Explicit "
            "axes, and a map puts such a mesh aside: its replicas have devices of their own. Pass the mesh to the "
            "jax.shard_map, and make it with Auto axes, as in mesh=jax.make_mesh(shape, names, axis_types="
            "(jax.sharding.AxisType.Auto,) * len(names))."
        ).with_traceback(error.__traceback__) from None
    called = getattr(fun, "__name__", "The mapped function")
    refuse_closed_over(called, consts)
    jaxpr = as_nested_maps(jaxpr, {name: size}, called)
    return Replica(jaxpr, list(_jax.constants(jaxpr)), out)


_OVER_A_VMAP_TOO = (
    "If this is a collective over several axes, of which a vmap inside the mapped function binds one: JAX has a rule "
    "for psum, pmean, pmax, pmin and axis_index there, and none for others, which jax.vmap refuses, too. Communicate "
    "over one axis after the other, or map the inner function with replicax.pmap."
)

#: What JAX itself refuses while it traces or differentiates a collective: its words, and ours.
REFUSALS = {
    "axis size doesn't match": _OVER_A_VMAP_TOO,
    "Please open a feature request": (
        "JAX has no rule for this collective under a vmap (or jacfwd, hessian, or a map in batches) inside the mapped "
        "function, such as all_to_all with axis_index_groups. Take it out of the vmap: it takes arrays of any shape."
    ),
    "full must be called with scalar fill_value": (
        "If this comes from the derivative of pbroadcast: JAX has one for scalars alone. Write "
        "all_gather(x, axis)[source]."
    ),
    "Expected cotangent type": (
        "If this comes from the derivative of all_to_all: JAX has none that is right between two different axes. Write "
        "tiled=True."
    ),
    "divisible by the size of the named axis": (
        "If this comes from the derivative of ragged_all_to_all: JAX has none that heeds axis_index_groups."
    ),
}


def _explain(error: Exception) -> None:
    """Adds to an error of JAX's what it is about, where its own words do not say."""
    said = text_of(error)
    for theirs, ours in REFUSALS.items():
        if theirs in said:
            error.add_note(ours)
    if isinstance(error, AssertionError) and not said and _jax.raised(error):
        error.add_note(
            "If this is a collective over the axis of the map, in a jax.shard_map inside the map: JAX's types there "
            "know the axes of its own mesh alone. Write check_vma=False in the jax.shard_map."
        )


def _check_results(out: Any) -> None:
    faults = {
        f"result{keystr(path)}": x
        for path, x in jax.tree_util.tree_leaves_with_path(out)
        if (not _jax.is_array_type(x) and not isinstance(x, bool)) or _jax.is_reference(x)
    }
    if faults:
        raise no_arrays(
            "pmap returns arrays, and these results of the mapped function are none:",
            faults,
            "Return arrays, scalars and trees of them, and the rest outside the mapped function.",
        )


def no_arrays(headline: str, named: Mapping[str, Any], remedy: str) -> NotAnArrayError:
    """The error about what is no array, by its name."""
    unconverted = list(filter(_jax.is_unconverted, named.values()))
    if any(map(_jax.is_masked, unconverted)):
        remedy += " Of a masked array JAX would lose the mask: write x.filled(0)."
    if not all(map(_jax.is_masked, unconverted)):
        remedy += " What has a __jax_array__ is converted by jax.numpy.asarray(x)."
    kind = UnconvertedArrayError if unconverted else NotAnArrayError
    return kind(report(headline, [f"{name} {describe_type(x)}" for name, x in named.items()], remedy))


def describe_type(x: object) -> str:
    """What a message says of something that is no array."""
    if _jax.is_masked(x):
        return "is a masked array of NumPy's"
    if _jax.is_unconverted(x):
        return f"is of type {type(x).__name__}, which has a __jax_array__"
    if isinstance(x, np.ndarray):
        return f"is a NumPy array of dtype {x.dtype}"
    if _jax.is_reference(x):
        return "is a reference to an array (jax.Ref), whose value is ref[...]"
    return f"is of type {type(x).__name__}" + (f": {x!r:.60}" if isinstance(x, str | bytes) else "")


def _unbound(unbound: str, name: Hashable) -> UnboundAxisError:
    if unbound == "None":
        return UnboundAxisError(
            "unbound axis name: None. A collective in the mapped function was given axis_name=None. Give it the name "
            "of the mapped axis, as in jax.lax.psum(x, 'i') with pmap(f, axis_name='i')."
        )
    names = [repr(n) for n in (*_jax.axes_in_scope(), name) if n is not ANONYMOUS]
    if names:
        known = f"The names in scope are {', '.join(names)}. Use one of them in the collective, or name"
    else:
        known = "No axis in scope has a name. Name"
    return UnboundAxisError(
        f"unbound axis name: {unbound}. A collective in the mapped function names an axis that no enclosing map "
        f"binds. {known} the axis where you map: pmap(f, axis_name={unbound!r})."
    )


@dataclass(frozen=True, eq=False)
class Program:
    """A function lowered for one signature: types of arguments, number of replicas, devices.

    Attributes:
        layout: Where the replicas lie.
        in_axes: The mapped axis of each argument leaf.
        types: The type of each argument leaf, before it is padded.
        out_axes: The mapped axis of each result leaf.
        in_splits: Which further axes of each argument leaf are split over the devices of maps inside.
        out_splits: The same of each result leaf.
        out_tree: The structure of the result.
        function: From padded argument leaves to result leaves of N rows, on the layout's devices; not compiled.
        donated: The positions of the donated argument leaves.
        closed: Arrays that the user's function closed over and that the program takes after its arguments: tracers
            of an enclosing trace, and arrays that lie on a mesh.
        name: The name of the user's function.
        one_mesh: Whether its results have to be on the mesh of its arguments: padded ones lie whole on each device.
        replica: What it was lowered from.
        agreeing: Whether a result with ``out_axes`` None has to be the same in all replicas.
    """

    layout: Layout
    in_axes: Sequence[int | None]
    types: Sequence[Any]
    out_axes: Sequence[int | None]
    in_splits: Sequence[Splits]
    out_splits: Sequence[Splits]
    out_tree: Any
    function: Callable[..., tuple[Any, ...]]
    donated: tuple[int, ...]
    closed: tuple[Any, ...]
    name: str
    one_mesh: bool
    replica: Replica
    agreeing: bool
    _turn: Any = field(default_factory=threading.RLock, init=False)

    @cached_property
    def packings(self) -> dict[Hashable, Any]:
        """Programs that do the same for packed arguments, by the classes of the arguments."""
        return {}

    @cached_property
    def closed_in_place(self) -> list[Any]:
        """What the function closed over, on the layout's devices; moved once, since nobody can change it."""
        return list(jax.device_put(self.closed, self.layout.sharding(None)))

    @cached_property
    def in_shardings(self) -> tuple[jax.sharding.NamedSharding, ...]:
        """Where each (padded) argument leaf has to lie."""
        return tuple(map(self.layout.sharding, self.in_axes, self.in_splits))

    @cached_property
    def out_shardings(self) -> tuple[jax.sharding.NamedSharding, ...]:
        """Where each result leaf lies."""
        if self.one_mesh and self.layout.axis.padding:
            return (self.layout.sharding(None),) * len(self.out_axes)
        each = list(map(self.layout.result_sharding, self.out_axes, self.out_splits))
        for k, own in enumerate(jax.tree.leaves(self.replica.out)):
            if 0 in own.shape:  # XLA gives each device all of nothing, and JAX 0.10 would not know
                each[k] = self.layout.sharding(None)
        return tuple(each)

    def padded_type(self, x: Any, axis: int | None) -> jax.ShapeDtypeStruct:
        """The type of an argument leaf once every padding lane has its row."""
        aval = _jax.typeof(x)
        shape = list(aval.shape)
        if axis is not None:
            shape[axis] = self.layout.padded_size
        return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))

    @property
    def taken(self) -> tuple[int, ...]:
        """The donated leaves whose buffers the program can reuse: not a padded copy, which fits no result."""
        return tuple(i for i in self.donated if self.in_axes[i] is None or not self.layout.axis.padding)

    @cached_property
    def dtypes(self) -> tuple[Any, ...]:
        """The dtype of each argument leaf."""
        return tuple(aval.dtype for aval in self.types)

    @cached_property
    def traced(self) -> jax.stages.Traced:
        """The function for arrays that lie in place, traced."""
        return self._jitted.trace(*map(self.padded_type, self.types, self.in_axes))

    @cached_property
    def _executable(self) -> Callable[..., Any]:
        """Compiled once, where ``jit`` compiles anew for each mixture of meshes that the arguments lie on."""
        return _cpp.fast_call(self.traced.lower().compile())

    @cached_property
    def _jitted(self) -> jax.stages.Wrapped:
        return jax.jit(
            self.function,
            in_shardings=self.in_shardings,
            out_shardings=self.out_shardings,
            donate_argnums=self.taken,
        )

    def run(self, *leaves: Any) -> Sequence[Any]:
        """Runs the program on arrays that lie in place: what an eager call does."""
        if jax.config.jax_disable_jit or _jax.looks_for_nans():
            return self._jitted(*leaves)  # which shows the user's Python, or where a NaN comes from
        with self._turn:
            in_cpp = self._executable
        try:
            if self._known:
                return in_cpp(*leaves)
            results, known = _cpp.first_run(in_cpp, leaves)
        except ValueError:  # an argument has another layout in memory; of four bits JAX 0.10 only thinks so
            results, known = self._jitted(*leaves), None
        self._known.append(known)
        return results

    @property
    def known(self) -> Any:
        """What C++ has to know to run it, or None where it has not run, or only Python can run it."""
        return self._known[0] if self._known else None

    @cached_property
    def _known(self) -> list[Any]:
        return []

    @cached_property
    def device_set(self) -> set[jax.Device]:
        """The devices that it runs on."""
        return self.layout.sharding(None).device_set

    def clear(self) -> None:
        """Frees what was compiled."""
        self._known.clear()
        self.packings.clear()
        for held in ("_executable", "traced"):
            vars(self).pop(held, None)
        for held in ("_jitted", "staged"):
            if (jitted := vars(self).pop(held, None)) is not None:
                jitted.clear_cache()

    def pad(self, which: tuple[int, ...], leaves: list[Any]) -> list[Any]:
        """These arguments, which lie on the layout's devices, with a row for each padding lane."""
        whole = all(x.sharding.is_fully_replicated and x.dtype in _WHOLE_BYTES for x in leaves)
        if (which, whole) not in self._pads:
            axes = [axis for i in which if (axis := self.in_axes[i]) is not None]
            self._pads[which, whole] = jax.jit(
                self._take_rows(axes) if whole else self._add_rows(axes),
                out_shardings=[self.in_shardings[i] for i in which],
            )
        return list(self._pads[which, whole](leaves))

    def _add_rows(self, axes: Sequence[int]) -> Callable[[list[Any]], list[Any]]:
        where = self.layout.axis.placement
        # One row more has no type on a mesh with Explicit axes that split the rows.
        return lambda xs: [pad_rows(_primitives.retype(x, None), a, where) for x, a in zip(xs, axes, strict=True)]

    def _take_rows(self, axes: Sequence[int]) -> Callable[[list[Any]], list[Any]]:
        """Each device takes its own rows of what it has whole, where XLA would have devices send each other parts."""
        where, name = self.layout, self.layout.mesh.axis_names[0]

        def rows(xs: list[Any]) -> list[Any]:
            first = lax.axis_index(name) * where.axis.lanes
            return [own_rows(x, axis, first, where.axis.placement) for x, axis in zip(xs, axes, strict=True)]

        outs = list(map(where.spec, axes))
        return jax.shard_map(rows, mesh=where.mesh, in_specs=PartitionSpec(), out_specs=outs, check_vma=False)

    @cached_property
    def _pads(self) -> dict[Any, jax.stages.Wrapped]:
        return {}

    @cached_property
    def staged(self) -> jax.stages.Wrapped:
        """The function for an enclosing trace, which pads by itself and leaves the places of results to XLA."""
        where, placement = self.layout, self.layout.axis.placement

        def placed(x: Any, axis: int | None) -> Any:
            if axis is None or not placement.padding:
                return x
            # XLA may choose a sharding of N rows that JAX cannot express, and JAX then refuses the array.
            return _primitives.pin(x, where.sharding(None))

        def padded_first(*args: Any) -> tuple[Any, ...]:
            typed = [_primitives.split_over(x) for x in args]
            args = tuple(
                x if axis is None else placed(pad_rows(placed(x, axis), axis, placement), axis)
                for x, axis in zip([_primitives.retype(x, None) for x in args], self.in_axes, strict=True)
            )
            results = map(placed, self.function(*args), self.out_axes)
            return tuple(
                _primitives.retype(y, _like_the_arguments(axis, typed, self.in_axes))
                for y, axis in zip(results, self.out_axes, strict=True)
            )

        padded_first.__name__ = padded_first.__qualname__ = self.name
        return jax.jit(padded_first)


#: The dtypes that XLA can cut and join anywhere.
_WHOLE_BYTES = frozenset(
    map(np.dtype, ("bool", *np.typecodes["AllInteger"], "float16", "float32", "float64", "F", "D"))
)


def _like_the_arguments(
    axis: int | None, typed: Sequence[jax.sharding.NamedSharding | None], in_axes: Sequence[int | None]
) -> jax.sharding.NamedSharding | None:
    """What the type of a result says: split along the mapped axis as all mapped arguments whose types say so."""
    said = [(where, a) for where, a in zip(typed, in_axes, strict=True) if where is not None]
    if not said:
        return None
    mesh = said[0][0].mesh
    rows = {where.spec[a] if a < len(where.spec) else None for where, a in said if a is not None}
    if axis is None or len(rows) != 1:
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*[None] * axis, rows.pop()))


def lower(
    replica: Replica,
    layout: Layout,
    in_axes: Sequence[int | None],
    out_axes: Spec,
    types: Sequence[Any],
    donated: Sequence[int],
    name: str,
    agreeing: bool,
) -> Program:
    """Lowers the program of one replica to a function of all of them.

    With ``agreeing`` a result whose ``out_axes`` is None has to be the same in all replicas; otherwise it is each
    device's first replica's, and read as replica 0's.

    Raises:
        AxisSpecError: ``out_axes`` does not fit the result.
        DivergentOutputError: ``out_axes`` is None where the result differs between replicas.
        UnsupportedCollectiveError: the program communicates in a way that replicax has no rule for.
        OrderedCallbackError: the program calls back into Python with ``ordered=True``.
        UnsupportedDtypeError: the program takes or returns numbers of two bits, and has to be padded.
    """
    refuse_ordered(replica.jaxpr, name)
    _refuse_two_bits([x.dtype for x in (*types, *jax.tree.leaves(replica.out))], layout)
    flat_out_axes, out_tree = match_out_axes(out_axes, replica.out, layout.size)
    running, watched = replica, guard(replica.jaxpr, replica.consts, layout.axis, name)
    if watched is not None:
        running = dataclasses.replace(replica, jaxpr=watched[0], consts=watched[1])
    results = [*flat_out_axes, *[None] * (watched is not None)]
    passed = [k for k, const in enumerate(running.consts) if _has_to_be_passed(const)]
    closed = tuple(running.consts[k] for k in passed)
    all_axes = (*in_axes, *[None] * len(closed))
    in_places, out_places = _places(running.jaxpr, layout, results)
    in_splits = [*map(_split, in_places, in_axes), *[()] * len(closed)]
    out_splits = list(map(_split, out_places, results))[: len(flat_out_axes)]
    rewriter = Rewriter(layout.scope)
    varying = [NOWHERE if a is None else frozenset({layout.axis}) for a in in_axes]
    if agreeing and None in flat_out_axes:
        where = rewriter.analysis.results(replica.jaxpr, varying)
        _check_broadcast_results(replica, flat_out_axes, where, layout.axis)
    by_replica = "custom_vjp_call" in replica.primitives or not agreeing
    one_replica = _one_replica(running, rewriter, varying, passed, results, in_places, out_places, by_replica)
    one_device = over_lanes(one_replica, layout.axis, all_axes, results)
    function = _over_devices(
        one_device if watched is None else _raising(one_device),
        layout,
        _jax.described_source(replica.jaxpr, _advice(name, layout)),
        list(map(layout.spec, all_axes, in_splits)),
        list(map(layout.spec, flat_out_axes, out_splits)),
        flat_out_axes,
    )
    function.__name__ = function.__qualname__ = name
    return Program(
        layout=layout,
        in_axes=all_axes,
        types=(*types, *closed),
        out_axes=flat_out_axes,
        in_splits=in_splits,
        out_splits=out_splits,
        out_tree=out_tree,
        function=function,
        donated=tuple(donated),
        closed=closed,
        name=name,
        one_mesh=_jax.needs_one_mesh(replica.primitives | (watched[2] if watched else set())),
        replica=replica,
        agreeing=agreeing,
    )


@dataclass(frozen=True, eq=False)
class Recorded:
    """A map inside a replica of another, to be lowered with it.

    Attributes:
        closed: The arrays that it takes after its arguments.
        out_tree: The structure of the result.
        staged: From the argument leaves and these to the result leaves.
        name: The name of the user's function.
    """

    closed: tuple[Any, ...]
    out_tree: Any
    staged: Callable[..., Sequence[Any]]
    name: str


def record(
    replica: Replica, axis: LogicalAxis, in_axes: Sequence[int | None], out_axes: Spec, name: str, agreeing: bool
) -> Recorded:
    """A map as one equation of the enclosing map's program; for ``agreeing`` see :func:`lower`.

    Raises:
        AxisSpecError: as :func:`lower`.
        DivergentOutputError: likewise.
    """
    refuse_ordered(replica.jaxpr, name)
    flat_out_axes, out_tree = match_out_axes(out_axes, replica.out, axis.size)
    first = [False] * len(flat_out_axes)
    if None in flat_out_axes:
        varying = [NOWHERE if a is None else frozenset({axis}) for a in in_axes]
        where = Analysis(Scope([axis])).results(replica.jaxpr, varying)
        if agreeing:
            _check_broadcast_results(replica, flat_out_axes, where, axis)
        first = [a is None and axis in varies for a, varies in zip(flat_out_axes, where, strict=True)]
    all_out_axes = [0 if f else a for a, f in zip(flat_out_axes, first, strict=True)]
    with _jax.axis_env({axis.name: axis.size}):
        jaxpr = _jax.without_constants(replica.jaxpr)

    def staged(*args: Any) -> list[Any]:
        leaves, consts = args[: len(in_axes)], args[len(in_axes) :]
        axes = (*[None] * len(consts), *in_axes)
        results = _primitives.nested_map(
            jaxpr, [*consts, *leaves], name=axis.name, size=axis.size, in_axes=axes, out_axes=all_out_axes
        )
        return [y[0] if f else y for y, f in zip(results, first, strict=True)]

    return Recorded(tuple(replica.consts), out_tree, staged, name)


def _one_replica(
    replica: Replica,
    rewriter: Rewriter,
    varying: Sequence[Varying],
    passed: Sequence[int],
    out_axes: Sequence[int | None],
    in_places: Sequence[_Place],
    out_places: Sequence[_Place],
    by_replica: bool,
) -> OneReplica:
    """What a replica runs on its arguments, and on the closed-over arrays that have to be passed."""
    axis = rewriter.scope.axes[-1]

    def one_replica(*args: Any) -> tuple[Any, ...]:
        consts = list(replica.consts)
        for k, value in zip(passed, args[len(varying) :], strict=True):
            consts[k] = value
        own = [x if where else unfolded(x) for x, where in zip(args, varying, strict=False)]
        own = [x if place is None else Part(x, place[1], place[0]) for x, place in zip(own, in_places, strict=True)]
        results = rewriter.run_in_parts(replica.jaxpr, consts, own, varying)
        results = [_at(y, place) for y, place in zip(results, out_places, strict=True)]
        return tuple(
            one_value(axis, y, by_replica=by_replica) if a is None else y
            for y, a in zip(results, out_axes, strict=True)
        )

    return one_replica


def _at(result: Any, place: _Place) -> Any:
    """A result where it is to be: a device's part of it, or the whole."""
    if not isinstance(result, Part):
        return result
    return result.join() if place is None else result.value


def _has_to_be_passed(const: Any) -> bool:
    """Whether a closed-over array belongs to an enclosing trace, or to a mesh of its own."""
    if isinstance(const, jax.core.Tracer):
        return True
    return isinstance(const, jax.Array) and not isinstance(const.sharding, jax.sharding.SingleDeviceSharding)


def _refuse_two_bits(dtypes: Sequence[Any], layout: Layout) -> None:
    """XLA overruns its buffers where it concatenates or cuts split arrays of two bits (``jit`` alone shows it)."""
    found = sorted({dtype.name for dtype in dtypes if dtype.name in ("int2", "uint2")})
    if found and layout.axis.padding:
        raise UnsupportedDtypeError(
            f"{layout.size} replicas of a function that takes or returns {' and '.join(found)}, on "
            f"{layout.axis.devices} devices of {layout.axis.lanes} each: XLA cannot pad arrays of two bits. Convert "
            f"them to int4 or int8, as in x.astype('int8'), or map over a number of replicas that the devices divide."
        )


#: Where a value has the axis of a map inside, of which each device has its part alone; None for a whole value.
_Place = tuple[int, LogicalAxis] | None


def _places(
    jaxpr: _jax.Jaxpr, layout: Layout, out_axes: Sequence[int | None]
) -> tuple[Sequence[_Place], Sequence[_Place]]:
    """Which arguments go to maps inside and nowhere else, and which results come from them.

    Each device is sent its own part of such an argument, and keeps its part of such a result.
    """
    jaxpr = _jax.body(jaxpr)
    made: dict[Any, _Place] = {}
    uses: dict[Any, set[_Place]] = {var: set() for var in jaxpr.invars}
    for eqn in jaxpr.eqns:
        inner = layout.scope.enter(eqn.params["name"], eqn.params["size"]) if _primitives.is_nested_map(eqn) else None
        axis = inner.axes[-1] if inner and comes_in_parts(inner.axes[-1]) and not layout.axis.padding else None
        for k, atom in enumerate(eqn.invars):
            dim = eqn.params["in_axes"][k] if axis else None
            if not _jax.is_literal(atom) and atom in uses:
                uses[atom].add(None if axis is None or dim is None else (dim, axis))
        if axis:
            dims = zip(eqn.outvars, eqn.params["out_axes"], strict=True)
            made.update({var: (dim, axis) for var, dim in dims if dim is not None})
    for atom in jaxpr.outvars:
        if not _jax.is_literal(atom) and atom in uses:
            uses[atom].add(None)
    args = [next(iter(places)) if len(places) == 1 else None for places in uses.values()]
    results = [
        None if _jax.is_literal(atom) or axis is None else made.get(atom)
        for atom, axis in zip(jaxpr.outvars, out_axes, strict=True)
    ]
    return args, results


def _split(place: _Place, axis: int | None) -> Splits:
    """The dimension of a mapped array that is split over the devices of a map inside, and their mesh axis."""
    if place is None:
        return ()
    dim, inner = place
    return ((dim + (axis is not None and axis <= dim), inner.device_axis),)


def _raising(one_device: OneReplica) -> OneReplica:
    """The same without its last result, the number of a failure, which is raised."""

    def raising(*blocks: Any) -> Sequence[Any]:
        *results, failed = one_device(*blocks)
        raise_after(results, failed)
        return results

    return raising


def _over_devices(
    one_device: OneReplica,
    layout: Layout,
    source: Any,
    ins: Sequence[PartitionSpec],
    outs: Sequence[PartitionSpec],
    out_axes: Sequence[int | None],
) -> Callable[..., tuple[Any, ...]]:
    """What all devices run on padded arguments, the results cut to N rows.

    Args:
        one_device: What each of them runs.
        layout: Where the replicas lie.
        source: Where an error of JAX's about its devices is to say that it comes from.
        ins: How each argument is split.
        outs: How each result is split.
        out_axes: The mapped axis of each result.
    """

    def missing(spec: PartitionSpec) -> list[Hashable]:
        return [name for name in layout.scope.copies if name not in spec]

    def alike(*blocks: Any) -> tuple[Any, ...]:
        with _jax.source(None):
            given = (equal_on(x, missing(spec)) for x, spec in zip(blocks, ins, strict=True))
            return tuple(own_on(y, missing(spec)) for y, spec in zip(one_device(*given), outs, strict=True))

    mapped = jax.shard_map(alike, mesh=layout.mesh, in_specs=tuple(ins), out_specs=tuple(outs), check_vma=False)

    def all_replicas(*args: Any) -> tuple[Any, ...]:
        with _jax.source(source):
            results = mapped(*args)
        return tuple(
            out if a is None or not layout.axis.padding else real_rows(out, a, layout.axis.placement)
            for out, a in zip(results, out_axes, strict=True)
        )

    return all_replicas


def _advice(name: str, layout: Layout) -> str:
    """What JAX says of a map where an argument of the program that it is in lies on other devices than the map."""
    every = layout.mesh.size
    used = -(-layout.size // -(-layout.size // every))
    which = f"as in pmap(f, devices=jax.devices()[:{used}])" if used < every else "as many as the smallest of them uses"
    return (
        f"{name}, mapped by replicax.pmap, which takes all of its {every} devices under jit. To pass what a map has "
        f"left on fewer, map all with the same devices, {which}; or pass replicax.fetch(x)"
    )


def _check_broadcast_results(
    replica: Replica, out_axes: Sequence[int | None], varying: Sequence[Varying], axis: LogicalAxis
) -> None:
    paths = jax.tree_util.tree_leaves_with_path(replica.out)
    faults = [
        f"result{keystr(path)} of shape {aval.shape}"
        for (path, aval), out_axis, where in zip(paths, out_axes, varying, strict=True)
        if out_axis is None and axis in where
    ]
    if faults:
        raise DivergentOutputError(
            report(
                "out_axes=None returns one value for all replicas, but these results may differ between them:",
                faults,
                "Write an int in out_axes to get each replica's value, or make them equal first, for example with "
                "jax.lax.pmean or jax.lax.psum over the mapped axis.",
            )
        )
