"""Signatures of calls, and explanations of their differences."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import jax
from jax.tree_util import keystr

from replicax import _jax
from replicax._layout.axes import Leaf, one_replica_type
from replicax._typing import KeyPath, PyTreeDef, ShapeAndDtype


class Rows(Enum):
    """The rows that the mapped arguments of a call hold. The values are for messages."""

    ALL = "with the rows of all replicas"
    OWN = "with the rows of each process"
    GLOBAL = "with arrays over all processes"


@dataclass(frozen=True)
class Signature:
    """Everything that a program is compiled for. A call with a different signature needs another program.

    Attributes:
        rows: Whether these are the rows of one process, or of all.
        size: The number of replicas, of this process if the rows are its own.
        leaves: The array leaves of the arguments.
        in_axes: The mapped axis of each leaf.
        tree: The pytree structure of the arguments.
        own_tree: The structure of one replica's arguments. It differs from ``tree`` if the metadata of a pytree node
            contains the shape of the whole array.
        roots: The name of each argument, by its path in ``tree``.
        static: The values of the static arguments, by name.
        settings: The JAX settings that affect compilation.
        surroundings: The context of the call: eager, inside a transformation, or inside another map.
    """

    rows: Rows
    size: int
    leaves: tuple[Leaf, ...]
    in_axes: tuple[int | None, ...]
    tree: PyTreeDef
    own_tree: PyTreeDef
    roots: Mapping[Hashable, str]
    static: Mapping[str, object]
    settings: Mapping[str, object]
    surroundings: str

    def differences(self, earlier: Signature) -> list[str]:
        """The differences from an earlier call, one line per difference."""
        found = []
        if self.rows != earlier.rows:
            found.append(f"it is called {self.rows.value}, and was called {earlier.rows.value}")
        if self.size != earlier.size:
            found.append(f"there are {self.size} replicas, and were {earlier.size}")
        if self.tree != earlier.tree:
            found += structure_differences(self.tree, earlier.tree, self.roots)
        else:
            found += self._types(earlier)
        found += _values(self.static, earlier.static, str)
        found += _values(self.settings, earlier.settings, lambda name: f"JAX's setting {name}")
        if self.surroundings != earlier.surroundings:
            found.append(f"it is called {self.surroundings}, and was called {earlier.surroundings}")
        return found

    def _types(self, earlier: Signature) -> list[str]:
        """The leaves whose type in one replica differs."""
        pairs = zip(self.leaves, self.in_axes, earlier.leaves, earlier.in_axes, strict=True)
        return [
            f"{leaf.name} is {type_name(leaf.aval)}, and was {type_name(old.aval)}"
            for leaf, axis, old, old_axis in pairs
            if one_replica_type(leaf.aval, axis) != one_replica_type(old.aval, old_axis)
        ]

    def explain(self, name: str, earlier: Sequence[Signature]) -> str:
        """Explains why ``name`` has no compiled program for this call."""
        if not earlier:
            return f"{name} has not been compiled before."
        closest = min((self.differences(one) for one in earlier), key=len)
        so_far = "the call" if len(earlier) == 1 else f"the closest of the {len(earlier)} calls"
        return "\n".join(
            [
                f"{name} needs a new compilation. Differences to {so_far} that it was compiled for:",
                *(f"  * {difference}" for difference in closest or ["it closes over other tracers"]),
            ]
        )


def type_name(aval: ShapeAndDtype) -> str:
    """A type in JAX's notation, such as ``float32[8,3]``, with a note if it is weak."""
    shape = ",".join(map(str, aval.shape))
    return f"{aval.dtype}[{shape}]" + (" (weakly typed)" if getattr(aval, "weak_type", False) else "")


def structure_differences(tree: PyTreeDef, earlier: PyTreeDef, roots: Mapping[Hashable, str]) -> list[str]:
    """The differences between two pytrees of ``(positional arguments, keyword arguments)``, one line each."""
    found = []
    for path, now, was in _jax.structure_faults(tree, earlier):
        if len(path) > 1:
            name = roots.get(path_key(path[:2]), "argument") + keystr(path[2:])
            found.append(f"{name} is {now}, and was {was}")
        else:
            name = "keyword" if path_key(path) == (1,) else "positional"
            found.append(f"the {name} arguments are {now}, and were {was}")
    return found


def path_key(path: KeyPath) -> tuple[Hashable, ...]:
    """A path in a pytree of tuples and dicts, as plain indices and keys."""
    return tuple(entry.idx if isinstance(entry, jax.tree_util.SequenceKey) else entry.key for entry in path)


def _values(now: Mapping[str, object], then: Mapping[str, object], name: Callable[[str], str]) -> list[str]:
    found = []
    for key in sorted({*now, *then}):
        if key not in then:
            found.append(f"{name(key)} is {now[key]!r:.60}, and was not passed")
        elif key not in now:
            found.append(f"{name(key)} is not passed, and was {then[key]!r:.60}")
        elif type(now[key]) is not type(then[key]) or now[key] != then[key]:
            found.append(f"{name(key)} is {now[key]!r:.60}, and was {then[key]!r:.60}")
    return found
