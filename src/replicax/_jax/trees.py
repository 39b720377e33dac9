"""The structure of pytrees."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from jax._src import tree_util
from jax.tree_util import PyTreeDef

from replicax._typing import PyTree


def one_level(tree: PyTree) -> tuple[list[PyTree], Any] | None:
    """Returns the children of a tree's root and its auxiliary data (such as the keys of a dict); None for a leaf."""
    found = tree_util.default_registry.flatten_one_level(tree)
    return found and (list(found[0]), found[1])


def structure_faults(one: PyTreeDef, other: PyTreeDef) -> Iterator[tuple[tuple[Any, ...], str, str]]:
    """Yields the differences between two tree structures: the path, and a description of each node."""
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
