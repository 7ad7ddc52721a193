"""Python values as JSON and back, exactly; anything that would need a pickle is refused by its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fxpipe.errors import WeightsError

_TUPLE = "__tuple__"
_PAIRS = "__pairs__"
_TENSOR = "__tensor__"
Keep = Callable[[Any, str], str | None]
"""Keeps a value elsewhere and gives the name it has there; None where it is of another kind."""


def encode(value: Any, place: str, *, strict: bool = False, keep: Keep = lambda value, place: None) -> Any:
    """Give a value as JSON can hold it.

    Args:
        value: Numbers, strings, booleans, None; lists and dictionaries of them.
        place: What it is, for the message.
        strict: Whether tuples, and dictionaries whose keys are no strings, are refused too.
        keep: Takes values that are kept elsewhere: tensors.

    Raises:
        WeightsError: There is something else in it; names its place.

    >>> encode({"betas": (0.9, 0.95)}, "group")
    {'betas': {'__tuple__': [0.9, 0.95]}}
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [encode(item, f"{place}[{index}]", strict=strict, keep=keep) for index, item in enumerate(value)]
    if type(value) is tuple and not strict:
        return {_TUPLE: [encode(item, f"{place}[{index}]", keep=keep) for index, item in enumerate(value)]}
    if isinstance(value, dict) and not (strict and type(value) is not dict):
        keys = list(value)
        if all(type(key) is str for key in keys) and not {_TUPLE, _PAIRS, _TENSOR} & set(keys):
            return {key: encode(item, f"{place}[{key!r}]", strict=strict, keep=keep) for key, item in value.items()}
        if not strict:
            pairs = [[encode(key, place), encode(item, f"{place}[{key!r}]", keep=keep)] for key, item in value.items()]
            return {_PAIRS: pairs}
    name = keep(value, place)
    if name is not None:
        return {_TENSOR: name}
    raise WeightsError(
        f"{place} is a {type(value).__module__}.{type(value).__qualname__}, which JSON cannot hold\n"
        "  checkpoints hold tensors and JSON values (no pickles): give numbers, strings, lists, dictionaries with "
        "string keys"
    )


def decode(value: Any, kept: Mapping[str, Any] | None = None) -> Any:
    """Give back what ``encode`` got.

    Args:
        value: What it gave.
        kept: The values that were kept elsewhere, by name.

    >>> decode(encode({1: (2, None)}, "value"))
    {1: (2, None)}
    """
    if isinstance(value, list):
        return [decode(item, kept) for item in value]
    if isinstance(value, Mapping):
        if set(value) == {_TUPLE}:
            return tuple(decode(item, kept) for item in value[_TUPLE])
        if set(value) == {_PAIRS}:
            return {decode(key): decode(item, kept) for key, item in value[_PAIRS]}
        if set(value) == {_TENSOR}:
            return (kept or {})[value[_TENSOR]]
        return {key: decode(item, kept) for key, item in value.items()}
    return value
