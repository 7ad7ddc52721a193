"""Values from JSON that anybody may have written: every field checked by its type, every fault named by its path."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar, cast

from fxpipe.errors import PlanError
from fxpipe.ir.tensor import dtype_name

T = TypeVar("T")
MOST_CHARACTERS = 256 * 2**20
"""Longest text that is read: a plan of a hundred thousand layers has a tenth of that."""
MOST = 2**63 - 1
"""Largest whole number in a file."""


def read_json(text: str, what: str, way_out: str) -> dict[str, Any]:
    """Parse JSON whose top is an object.

    Args:
        text: The text.
        what: What it should be, for messages: ``"a plan"``.
        way_out: How such a file is made.

    Raises:
        PlanError: It is too long, no JSON, nested too deeply, names a field twice, or its top is no object.

    >>> read_json('{"format": 3}', "a plan", "write it anew")
    {'format': 3}
    """
    if not isinstance(text, str):
        raise PlanError(f"{what} is read from text, not from a {type(text).__name__}\n  {way_out}")
    if len(text) > MOST_CHARACTERS:
        raise PlanError(f"this is not {what}: {len(text):,} characters are more than one has\n  {way_out}")
    try:
        data = json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise PlanError(f"this is not {what}: nested too deeply\n  {way_out}") from error
    except ValueError as error:  # no JSON, a number of too many digits, a field twice
        raise PlanError(f"this is not {what}: not JSON ({_first_line(error)})\n  {way_out}") from error
    if not isinstance(data, dict):
        raise PlanError(f"this is not {what}: its top is {_shown(data)}, not an object\n  {way_out}")
    return data


def read_value(kind: Any, data: Any, path: str) -> Any:
    """Turn parsed JSON into a value of a type, dataclasses and tuples of them included.

    Args:
        kind: The type: a dataclass, a tuple, a number, a string, a mapping, or one of several.
        data: What was parsed.
        path: Where it stands, for messages: ``"stages[3].bytes"``.

    Raises:
        PlanError: Names the path, what stands there and what was expected.

    >>> read_value(tuple[int, ...], [1, 2], "cuts")
    (1, 2)
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _read_union(inner, data, path)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return read_fields(kind, data, path)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise _wrong(path, data, "a list")
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(read_value(inner[0], item, f"{path}[{place}]") for place, item in enumerate(data))
        if len(data) != len(inner):
            raise _wrong(path, data, f"a list of {len(inner)}")
        pairs = enumerate(zip(inner, data, strict=True))
        return tuple(read_value(each, item, f"{path}[{place}]") for place, (each, item) in pairs)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise _wrong(path, data, "an object")
        return {key: read_value(inner[1], item, f"{path}.{key}") for key, item in data.items()}
    return _read_plain(kind, data, path)


def read_fields(cls: type[T], data: Any, path: str) -> T:
    """Make a dataclass of an object's fields; those with a default may be missing.

    Raises:
        PlanError: A field is unknown, missing or wrong, or the class refuses the values.
    """
    if not isinstance(data, dict):
        raise _wrong(path, data, f"an object with the fields of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = [name for name in data if name not in fields]
    if unknown:
        raise PlanError(
            f"{_at(path)}{unknown[0]} is no field of {cls.__name__}\n  known: {', '.join(fields)}; "
            "or make the file anew with this version of fxpipe"
        )
    hints = _hints(cast(Hashable, cls))
    missing = [
        name
        for name, field in fields.items()
        if name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise PlanError(f"{_at(path)}{missing[0]} is missing\n  make the file anew with this version of fxpipe")
    values = {name: read_value(hints[name], item, f"{_at(path)}{name}") for name, item in data.items()}
    try:
        return cls(**values)
    except PlanError as error:
        raise PlanError(f"{path}: {error}" if path else str(error)) from error
    except (TypeError, ValueError, KeyError) as error:
        raise PlanError(f"{path or cls.__name__}: {_first_line(error)}\n  make the file anew with fxpipe") from error


def check_dtype(name: str, path: str) -> None:
    """Raise unless a dtype has that name.

    Raises:
        PlanError: Names the path.
    """
    try:
        dtype_name(name)
    except ValueError as error:
        raise PlanError(f"{path}: {error}") from error


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _read_union(kinds: tuple[Any, ...], data: Any, path: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    error: PlanError | None = None
    for kind in others:
        try:
            return read_value(kind, data, path)
        except PlanError as found:
            error = found
    assert error is not None
    raise error


def _read_plain(kind: Any, data: Any, path: str) -> Any:
    if kind is bool:
        if not isinstance(data, bool):
            raise _wrong(path, data, "true or false")
    elif kind is int:
        if isinstance(data, bool) or not isinstance(data, int) or abs(data) > MOST:
            raise _wrong(path, data, "a whole number")
    elif kind is float:
        if isinstance(data, int) and not isinstance(data, bool) and abs(data) <= MOST:
            return float(data)
        if not isinstance(data, float) or math.isnan(data):
            raise _wrong(path, data, "a number")
    elif kind is str:
        if not isinstance(data, str):
            raise _wrong(path, data, "a text")
    else:
        raise _wrong(path, data, f"a value of {kind}")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"the field {_shown(twice)} stands twice in one object")
    return found


def _wrong(path: str, data: Any, expected: str) -> PlanError:
    return PlanError(f"{path} is {_shown(data)}, not {expected}\n  mend the file, or make it anew with fxpipe")


def _shown(data: Any) -> str:
    if isinstance(data, dict | list):
        return "an object" if isinstance(data, dict) else f"a list of {len(data)}"
    if isinstance(data, int) and abs(data) > MOST:
        return "a number of too many digits"
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _at(path: str) -> str:
    return f"{path}." if path else ""


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
