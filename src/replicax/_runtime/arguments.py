"""The arguments of one call: separates static arguments, names and validates the leaves."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax

from replicax import _jax
from replicax._engine.references import refuse_passed
from replicax._engine.replica import no_arrays
from replicax._layout.axes import Chosen, name_leaves, parameter_names
from replicax._messages import report, text_of, too_large
from replicax._typing import Args, Function, Kwargs, PyTree
from replicax.errors import StaticArgumentError


class Call(NamedTuple):
    """The arguments of a call, with static arguments separated.

    Attributes:
        fun: The mapped function.
        dynamic: The positional arguments that are not static.
        positions: The position of each of ``dynamic`` in the call.
        kwargs: The keyword arguments that are not static.
        static: The static arguments, each as ``(position or name, type, value)``.
    """

    fun: Function
    dynamic: Args
    positions: Sequence[int]
    kwargs: Kwargs
    static: tuple[tuple[int | str, type, Any], ...] = ()

    @property
    def name(self) -> str:
        """The name of the function, for messages."""
        return function_name(self.fun)

    @property
    def static_positions(self) -> list[int]:
        """The positions of the static arguments that were passed by position."""
        return [where for where, _, _ in self.static if isinstance(where, int)]

    def by_position(self) -> dict[int, PyTree]:
        """The positional arguments that are not static, by position."""
        return dict(zip(self.positions, self.dynamic, strict=True))

    def leaf_names(self) -> list[str]:
        """The name of each leaf of the arguments, for messages."""
        return name_leaves(self.fun, self.by_position(), self.kwargs)

    def parameter_names(self) -> dict[int, str]:
        """The parameter name of each positional argument."""
        return parameter_names(self.fun, sorted([*self.positions, *self.static_positions]))

    def donated(self, chosen: Chosen) -> tuple[int, ...]:
        """The indices of the leaves that belong to the arguments in ``chosen``."""
        count = len(self.positions) + len(self.static_positions)
        at = {i % count for i in chosen.positions if -count <= i < count}
        roots = [(i in at, tree) for i, tree in zip(self.positions, self.dynamic, strict=True)]
        roots += [(name in chosen.names, self.kwargs[name]) for name in sorted(self.kwargs)]
        leaves = [given for given, tree in roots for _ in jax.tree.leaves(tree)]
        return tuple(k for k, given in enumerate(leaves) if given)


def split(fun: Function, static: Chosen, args: Args, kwargs: Kwargs) -> Call:
    """Separates the static arguments of a call.

    Raises:
        StaticArgumentError: a static argument is missing.
    """
    count = len(args)
    if not static.positions and not static.names:
        return Call(fun, args, range(count), kwargs)
    missing = [i for i in static.given if not -count <= i < count]
    if missing := [i for i in missing if dict(static.aliases).get(i) not in kwargs]:
        names = parameter_names(fun, missing)
        raise StaticArgumentError(
            report(
                f"static_broadcasted_argnums={static.given} names arguments that are missing from a "
                f"call with {count} positional argument(s):",
                [names[i] for i in sorted(missing)],
                "Pass static arguments by position or by name. To leave out an argument that has a default value, "
                "name it in static_broadcasted_argnames instead.",
            )
        )
    return partition(fun, static, args, kwargs)


def partition(fun: Function, static: Chosen, args: Args, kwargs: Kwargs) -> Call:
    """Separates the static arguments that the call passes. Missing ones are not an error."""
    count = len(args)
    at = sorted({i % count for i in static.positions if -count <= i < count})
    positions = [i for i in range(count) if i not in at]
    values: list[tuple[int | str, type, Any]] = [(i, type(args[i]), args[i]) for i in at]
    values += [(name, type(kwargs[name]), kwargs[name]) for name in static.names if name in kwargs]
    rest = {name: value for name, value in kwargs.items() if name not in static.names}
    return Call(fun, tuple(args[i] for i in positions), positions, rest, tuple(values))


def function_name(fun: Function) -> str:
    """The name of a function, for messages and for the compiled program."""
    while isinstance(fun, functools.partial):
        fun = fun.func
    return getattr(fun, "__name__", type(fun).__name__)


def check_types(call: Call, leaves: Sequence[PyTree], *, abstract: bool) -> Hashable:
    """Checks that all leaves are arrays, and returns their types as a cache key.

    Args:
        call: The call.
        leaves: The leaves of its arguments.
        abstract: Whether a ``jax.ShapeDtypeStruct`` is allowed in place of an array.

    Raises:
        NotAnArrayError: lists every leaf that is not an array.
        NumberTooLargeError: an int does not fit into the dtype that JAX gives it.
    """
    faults, names = {}, call.leaf_names()
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
                error.add_note(f"The argument is {name}.")
                raise
            known = False
        if not known:
            faults[name] = x
    if not faults:
        return _jax.type_key(leaves)
    raise no_arrays(
        "pmap arguments must be arrays; these are not:",
        faults,
        "Convert them to numeric arrays, or name them in static_broadcasted_argnums or static_broadcasted_argnames "
        "(values must be hashable), or bind them with functools.partial before pmap.",
    ) from None


def refuse_static(call: Call) -> None:
    """Rejects static arguments that cannot be part of a cache key.

    Raises:
        StaticArgumentError: lists the arguments that are unhashable, or whose ``==`` raises.
    """
    names = call.parameter_names()
    unhashable, incomparable = [], []
    for where, kind, value in call.static:
        name = names[where] if isinstance(where, int) else where
        try:
            hash(value)
        except Exception as error:
            what = text_of(error)  # such as "unhashable type: 'list'" for a list in a tuple
            unhashable.append(f"{name} is of type {kind.__name__}" + (f" ({what})" if what else ""))
            continue
        try:
            bool(value == value)
        except Exception as error:
            what = f"{type(error).__name__}: {text_of(error)}".removesuffix(": ")
            incomparable.append(f"{name}, of type {kind.__name__}, raised {what}")
    if unhashable:
        raise StaticArgumentError(
            report(
                "Non-hashable static arguments are not supported, because compiled programs are looked up by value:",
                unhashable,
                "Pass a hashable value, such as a tuple instead of a list, or do not name the argument as static.",
            )
        ) from None
    if incomparable:
        raise StaticArgumentError(
            report(
                "Static arguments must support ==, because compiled programs are looked up by value; these failed:",
                incomparable,
                "Give the type an __eq__ that returns True or False, and a consistent __hash__.",
            )
        ) from None
