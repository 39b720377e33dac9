"""From a function and the types of its arguments to one compiled program on a mesh of devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import keystr

from replicax import _jax
from replicax._axes import Spec, match_out_axes
from replicax._blocks import any_lane, lane_by_lane, unfolded
from replicax._collectives import equal_value
from replicax._errors import (
    DivergentOutputError,
    NestedMapError,
    NotAnArrayError,
    UnboundAxisError,
    UnsupportedCollectiveError,
    UnsupportedDtypeError,
    report,
)
from replicax._layout import Layout, LogicalAxis
from replicax._rewrite import Rewriter


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
    """

    @functools.wraps(fun)
    def checked(*args: Any, **kwargs: Any) -> Any:
        out = fun(*args, **kwargs)
        _check_results(out)
        return out

    depth = _tracing.set(True)
    try:
        jaxpr, consts, out = _jax.trace(checked, args, kwargs, static, {name: size})
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
        raise
    finally:
        _tracing.reset(depth)
    return Replica(jaxpr, consts, out)


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
    for theirs, ours in REFUSALS.items():
        if theirs in str(error):
            error.add_note(ours)


_tracing: ContextVar[bool] = ContextVar("_tracing", default=False)


def tracing_replica() -> bool:
    """Whether a replica of an enclosing map is being traced."""
    return _tracing.get()


def _check_results(out: Any) -> None:
    faults = [
        f"result{keystr(path)} {describe_type(x)}"
        for path, x in jax.tree_util.tree_leaves_with_path(out)
        if not _jax.is_array_type(x) and not isinstance(x, bool)
    ]
    if faults:
        raise NotAnArrayError(
            report(
                "pmap returns arrays, and these results of the mapped function are none:",
                faults,
                "Return arrays, scalars and trees of them, and the rest outside the mapped function.",
            )
        )


def describe_type(x: object) -> str:
    """What a message says of something that is no array."""
    if isinstance(x, np.ndarray):
        return f"is a NumPy array of dtype {x.dtype}"
    return f"is of type {type(x).__name__}" + (f": {x!r:.60}" if isinstance(x, str | bytes) else "")


def _unbound(unbound: str, name: Hashable) -> UnboundAxisError:
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
        dtypes: The dtype of each argument leaf.
        out_axes: The mapped axis of each result leaf.
        out_tree: The structure of the result.
        function: From padded argument leaves to result leaves of N rows, on the layout's devices; not compiled.
        donated: The positions of the donated argument leaves.
        closed: Arrays that the user's function closed over and that the program takes after its arguments: tracers
            of an enclosing trace, and arrays that lie on a mesh.
        name: The name of the user's function.
    """

    layout: Layout
    in_axes: Sequence[int | None]
    dtypes: Sequence[Any]
    out_axes: Sequence[int | None]
    out_tree: Any
    function: Callable[..., tuple[Any, ...]]
    donated: tuple[int, ...]
    closed: tuple[Any, ...]
    name: str

    @cached_property
    def closed_in_place(self) -> list[Any]:
        """What the function closed over, on the layout's devices; moved once, since nobody can change it."""
        return list(jax.device_put(self.closed, self.layout.sharding(None)))

    @cached_property
    def in_shardings(self) -> tuple[jax.sharding.NamedSharding, ...]:
        """Where each (padded) argument leaf has to lie."""
        return tuple(self.layout.sharding(axis) for axis in self.in_axes)

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
    def compiled(self) -> jax.stages.Wrapped:
        """The function for arrays that lie in place: what an eager call runs."""
        return jax.jit(
            self.function,
            in_shardings=self.in_shardings,
            out_shardings=tuple(self.layout.result_sharding(axis) for axis in self.out_axes),
            donate_argnums=self.taken,
        )

    def pad(self, which: tuple[int, ...], leaves: list[Any]) -> list[Any]:
        """These arguments, which lie on the layout's devices, with a row for each padding lane."""
        if which not in self._pads:
            axes = [axis for i in which if (axis := self.in_axes[i]) is not None]
            rows = self.layout.axis.padding
            self._pads[which] = jax.jit(
                lambda xs: [pad_rows(x, axis, rows) for x, axis in zip(xs, axes, strict=True)],
                out_shardings=[self.in_shardings[i] for i in which],
            )
        return list(self._pads[which](leaves))

    @cached_property
    def _pads(self) -> dict[tuple[int, ...], jax.stages.Wrapped]:
        return {}

    @cached_property
    def staged(self) -> jax.stages.Wrapped:
        """The function for an enclosing trace, which pads by itself and leaves the places of results to XLA."""
        where, rows = self.layout, self.layout.axis.padding

        def placed(x: Any, axis: int | None) -> Any:
            if axis is None or not rows or where.mesh is None:
                return x
            # XLA may choose a sharding of N rows that JAX cannot express, and JAX then refuses the array.
            return _jax.pin(x, where.sharding(None))

        def padded_first(*args: Any) -> tuple[Any, ...]:
            typed = [_jax.split_over(x) for x in args]
            args = tuple(
                x if axis is None else placed(pad_rows(placed(x, axis), axis, rows), axis)
                for x, axis in zip([_jax.retype(x, None) for x in args], self.in_axes, strict=True)
            )
            results = map(placed, self.function(*args), self.out_axes)
            return tuple(
                _jax.retype(y, _like_the_arguments(axis, typed, self.in_axes))
                for y, axis in zip(results, self.out_axes, strict=True)
            )

        padded_first.__name__ = padded_first.__qualname__ = self.name
        return jax.jit(padded_first)


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


def pad_rows(x: Any, axis: int, rows: int) -> Any:
    """``x`` with its last row along ``axis`` repeated ``rows`` more times.

    The copies have no part in derivatives: not even a NaN, from a slope of infinity times a cotangent of zero.
    """
    if not rows:
        return x
    last = lax.stop_gradient(lax.slice_in_dim(x, x.shape[axis] - 1, None, axis=axis))
    copies = jnp.broadcast_to(last, (*x.shape[:axis], rows, *x.shape[axis + 1 :]))
    return jnp.concatenate([x, copies], axis)


def lower(
    replica: Replica,
    layout: Layout,
    in_axes: Sequence[int | None],
    out_axes: Spec,
    dtypes: Sequence[Any],
    donated: Sequence[int],
    name: str,
) -> Program:
    """Lowers the program of one replica to a function of all of them.

    Raises:
        AxisSpecError: ``out_axes`` does not fit the result.
        DivergentOutputError: ``out_axes`` is None where the result differs between replicas.
        UnsupportedCollectiveError: the program communicates in a way that replicax has no rule for.
        NestedMapError: the program has a ``jax.pmap`` or ``jax.shard_map`` in it.
        UnsupportedDtypeError: the program takes or returns numbers of two bits, and has to be padded.
    """
    _refuse_device_maps(replica.jaxpr, name)
    _refuse_two_bits([*dtypes, *(x.dtype for x in jax.tree.leaves(replica.out))], layout)
    flat_out_axes = match_out_axes(out_axes, replica.out)
    one_replica, closed = _one_replica(replica, layout.axis, in_axes, flat_out_axes)
    all_axes = (*in_axes, *[None] * len(closed))
    one_device = _over_lanes(one_replica, layout.axis, all_axes, flat_out_axes)
    function = _over_devices(one_device, layout, all_axes, flat_out_axes)
    function.__name__ = function.__qualname__ = name
    return Program(
        layout=layout,
        in_axes=all_axes,
        dtypes=(*dtypes, *(x.dtype for x in closed)),
        out_axes=flat_out_axes,
        out_tree=jax.tree.structure(replica.out),
        function=function,
        donated=tuple(donated),
        closed=closed,
        name=name,
    )


def _one_replica(
    replica: Replica, axis: LogicalAxis, in_axes: Sequence[int | None], out_axes: Sequence[int | None]
) -> tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...]]:
    """What a replica runs on its arguments and on the closed-over arrays that have to be passed; and those arrays."""
    rewriter = Rewriter({axis.name: axis})
    varying = [frozenset() if a is None else frozenset({axis.name}) for a in in_axes]
    _check_broadcast_results(replica, out_axes, rewriter.analysis.results(replica.jaxpr, varying), axis.name)
    has_rules = _jax.has_primitive(replica.jaxpr, ("custom_vjp_call",)) and bool(axis.physical)

    def one_value(y: Any) -> Any:
        if has_rules and jnp.issubdtype(jnp.result_type(y), jnp.inexact):
            return equal_value(axis, lane_by_lane([axis], y))
        return any_lane(axis, y)

    passed = [k for k, const in enumerate(replica.consts) if _has_to_be_passed(const)]

    def one_replica(*args: Any) -> tuple[Any, ...]:
        consts = list(replica.consts)
        for k, value in zip(passed, args[len(varying) :], strict=True):
            consts[k] = value
        own = [unfolded(x) if a is None else x for x, a in zip(args, in_axes, strict=False)]
        results = rewriter.run(replica.jaxpr, consts, own, varying)
        return tuple(one_value(y) if a is None else y for y, a in zip(results, out_axes, strict=True))

    return one_replica, tuple(replica.consts[k] for k in passed)


def _has_to_be_passed(const: Any) -> bool:
    """Whether a closed-over array belongs to an enclosing trace, or to a mesh of its own."""
    if isinstance(const, jax.core.Tracer):
        return True
    return isinstance(const, jax.Array) and not isinstance(const.sharding, jax.sharding.SingleDeviceSharding)


def _refuse_device_maps(jaxpr: _jax.Jaxpr, name: str) -> None:
    if _jax.has_primitive(jaxpr, ("shard_map", "xla_pmap")):
        raise NestedMapError(
            f"{name} spreads its own work over devices, with jax.pmap or jax.shard_map, and is mapped over devices "
            f"itself. Map the inner function with replicax.pmap, whose replicas run beside the outer's, or with "
            f"jax.vmap."
        )


def _refuse_two_bits(dtypes: Sequence[Any], layout: Layout) -> None:
    """XLA overruns its buffers where it concatenates or cuts split arrays of two bits (``jit`` alone shows it)."""
    found = sorted({dtype.name for dtype in dtypes if dtype.name in ("int2", "uint2")})
    if found and layout.axis.padding:
        raise UnsupportedDtypeError(
            f"{layout.size} replicas of a function that takes or returns {' and '.join(found)}, on "
            f"{layout.axis.devices} devices of {layout.axis.lanes} each: XLA cannot pad arrays of two bits. Convert "
            f"them to int4 or int8, as in x.astype('int8'), or map over a number of replicas that the devices divide."
        )


def _over_lanes(
    one_replica: Callable[..., tuple[Any, ...]],
    axis: LogicalAxis,
    in_axes: Sequence[int | None],
    out_axes: Sequence[int | None],
) -> Callable[..., tuple[Any, ...]]:
    """What one device runs on its block of each argument: its lanes, vectorized."""
    if axis.lane_axis is not None:
        return jax.vmap(one_replica, tuple(in_axes), tuple(out_axes), axis_name=axis.lane_axis, axis_size=axis.lanes)

    def only_lane(*blocks: Any) -> tuple[Any, ...]:
        args = (x if a is None else lax.squeeze(x, [a]) for x, a in zip(blocks, in_axes, strict=True))
        outs = one_replica(*args)
        return tuple(y if a is None else lax.expand_dims(y, [a]) for y, a in zip(outs, out_axes, strict=True))

    return only_lane


def _over_devices(
    one_device: Callable[..., tuple[Any, ...]],
    layout: Layout,
    in_axes: Sequence[int | None],
    out_axes: Sequence[int | None],
) -> Callable[..., tuple[Any, ...]]:
    """What all devices run on padded arguments, the results cut to N rows."""
    mapped = one_device
    if layout.mesh is not None:
        mapped = jax.shard_map(
            one_device,
            mesh=layout.mesh,
            in_specs=tuple(map(layout.spec, in_axes)),
            out_specs=tuple(map(layout.spec, out_axes)),
            check_vma=False,
        )

    def all_replicas(*args: Any) -> tuple[Any, ...]:
        outs = mapped(*args)
        return tuple(
            out if a is None or not layout.axis.padding else lax.slice_in_dim(out, 0, layout.size, axis=a)
            for out, a in zip(outs, out_axes, strict=True)
        )

    return all_replicas


def _check_broadcast_results(
    replica: Replica, out_axes: Sequence[int | None], varying: Sequence[frozenset[Hashable]], name: Hashable
) -> None:
    paths = jax.tree_util.tree_leaves_with_path(replica.out)
    faults = [
        f"result{keystr(path)} of shape {aval.shape}"
        for (path, aval), axis, where in zip(paths, out_axes, varying, strict=True)
        if axis is None and name in where
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
