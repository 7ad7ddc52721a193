"""Benchmarks are run by hand, and rarely: that they would run, as far as can be told without measuring anything."""

from __future__ import annotations

import argparse
import ast
import importlib
import pathlib
import types
from collections.abc import Iterator

import pytest

FOLDER = pathlib.Path(__file__).parent / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
OURS = ("fxpipe", "tests")


class Parsed(Exception):
    """Raised by a parser instead of parsing."""


def resolved(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Give every name of ours that a module imports, or asks a module of ours for, wherever it does so."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            for each in node.names:
                yield node.module, each.name
                modules[each.asname or each.name] = f"{node.module}.{each.name}"
        elif isinstance(node, ast.Import):
            for each in node.names:
                if each.name.split(".")[0] in OURS:
                    modules[each.asname or each.name] = each.name
                    yield each.name, ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                parts.append(value.attr)
                value = value.value
            if isinstance(value, ast.Name):
                whole = ".".join([value.id, *reversed(parts)]).rpartition(".")
                if whole[0] in modules:
                    yield modules[whole[0]], whole[2]


def found(module: str, name: str) -> bool:
    """Tell whether a module has a name; of what is no module nothing is asked."""
    try:
        held = importlib.import_module(module)
    except ModuleNotFoundError:
        owner, _, last = module.rpartition(".")
        return not isinstance(getattr(importlib.import_module(owner), last), types.ModuleType)
    if not name or hasattr(held, name):
        return True
    try:
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_finds_what_it_names(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    missing = {f"{module}.{attribute}" for module, attribute in resolved(tree) if not found(module, attribute)}
    assert not missing


@pytest.mark.parametrize("name", [name for name in NAMES if "def main" in (FOLDER / f"{name}.py").read_text("utf-8")])
def test_the_commands_of_a_benchmark_are_spelled_out(name, monkeypatch):
    module = importlib.import_module(f"tests.benchmarks.{name}")
    parsers: list[argparse.ArgumentParser] = []

    def parse(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parsers.append(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        module.main()
    for parser in parsers:
        assert parser.format_help()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif action.choices is not None:
                assert list(action.choices)


def test_a_name_that_is_gone_is_found():
    tree = ast.parse("import fxpipe.errors as e\nfrom fxpipe.ir import gone\ndef f():\n  e.FxpipeError, e.gone\n")
    assert {each for each in resolved(tree) if not found(*each)} == {("fxpipe.ir", "gone"), ("fxpipe.errors", "gone")}
