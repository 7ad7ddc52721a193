"""The JSON of a plan, described by a JSON Schema that is made of the values' own types and words."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from fxpipe.ir.plan import FORMAT, PipelinePlan

_PLAIN: dict[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}


def plan_schema() -> dict[str, Any]:
    """Give the JSON Schema (draft 2020-12) of what ``PipelinePlan.to_json`` writes.

    >>> plan_schema()["properties"]["cost"]
    {'type': 'string', 'description': 'Name of the cost model.'}
    """
    definitions: dict[str, Any] = {}
    _reference(PipelinePlan, definitions)
    top = definitions.pop("PipelinePlan")
    top["properties"] = {"format": {"const": FORMAT, "description": "Of the file."}, **top["properties"]}
    top["required"] = ["format", *top["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A plan of fxpipe",
        **top,
        "$defs": definitions,
    }


def field_descriptions(cls: type) -> dict[str, str]:
    """Give what a class's docstring says of each attribute, in one line each.

    >>> field_descriptions(PipelinePlan)["num_ranks"]
    'Ranks of the pipeline dimension.'
    """
    text = inspect.getdoc(cls) or ""
    _, _, listed = text.partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in listed.splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start[1]
            found[name] = start[2]
        elif name and line.startswith("        "):
            found[name] += f" {line.strip()}"
        else:
            break
    return found


def _reference(cls: type, definitions: dict[str, Any]) -> dict[str, str]:
    if cls.__name__ not in definitions:
        definitions[cls.__name__] = {}
        words, hints = field_descriptions(cls), typing.get_type_hints(cls)
        fields = [field for field in dataclasses.fields(cls) if field.init]
        definitions[cls.__name__] = {
            "type": "object",
            "additionalProperties": False,
            "required": [
                field.name
                for field in fields
                if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            ],
            "properties": {
                field.name: {
                    **_type(hints[field.name], definitions),
                    **({"description": words[field.name]} if field.name in words else {}),
                }
                for field in fields
            },
        }
    return {"$ref": f"#/$defs/{cls.__name__}"}


def _type(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_type(each, definitions) for each in inner]}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return dict(_reference(hint, definitions))
    if origin is tuple:
        return {"type": "array", "items": _type(inner[0], definitions)}
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _type(inner[1], definitions)}
    return {"type": _PLAIN[hint]}
