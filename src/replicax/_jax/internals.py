"""The door to JAX's non-public parts (beside ``_cpp``, for calls, and ``_primitives``), and the branch on its version.

Everything here works on jaxprs generically: the parameters of a primitive differ between JAX versions (0.10 wraps
a jaxpr with constants in ``ClosedJaxpr``, 0.12 has one class), so an equation is never rebuilt from parameters
known by name, except for the three control-flow primitives whose carries :func:`loop_counts` has to tell apart.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import ad_util, config, core, dispatch, source_info_util, traceback_util, tree_util, xla_bridge
from jax._src import linear_util as lu
from jax._src.ad_checkpoint import remat_p
from jax._src.interpreters import ad, batching
from jax._src.interpreters import partial_eval as pe
from jax._src.lax import lax as lax_internal
from jax._src.lib import _jax as jaxlib
from jax._src.sharding_impls import UNSPECIFIED
from jax._src.state.types import AbstractRef
from jax.extend import core as extend_core
from jaxlib import version as jaxlib_version

from replicax._messages import text_of

Jaxpr = Any
Equation = Any
AxisName = Hashable

#: JAX 0.10 has one class for jaxprs with constants and one for those without; 0.12 has one class for both.
_Closed: Any = vars(extend_core)["ClosedJaxpr"]
_Open: Any = extend_core.Jaxpr

VERSION: str = jax.__version__

#: JAX's own, whatever stands in their places in ``jax``.
devices, local_devices = xla_bridge.devices, xla_bridge.local_devices

#: Whether anybody has made an array or asked for devices in this process.
devices_are_known = xla_bridge.backends_are_initialized

# ---------------------------------------------------------------------------------------------------------------
# The state of tracing


def eager() -> bool:
    """Whether no JAX transformation is being traced around this call."""
    return bool(core.trace_state_clean())


def staging() -> bool:
    """Whether an enclosing ``jit``, ``scan`` or the like records what is called."""
    trace: Any = core.trace_ctx.trace
    while (parent := getattr(trace, "parent_trace", None)) is not None and not isinstance(trace, pe.DynamicJaxprTrace):
        trace = parent
    return isinstance(trace, pe.DynamicJaxprTrace)


@contextlib.contextmanager
def _at_once(known: Any) -> Iterator[None]:
    """Under ``jax.ensure_compile_time_eval`` runs what is ``known``, and records the rest as if it were not.

    Under it JAX looks for the index of a mapped axis at once, while a map is traced and there is none.
    """
    eager_if_known: Any = _NOTHING
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(known)):
        eager_if_known = core.eval_context()
    with eager_if_known, config.eager_constant_folding(False), own_mesh(known):
        yield


def own_mesh(known: Any = None) -> contextlib.AbstractContextManager[Any]:
    """Puts aside a mesh that the user has set for all of JAX, since a map brings its own."""
    if config.eager_constant_folding.value:
        return _at_once(known)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or jax.sharding.AxisType.Manual in mesh.axis_types:
        return _NOTHING
    if not eager():
        return jax.sharding.use_abstract_mesh(NO_MESH)
    return jax.set_mesh(jax.sharding.Mesh(np.empty((), dtype=object), ()))


_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
NO_MESH = jax.sharding.AbstractMesh((), ())


def trace_context() -> Hashable:
    """What JAX's own compilation caches depend on besides the arguments (x64 mode, precision, axes in scope, …)."""
    return config.trace_context()


def typeof(x: Any) -> Any:
    """The type of an array or a scalar, as JAX would take it now; TypeError or ValueError for anything else."""
    is_type = isinstance(x, jax.ShapeDtypeStruct | core.AbstractValue)
    aval = core.shaped_abstractify(x) if is_type else core.typeof(x)  # the first takes whatever has a dtype
    if not isinstance(aval, core.ShapedArray):
        raise TypeError(f"{type(x).__name__} is no array")  # a jax.Ref
    if isinstance(x, jax.Array) and not config.enable_x64.value and aval.dtype.name in _WIDE:
        return aval.update(dtype=_WIDE[aval.dtype.name])  # made while 64-bit types were enabled
    return aval


_WIDE = {
    wide: np.dtype(narrow)
    for wide, narrow in (
        ("float64", "float32"),
        ("complex128", "complex64"),
        ("int64", "int32"),
        ("uint64", "uint32"),
    )
}


def array_type(shape: tuple[int, ...], dtype: np.dtype[Any], x64: bool) -> Any:
    """The type that JAX gives an array made of a NumPy array, with and without 64-bit types."""
    return core.ShapedArray(shape, dtype if x64 else _WIDE.get(dtype.name, dtype))


def type_key(leaves: Sequence[Any]) -> Hashable:
    """Shapes, dtypes, and which are weak, of :func:`typeof` for each, without looking at the usual arrays one by one.

    Raises:
        TypeError: as :func:`typeof`.
        ValueError: likewise.
    """
    kinds = set(map(type, leaves))
    try:
        if kinds <= _USUAL:
            dtypes = [x.dtype for x in leaves]
            narrow = {dtype: _PLAIN[dtype] for dtype in set(dtypes)}
            if not config.enable_x64.value and any(dtype != own for dtype, own in narrow.items()):
                dtypes = [narrow[dtype] for dtype in dtypes]
            on_host = jaxlib.ArrayImpl not in kinds
            weak = () if on_host else [k for k, x in enumerate(leaves) if type(x) is jaxlib.ArrayImpl and x.weak_type]
            return tuple([x.shape for x in leaves]), tuple(dtypes), tuple(weak)
    except KeyError:
        pass
    avals = list(map(typeof, leaves))
    weak = [k for k, aval in enumerate(avals) if getattr(aval, "weak_type", False)]
    return tuple(aval.shape for aval in avals), tuple(aval.dtype for aval in avals), tuple(weak)


_USUAL = {np.ndarray, jaxlib.ArrayImpl}

#: The usual dtypes, and what each is without 64-bit types.
_PLAIN = {
    dtype: np.dtype(_WIDE.get(dtype.name, dtype))
    for dtype in map(np.dtype, ("bool", *np.typecodes["AllInteger"], "float16", "float32", "float64", "F", "D"))
}


def axis_env(sizes: Mapping[AxisName, int]) -> contextlib.AbstractContextManager[None]:
    """Brings mapped axes of the given sizes into scope while a function is traced."""
    return core.extend_axis_env_nd(list(sizes.items()))


def tracing_replica() -> bool:
    """Whether a replica of an enclosing map of ours is being traced."""
    return _tracing.get() and not eager()


@contextlib.contextmanager
def replica_traced() -> Iterator[None]:
    """What is traced inside is a replica's: maps in it are recorded, to be lowered with it."""
    before = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(before)


_tracing: ContextVar[bool] = ContextVar("_tracing", default=False)


def axes_in_scope() -> tuple[AxisName, ...]:
    """The names of the mapped axes that enclosing transformations have bound."""
    return tuple(core.get_axis_env().axis_sizes)


def outermost_value(x: Any) -> tuple[Any, bool]:
    """The primal value under any number of ``grad``, ``jvp`` and ``vmap`` tracers, and whether it is a ``vmap``'s."""
    batched = False
    while isinstance(x, ad.JVPTracer | ad.LinearizeTracer | batching.BatchTracer):
        batched |= isinstance(x, batching.BatchTracer)
        x = x.val if isinstance(x, batching.BatchTracer) else x.primal
    return x, batched


def looks_for_nans() -> bool:
    """Whether JAX is told to look for NaNs or infinities in what programs return."""
    return bool(config.debug_nans.value or config.debug_infs.value)


def refuse_leaked_tracers(values: Sequence[Any]) -> None:
    """Raises JAX's error about a tracer that has outlived its trace, where there is one and nothing is traced."""
    if any(issubclass(kind, core.Tracer) for kind in set(map(type, values))):
        core.check_eval_args(values)


def unbound_axis_name(error: NameError) -> str | None:
    """The axis name that JAX says nobody bound, or None when ``error`` is about something else."""
    found = re.search(r"unbound axis name: (.*?)(?:\. |\.?$)", text_of(error))
    return found and found.group(1)


def raised(error: BaseException) -> bool:
    """Whether it was JAX's own code that raised an exception, and not the user's."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_code.co_filename.startswith(_JAX)


_JAX = os.path.dirname(jax.__file__) + os.sep


def is_about_shard_map_types(error: AssertionError) -> bool:
    """Whether JAX failed on a type that says over which axes of a mesh a value varies, since here is no mesh."""
    return text_of(error).startswith("ManualAxisType(")


def is_about_explicit_meshes(error: Exception) -> bool:
    """Whether ``shard_map`` misses a mesh, or arguments that lie on one with ``Explicit`` axes."""
    said = text_of(error)
    misplaced = "in_specs passed to shard_map" in said and "does not match the specs of the input" in said
    return misplaced or said.startswith("The context mesh cannot be empty") or "sharded on `Explicit` axes is" in said


def one_level(tree: Any) -> tuple[list[Any], Any] | None:
    """The children of a tree's root, and what else it is made of (the keys of a dict); None for a leaf."""
    found = tree_util.default_registry.flatten_one_level(tree)
    return found and (list(found[0]), found[1])


def structure_faults(one: Any, other: Any) -> Iterator[tuple[tuple[Any, ...], str, str]]:
    """Where two tree structures differ: the path, and what each has there, in words."""
    for path, ours, theirs, why in tree_util.equality_errors_pytreedef(one, other):
        keys = re.search(r"key sets: \{(.*)\}", why)
        which = f", different in {keys[1]}" if keys else ""
        yield tuple(path), _node(ours) + which, _node(theirs)


def _node(description: str) -> str:
    plain = re.sub(r"<class '(?:[^']*\.)?([^'.]+)'>", r"\1", description)
    plain = re.sub(r"^dict with pytree metadata [\[(](.*?),?[\])]$", r"dict with keys \1", plain)
    plain = plain.replace("pytree metadata", "static fields").replace("children", "entries").replace("child", "entry")
    plain = re.sub(r"\b0 entry", "0 entries", plain.removesuffix("Type"))
    if plain in ("pytree leaf", "None"):
        return "an array" if plain == "pytree leaf" else "None"
    return f"an {plain}" if plain[0] in "AEIOUaeiou" else f"a {plain}"


# ---------------------------------------------------------------------------------------------------------------
# Ahead of time


def settings() -> dict[str, Any]:
    """The settings of JAX's that programs depend on, by name."""
    names = (name for name in config.trace_context_names() if name != "axis_env_state")
    return {name: value for name, value in zip(names, config.trace_context(), strict=False) if name.startswith("jax_")}


def stage_parts(lowered: jax.stages.Lowered) -> Any:
    """What a ``jax.stages.Lowered`` is made of, to make another that goes by the user's arguments."""
    return lowered._lowering


def executable_parts(compiled: jax.stages.Compiled) -> tuple[Any, Any]:
    """What a ``jax.stages.Compiled`` is made of: the executable, and the constants that it takes first."""
    return compiled._executable, compiled._params.const_args


# ---------------------------------------------------------------------------------------------------------------
# The client of CPU devices

#: Whether XLA hangs where its pool has few threads for its CPU devices: see ``_cpu_threads``. This goes by jaxlib,
#: which may be older than JAX.
FEW_CPU_THREADS_HANG = tuple(map(int, jaxlib_version.__version__.split(".")[:2])) < (0, 12)


def make_cpu_client_by(around: Callable[[Callable[[], Any]], Any]) -> None:
    """Has JAX make its client of CPU devices by ``around`` from now on, which is given what makes it.

    Where JAX keeps that elsewhere, nothing happens.
    """
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        factories: Any = vars(sys.modules["jax._src.xla_bridge"])["_backend_factories"]
        before = factories["cpu"]
        factories["cpu"] = dataclasses.replace(before, factory=functools.partial(around, before.factory))


F = TypeVar("F", bound=Callable[..., Any])


def api_boundary(fun: F) -> F:
    """A function that users call: the traceback of what it raises has their frames, and neither ours nor JAX's."""
    return traceback_util.api_boundary(fun)


_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep

traceback_util.register_exclusion(_PACKAGE)

# Source lines that JAX remembers are the user's, not those of this package.
source_info_util.register_exclusion(_PACKAGE)


# ---------------------------------------------------------------------------------------------------------------
# Jaxprs


def is_jaxpr(x: object) -> bool:
    """Whether ``x`` is a jaxpr of either class."""
    return isinstance(x, _Closed | _Open)


def body(jaxpr: Jaxpr) -> Any:
    """The open jaxpr: its ``eqns``, ``invars``, ``constvars`` and ``outvars``."""
    return jaxpr.jaxpr if isinstance(jaxpr, _Closed) else jaxpr


def constants(jaxpr: Jaxpr) -> Sequence[Any]:
    """The values of the jaxpr's ``constvars`` (none for an open jaxpr of JAX 0.10)."""
    return getattr(jaxpr, "consts", ())


def is_literal(atom: Any) -> bool:
    """Whether an equation's operand is a constant written into the equation."""
    return isinstance(atom, extend_core.Literal)


def sub_jaxprs(eqn: Equation) -> Iterator[Jaxpr]:
    """The jaxprs among an equation's parameters, in a fixed order; not that with which JAX has a scatter add."""
    if eqn.primitive.multiple_results:
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if is_jaxpr(item):
                    yield item


def primitives(jaxpr: Jaxpr) -> set[str]:
    """The names of all primitives anywhere in the jaxpr."""
    names: set[str] = set()
    seen: set[int] = set()

    def visit(jaxpr: Jaxpr) -> None:
        if id(jaxpr) not in seen:
            seen.add(id(jaxpr))
            for eqn in body(jaxpr).eqns:
                names.add(eqn.primitive.name)
                for sub in sub_jaxprs(eqn):
                    visit(sub)

    visit(jaxpr)
    return names


def equations(jaxpr: Jaxpr, most: int) -> int:
    """How many equations the jaxpr has, those of the jaxprs inside it included; ``most`` if there are more."""
    count = 0
    for eqn in body(jaxpr).eqns:
        count += 1 + sum(equations(sub, most - count) for sub in sub_jaxprs(eqn))
        if count >= most:
            return most
    return count


def named_axes(eqn: Equation) -> tuple[AxisName, ...]:
    """The mapped axes that an equation without sub-jaxprs names; empty when it communicates over none."""
    names = _axis_parameters(eqn)
    if eqn.effects:
        names.extend(effect.name for effect in eqn.effects if isinstance(effect, core.NamedAxisEffect))
    return tuple(dict.fromkeys(name for name in names if not isinstance(name, int))) if names else ()


def repeated_axes(eqn: Equation) -> tuple[AxisName, ...]:
    """The mapped axes that a collective names more than once."""
    names = _axis_parameters(eqn)
    return tuple(dict.fromkeys(name for name in names if not isinstance(name, int) and names.count(name) > 1))


def _axis_parameters(eqn: Equation) -> list[AxisName]:
    names: list[AxisName] = []
    for key in ("axes", "axis_name"):
        if key in eqn.params:
            value = eqn.params[key]
            names.extend(value if isinstance(value, tuple | list) else (value,))
    return names


def loop_counts(eqn: Equation) -> tuple[int, int]:
    """How many constants and how many carried values a ``scan`` has."""
    if "num_carry" in eqn.params:  # JAX 0.10
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def loop_carry(eqn: Equation) -> slice:
    """Which operands of a ``scan`` are carried."""
    consts, carries = loop_counts(eqn)
    return slice(consts, consts + carries)


def trace(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    static: Sequence[int],
    sizes: Mapping[AxisName, int],
) -> tuple[Jaxpr, list[Any], Any]:
    """Traces the user's ``fun`` with mapped axes in scope.

    Returns:
        The jaxpr, its constants (which may be tracers of an enclosing trace), and the tree of
        ``jax.ShapeDtypeStruct`` that ``fun`` returned.
    """
    fixed = {i: args[i] for i in static}

    @functools.wraps(fun, updated=())  # an attribute of the user's, such as "trace", would hide jit's
    def bound(*args: Any, **kwargs: Any) -> Any:
        # JAX compares static arguments with those of other functions, which may be of a kind that has no comparison.
        return fun(*(fixed.get(i, x) for i, x in enumerate(args)), **kwargs)

    traced = jax.make_jaxpr(bound, axis_env=list(sizes.items()), return_shape=True)
    jaxpr, out = traced(*(None if i in fixed else x for i, x in enumerate(args)), **kwargs)
    return jaxpr, list(constants(jaxpr)), out


def _trace_flat(fun: Callable[..., Sequence[Any]], avals: Sequence[Any], debug_info: Any) -> tuple[Jaxpr, list[Any]]:
    """Traces a function of flat arguments; the jaxpr, and the constants that it has to be closed over."""
    jaxpr, _, consts = pe.trace_to_jaxpr_dynamic(lu.wrap_init(fun, debug_info=debug_info), list(avals))
    return jaxpr, list(consts)


def trace_flat(
    fun: Callable[..., Sequence[Any]], avals: Sequence[Any], sizes: Mapping[AxisName, int]
) -> tuple[Jaxpr, list[Any]]:
    """A jaxpr of a function of flat arguments that closes over nothing, and the arrays that it takes before them."""
    with axis_env(sizes):
        jaxpr, consts = _trace_flat(fun, avals, lu.DebugInfo("nested map", "one replica", None, None))
        return _close(pe.convert_constvars_jaxpr(jaxpr), ()), consts


def _close(jaxpr: Jaxpr, consts: Sequence[Any]) -> Jaxpr:
    return _Closed(jaxpr, consts) if _Closed is not _Open else jaxpr.with_consts(consts)


def retrace(fun: Callable[..., Sequence[Any]], like: Jaxpr, *, hoist: bool) -> tuple[Jaxpr, list[Any]]:
    """A jaxpr of ``fun`` with the argument and result types, and the class, of ``like``.

    ``fun`` takes what ``like`` takes and returns what it returns, to within weak types, which are put back: loops
    and branches compare them.

    Args:
        fun: The function.
        like: The jaxpr to be like.
        hoist: Whether the arrays that ``fun`` closes over become arguments, before the others.

    Returns:
        The jaxpr, and the arrays that it takes before its arguments.
    """

    def same_types(*args: Any) -> list[Any]:
        return [as_type(x, var.aval) for x, var in zip(fun(*args), body(like).outvars, strict=True)]

    in_avals = [_without_sharding(var.aval) for var in body(like).invars]
    jaxpr, consts = _trace_flat(same_types, in_avals, body(like).debug_info)
    hoisted = consts if hoist else []
    if hoist:
        jaxpr, consts = pe.convert_constvars_jaxpr(jaxpr), []
    return _close(jaxpr, consts) if isinstance(like, _Closed) else jaxpr, hoisted


def _without_sharding(aval: Any) -> Any:
    """The type as it is where no mesh is in scope."""
    where = getattr(aval, "sharding", None)
    if where is None or where.mesh.empty:
        return aval
    return core.ShapedArray(aval.shape, aval.dtype, weak_type=aval.weak_type)


def without_axis(x: Any, axis: int | None) -> Any:
    """The type of one part of ``x`` along the axis."""
    shape = x.shape if axis is None else (*x.shape[:axis], *x.shape[axis + 1 :])
    return core.ShapedArray(shape, x.dtype, weak_type=core.typeof(x).weak_type)


def in_shard_map(eqn: Equation) -> bool:
    """Whether the equation was recorded inside a ``shard_map``."""
    types = (getattr(atom.aval, "sharding", None) for atom in (*eqn.invars, *eqn.outvars))
    return any(x is not None and jax.sharding.AxisType.Manual in x.mesh.axis_types for x in types)


def literal(atom: Any) -> Any:
    """The value of a literal, without that it was written down inside a ``shard_map``."""
    if atom.aval.sharding.mesh.empty:
        return atom.val
    value = np.asarray(atom.val, atom.aval.dtype)
    return (
        value.item()
        if atom.aval.weak_type and np.result_type(core.typeof(value.item()).dtype) == value.dtype
        else value
    )


def without_mesh(eqn: Equation) -> Equation:
    """The equation as it is where no mesh is in scope."""
    ctx = copy.copy(eqn.ctx)
    object.__setattr__(ctx, "cur_abstract_mesh", NO_MESH)  # which no method changes
    params = dict(eqn.params)
    if "ctx_mesh" in params:
        params["ctx_mesh"] = NO_MESH
    for key in ("sharding", "out_sharding"):
        if isinstance(params.get(key), jax.sharding.NamedSharding):
            params[key] = None
    return eqn.replace(ctx=ctx, params=params)


def without_constants(jaxpr: Jaxpr) -> Jaxpr:
    """The jaxpr with its constants as arguments, before the others."""
    if not body(jaxpr).constvars:
        return jaxpr
    return _close(pe.convert_constvars_jaxpr(body(jaxpr)), ())


def with_results(jaxpr: Jaxpr, outvars: Sequence[Any]) -> Jaxpr:
    """The jaxpr with other results, of those that it computes anyway; it closes over nothing."""
    debug_info = body(jaxpr).debug_info._replace(arg_names=None, result_paths=None)
    return _close(body(jaxpr).replace(outvars=list(outvars), debug_info=debug_info), ())


def open_constants(jaxpr: Jaxpr, count: int) -> Jaxpr:
    """The open jaxpr whose constants are the first ``count`` arguments of one that closes over nothing."""
    debug_info = body(jaxpr).debug_info._replace(arg_names=None, result_paths=None)
    invars = body(jaxpr).invars
    return body(jaxpr).replace(constvars=invars[:count], invars=invars[count:], debug_info=debug_info)


def inline(jaxpr: Jaxpr, wanted: Callable[[Equation], bool]) -> Jaxpr:
    """The open jaxpr with the equations of the ``jit`` that are ``wanted`` in their places, to any depth."""
    values: dict[Any, Any] = {}
    eqns: list[Equation] = []

    def read(atom: Any) -> Any:
        return atom if is_literal(atom) else values.get(atom, atom)

    for eqn in body(jaxpr).eqns:
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name != "jit" or not _leaves_places_to_xla(eqn) or constants(inner) or not wanted(eqn):
            eqns.append(eqn.replace(invars=list(map(read, eqn.invars))))
            continue
        inner = inline(inner, wanted)
        own = dict(zip(inner.invars, map(read, eqn.invars), strict=True))
        for each in inner.eqns:
            own.update((var, type(var)(var.aval)) for var in each.outvars)
            stack = eqn.source_info.name_stack + each.source_info.name_stack
            eqns.append(
                each.replace(
                    invars=[atom if is_literal(atom) else own[atom] for atom in each.invars],
                    outvars=[own[var] for var in each.outvars],
                    source_info=each.source_info.replace(name_stack=stack),
                )
            )
        results = (atom if is_literal(atom) else own[atom] for atom in inner.outvars)
        values.update(zip(eqn.outvars, results, strict=True))
    return body(jaxpr).replace(eqns=eqns, outvars=list(map(read, body(jaxpr).outvars)))


def _leaves_places_to_xla(eqn: Equation) -> bool:
    """Whether a ``jit`` says nothing about where its arguments and results lie, nor how it is compiled."""
    said = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    options = eqn.params["in_layouts"], eqn.params["out_layouts"], eqn.params["compiler_options_kvs"]
    return all(x is UNSPECIFIED for x in said) and not any(map(any, options))


def run(jaxpr: Jaxpr, args: Sequence[Any], consts: Sequence[Any] | None = None) -> list[Any]:
    """The results of a jaxpr, bound equation by equation as they are, with other values of its constants if given."""
    return list(core.eval_jaxpr(body(jaxpr), constants(jaxpr) if consts is None else consts, *args))


def bears_no_constants(eqn: Equation) -> bool:
    """Whether the jaxpr of a higher-order equation must not close over arrays: that of ``jax.checkpoint``."""
    return eqn.primitive is remat_p


def operands(eqn: Equation, args: Sequence[Any]) -> list[Any]:
    """The operands of an equation as arrays: a jaxpr may hand one over as a scalar of Python's."""
    return [as_array(x, atom.aval) for x, atom in zip(args, eqn.invars, strict=True)]


def as_array(x: Any, aval: Any) -> Any:
    """An operand of an equation as an array: a jaxpr may hand one over as a scalar of Python's."""
    if isinstance(x, jax.Array | np.ndarray):
        return x
    return lax_internal._convert_element_type(x, aval.dtype, weak_type=aval.weak_type)


def equation_name(eqn: Equation) -> str:
    """What the equation is called: by its primitive, or by what JAX 0.12 wraps in its one general primitive."""
    return type(eqn.params["_prim"]).__name__ if "_prim" in eqn.params else str(eqn.primitive.name)


def as_type(x: Any, aval: Any) -> Any:
    """``x``, as weakly typed as ``aval``."""
    if getattr(core.typeof(x), "weak_type", False) == getattr(aval, "weak_type", False):
        return x
    return lax_internal._convert_element_type(x, aval.dtype, weak_type=aval.weak_type)


@contextlib.contextmanager
def equation_context(eqn: Equation) -> Iterator[None]:
    """What is bound inside keeps the user's source line and name stack of ``eqn``."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack):
        yield


def described_source(jaxpr: Jaxpr, description: str) -> Any:
    """A traceback that JAX's errors quote as ``file:line (description)``, with where the jaxpr's function begins.

    JAX checks devices before it runs anything of ours, and says of an equation no more than where it comes from.
    """
    found = re.search(r" at (.*):(\d+)$", body(jaxpr).debug_info.func_src_info or "")
    users = found is not None and source_info_util.is_user_filename(found[1])  # JAX skips files of its own
    file, line = (found[1], int(found[2])) if found is not None and users else ("<replicax.pmap>", 1)
    code = compile("get()", file, "eval")
    code = code.replace(co_name=description, co_qualname=description, co_firstlineno=line)
    return eval(code, {"get": jaxlib.Traceback.get_traceback})


@contextlib.contextmanager
def source(traceback: Any) -> Iterator[None]:
    """What is bound inside comes from there; with None, from where it is bound."""
    state = source_info_util._source_info_context
    before = state.context
    state.context = before.replace(traceback=traceback)
    try:
        yield
    finally:
        state.context = before


def bind(eqn: Equation, args: Sequence[Any]) -> list[Any]:
    """Binds an equation as it is."""
    return _bind(eqn, args, eqn.primitive.get_bind_params(eqn.params))


def _bind(eqn: Equation, args: Sequence[Any], params: Mapping[str, Any]) -> list[Any]:
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def bind_again(
    eqn: Equation,
    args: Sequence[Any],
    rewrite_jaxpr: Callable[[Jaxpr], tuple[Jaxpr, list[Any]]],
    rewrite_rule: Callable[[Callable[..., Any], str], Callable[..., Any]],
) -> list[Any]:
    """Binds a higher-order equation with every jaxpr in it rewritten, as :func:`retrace` returns it.

    The derivative rules of ``custom_jvp`` and ``custom_vjp`` are not jaxprs but functions that JAX calls when, and
    if, it differentiates: ``rewrite_rule`` wraps each of them, and is told whether it is ``"jvp"``, ``"fwd"`` or
    ``"bwd"``.
    """
    hoisted: list[Any] = []

    def rewritten(value: Any) -> Any:
        if is_jaxpr(value):
            jaxpr, consts = rewrite_jaxpr(value)
            hoisted.extend(consts)
            return jaxpr
        if isinstance(value, tuple | list) and any(is_jaxpr(item) for item in value):
            items = [rewritten(item) for item in value]
            return value._make(items) if hasattr(value, "_make") else type(value)(items)
        return value

    params = eqn.primitive.get_bind_params({key: rewritten(value) for key, value in eqn.params.items()})
    if "subfuns" in params:
        primal, *rules = params["subfuns"]
        wrapped = (
            lu.wrap_init(rewrite_rule(rule.call_wrapped, role), debug_info=rule.debug_info)
            for rule, role in zip(rules, derivative_rules(eqn), strict=True)
        )
        params = {**params, "subfuns": (primal, *wrapped)}
    if hoisted and isinstance(params.get("prevent_cse"), tuple):
        params = {**params, "prevent_cse": (*[False] * len(hoisted), *params["prevent_cse"])}
    return _bind(eqn, [*hoisted, *args], params)


_RULES: dict[str, tuple[str, ...]] = {"custom_jvp_call": ("jvp",), "custom_vjp_call": ("fwd", "bwd")}


def derivative_rules(eqn: Equation) -> tuple[str, ...]:
    """The derivative rules of the user's that the equation carries, which may communicate when they are called."""
    return _RULES.get(eqn.primitive.name, ())


def rule_jaxprs(eqn: Equation) -> Iterator[Jaxpr]:
    """The derivative rules of the user's that the equation carries, traced as JAX would call them."""
    if not derivative_rules(eqn):
        return
    params = eqn.primitive.get_bind_params(eqn.params)
    _, *rules = params["subfuns"]
    primals = [atom.aval for atom in eqn.invars]
    if len(rules) == 1:
        jaxpr, *_ = trace_rule(rules[0].call_wrapped, [*primals, *(aval.to_tangent_aval() for aval in primals)])
        yield jaxpr
        return
    fwd, bwd = rules
    jaxpr, *_ = trace_rule(fwd.call_wrapped, [x for aval in primals for x in (aval, True)])
    yield jaxpr
    # As in JAX's own JVPTrace.process_custom_vjp_call: a residual that is an argument is not given back.
    _, _, forwarded = params["out_trees"]()
    own = iter(var.aval for var in body(jaxpr).outvars)
    residuals = [next(own) if k is None else primals[k] for k in forwarded]
    jaxpr, *_ = trace_rule(bwd.call_wrapped, [*residuals, *(var.aval.to_cotangent_aval() for var in eqn.outvars)])
    yield jaxpr


def expansion(eqn: Equation) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """What an equation of JAX 0.12's one general primitive stands for: itself in terms of others, and its ``jvp``.

    Both are functions of flat arguments; the second takes the primals, then their tangents.
    """
    prim = eqn.params.get("_prim")
    if prim is None:
        return None

    def primal(*flat: Any) -> list[Any]:
        return jax.tree.leaves(prim.expand(*prim.in_tree.unflatten(flat)))

    def jvp(*flat: Any) -> tuple[list[Any], list[Any]]:
        primals, tangents = flat[: len(flat) // 2], flat[len(flat) // 2 :]
        tangents = tuple(
            ad_util.p2tz(p) if t.dtype == jax.dtypes.float0 else t for p, t in zip(primals, tangents, strict=True)
        )
        out, out_dot = prim.jvp(prim.in_tree.unflatten(primals), prim.in_tree.unflatten(tangents))
        return jax.tree.leaves(out), [ad_util.instantiate(t) for t in prim.out_tree.flatten_up_to(out_dot)]

    return primal, jvp


def trace_rule(rule: Callable[..., Any], args: Sequence[Any]) -> tuple[Jaxpr, list[Any], Callable[..., Any]]:
    """Traces a derivative rule, whose arguments and results mix arrays with JAX's symbolic zeros and flags.

    Types may stand for the arrays.

    Returns:
        The jaxpr, its (array) arguments, and the function that puts the rule's own result together again from the
        jaxpr's results.
    """
    is_array = [isinstance(x, core.ShapedArray) or is_array_type(x) for x in args]
    arrays = [x for x, dynamic in zip(args, is_array, strict=True) if dynamic]
    restore: list[Callable[..., Any]] = []

    def flat(*tracers: Any) -> list[Any]:
        it = iter(tracers)
        out = rule(*(next(it) if dynamic else x for x, dynamic in zip(args, is_array, strict=True)))
        leaves, treedef = jax.tree.flatten(out)
        dynamic_out = [is_array_type(x) for x in leaves]

        def unflatten(results: Sequence[Any]) -> Any:
            it = iter(results)
            return treedef.unflatten(next(it) if dyn else x for x, dyn in zip(leaves_kept, dynamic_out, strict=True))

        leaves_kept = [None if dyn else x for x, dyn in zip(leaves, dynamic_out, strict=True)]
        restore.append(unflatten)
        return [x for x, dyn in zip(leaves, dynamic_out, strict=True) if dyn]

    dbg = lu.DebugInfo("replicax derivative rule", "derivative rule", None, None)
    # As in the trace of the replica, no type says on which mesh its value is: equinox compares the two.
    with replica_traced(), jax.sharding.use_abstract_mesh(NO_MESH):
        jaxpr = _close(*_trace_flat(flat, list(map(_plain_type, arrays)), dbg))
    return jaxpr, arrays, restore[0]


def _plain_type(x: Any) -> Any:
    aval = x if isinstance(x, core.ShapedArray) else core.typeof(x)
    return aval.update(sharding=None) if isinstance(aval, core.ShapedArray) else aval


def is_array_type(x: object) -> bool:
    """Whether ``x`` is an array, a scalar or a tracer: not a flag, nor one of JAX's symbolic zeros."""
    if isinstance(x, bool | ad_util.Zero | ad_util.SymbolicZero | jax.ShapeDtypeStruct):
        return False
    try:
        core.typeof(x)
    except TypeError:
        return False
    except ValueError:
        if is_unconverted(x):
            return False
        raise
    return True


def is_unconverted(x: object) -> bool:
    """Whether JAX has the user convert ``x`` to an array: a masked array, or an object with ``__jax_array__``."""
    return is_masked(x) or (hasattr(type(x), "__jax_array__") and not isinstance(x, jax.Array | core.Tracer))


def is_masked(x: object) -> bool:
    """Whether ``x`` is a masked array of NumPy's."""
    return isinstance(x, np.ma.MaskedArray | Masked)


@dataclasses.dataclass(frozen=True, eq=False)
class Masked:
    """A masked array as something that C++ takes for no array: of an array it would use what is behind the mask."""

    array: Any

    def __jax_array__(self) -> Any:
        raise TypeError("a masked array")


def is_vmappable(x: object) -> bool:
    """Whether ``x`` is of a type with rules of its own for ``vmap``."""
    return type(x) in batching.vmappables


def is_map_spec(x: object) -> bool:
    """Whether ``x`` is what such a type takes in the place of an axis."""
    return type(x) in batching.spec_types and type(x) not in (batching.Sum, batching.Infer)


def vmap_rules(kind: type) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The rules of such a type: from the value of all to that of one, and back."""
    return batching.to_elt_handlers[kind], batching.from_elt_handlers[kind]


def passed_on(fun: Callable[..., Sequence[Any]], types: Sequence[Any]) -> list[int | None]:
    """Which argument each result of ``fun`` is; None for one that it computes."""
    jaxpr = body(jax.make_jaxpr(fun)(*types))
    position = {var: k for k, var in enumerate(jaxpr.invars)}
    return [None if is_literal(var) else position.get(var) for var in jaxpr.outvars]


def is_reference(x: object) -> bool:
    """Whether ``x`` is a ``jax.Ref``, or a tracer of one."""
    return isinstance(x, core.Ref | core.Tracer) and isinstance(core.typeof(x), AbstractRef)


# ---------------------------------------------------------------------------------------------------------------
# Random numbers


def draws_batches(eqn: Equation) -> bool:
    """Whether ``vmap`` makes one draw of the equation, with the first key, where each key of the batch has its own.

    It does so of ``lax.rng_bit_generator``, which keys with the implementations ``rbg`` and ``unsafe_rbg`` draw with,
    the latter also when they are split or folded: see ``jax._src.lax.control_flow.loops``.
    """
    name = eqn.primitive.name
    if name not in _DRAWS:
        return name == "rng_bit_generator"
    dtypes: list[Any] = [atom.aval.dtype for atom in (*eqn.invars, *eqn.outvars)]
    return any(_batches(dtype._impl, _DRAWS[name]) for dtype in dtypes if hasattr(dtype, "_impl"))


#: What each primitive on typed keys does with a key.
_DRAWS = {
    "random_bits": "random_bits",
    "random_split": "split",
    "random_fold_in": "fold_in",
    "random_seed": "seed",
    "random_gamma": "split",
}


@functools.cache
def _batches(impl: Any, step: str) -> bool:
    key, number = jax.ShapeDtypeStruct(impl.key_shape, np.uint32), jax.ShapeDtypeStruct((), np.uint32)
    steps = {
        "random_bits": lambda: jax.make_jaxpr(lambda key: impl.random_bits(key, 32, (1,)))(key),
        "split": lambda: jax.make_jaxpr(lambda key: impl.split(key, (1,)))(key),
        "fold_in": lambda: jax.make_jaxpr(impl.fold_in)(key, number),
        "seed": lambda: jax.make_jaxpr(impl.seed)(number),
    }
    return "rng_bit_generator" in primitives(steps[step]())


# ---------------------------------------------------------------------------------------------------------------
# Callbacks


def needs_one_mesh(primitives: set[str]) -> bool:
    """Whether a program with these primitives has to name one mesh throughout: that of callbacks that return values."""
    return any(primitive.name in primitives for primitive in dispatch.prim_requires_devices_during_lowering)


def has_side_effect(eqn: Equation) -> bool:
    """Whether the equation calls back into Python for an effect: a debug print or callback, or an ``io_callback``."""
    return eqn.primitive.name in ("debug_callback", "debug_print", "io_callback")


def bind_callback_where(eqn: Equation, args: Sequence[Any], runs: Any) -> list[Any]:
    """Binds a :func:`has_side_effect` equation so that Python is called only where ``runs`` is true.

    Elsewhere the results of an ``io_callback`` are zeros.
    """
    if eqn.primitive.name == "io_callback":
        results = eqn.params["result_avals"]

        def call(run: Any, *args: Any) -> Any:
            if run:
                return eqn.params["callback"](*args)
            return tuple(np.zeros(aval.shape, aval.dtype) for aval in results)

        with eqn.ctx.manager:
            return list(eqn.primitive.bind(runs, *args, **{**eqn.params, "callback": call}))

    def show(run: Any, *args: Any) -> None:
        if run:
            eqn.primitive.impl(*args, **eqn.params)

    jax.debug.callback(show, runs, *args, ordered=_is_ordered(eqn))
    return []


def _is_ordered(eqn: Equation) -> bool:
    return any("Ordered" in type(effect).__name__ for effect in eqn.effects)
