"""Nested containers as users pass and return them: walked, and rebuilt around other leaves.

Lists, tuples, named tuples, mappings (their subclasses too) and dataclasses are containers, also where several are
one, as in Hugging Face's ``ModelOutput``; everything else is a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

Function: TypeAlias = Callable[[str, Any], Any]
Classes: TypeAlias = tuple[type, ...]


def map_tree(function: Function, value: Any, path: str = "", whole: Classes = ()) -> Any:
    """Rebuild nested containers around ``function(path, leaf)``.

    Args:
        function: Called with the path to a leaf, ``"batch['ids'][0]"``, and the leaf.
        value: A container, or a leaf.
        path: Path of ``value``.
        whole: Classes of containers that are leaves here.

    Returns:
        The same structure; ``value`` itself is never changed.

    >>> map_tree(lambda path, leaf: f"{path}={leaf}", {"a": (1, [2])}, "x")
    {'a': ("x['a'][0]=1", ["x['a'][1][0]=2"])}
    >>> map_tree(lambda path, leaf: f"{path}={leaf}", {"a": (1, [2])}, "x", (tuple,))
    {'a': "x['a']=(1, [2])"}
    """
    kind: Any = type(value)  # mypy takes no class for hashable
    rebuild = _rebuild(kind)
    if rebuild is None or (whole and isinstance(value, whole)):
        return function(path, value)
    return rebuild(function, value, path, whole)


@functools.lru_cache(maxsize=4096)
def _rebuild(kind: type) -> Callable[[Function, Any, str, Classes], Any] | None:
    """Give what rebuilds containers of a class; None for leaves. Asked once for a class: a step walks many trees."""
    if dataclasses.is_dataclass(kind):
        return _map_dataclass
    if issubclass(kind, Mapping):
        return _map_mapping
    if not issubclass(kind, tuple | list):
        return None
    if hasattr(kind, "_fields"):
        return _map_named
    return _map_sequence if kind in (tuple, list) else _map_subclass


def tree_leaves(value: Any, path: str = "", whole: Classes = ()) -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested containers with the path to it; arguments as of ``map_tree``.

    >>> list(tree_leaves({"a": (1, [2])}))
    [("['a'][0]", 1), ("['a'][1][0]", 2)]
    """
    found: list[tuple[str, Any]] = []

    def keep(path: str, leaf: Any) -> Any:
        found.append((path, leaf))
        return leaf

    map_tree(keep, value, path, whole)
    yield from found


def _map_sequence(function: Function, value: Any, path: str, whole: Classes) -> Any:
    parts = [map_tree(function, item, f"{path}[{index}]", whole) for index, item in enumerate(value)]
    return parts if type(value) is list else type(value)(parts)


def _map_subclass(function: Function, value: Any, path: str, whole: Classes) -> Any:
    kind: Any = type(value)
    is_number = all(isinstance(item, int) for item in value) and not _holds_anything(kind, max(len(value), 1))
    return function(path, value) if is_number else _map_sequence(function, value, path, whole)


@functools.lru_cache(maxsize=4096)
def _holds_anything(kind: type, length: int) -> bool:
    """Tell a container from a value made of whole numbers, as a size is."""
    try:
        kind([object()] * length)
    except Exception:  # whatever it says: it is no container
        return False
    return True


def _map_named(function: Function, value: Any, path: str, whole: Classes) -> Any:
    parts = [map_tree(function, item, f"{path}[{index}]", whole) for index, item in enumerate(value)]
    return type(value)._make(parts)  # past a constructor that looks at the leaves


def _map_mapping(function: Function, value: Mapping[Any, Any], path: str, whole: Classes) -> Any:
    items = {key: map_tree(function, item, f"{path}[{key!r}]", whole) for key, item in value.items()}
    if type(value) is dict:
        return items
    rebuilt = copy.copy(value)
    if not hasattr(rebuilt, "update"):
        return function(path, value)
    rebuilt.update(items)
    return rebuilt


def _map_dataclass(function: Function, value: Any, path: str, whole: Classes) -> Any:
    rebuilt = copy.copy(value)
    is_mapping = isinstance(value, dict)  # as Hugging Face's ModelOutput: its fields are its items too
    for field in dataclasses.fields(value):
        item = getattr(value, field.name, None)
        part = map_tree(function, item, f"{path}.{field.name}" if path else field.name, whole)
        if part is item:
            continue
        object.__setattr__(rebuilt, field.name, part)
        if is_mapping and field.name in rebuilt:
            dict.__setitem__(rebuilt, field.name, part)
    return rebuilt
