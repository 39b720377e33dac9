"""The program of one replica: the user's function, traced with the mapped axis in scope."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from jax.tree_util import keystr

from replicax import _jax
from replicax._engine.references import refuse_closed_over
from replicax._engine.shard_maps import as_nested_maps
from replicax._messages import report, text_of
from replicax._typing import ArrayLike, Function, Kwargs, PyTree
from replicax.errors import (
    NestedMapError,
    NotAnArrayError,
    ReplicaxError,
    UnboundAxisError,
    UnconvertedArrayError,
    UnsupportedCollectiveError,
)


class Anonymous:
    """The name of a mapped axis for which the user gave no name. No collective can name it."""

    def __repr__(self) -> str:
        return "an unnamed mapped axis"

    def __reduce__(self) -> str:
        return "ANONYMOUS"  # unpickle to the singleton


ANONYMOUS = Anonymous()


@dataclass(frozen=True)
class Replica:
    """The traced program of one replica.

    Attributes:
        jaxpr: The program. Its collectives are over the user's axis.
        consts: The closed-over arrays.
        out: The result: a tree of ``jax.ShapeDtypeStruct``.
    """

    jaxpr: _jax.Jaxpr
    consts: Sequence[ArrayLike]
    out: PyTree

    @cached_property
    def primitives(self) -> set[str]:
        """The names of all primitives in the program."""
        return _jax.primitives(self.jaxpr)

    @property
    def closes_over_tracers(self) -> bool:
        """Whether the program closes over tracers of an enclosing transformation. If so, only this call may use it."""
        return any(isinstance(const, jax.core.Tracer) for const in self.consts)


def trace_replica(
    fun: Function,
    args: Sequence[PyTree],
    kwargs: Kwargs,
    static: Sequence[int],
    name: Hashable,
    size: int,
) -> Replica:
    """Traces ``fun`` for one replica.

    Args:
        fun: The user's function.
        args: The positional arguments of one replica: static values, and trees of ``jax.ShapeDtypeStruct``.
        kwargs: The keyword arguments, in the same form.
        static: The positions of the static arguments.
        name: The user's name of the mapped axis.
        size: The number of replicas.

    Raises:
        UnboundAxisError: A collective names an axis that no map binds.
        NotAnArrayError: A result is not an array.
        UnsupportedCollectiveError: The function uses ``pcast``, which JAX supports only inside ``jax.shard_map``.
        NestedMapError: The function contains a ``jax.shard_map`` that cannot run as a map.
    """

    @functools.wraps(fun)
    def checked(*args: PyTree, **kwargs: PyTree) -> PyTree:
        out = fun(*args, **kwargs)
        _check_results(out)
        return out

    try:
        with _jax.replica_traced():
            jaxpr, consts, out = _jax.trace(checked, args, kwargs, static, {name: size})
    except (NameError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        ours = _in_our_words(error, name)
        if ours is None:
            raise
        raise ours.with_traceback(error.__traceback__) from None
    called = getattr(fun, "__name__", "The mapped function")
    refuse_closed_over(called, consts)
    jaxpr = as_nested_maps(jaxpr, {name: size}, called)
    return Replica(jaxpr, list(_jax.constants(jaxpr)), out)


def _in_our_words(error: Exception, name: Hashable) -> ReplicaxError | None:
    """Returns the error to raise instead of JAX's error, or None if JAX's error is clear.

    May add a note to JAX's error.
    """
    if isinstance(error, NameError):
        # A nested map raises an UnboundAxisError itself.
        unbound = None if isinstance(error, UnboundAxisError) else _jax.unbound_axis_name(error)
        return None if unbound is None else _unbound(unbound, name)
    if isinstance(error, AssertionError) and _jax.is_about_shard_map_types(error):
        return UnsupportedCollectiveError(
            "pcast, or all_gather with to=, is not supported in a mapped function: JAX tracks varying axes only inside "
            "jax.shard_map, and jax.vmap rejects both, too. Leave pcast out (in a mapped function, any value may "
            "differ between replicas), and call all_gather without to=."
        )
    _explain(error)
    if not isinstance(error, AssertionError) and _jax.is_about_explicit_meshes(error):
        return NestedMapError(
            "A jax.shard_map in the mapped function must not use a mesh with Explicit axes or the mesh of "
            "jax.set_mesh, because a map runs on its own devices. Pass the mesh to the jax.shard_map, and create it "
            "with Auto axes, as in mesh=jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * "
            "len(names))."
        )
    return None


_OVER_A_VMAP_TOO = (
    "If this is a collective over several axes, and a vmap inside the mapped function binds one of them: JAX supports "
    "only psum, pmean, pmax, pmin and axis_index there, and jax.vmap rejects the others, too. Communicate over one "
    "axis after the other, or map the inner function with replicax.pmap."
)

#: JAX's errors while it traces or differentiates a collective: a part of the message, and the note to add.
REFUSALS = {
    "axis size doesn't match": _OVER_A_VMAP_TOO,
    "Please open a feature request": (
        "JAX has no batching rule for this collective (for example all_to_all with axis_index_groups) under a vmap, "
        "jacfwd, hessian or batched lax.map inside the mapped function. Call it outside the vmap, on the whole batch."
    ),
    "full must be called with scalar fill_value": (
        "If this comes from the derivative of pbroadcast: JAX supports it only for scalars. Write "
        "all_gather(x, axis)[source]."
    ),
    "Expected cotangent type": (
        "If this comes from the derivative of all_to_all: JAX computes a wrong one if split_axis and concat_axis "
        "differ. Write tiled=True."
    ),
    "divisible by the size of the named axis": (
        "If this comes from the derivative of ragged_all_to_all: JAX's rule ignores axis_index_groups. Leave the "
        "groups out."
    ),
}


def _explain(error: Exception) -> None:
    """Adds a note to an error of JAX whose message does not name the cause."""
    said = text_of(error)
    for theirs, ours in REFUSALS.items():
        if theirs in said:
            error.add_note(ours)
    if isinstance(error, AssertionError) and not said and _jax.raised(error):
        error.add_note(
            "If this is a collective over the axis of the map, in a jax.shard_map inside the map: the type check of "
            "jax.shard_map knows only the axes of its own mesh. Write check_vma=False in the jax.shard_map."
        )


def _check_results(out: PyTree) -> None:
    faults = {
        f"result{keystr(path)}": x
        for path, x in jax.tree_util.tree_leaves_with_path(out)
        if (not _jax.is_array_type(x) and not isinstance(x, bool)) or _jax.is_reference(x)
    }
    if faults:
        raise no_arrays(
            "Results of a mapped function must be arrays; these are not:",
            faults,
            "Return only arrays, scalars and pytrees of them. Compute other results outside the mapped function.",
        )


def no_arrays(headline: str, named: Mapping[str, object], remedy: str) -> NotAnArrayError:
    """Returns the error for values that are not arrays. The message lists all of them."""
    unconverted = list(filter(_jax.is_unconverted, named.values()))
    if any(map(_jax.is_masked, unconverted)):
        remedy += " JAX would ignore the mask of a masked array: write x.filled(0)."
    if not all(map(_jax.is_masked, unconverted)):
        remedy += " Convert an object with __jax_array__ by jax.numpy.asarray(x)."
    kind = UnconvertedArrayError if unconverted else NotAnArrayError
    return kind(report(headline, [f"{name} {describe_type(x)}" for name, x in named.items()], remedy))


def describe_type(x: object) -> str:
    """Describes a value that is not an array, for an error message."""
    if _jax.is_masked(x):
        return "is a NumPy masked array"
    if _jax.is_unconverted(x):
        return f"is of type {type(x).__name__}, which has __jax_array__"
    if isinstance(x, int):
        return f"is the int {x!s:.40}, which is too large for JAX's ints"
    if isinstance(x, np.ndarray):
        return f"is a NumPy array of dtype {x.dtype}"
    if _jax.is_reference(x):
        return "is a reference to an array (jax.Ref); read its value with ref[...]"
    return f"is of type {type(x).__name__}" + (f": {x!r:.60}" if isinstance(x, str | bytes) else "")


def _unbound(unbound: str, name: Hashable) -> UnboundAxisError:
    if unbound == "None":
        return UnboundAxisError(
            "unbound axis name: None. A collective in the mapped function got axis_name=None. Pass the name of the "
            "mapped axis, as in jax.lax.psum(x, 'i') with pmap(f, axis_name='i')."
        )
    names = [repr(n) for n in (*_jax.axes_in_scope(), name) if n is not ANONYMOUS]
    if names:
        known = f"The names in scope are {', '.join(names)}. Use one of them in the collective, or set the axis name"
    else:
        known = "No axis in scope has a name. Set the axis name"
    return UnboundAxisError(
        f"unbound axis name: {unbound}. A collective in the mapped function names an axis that no enclosing map "
        f"binds. {known} in the call of pmap: pmap(f, axis_name={unbound!r})."
    )
