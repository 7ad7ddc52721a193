"""Configurations of transformers that want a value, or are too large: mended by what errors say and by trying.

What a model misses is read off the line that failed: an attribute of a configuration that is None, or that it has not.
It gets what the configuration itself has by that name elsewhere, else what most configurations of the library have.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import copy
import functools
import importlib.util
import linecache
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

PASSED_ON = re.compile(r"self\.(\w+)\s*=\s*(?:self\.)?config\.(\w+)")
ROUNDS = 12  # numbers that are made smaller, one after the other


def nested(config: Any) -> Iterator[Any]:
    """Give a configuration and all that are inside it, the outer ones first."""
    waiting, seen = [config], set()
    while waiting:
        each = waiting.pop(0)
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [
                value for value in vars(each).values() if hasattr(value, "to_dict") and hasattr(value, "__dict__")
            ]


def fitting(kind: Any, config: Any) -> list[Any]:
    """Give the configurations that a class may be made of: of the type it asks for, then the outer and the text's."""
    asked = getattr(kind, "config_class", None)
    found = [each for each in nested(config) if asked is not None and isinstance(each, asked)]
    try:
        text = [config.get_text_config()]
    except ValueError:  # there are several
        text = []
    return list({id(each): each for each in [*found, config, *text]}.values())


@functools.cache
def _sources() -> tuple[str, ...]:
    root = importlib.util.find_spec("transformers")
    folder = Path(root.origin).parent if root is not None and root.origin else Path()
    return tuple(path.read_text(encoding="utf-8") for path in sorted(folder.glob("models/*/configuration_*.py")))


@functools.cache
def usual(name: str) -> tuple[Any, ...]:
    """Give the values that the library's configurations have by a name, the commonest first."""
    pattern = re.compile(rf"^\s+{re.escape(name)}: [^=\n]* = (.+)$", re.MULTILINE)
    counts: collections.Counter[str] = collections.Counter()
    for text in _sources():
        counts.update(pattern.findall(text))
    found = []
    for text, _ in counts.most_common():
        try:
            value = ast.literal_eval(text.partition("  #")[0].strip())
        except (ValueError, SyntaxError):
            continue
        if value is not None:
            found.append(list(value) if isinstance(value, tuple) else value)
    return tuple(found)


def lines_of(error: BaseException) -> Iterator[tuple[str, str]]:
    """Give the statements of the library that failed, the innermost first, each with its file."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "transformers" in frame.filename:
            yield statement(frame), frame.filename


def statement(frame: traceback.FrameSummary) -> str:
    """Give all lines of the statement that a frame stands at."""
    first = frame.lineno or 0
    return "".join(linecache.getline(frame.filename, n) for n in range(first, (frame.end_lineno or first) + 1))


def asked_for(error: BaseException) -> list[tuple[str, str]]:
    """Give the attributes that the statements that failed read, innermost first, each with its statement."""
    names = [(name, "") for name in re.findall(r"[`'](\w+)[`']", str(error))]
    for line, file in lines_of(error):
        passed = dict(PASSED_ON.findall(Path(file).read_text(encoding="utf-8")))
        for name in re.findall(r"\.(\w+)", line):
            names += [(name, line)] + ([(passed[name], line)] if name in passed else [])
    return list(dict.fromkeys(names))


class Repairs:
    """Changes of one configuration, each tried once."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.tried: collections.Counter[str] = collections.Counter()

    def mend(self, error: BaseException) -> bool:
        """Set one attribute that the error may be about; False where nothing is left to set."""
        if isinstance(error, AttributeError) and hasattr(error.obj, "to_dict"):
            without = [each for each in nested(self.config) if type(each) is type(error.obj)]
            return self._set(error.name or "", without or [self.config], "")
        for name, line in asked_for(error):
            holders = [each for each in nested(self.config) if _has(each, name)]
            empty = [each for each in holders if getattr(each, name) is None]
            if empty and self._set(name, empty, line):
                return True
            off = [each for each in holders if getattr(each, name) is False]
            if off and isinstance(error, AssertionError) and not self.tried[name]:
                self.tried[name] += 1
                for each in off:
                    setattr(each, name, True)
                return True
        return False

    def _set(self, name: str, holders: list[Any], line: str) -> bool:
        values = list(self._values(name, holders[0], line))
        if self.tried[name] >= len(values):
            return False
        value = values[self.tried[name]]
        self.tried[name] += 1
        for each in holders:
            with contextlib.suppress(Exception):  # one that the configuration takes for no such value
                setattr(each, name, copy.deepcopy(value))
        return True

    def _values(self, name: str, holder: Any, line: str) -> Iterator[Any]:
        layers = getattr(holder, "num_hidden_layers", None)
        kinds = re.findall(rf"{name}\[\w+\] [!=]= \"(\w+)\"", line)
        if kinds and isinstance(layers, int):  # one of two kinds for each layer
            other = "dense" if "mlp" in name else "full_attention"
            yield [other if index % 2 else kinds[0] for index in range(layers)]
        heads, wide = (getattr(holder, each, None) for each in ("num_attention_heads", "hidden_size"))
        if name == "head_dim" and isinstance(heads, int) and isinstance(wide, int):
            yield wide // heads
        if name == "num_key_value_heads" and isinstance(heads, int):
            yield heads
        for each in nested(self.config):
            if each is not holder and _has(each, name) and getattr(each, name) is not None:
                yield getattr(each, name)
        yield from usual(name)


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name) and not callable(getattr(config, name))
    except Exception:  # one that differs from layer to layer
        return False


def size_of(kind: Callable[[Any], nn.Module], config: Any) -> tuple[int, list[tuple[int, ...]]]:
    """Count the parameters of a class, built on meta; and give their shapes, the largest first."""
    with torch.device("meta"):
        model = kind(copy.deepcopy(config))
    shapes = sorted((tuple(p.shape) for p in model.parameters()), key=lambda shape: -torch.Size(shape).numel())
    return sum(torch.Size(shape).numel() for shape in shapes), shapes


def lessened(kind: Callable[[Any], nn.Module], config: Any, most: int) -> Any:
    """Divide numbers that the largest parameters have as a size, one after the other, until there are few enough."""
    size, shapes = size_of(kind, config)
    for _ in range(ROUNDS):
        if size <= most:
            break
        for other in _smaller(config, shapes[:2]):
            try:
                less, others = size_of(kind, other)
            except Exception:  # numbers that no longer fit each other
                continue
            if less < 0.9 * size:
                config, size, shapes = other, less, others
                break
        else:
            break
    return config


def _smaller(config: Any, shapes: list[tuple[int, ...]]) -> Iterator[Any]:
    """Give copies of a configuration in which one number that is a size of a parameter is divided."""
    for dim in dict.fromkeys(dim for shape in shapes for dim in sorted(shape, reverse=True) if dim > 16):
        for by in (8, 2):
            for place, each in enumerate(nested(config)):
                for name, value in vars(each).items():
                    if type(value) is int and value % by == 0 and (value == dim or (dim % value == 0 and value > 64)):
                        other = copy.deepcopy(config)
                        setattr(list(nested(other))[place], name, value // by)
                        yield other
