"""Matches ``in_axes`` and ``out_axes`` with pytrees, and reports mismatches with the user's names."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax
from jax.tree_util import keystr

from replicax import _jax
from replicax._layout.vmappable import all_of, one_of
from replicax._messages import MOST, as_int, report
from replicax._typing import Axes, Function, KeyPath, PyTree, PyTreeDef
from replicax.errors import ArgumentNameError, AxisSpecError, AxisSpecTypeError, MappedSizeError, OptionTypeError

#: Function of a vmappable value and its entry: returns the mapped axis of each array, and the value after mapping.
OfOne: TypeAlias = Callable[[PyTree, PyTree], tuple[list[int | None], PyTree]]


def is_none(x: object) -> bool:
    """Whether ``x`` is None. In a specification, None is a leaf ("not mapped")."""
    return x is None


@dataclass(frozen=True)
class Spec:
    """``in_axes`` or ``out_axes``: a hashable pytree of ints and None.

    An entry for a vmappable type may have another type.
    """

    leaves: tuple[PyTree, ...]
    treedef: PyTreeDef

    @property
    def tree(self) -> PyTree:
        """The specification as the user wrote it."""
        return jax.tree.unflatten(self.treedef, self.leaves)


def check_spec(which: str, spec: PyTree) -> Spec:
    """Checks that ``in_axes`` or ``out_axes`` contains only ints and None, before any argument is known.

    Args:
        which: ``in_axes`` or ``out_axes``.
        spec: The specification.

    Raises:
        AxisSpecTypeError: lists every entry of another type.
    """
    faults = []

    def leaf(path: KeyPath, axis: PyTree) -> PyTree:
        if axis is None or (_jax.is_map_spec(axis) and not isinstance(axis, int)):
            return axis
        if _jax.is_vmappable(axis):
            faults.append(f"{which}{keystr(path)} is a {type(axis).__name__}: write one int for the whole object")
            return None
        try:
            if isinstance(axis, bool):
                raise TypeError
            return operator.index(axis)
        except TypeError:
            faults.append(f"{which}{keystr(path)} is {axis!r}, of type {type(axis).__name__}")
            return None

    checked = jax.tree_util.tree_map_with_path(leaf, spec, is_leaf=lambda x: is_none(x) or _jax.is_vmappable(x))
    if faults:
        raise AxisSpecTypeError(
            report(
                f"{which} must be an int, None, or a pytree of ints and None; these entries are not:",
                faults,
                f"Write the position of the mapped axis, as in {which}=0, or None for an array without a mapped axis.",
            )
        )
    return Spec(*_flatten(checked))


def _flatten(spec: PyTree) -> tuple[tuple[PyTree, ...], PyTreeDef]:
    leaves, treedef = jax.tree.flatten(spec, is_leaf=is_none)
    return tuple(leaves), treedef


@dataclass(frozen=True)
class Leaf:
    """One array among the arguments: its name for messages, and its type."""

    name: str
    aval: jax.ShapeDtypeStruct

    def __str__(self) -> str:
        return f"{self.name} of shape {self.aval.shape}"


def name_leaves(fun: Function, args: Mapping[int, PyTree], kwargs: Mapping[str, PyTree]) -> list[str]:
    """Returns the name of each leaf of the arguments: parameter name and tree path.

    Args:
        fun: The function that takes the arguments.
        args: The positional arguments by position, without static ones.
        kwargs: The keyword arguments.
    """
    names = parameter_names(fun, args)
    roots = [(names[i], value) for i, value in args.items()]
    roots += [(name, kwargs[name]) for name in sorted(kwargs)]
    return [root + keystr(path) for root, tree in roots for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def parameter_names(fun: Function, positions: Iterable[int]) -> dict[int, str]:
    """Returns the name of the parameter at each position, or ``argument 0`` and so on if it is unknown."""
    parameters = _parameters(fun) or []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)

    def name(i: int) -> str:
        if 0 <= i < len(positional):
            return positional[i].name
        return f"argument {i}" if variadic is None or i < 0 else f"{variadic}[{i - len(positional)}]"

    return {i: name(i) for i in positions}


def _parameters(fun: Function) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(fun).parameters.values())
    except (ValueError, TypeError):
        return None


@dataclass(frozen=True)
class Chosen:
    """The arguments that an option such as ``donate_argnums`` selects, passed by position or by name.

    Attributes:
        given: The positions that the user wrote. Negative ones count from the end of a call's arguments.
        positions: ``given``, plus the positions of the parameters that the user named.
        names: The names that the user wrote, plus the names of the parameters at the given positions.
        aliases: (position, name) of each selected parameter that can be passed by position.
    """

    given: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    aliases: tuple[tuple[int, str], ...] = ()


@_jax.api_boundary
def choose(which: str, fun: Function, argnums: int | Iterable[int], argnames: str | Iterable[str]) -> Chosen:
    """Checks ``<which>_argnums`` and ``<which>_argnames``, and adds to each the arguments that the other selects.

    Args:
        which: ``static_broadcasted`` or ``donate``.
        fun: The user's function.
        argnums: The positions.
        argnames: The names.

    Raises:
        OptionTypeError: A position is not an int, or a name is not a string.
        ArgumentNameError: The function has no such parameter.
    """
    given: object = argnums
    if isinstance(given, str):
        raise OptionTypeError(
            f"{which}_argnums must be an int or a tuple of ints, got {given!r}. Pass names as {which}_argnames."
        )
    numbers = argnums if isinstance(argnums, Iterable) else (argnums,)
    positions = tuple(as_int(f"{which}_argnums", position) for position in numbers)
    names = _as_names(which, argnames)
    parameters = _parameters(fun) if positions or names else None
    if parameters is None:
        return Chosen(positions, positions, names)
    _refuse_unknown_names(which, fun, names, parameters)
    if which == "donate" and (unknown := [i for i in positions if not _takes(parameters, i)]):
        raise ArgumentNameError(
            f"donate_argnums={argnums!r} contains position {', '.join(map(str, unknown))}, but "
            f"{getattr(fun, '__name__', repr(fun))} takes {_positional(parameters)} positional argument(s). Use "
            f"positions from 0 to {_positional(parameters) - 1}, or donate_argnames."
        )
    pairs = [
        (i, p.name)
        for i, p in enumerate(parameters)
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and (i in positions or p.name in names)
    ]
    by_name = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY]
    return Chosen(
        given=positions,
        positions=tuple(dict.fromkeys((*positions, *(i for i, _ in pairs)))),
        names=tuple(dict.fromkeys((*names, *(name for _, name in pairs if name in by_name)))),
        aliases=tuple(pairs),
    )


def _as_names(which: str, argnames: str | Iterable[str]) -> tuple[str, ...]:
    names = (argnames,) if isinstance(argnames, str) or not isinstance(argnames, Iterable) else tuple(argnames)
    for name in names:
        if not isinstance(name, str):
            raise OptionTypeError(
                f"{which}_argnames must be a string or several strings, got {name!r:.60} of type "
                f"{type(name).__name__}. Pass positions in {which}_argnums."
            )
    return names


def takes_position(fun: Function, position: int) -> bool:
    """Whether a function accepts a positional argument at this position. True if its signature is unknown."""
    parameters = _parameters(fun)
    return parameters is None or _takes(parameters, position)


def _takes(parameters: Sequence[inspect.Parameter], position: int) -> bool:
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    return -_positional(parameters) <= position < _positional(parameters)


def _positional(parameters: Sequence[inspect.Parameter]) -> int:
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _refuse_unknown_names(
    which: str, fun: Function, names: Sequence[str], parameters: Sequence[inspect.Parameter]
) -> None:
    known = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    unknown = [name for name in names if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ArgumentNameError(
            report(
                f"{which}_argnames must name parameters of {getattr(fun, '__name__', repr(fun))}; these are not:",
                [repr(name) for name in unknown],
                f"Use one of its parameters: {', '.join(map(repr, known))}."
                if known
                else "The function has no parameters: leave the option out.",
            )
        )


def one_replica_type(aval: jax.ShapeDtypeStruct, axis: int | None) -> jax.ShapeDtypeStruct:
    """Returns the type of one replica's part of a mapped array."""
    if axis is None:
        return aval
    shape = (*aval.shape[:axis], *aval.shape[axis + 1 :])
    return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=aval.weak_type)


def match_in_axes(
    spec: Spec,
    args: Mapping[int, PyTree],
    kwargs: Mapping[str, PyTree],
    names: Mapping[int, str],
    static: Collection[int | str],
    leaves: Sequence[Leaf],
) -> tuple[list[int | None], PyTreeDef]:
    """Returns the mapped axis of each argument leaf, non-negative, and the tree structure of one replica's arguments.

    As in ``jax.pmap``, ``in_axes`` has an unused entry for each static argument. If the function has static arguments,
    ``in_axes`` may have more entries than the call has arguments.

    Args:
        spec: ``in_axes``: one axis for all positional arguments, or a tuple with one entry for each.
        args: The positional arguments by position, without static ones.
        kwargs: The keyword arguments, which are always mapped along axis 0.
        names: The name of each positional argument, including static ones.
        static: The positions of the function's static arguments, and the names of those passed by name.
        leaves: The leaves of ``args`` and ``kwargs``.

    Raises:
        AxisSpecError: ``in_axes`` is not a prefix of the arguments, or a leaf does not have its mapped axis.
    """
    in_axes = spec.tree
    per_argument = isinstance(in_axes, tuple | list)
    arity = len(names)
    if per_argument and (len(in_axes) <= max(args, default=-1) or (len(in_axes) > arity and not static)):
        called = f"in_axes={in_axes!r} has length {len(in_axes)}, but the function was called with {arity} positional"
        if static:
            raise AxisSpecError(_entries(called, in_axes, names, static))
        raise AxisSpecError(
            f"{called} argument(s). Write one entry per positional argument (keyword arguments are always mapped along "
            f"axis 0), or a single int for all of them."
        )
    if not arity and not per_argument and not isinstance(in_axes, int | None):
        raise AxisSpecError(
            f"in_axes={in_axes!r} applies to positional arguments, but the function was called with none. Arguments "
            f"passed by keyword are always mapped along axis 0. Leave in_axes out, or pass the arguments by position."
        )
    entries = tuple(in_axes[i] if per_argument else in_axes for i in args)
    axes, own = broadcast_prefix("in_axes", "the tuple of arguments", entries, tuple(args.values()), one_of)
    of_kwargs, own_kwargs = broadcast_prefix("in_axes", "the keyword arguments", 0, dict(kwargs), one_of)
    axes = normalize("in_axes", "argument", [*axes, *of_kwargs], leaves, extra=0)
    return axes, jax.tree.structure((own, own_kwargs))


def _entries(called: str, in_axes: Sequence[PyTree], names: Mapping[int, str], static: Collection[int | str]) -> str:
    """Reports which entry of ``in_axes`` belongs to which argument, if entries for static ones are missing."""
    lines, dynamic = [], [i for i in names if i not in static]
    for i, name in names.items():
        entry = f"in_axes[{i}] is {in_axes[i]!r}" if i < len(in_axes) else "no entry"
        lines.append(f"{name}{' (static)' if i in static else ''}: {entry}")
    meant = dict(zip(dynamic, in_axes, strict=True)) if len(dynamic) == len(in_axes) else dict.fromkeys(dynamic, 0)
    example = tuple(meant.get(i) for i in names)
    return report(
        f"{called} argument(s), including static ones:",
        lines,
        f"Write one entry per positional argument. The entry of a static argument is not used, so write None. For "
        f"example, write in_axes={example!r}, or a single int for all of them.",
    )


def match_out_axes(spec: Spec, out: PyTree, size: int) -> tuple[list[int | None], PyTreeDef]:
    """Returns the mapped axis of each result leaf, non-negative, and the tree structure of all replicas' results.

    Args:
        spec: ``out_axes``.
        out: The result of one replica: a tree of ``jax.ShapeDtypeStruct``.
        size: The number of replicas.

    Raises:
        AxisSpecError: ``out_axes`` is not a prefix of the result, or an axis is out of range for a leaf.
    """
    axes, whole = broadcast_prefix("out_axes", "the result", spec.tree, out, lambda own, axis: all_of(own, axis, size))
    paths = jax.tree_util.tree_leaves_with_path(out)
    leaves = [Leaf(f"result{keystr(path)}", aval) for path, aval in paths]
    return normalize("out_axes", "result", axes, leaves, extra=1), jax.tree.structure(whole)


def broadcast_prefix(
    which: str, what: str, spec: PyTree, tree: PyTree, mapped: OfOne
) -> tuple[list[int | None], PyTree]:
    """Broadcasts a prefix tree of axes to the leaves of ``tree``.

    Args:
        which: ``in_axes`` or ``out_axes``.
        what: The name of the tree, for error messages.
        spec: The prefix tree.
        tree: The tree.
        mapped: Returns the axis of each leaf of a vmappable value, and the value after mapping.

    Returns:
        The axis of each leaf, and the tree with each vmappable value replaced by its value after mapping.
    """
    axes: list[int | None] = []
    values: list[PyTree] = []

    def repeat(axis: PyTree, subtree: PyTree) -> None:
        for x in jax.tree.leaves(subtree, is_leaf=_jax.is_vmappable):
            if not _jax.is_vmappable(x) and not isinstance(axis, int | None):
                raise AxisSpecError(
                    f"{which} has {axis!r} of type {type(axis).__name__} for an array. Write an int or None."
                )
            own_axes, own = mapped(x, axis) if _jax.is_vmappable(x) and axis is not None else ([axis], x)
            axes.extend([None] * jax.tree.structure(x).num_leaves if axis is None else own_axes)
            values.append(own)

    try:
        jax.tree.map(repeat, spec, tree, is_leaf=is_none)
    except AxisSpecError:
        raise
    except ValueError:
        raise AxisSpecError(
            report(
                f"{which} does not match {what}: it must be an int, None, or a pytree prefix of {what}.",
                _prefix_faults(which, spec, tree),
                f"Write one int or None for a whole subtree, or a pytree with the structure of {what}.",
            )
        ) from None
    return axes, jax.tree.unflatten(jax.tree.structure(tree, is_leaf=_jax.is_vmappable), values)


def _prefix_faults(where: str, spec: PyTree, tree: PyTree) -> list[str]:
    """Reports where the structures of a specification and a tree differ."""
    if is_none(spec) or (ours := _jax.one_level(spec)) is None:
        return []
    theirs = _jax.one_level(tree)
    if theirs is None or type(spec) is not type(tree) or ours[1] != theirs[1] or len(ours[0]) != len(theirs[0]):
        return [f"{where} is {_kind(spec)}, but should match {_kind(tree)}"]
    keys = ours[1] if isinstance(spec, dict) else range(len(ours[0]))
    pairs = zip(keys, ours[0], theirs[0], strict=True)
    return [fault for key, one, other in pairs for fault in _prefix_faults(f"{where}[{key!r}]", one, other)]


def _kind(tree: PyTree) -> str:
    if tree is None:
        return "None"
    if isinstance(tree, dict):
        return f"a dict with the keys {', '.join(map(repr, tree))}" if tree else "an empty dict"
    if isinstance(tree, tuple | list):
        return f"a {type(tree).__name__} of length {len(tree)}"
    return "an array" if _jax.one_level(tree) is None else f"a {type(tree).__name__}"


def normalize(which: str, role: str, axes: Axes, leaves: Sequence[Leaf], *, extra: int) -> list[int | None]:
    """Replaces negative axes by non-negative ones.

    Args:
        which: ``in_axes`` or ``out_axes``.
        role: ``argument`` or ``result``, for error messages.
        axes: One entry per leaf.
        leaves: The leaves.
        extra: The number of axes that the mapped array has more than the leaf: 0 or 1.

    Raises:
        AxisSpecError: lists every leaf that does not have its axis.
    """
    faults, normal = [], list[int | None]()
    for axis, leaf in zip(axes, leaves, strict=True):
        rank = len(leaf.aval.shape) + extra
        if axis is not None and not -rank <= axis < rank:
            faults.append(f"{leaf}: axis {axis}" if rank else f"{leaf}: a scalar has no axis to map")
        normal.append(axis % rank if axis is not None and rank else axis)
    if faults:
        remedy = (
            "Map an axis that the array has, or write None in in_axes to pass an argument whole to every replica, as "
            "in in_axes=(0, None)."
            if which == "in_axes"
            else "pmap inserts the mapped axis into each result. Write a position from 0 up to the rank of the result."
        )
        raise AxisSpecError(
            report(
                f"{which} names an axis that a{'n' if role == 'argument' else ''} {role} does not have:", faults, remedy
            )
        )
    return normal


def _by_argument(mapped: Sequence[tuple[Leaf, int, int]]) -> list[str]:
    """Lists the sizes of the mapped axes: one line per array, or one per argument and size if there are many arrays."""
    if len(mapped) <= MOST - 1:  # one line is for axis_size
        return [f"{leaf}: axis {axis} has size {size}" for leaf, axis, size in mapped]
    alike: dict[tuple[str, int, int], list[Leaf]] = {}
    for leaf, axis, size in mapped:
        alike.setdefault((_ARGUMENT.split(leaf.name, maxsplit=1)[0], axis, size), []).append(leaf)
    return [
        f"{leaves[0]}: axis {axis} has size {size}"
        if len(leaves) == 1
        else f"{len(leaves)} arrays of {root}: axis {axis} has size {size} ({leaves[0]}, ...)"
        for (root, axis, size), leaves in sorted(alike.items(), key=lambda item: len(item[1]))
    ]


#: Matches the end of an argument's name, where its tree path begins.
_ARGUMENT = re.compile(r"(?=[.\[])")


def mapped_size(axes: Axes, leaves: Sequence[Leaf], axis_size: int | None, *, least: int = 1) -> int:
    """Returns the number of replicas, on which all mapped arguments and ``axis_size`` must agree.

    Args:
        axes: The mapped axis of each leaf.
        leaves: The argument leaves.
        axis_size: The number of replicas that the user gave, or None.
        least: The smallest number of replicas that is accepted.

    Raises:
        MappedSizeError: The sizes differ, are less than 1, or there are none. The message lists every argument.
    """
    mapped = [(leaf, axis, leaf.aval.shape[axis]) for leaf, axis in zip(leaves, axes, strict=True) if axis is not None]
    sizes = {size for _, _, size in mapped} | ({axis_size} if axis_size is not None else set())
    if len(sizes) == 1 and (size := next(iter(sizes))) >= least:
        return size
    if not sizes:
        raise MappedSizeError(
            report(
                "pmap cannot infer the number of replicas, because no argument is mapped:",
                [f"{leaf}: not mapped" for leaf in leaves] or ["the function was called without arrays"],
                "Map an argument with in_axes, or pass the number of replicas, as in pmap(f, axis_size=8).",
            )
        )
    faults = [*([f"axis_size is {axis_size}"] if axis_size is not None else []), *_by_argument(mapped)]
    if len(sizes) == 1 or (axis_size is not None and axis_size < 1):
        raise MappedSizeError(
            report(
                "pmap needs at least one replica:",
                faults,
                "Map a non-empty axis. Set axis_size to at least 1, or leave axis_size out.",
            )
        )
    raise MappedSizeError(
        report(
            "pmap got inconsistent sizes for array axes to be mapped:",
            faults,
            "Pass arrays of the same size along the mapped axis, or write None in in_axes to pass an argument whole "
            "to every replica, as in in_axes=(0, None)."
            + (" Correct axis_size, or leave it out." if axis_size is not None else ""),
        )
    )
