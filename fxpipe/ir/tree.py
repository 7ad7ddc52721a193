"""Nested containers as users pass and return them: walked, and rebuilt around other leaves.

Lists, tuples, named tuples, mappings (their subclasses too) and dataclasses are containers, also where several are
one, as in Hugging Face's ``ModelOutput``; everything else is a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def map_tree(function: Callable[[str, Any], Any], value: Any, path: str = "") -> Any:
    """Rebuild nested containers around ``function(path, leaf)``.

    Args:
        function: Called with the path to a leaf, ``"batch['ids'][0]"``, and the leaf.
        value: A container, or a leaf.
        path: Path of ``value``.

    Returns:
        The same structure; ``value`` itself is never changed.

    >>> map_tree(lambda path, leaf: f"{path}={leaf}", {"a": (1, [2])}, "x")
    {'a': ("x['a'][0]=1", ["x['a'][1][0]=2"])}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _map_dataclass(function, value, path)
    if isinstance(value, Mapping):
        return _map_mapping(function, value, path)
    if isinstance(value, tuple | list) and type(value).__name__ != "Size":
        parts = [map_tree(function, item, f"{path}[{index}]") for index, item in enumerate(value)]
        if hasattr(value, "_fields"):
            named: Any = type(value)
            return named._make(parts)  # past a constructor that looks at the leaves
        return parts if type(value) is list else type(value)(parts)
    return function(path, value)


def tree_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested containers with the path to it.

    >>> list(tree_leaves({"a": (1, [2])}))
    [("['a'][0]", 1), ("['a'][1][0]", 2)]
    """
    found: list[tuple[str, Any]] = []

    def keep(path: str, leaf: Any) -> Any:
        found.append((path, leaf))
        return leaf

    map_tree(keep, value, path)
    yield from found


def _map_mapping(function: Callable[[str, Any], Any], value: Mapping[Any, Any], path: str) -> Any:
    items = {key: map_tree(function, item, f"{path}[{key!r}]") for key, item in value.items()}
    if type(value) is dict:
        return items
    rebuilt = copy.copy(value)
    if not hasattr(rebuilt, "update"):
        return function(path, value)
    rebuilt.update(items)
    return rebuilt


def _map_dataclass(function: Callable[[str, Any], Any], value: Any, path: str) -> Any:
    rebuilt = copy.copy(value)
    is_mapping = isinstance(value, dict)  # as Hugging Face's ModelOutput: its fields are its items too
    for field in dataclasses.fields(value):
        item = getattr(value, field.name, None)
        part = map_tree(function, item, f"{path}.{field.name}" if path else field.name)
        if part is item:
            continue
        object.__setattr__(rebuilt, field.name, part)
        if is_mapping and field.name in rebuilt:
            dict.__setitem__(rebuilt, field.name, part)
    return rebuilt
