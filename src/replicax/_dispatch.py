"""From a call to a compiled program: the signature looked up, the arguments moved to where the program wants them."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from replicax import _cpp, _cpu_threads, _jax, _primitives
from replicax._axes import (
    Chosen,
    Leaf,
    Spec,
    mapped_size,
    match_in_axes,
    name_leaves,
    one_replica_type,
    parameter_names,
)
from replicax._errors import (
    DevicesError,
    NestedMapError,
    OptionTypeError,
    StaticArgumentError,
    UnknownBackendError,
    report,
    text_of,
    too_large,
)
from replicax._layout import layout, replicas_of
from replicax._lowering import Program, Recorded, lower, no_arrays, record, trace_replica
from replicax._packing import comes_packed, may_be_packed, packed
from replicax._references import refuse_passed
from replicax._run import delete_taken, run, stage
from replicax._signature import Signature
from replicax._transfer import is_small, native, own, put


@dataclass(frozen=True)
class Options:
    """What the user asked of ``pmap``, checked: the part of a signature that does not change between calls.

    Attributes:
        axis_name: The user's name of the mapped axis (or the name of one without a name).
        in_axes: The mapped axes of the positional arguments.
        out_axes: The mapped axes of the result.
        static: The static arguments.
        donated: The donated arguments.
        devices: The devices to use, or None for all of the backend.
        backend: The platform to use, or None for JAX's default.
        axis_size: The number of replicas, or None to read it off the arguments.
        agreeing: Whether a result with out_axes None has to be the same in all replicas.
    """

    axis_name: Hashable
    in_axes: Spec
    out_axes: Spec
    static: Chosen
    donated: Chosen
    devices: tuple[jax.Device, ...] | None
    backend: str | None
    axis_size: int | None
    agreeing: bool = True

    def resolve_devices(self) -> tuple[jax.Device, ...]:
        """The devices that replicas may lie on; the first moment that JAX's backends are touched."""
        if self.devices is not None and self.backend is None:
            return self.devices
        try:
            known = tuple(jax.devices(self.backend))
        except RuntimeError as error:
            if self.backend is None:
                raise
            raise UnknownBackendError(
                f"backend={self.backend!r}: JAX has no such backend here ({error}). Name one that it has, such as "
                f"{jax.default_backend()!r}, or leave backend out."
            ) from None
        if self.devices is None:
            return known
        foreign = [repr(device) for device in self.devices if device not in known]
        if foreign:
            raise DevicesError(
                report(
                    f"devices and backend={self.backend!r} contradict each other:",
                    [f"{device} is not a device of that backend" for device in foreign],
                    "Give one of the two.",
                )
            )
        return self.devices


class Call(NamedTuple):
    """The arguments of a call, the static ones apart.

    Attributes:
        dynamic: The positional arguments that are not static.
        positions: Where they stood.
        kwargs: The keyword arguments that are not static.
        static: The static arguments: position or name, type, value.
    """

    dynamic: tuple[Any, ...]
    positions: Sequence[int]
    kwargs: dict[str, Any]
    static: tuple[tuple[int | str, type, Any], ...] = ()

    def by_position(self) -> dict[int, Any]:
        """The positional arguments that are not static."""
        return dict(zip(self.positions, self.dynamic, strict=True))


R = TypeVar("R")


class Entrance(Generic[R]):
    """What is called in place of a function: each call goes the shortest way that its dispatcher finds good.

    ``__call__`` is a slot, so that Python finds on the object what to call, and calls it without a frame.

    Attributes:
        _entry: The way straight to C++: see :meth:`Dispatcher.entry`.
        _copying: The same behind a copy of small NumPy arrays.
        _careful: The way by Python: see :meth:`Dispatcher.careful`.
        _fun: The function.
        _in_python: The way by Python alone, which knows the names of the arguments.
    """

    __slots__ = ("__call__", "__weakref__", "_careful", "_copying", "_dispatcher", "_entry", "_fun", "_in_python")

    __call__: Callable[..., R]

    def __init__(self, dispatcher: Dispatcher, fun: Callable[..., R]) -> None:
        self._dispatcher, self._fun = dispatcher, fun
        self._entry, self._in_python = dispatcher.entry(fun), functools.partial(dispatcher.in_python, fun)
        if dispatcher.donates:
            self._entry = _guarding(self._entry, self._in_python)
        elif dispatcher.options.static.positions or dispatcher.options.static.names:
            self._entry = _explaining(self._entry, self._in_python)
        self._copying = _copying(self._entry)
        self._careful = functools.partial(dispatcher.careful, fun, self._entry, self._copying)
        dispatcher.open(self)


class Dispatcher:
    """The compiled programs of one function under one set of options.

    It does not hold the function: a function that is dropped takes its programs with it.
    """

    def __init__(self, fun: Callable[[], Callable[..., Any]], options: Options) -> None:
        self._fun = fun  # a reference that does not hold it
        self.options = options
        self._programs: dict[Hashable, Program | Recorded] = {}
        self._signatures: dict[Hashable, Signature] = {}
        self._entrances: weakref.WeakSet[Entrance[Any]] = weakref.WeakSet()
        self._switching = threading.RLock()
        self._tracing: dict[Hashable, threading.RLock] = {}
        self._owner = functools.partial(_without_jit, weakref.ref(self))  # what C++ remembers is freed with it
        self._copies = self._packs = self._may_hang = False
        self.donates = bool(options.donated.positions or options.donated.names)

    def entry(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """What runs a call of ``fun``: in C++ if there was such a call before and its arguments lie right."""
        return _cpp.entry(
            self._owner,
            functools.partial(self._call, fun),
            _refuse_nan if self.donates else functools.partial(self.in_python, fun),
            function_name(fun),
            (self.options.static.positions, self.options.static.names),
            put,
        )

    def open(self, entrance: Entrance[Any]) -> None:
        """Lets calls in, and keeps telling them which way to go."""
        with self._switching:
            self._entrances.add(entrance)
            self._direct(entrance)

    def _direct(self, *entrances: Entrance[Any]) -> None:
        """Sends calls straight to C++, unless something has to be seen to first."""
        with self._switching:
            careful = self._tracing or self._packs
            for entrance in entrances or self._entrances:
                direct = entrance._copying if self._copies else entrance._entry
                call = entrance._careful if careful else direct
                entrance.__call__ = _cpu_threads.bounded(call, entrance._in_python) if self._may_hang else call

    def careful(
        self,
        fun: Callable[..., Any],
        entry: Callable[..., Any],
        copying: Callable[..., Any],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Runs a call after what has to be seen to before C++ runs it."""
        if self._tracing or (self._packs and comes_packed(args, kwargs)):
            # C++ would wait for the thread that traces, or look for packed arguments in vain.
            return self._call(fun, args, kwargs)[0]
        return (copying if self._copies else entry)(*args, **kwargs)

    @_jax.api_boundary
    def in_python(self, fun: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Runs a call of ``fun`` in Python alone."""
        return self._call(fun, args, kwargs)[0]

    def __call__(self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs ``fun`` once for each replica, in Python alone."""
        return self._call(fun, args, kwargs)[0]

    @_jax.api_boundary
    def _call(self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Runs ``fun`` once for each replica; the result, and what C++ has to know to run such a call, if it can."""
        with _jax.own_mesh((args, kwargs)):
            program, leaves = self.resolve(fun, args, kwargs)
            known = None
            if isinstance(program, Recorded):
                results = program.staged(*leaves, *program.closed)
            elif not _jax.eager():
                results = stage(program, leaves)
            else:
                _jax.refuse_leaked_tracers([*leaves, *program.closed])
                names = functools.partial(self._leaf_names, fun, args, kwargs)
                if pack := packed(program, leaves):
                    if not self._packs:
                        self._packs = True
                        self._direct()
                    results, _ = run(pack.program, pack.leaves(leaves), pack.program.run, pack.names(names))
                else:
                    results, placed = run(program, leaves, program.run, names)
                    if self._goes_by_itself(program, leaves, placed):
                        known = program.known
            out = jax.tree.unflatten(program.out_tree, results)
        return out, known and _cpp.remember(known, out)

    def _goes_by_itself(self, program: Program, leaves: Sequence[Any], placed: Sequence[Any]) -> bool:
        """Whether C++ may run such a call: each argument lies right, or gets to its place in the same way by itself.

        Where there is one device JAX takes a NumPy array's own memory. So small arrays are copied first from now on,
        and calls with large ones do not go this way.
        """
        if program.closed or _jax.looks_for_nans() or may_be_packed(program, leaves):
            return False
        several, on_host = program.layout.mesh.size > 1, False
        for x, y, axis in zip(leaves, placed, program.in_axes, strict=False):
            if isinstance(x, jax.Array):
                moves = several and len(x.sharding.device_set) == 1 and not program.donated
                if x is not y and not (moves and x.dtype == y.dtype and x.shape == y.shape):
                    return False
            elif (program.layout.axis.padding and axis is not None) or jax.dtypes.float0 == getattr(x, "dtype", None):
                return False
            elif isinstance(x, np.ndarray | np.generic) and not several:
                if isinstance(x, np.ndarray) and not is_small(x):
                    return False
                on_host = True  # to C++ a scalar of NumPy's is an array without axes
        if on_host and not self._copies:
            self._copies = True
            self._direct()
        return True

    def _leaf_names(self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        call = self.split(fun, args, kwargs)
        return name_leaves(fun, call.by_position(), call.kwargs)

    def resolve(
        self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, abstract: bool = False
    ) -> tuple[Program | Recorded, list[Any]]:
        """The program for a call, traced and lowered at most once a signature, and the leaves to run it on.

        With ``abstract`` a ``jax.ShapeDtypeStruct`` may stand for an array.
        """
        call = self.split(fun, args, kwargs)
        leaves, key = self._key(fun, call, abstract=abstract)
        try:
            program = None if jax.config.jax_disable_jit else self._programs.get(key)
        except Exception:
            _refuse_static(fun, call)
            raise
        if program is None:
            program = self._build(key, fun, call, leaves)
        return program, leaves

    def _key(self, fun: Callable[..., Any], call: Call, *, abstract: bool) -> tuple[list[Any], Hashable]:
        """The arguments' leaves, and all that the program for them depends on."""
        leaves, tree = jax.tree.flatten((call.dynamic, call.kwargs))
        try:
            types = _jax.type_key(leaves)
            if not abstract and jax.ShapeDtypeStruct in map(type, leaves):
                raise TypeError
        except (OverflowError, TypeError, ValueError):
            leaves = list(map(native, leaves))
            types = _types_of_arrays(fun, call, leaves, abstract=abstract)
        surroundings = _jax.eager(), _has_to_spread(leaves), _jax.tracing_replica()
        return leaves, (tree, types, call.static, _jax.trace_context(), surroundings)

    def _build(self, key: Hashable, fun: Callable[..., Any], call: Call, leaves: Sequence[Any]) -> Program | Recorded:
        """Traces and lowers a program, unless another thread has done so by the time that it is this one's turn."""
        turn = self._tracing.setdefault(key, threading.RLock())
        self._direct()
        in_turn = turn.acquire(timeout=PATIENCE)
        try:
            program = None if jax.config.jax_disable_jit else self._programs.get(key)
            if program is None:
                signature = self._signature(fun, call, leaves)
                earlier = list(self._signatures.values())
                program, reusable = self._lower(fun, call, signature, _has_to_spread(leaves))
                if jax.config.jax_explain_cache_misses:
                    logger.warning(signature.explain(program.name, earlier))
                if reusable and not jax.config.jax_disable_jit:  # under it every call runs the user's Python
                    self._signatures[key], self._programs[key] = signature, program
            return program
        finally:
            if in_turn:
                turn.release()
            self._tracing.pop(key, None)
            self._direct()

    def describe(
        self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program | Recorded, Call, Signature]:
        """The program for a call with these arguments or types, and what it stands for."""
        program, leaves = self.resolve(fun, args, kwargs, abstract=True)
        call = self.split(fun, args, kwargs)
        return program, call, self._signature(fun, call, leaves)

    @_jax.api_boundary
    def eval_shape(self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The types of the results of a call with these arguments or types."""
        with _jax.own_mesh():
            program, leaves = self.resolve(fun, args, kwargs, abstract=True)
            if isinstance(program, Program) and _jax.eager():
                out = program.traced.out_info
            else:
                out = jax.eval_shape(program.staged, *map(_type, [*leaves, *program.closed]))
        types = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False)) for x in out]
        return jax.tree.unflatten(program.out_tree, types)

    @_jax.api_boundary
    def explain(self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Whether a call has its program already, and if not, why none of the others fits."""
        call = self.split(fun, args, kwargs)
        leaves, key = self._key(fun, call, abstract=True)
        name = function_name(fun)
        if key in self._signatures:
            return f"{name} is compiled already for such a call."
        return self._signature(fun, call, leaves).explain(name, list(self._signatures.values()))

    def clear(self, entrance: Entrance[Any]) -> None:
        """Forgets all programs of those who came in by it."""
        programs = [program for program in self._programs.values() if isinstance(program, Program)]
        _cpp.forget(self.entry(entrance._fun))
        self._programs.clear()
        self._signatures.clear()
        for program in programs:
            program.clear()

    def split(self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Takes the static arguments out of a call.

        Raises:
            StaticArgumentError: one is missing.
        """
        chosen, count = self.options.static, len(args)
        if not chosen.positions and not chosen.names:
            return Call(args, range(count), kwargs)
        missing = [i for i in chosen.given if not -count <= i < count]
        if missing:
            self._refuse_missing(fun, [i for i in missing if dict(chosen.aliases).get(i) not in kwargs], count)
        return self.partition(args, kwargs)

    def partition(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Takes those static arguments out of a call that it has."""
        chosen, count = self.options.static, len(args)
        at = sorted({i % count for i in chosen.positions if -count <= i < count})
        positions = [i for i in range(count) if i not in at]
        static: list[tuple[int | str, type, Any]] = [(i, type(args[i]), args[i]) for i in at]
        static += [(name, type(kwargs[name]), kwargs[name]) for name in chosen.names if name in kwargs]
        rest = {name: value for name, value in kwargs.items() if name not in chosen.names}
        return Call(tuple(args[i] for i in positions), positions, rest, tuple(static))

    def _refuse_missing(self, fun: Callable[..., Any], missing: Sequence[int], count: int) -> None:
        names = parameter_names(fun, missing)
        if missing:
            raise StaticArgumentError(
                report(
                    f"static_broadcasted_argnums={self.options.static.given} names arguments that are missing from a "
                    f"call with {count} positional argument(s):",
                    [names[i] for i in sorted(missing)],
                    "Pass static arguments by position, or by name; one with a default value may be left out of the "
                    "call if static_broadcasted_argnames names it instead.",
                )
            )

    def _signature(self, fun: Callable[..., Any], call: Call, leaves: Sequence[Any]) -> Signature:
        """What a program for this call has to be compiled for; refuses a call that none can be compiled for."""
        options, args = self.options, call.by_position()
        names = name_leaves(fun, args, call.kwargs)
        named = [Leaf(name, _type(x)) for name, x in zip(names, leaves, strict=True)]
        static = {where for where, _, _ in call.static} | {*options.static.positions}
        every = parameter_names(fun, sorted([*args, *(i for i, _, _ in call.static if isinstance(i, int))]))
        in_axes, own_tree = match_in_axes(options.in_axes, args, call.kwargs, every, static, named)
        return Signature(
            size=mapped_size(in_axes, named, options.axis_size),
            leaves=tuple(named),
            in_axes=tuple(in_axes),
            tree=jax.tree.structure((call.dynamic, call.kwargs)),
            own_tree=own_tree,
            roots={(0, k): every[i] for k, i in enumerate(args)} | {(1, name): name for name in call.kwargs},
            static={every[i] if isinstance(i, int) else i: value for i, _, value in call.static},
            settings=_jax.settings(),
            surroundings="inside another mapped function"
            if _jax.tracing_replica()
            else ("by itself" if _jax.eager() else "inside a transformation such as jit, grad or vmap"),
        )

    def _lower(
        self, fun: Callable[..., Any], call: Call, signature: Signature, spread: bool
    ) -> tuple[Program | Recorded, bool]:
        options, size = self.options, signature.size
        if _jax.tracing_replica():
            _refuse_inner_devices(options, function_name(fun))
        devices = options.resolve_devices()
        avals = [leaf.aval for leaf in signature.leaves]
        one = [one_replica_type(aval, axis) for aval, axis in zip(avals, signature.in_axes, strict=True)]
        one_dynamic, one_kwargs = jax.tree.unflatten(signature.own_tree, one)
        by_position = dict(zip(call.positions, one_dynamic, strict=True))
        static = {where: value for where, _, value in call.static}
        by_position |= {i: value for i, value in static.items() if isinstance(i, int)}
        replica = trace_replica(
            _bound(fun, {name: value for name, value in static.items() if isinstance(name, str)}),
            [by_position[i] for i in range(len(by_position))],
            one_kwargs,
            [i for i in static if isinstance(i, int)],
            options.axis_name,
            size,
        )
        reusable, name = not replica.closes_over_tracers, function_name(fun)
        if _jax.tracing_replica():
            axis = replicas_of(options.axis_name, size)
            return record(replica, axis, signature.in_axes, options.out_axes, name, options.agreeing), reusable
        nesting = _primitives.nesting(replica.jaxpr)
        placed = layout(options.axis_name, size, devices, spread=spread, aside=not _jax.eager(), nesting=nesting)
        donated, agreeing = self._donated(call), options.agreeing
        program = lower(replica, placed, signature.in_axes, options.out_axes, avals, donated, name, agreeing)
        self._may_hang = self._may_hang or _cpu_threads.may_hang(placed.mesh)
        if _jax.eager():  # All that is traced is traced now, in this thread's turn and before an argument is moved.
            _ = program.traced
        return program, reusable

    def _donated(self, call: Call) -> list[int]:
        """Which leaves of the arguments are donated."""
        chosen, count = self.options.donated, len(call.positions) + sum(isinstance(i, int) for i, _, _ in call.static)
        at = {i % count for i in chosen.positions if -count <= i < count}
        roots = [(i in at, tree) for i, tree in zip(call.positions, call.dynamic, strict=True)]
        roots += [(name in chosen.names, call.kwargs[name]) for name in sorted(call.kwargs)]
        leaves = [given for given, tree in roots for _ in jax.tree.leaves(tree)]
        return [k for k, given in enumerate(leaves) if given]


#: How many seconds a thread waits while another traces the same program. After that it traces for itself, which is a
#: waste and no harm; it might be what the other one waits for.
PATIENCE = 300.0

logger = logging.getLogger("replicax")


def function_name(fun: Callable[..., Any]) -> str:
    """What the user calls a function, and what its programs are called."""
    while isinstance(fun, functools.partial):
        fun = fun.func
    return getattr(fun, "__name__", type(fun).__name__)


def _bound(fun: Callable[..., Any], static: Mapping[str, Any]) -> Callable[..., Any]:
    """``fun`` with its static keyword arguments."""
    if not static:
        return fun

    @functools.wraps(fun)
    def bound(*args: Any, **kwargs: Any) -> Any:
        return fun(*args, **kwargs, **static)

    return bound


def _copying(entry: Callable[..., Any]) -> Callable[..., Any]:
    """Runs calls on copies of their small NumPy arrays, whose owner may change them before the program has run."""

    def copying(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1:
            return entry(*map(own, args), **{name: own(tree) for name, tree in kwargs.items()})
        return entry(own(args[0]))  # the same with fewer steps

    return copying


def _explaining(entry: Callable[..., Any], in_python: Callable[..., Any]) -> Callable[..., Any]:
    """Runs calls with static arguments, which C++ refuses without their names: that is left to Python."""

    def explaining(*args: Any, **kwargs: Any) -> Any:
        try:
            return entry(*args, **kwargs)
        except ValueError as error:
            if not _cpp.names_no_argument(error):
                raise
        return in_python(*args, **kwargs)

    return explaining


def _guarding(entry: Callable[..., Any], in_python: Callable[..., Any]) -> Callable[..., Any]:
    """Runs calls that donate, but those with an array twice: XLA ends the process, or prints all that it knows of it.

    For arrays that were taken see ``TAKEN_ARRAYS_CRASH``.
    """

    def guarding(*args: Any, **kwargs: Any) -> Any:
        leaves = _cpp.flatten((args, kwargs), None)[0]
        if len(set(map(id, leaves))) < len(leaves):
            return in_python(*args, **kwargs)
        try:
            result = entry(*args, **kwargs)
        except ValueError as error:
            if not _cpp.names_no_argument(error):
                raise
            result = in_python(*args, **kwargs)
        if _cpp.TAKEN_ARRAYS_CRASH:
            delete_taken(leaves)
        return result

    return guarding


def _refuse_nan(*_: Any, **__: Any) -> Any:
    """What JAX calls where a program has returned a NaN, was told to look for any, and its arguments are gone."""
    raise FloatingPointError(
        "invalid value (nan or inf) encountered in the result of a map, under jax_debug_nans or jax_debug_infs. What "
        "was donated to it is gone, so that it cannot be run again to show where. Leave out donate_argnums to see."
    )


def _without_jit(dispatcher: weakref.ref[Dispatcher], /, *args: Any, **kwargs: Any) -> Any:
    """What C++ calls where jit is disabled."""
    found: Any = dispatcher()
    return found(found._fun(), args, kwargs)


def _has_to_spread(leaves: Sequence[Any]) -> bool:
    """Whether a program has to take all devices: it is recorded with others, or its arguments' types name a mesh."""
    return not _jax.eager() and (_jax.staging() or any(_primitives.split_over(x) is not None for x in leaves))


def _type(x: Any) -> jax.ShapeDtypeStruct:
    aval = _jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


# ---------------------------------------------------------------------------------------------------------------
# Faults


def _types_of_arrays(fun: Callable[..., Any], call: Call, leaves: Sequence[Any], *, abstract: bool) -> Hashable:
    """What the usual look at all of them at once has not found: the types of some that are arrays nevertheless."""
    faults, names = {}, name_leaves(fun, call.by_position(), call.kwargs)
    refuse_passed(names, leaves)
    for name, x in zip(names, leaves, strict=True):
        try:
            _jax.typeof(x)
            known = abstract or not isinstance(x, jax.ShapeDtypeStruct)
        except TypeError:
            known = False
        except OverflowError:
            raise too_large(name, x) from None
        except ValueError as error:
            if not _jax.is_unconverted(x):
                error.add_note(f"It is the argument {name}.")
                raise
            known = False
        if not known:
            faults[name] = x
    if not faults:
        return _jax.type_key(leaves)
    raise no_arrays(
        "pmap maps arrays, and these arguments are none:",
        faults,
        "Convert them to arrays of numbers; or name what is none in static_broadcasted_argnums or "
        "static_broadcasted_argnames (it has to be hashable); or bind it beforehand with functools.partial.",
    ) from None


def _refuse_static(fun: Callable[..., Any], call: Call) -> None:
    """Refuses static arguments that cannot be looked up, if there are any."""
    names = parameter_names(fun, [i for i, _, _ in call.static if isinstance(i, int)])
    unhashable, incomparable = [], []
    for where, kind, value in call.static:
        name = names[where] if isinstance(where, int) else where
        try:
            hash(value)
        except Exception:
            unhashable.append(f"{name} is of type {kind.__name__}")
            continue
        try:
            bool(value == value)
        except Exception as error:
            what = f"{type(error).__name__}: {text_of(error)}".removesuffix(": ")
            incomparable.append(f"{name}, of type {kind.__name__}, raised {what}")
    if unhashable:
        raise StaticArgumentError(
            report(
                "Non-hashable static arguments are not supported, since each new value is compiled for anew:",
                unhashable,
                "Pass a hashable value, such as a tuple for a list, or do not name the argument as static.",
            )
        ) from None
    if incomparable:
        raise StaticArgumentError(
            report(
                "Static arguments are compared with ==, to find the program compiled for them, and this failed:",
                incomparable,
                "Give the type an __eq__ that returns True or False, and a __hash__ that goes with it.",
            )
        ) from None


def _refuse_inner_devices(options: Options, name: str) -> None:
    chosen = [which for which in ("devices", "backend") if getattr(options, which) is not None]
    if chosen:
        raise NestedMapError(
            f"Nested pmap with explicit {' and '.join(chosen)} argument. {name} is mapped inside another mapped "
            f"function, whose devices its replicas share out. Leave it out here, and give it to the outermost pmap."
        )


def check_devices(devices: Sequence[jax.Device]) -> tuple[jax.Device, ...]:
    """The devices as a tuple.

    Raises:
        OptionTypeError: it is no sequence.
        DevicesError: it is empty, or holds something that is no device, one twice, or devices of several platforms.
    """
    if isinstance(devices, str) or not isinstance(devices, Iterable):
        raise OptionTypeError(f"devices must be a list of devices, and is {devices!r:.60}. Write [device] for one.")
    given = tuple(devices)
    if not given:
        raise DevicesError(
            "The 'devices' argument to pmap must be non-empty, or None. Pass some of jax.devices(), or leave devices "
            "out to use all of them."
        )
    faults = [
        f"devices[{i}] is {d!r}, which is no device" for i, d in enumerate(given) if not isinstance(d, jax.Device)
    ]
    faults = faults or [
        f"{d!r} stands in it {given.count(d)} times" for d in dict.fromkeys(given) if given.count(d) > 1
    ]
    platforms = sorted({d.platform for d in given}) if not faults else []
    if len(platforms) > 1:
        faults = [f"its devices are of the platforms {', '.join(platforms)}"]
    if faults:
        raise DevicesError(
            report(
                "devices must be one or more different devices of one platform:",
                faults,
                "Pass some of jax.devices(), or leave devices out to use all of them.",
            )
        )
    return given


# ---------------------------------------------------------------------------------------------------------------
# One dispatcher for each function and options


_dispatchers: dict[int, tuple[weakref.ref[Any], dict[Hashable, Dispatcher]]] = {}


def dispatcher(fun: Callable[..., Any], options: Options) -> Dispatcher:
    """The dispatcher of ``fun``, shared by all who map the same function in the same way, and freed with it."""
    owner = getattr(fun, "__self__", None) if hasattr(fun, "__func__") else fun
    try:
        reference = weakref.ref(owner, functools.partial(_forget, id(owner)))
        itself: Any = weakref.WeakMethod(fun) if hasattr(fun, "__func__") else weakref.ref(fun)
        key = (getattr(fun, "__func__", None), options)
        hash(key)
    except TypeError:  # no weak references, or an unhashable axis name: not shared
        return Dispatcher(lambda: fun, options)
    _, known = _dispatchers.setdefault(id(owner), (reference, {}))
    return known.setdefault(key, Dispatcher(itself, options))


def _forget(owner: int, _: object) -> None:
    _dispatchers.pop(owner, None)
