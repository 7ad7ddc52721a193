"""The pages that are made of the code's own words: ``python -m tests.pages`` writes them anew."""

import dataclasses
import inspect
import pathlib
import re
import sys

import fxpipe
from fxpipe.ir.files.schema import plan_schema

DOCS = pathlib.Path(__file__).parents[1] / "docs"
SECTIONS = ("Args", "Returns", "Raises", "Attributes", "Yields")

JSON_PAGE = """# The JSON of a plan

`fxpipe plan --json plan.json`, `pipe.report("json")` and `plan.to_json()` write the same text with sorted keys;
`PipelinePlan.from_json` reads it back, and equal plans have equal text. `fxpipe show --schema` prints this page as a
JSON Schema. With `baselines=True` or `weights=True` the plan is the entry `"plan"`, the rest stands beside it.
Infinite bandwidths are written as `Infinity`, as Python's `json` does. Written by `python -m tests.pages`.
"""


def plan_json() -> str:
    """The fields of a plan's JSON, value by value."""
    schema = plan_schema()
    lines = [JSON_PAGE]
    for name, part in {"PipelinePlan": schema, **schema["$defs"]}.items():
        lines += [f"## {name}", "", "| field | type | |", "|---|---|---|"]
        for field, value in part["properties"].items():
            optional = "" if field in part["required"] else ", may be left out"
            lines.append(f"| `{field}` | {kind(value)}{optional} | {plain(value['description'])} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def kind(value: dict) -> str:
    """A type in words."""
    if "$ref" in value:
        return value["$ref"].rpartition("/")[2]
    if "anyOf" in value:
        return " or ".join(kind(each) for each in value["anyOf"])
    if "const" in value:
        return str(value["const"])
    if value["type"] == "array":
        return f"list of {kind(value['items'])}"
    return "mapping" if value["type"] == "object" else value["type"]


def plain(text: str) -> str:
    """Markdown of a docstring's words."""
    return text.replace("``", "`").replace("|", "\\|")


def reference() -> str:
    """Every public name with its docstring."""
    lines = [
        "# API reference",
        "",
        "All names are importable from `fxpipe`. Made of the docstrings by `python -m tests.pages`.",
        "",
    ]
    things = {name: getattr(fxpipe, name) for name in fxpipe.__all__}
    errors = {name for name, thing in things.items() if isinstance(thing, type) and issubclass(thing, Exception)}
    for name in sorted(set(things) - errors, key=lambda name: (not name.islower(), name)):
        lines += entry(name, things[name], "## ")
    lines += ["## Errors", "", "| Error | Also a | |", "|---|---|---|"]
    for name in sorted(errors):
        bases = [base.__name__ for base in things[name].__mro__[1:] if base not in (Exception, BaseException, object)]
        lines.append(f"| `{name}` | {', '.join(f'`{base}`' for base in bases)} | {plain(first_line(things[name]))} |")
    return "\n".join(lines).rstrip() + "\n"


def first_line(thing: object) -> str:
    """The first line of a docstring."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def entry(name: str, thing: object, heading: str) -> list[str]:
    """A heading, the signature, the words, and the public members of a class."""
    lines = [f"{heading}{name}", ""]
    if callable(thing) and not dataclasses.is_dataclass(thing):
        lines += ["```text", signature(name.rpartition(".")[2], thing), "```", ""]
    lines += words(inspect.getdoc(thing) or "")
    if isinstance(thing, type):
        for member, value in vars(thing).items():
            public = not member.startswith("_") and getattr(value, "__doc__", None)
            value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if public and (inspect.isfunction(value) or isinstance(value, property)):
                lines += entry(f"{name}.{member}", value, "### ")
    return lines


def signature(name: str, thing: object) -> str:
    """A call with its arguments, without types."""
    found = inspect.signature(thing)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r"<.*? at 0x\w+>", "…", f"{name}{text}")


def words(text: str) -> list[str]:
    """A docstring as Markdown: sections as lists, examples as code."""
    lines: list[str] = []
    in_code = section = False
    for line in text.splitlines():
        if in_code and not line.strip():
            lines.append("```")
            in_code = False
        if line.lstrip().startswith(">>>") and not in_code:
            lines += ["", "```python"]
            in_code, section = True, False
        if in_code:
            lines.append(line)
        elif line.rstrip(":") in SECTIONS and line.endswith(":"):
            lines += ["", f"**{line[:-1]}**", ""]
            section = True
        elif section and re.match(r"    \S", line):
            named = re.match(r"    ([\w*.]+): (.*)", line)
            lines.append(plain(f"- `{named[1]}`: {named[2]}" if named else f"- {line.strip()}"))
        elif section and line.strip():
            lines.append("  " + plain(line.strip()))
        else:
            section = section and bool(line.strip())
            lines.append(plain(line))
    return [*lines, *(["```"] if in_code else []), ""]


PAGES = {"plan-json.md": plan_json, "reference.md": reference}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (DOCS / page).write_text(make())
        print(f"wrote {page}", file=sys.stderr)
