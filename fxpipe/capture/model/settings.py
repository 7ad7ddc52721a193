"""Numbers and words that a function finds outside of its arguments, and which a script may change between steps.

A recording holds what they were. A loss weight that anneals (``args.beta``, a closure, a global) is no input: it is
looked at before each step, and another value is another recording.
"""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

_DEEPEST = 12
"""How far a value is followed, from one function or object to the next."""
_LARGEST = 100
"""Most values that are noted, and most parts of one container that are looked at."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, enum.Enum)
_LIBRARIES = ("torch", "numpy", "transformers", "builtins")
"""Not looked into, for the sake of time: what they keep for themselves is no setting of a script."""


def settings_of(function: Callable[..., Any] | None) -> tuple[tuple[str, str], ...]:
    """Give what a function reads from closures, globals, defaults and attributes, by path, as far as it is plain.

    Only names that stand in the code are followed, into functions that it calls by them and objects that have them.

    >>> options = {"beta": 0.5}
    >>> settings_of(lambda output: output * options["beta"])
    ((".options['beta']", '0.5'),)
    """
    reader = _Reader()
    if function is not None:
        reader.function(function, "", 0)
    return tuple(reader.found.items())


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    inside = (_names(each) for each in code.co_consts if isinstance(each, CodeType))
    return frozenset((*code.co_names, *code.co_freevars)).union(*inside)


class _Reader:
    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._seen: set[tuple[int, Collection[str]]] = set()

    def function(self, function: Any, path: str, depth: int) -> None:
        """Follow what is called."""
        if isinstance(function, functools.partial):
            self.value((function.args, function.keywords), path, frozenset(), depth + 1)
            self.function(function.func, path, depth + 1)
        elif isinstance(function, MethodType):
            self._method(function.__func__, function.__self__, path, depth)
        elif isinstance(function, FunctionType):
            self._plain_function(function, path, depth)
        elif callable(function) and not isinstance(function, type):
            kind = type(function)
            self._method(kind.forward if isinstance(function, nn.Module) else kind.__call__, function, path, depth)

    def _method(self, function: Any, owner: Any, path: str, depth: int) -> None:
        if isinstance(function, FunctionType):
            self.value(owner, path, _names(function.__code__), depth + 1)
            self._plain_function(function, path, depth)

    def _plain_function(self, function: FunctionType, path: str, depth: int) -> None:
        names = _names(function.__code__)
        if depth > _DEEPEST or self._is_known(function, names) or _of_library(function.__module__):
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.value(cell.cell_contents, f"{path}.{name}", names, depth + 1)
            except ValueError:  # not bound yet
                continue
        self.value(function.__defaults__ or (), f"{path}.defaults", names, depth + 1)
        self.value(function.__kwdefaults__ or {}, f"{path}.defaults", names, depth + 1)
        for name in sorted(names & function.__globals__.keys()):
            self.value(function.__globals__[name], f"{path}.{name}", names, depth + 1)

    def value(self, value: Any, path: str, names: frozenset[str], depth: int) -> None:
        """Note a value, or what of it is asked for by one of some names."""
        if isinstance(value, _PLAIN):
            if len(self.found) < _LARGEST:
                self.found[path] = repr(value)
        elif depth > _DEEPEST or isinstance(value, torch.Tensor):
            return
        elif isinstance(value, list | tuple):
            for place, part in enumerate(value[:_LARGEST]):
                self.value(part, f"{path}[{place}]", names, depth + 1)
        elif isinstance(value, Mapping):
            for key, part in list(value.items())[:_LARGEST]:
                self.value(part, f"{path}[{key!r}]", names, depth + 1)
        elif isinstance(value, FunctionType | MethodType | functools.partial):
            self.function(value, path, depth + 1)
        elif not self._is_known(value, names):
            self._attributes(value, path, names, depth)

    def _attributes(self, owner: Any, path: str, names: frozenset[str], depth: int) -> None:
        if isinstance(owner, ModuleType) and _of_library(owner.__name__):
            return
        held = getattr(owner, "__dict__", {})
        held = held if isinstance(held, Mapping) else {}
        for name in sorted(names & held.keys()):
            self.value(held[name], f"{path}.{name}", names, depth + 1)
        kind = owner if isinstance(owner, type) else type(owner)
        if isinstance(owner, ModuleType) or _of_library(kind.__module__):
            return
        for name in sorted(names - held.keys()):
            found = inspect.getattr_static(kind, name, None)
            found = found.fget if isinstance(found, property) else found
            if isinstance(found, FunctionType):
                self._method(found, owner, f"{path}.{name}", depth + 1)
            elif isinstance(found, _PLAIN) and found is not None:
                self.value(found, f"{path}.{name}", names, depth + 1)

    def _is_known(self, value: Any, names: frozenset[str]) -> bool:
        key = id(value), names
        known = key in self._seen
        self._seen.add(key)
        return known


def _of_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES
