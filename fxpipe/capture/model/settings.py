"""Numbers and words that a function finds outside of its arguments, and which a script may change between steps.

A recording holds what they were. A loss weight that anneals (``args.beta``, a closure, a global) is no input: it is
looked at before each step, and another value is another recording.
"""

from __future__ import annotations

import enum
import functools
import inspect
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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


def settings_of(
    function: Callable[..., Any] | None, inside: Sequence[FunctionType] = ()
) -> tuple[tuple[str, str], ...]:
    """Give what a function reads from closures, globals, defaults and attributes, by path, as far as it is plain.

    Only names that stand in the code are followed, into functions that it calls by them and objects that have them.

    Args:
        function: A function, or a module's forward.
        inside: Others that run in it, of which attributes are not looked at.

    >>> options = {"beta": 0.5}
    >>> settings_of(lambda output: output * options["beta"])
    ((".options['beta']", '0.5'),)
    """
    reader = _Reader()
    if function is not None:
        reader.function(function, "", 0)
    for each in inside:
        reader.most = len(reader.found) + _LARGEST
        reader.plain_function(each, f".{each.__module__}.{each.__qualname__}", 0)
    return tuple(reader.found.items())


def functions_within(model: nn.Module, closed: Collection[str]) -> tuple[FunctionType, ...]:
    """Give what the forwards of a model's modules are made of, each function once, but not those of libraries.

    Args:
        model: Its own forward is not among them.
        closed: FQNs of the modules that are recorded as one call, and run as they are.
    """
    found: dict[FunctionType, None] = {}
    for part in _outside(model, "", closed):
        kind = type(part)
        todo = [vars(part).get("forward", kind.forward)]
        while todo:
            function = todo.pop()
            function = getattr(function, "__func__", function)
            if not isinstance(function, FunctionType) or function in found or _of_library(function.__module__):
                continue
            found[function] = None
            names = _names(function.__code__)
            todo += [_function(inspect.getattr_static(kind, name)) for name in _members(kind, names)]
    return tuple(found)


def _outside(module: nn.Module, fqn: str, closed: Collection[str]) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        inner = f"{fqn}.{name}" if fqn else name
        if inner not in closed:
            yield child
            yield from _outside(child, inner, closed)


_KNOWN: weakref.WeakKeyDictionary[type, dict[frozenset[str], tuple[str, ...]]] = weakref.WeakKeyDictionary()


def _members(kind: type, names: frozenset[str]) -> tuple[str, ...]:
    """Give those of some names that are functions, properties or plain values of a class; looked for once."""
    known = _KNOWN.setdefault(kind, {})
    if names not in known:
        static = {name: inspect.getattr_static(kind, name, None) for name in sorted(names)}
        kept = (name for name, each in static.items() if each is not None)
        known[names] = tuple(name for name in kept if isinstance(_function(static[name]), (FunctionType, *_PLAIN)))
    return known[names]


def _function(member: Any) -> Any:
    return member.fget if isinstance(member, property) else member


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    inside = (_names(each) for each in code.co_consts if isinstance(each, CodeType))
    return frozenset((*code.co_names, *code.co_freevars)).union(*inside)


class _Reader:
    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self.most = _LARGEST
        self._seen: set[tuple[int, Collection[str]]] = set()

    def function(self, function: Any, path: str, depth: int) -> None:
        """Follow what is called."""
        if isinstance(function, functools.partial):
            self.value((function.args, function.keywords), path, frozenset(), depth + 1)
            self.function(function.func, path, depth + 1)
        elif isinstance(function, MethodType):
            self._method(function.__func__, function.__self__, path, depth)
        elif isinstance(function, FunctionType):
            self.plain_function(function, path, depth)
        elif callable(function) and not isinstance(function, type):
            kind = type(function)
            self._method(kind.forward if isinstance(function, nn.Module) else kind.__call__, function, path, depth)

    def _method(self, function: Any, owner: Any, path: str, depth: int) -> None:
        if isinstance(function, FunctionType):
            self.value(owner, path, _names(function.__code__), depth + 1)
            self.plain_function(function, path, depth)

    def plain_function(self, function: FunctionType, path: str, depth: int) -> None:
        """Follow a function, whosever it is."""
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
            if len(self.found) < self.most:
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
        for name in _members(kind, names):
            if name in held:
                continue
            found = _function(inspect.getattr_static(kind, name, None))
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
