"""Functions that the user compiled and a module's forward calls: where it is opened, their operations are recorded."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn


def opened_modules(module: nn.Module, closed: Collection[str], fqn: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose forwards are recorded, with their FQNs: those that lie in none that is called whole."""
    if fqn not in closed:
        yield fqn, module
        for name, child in module.named_children():
            yield from opened_modules(child, closed, f"{fqn}.{name}" if fqn else name)


def compiled_functions(module: nn.Module) -> tuple[str, ...]:
    """Name the functions compiled by ``torch.compile`` that a module's own methods call by a name.

    That is: globals, what a method closes over, and attributes of the module.

    >>> import torch
    >>> act = torch.compile(torch.tanh, backend="eager")
    >>> class Act(nn.Module):
    ...     def forward(self, x):
    ...         return act(x)
    >>> compiled_functions(Act()), compiled_functions(nn.Linear(2, 2))
    (('act',), ())
    """
    own = tuple(name for name, value in vars(module).items() if _is_compiled(value))
    return tuple(dict.fromkeys((*_named_by(type(module)), *own)))  # type: ignore[arg-type] # a class is hashable


@functools.lru_cache(maxsize=4096)
def _named_by(kind: type[nn.Module]) -> tuple[str, ...]:
    """Name those that the methods of a class and of its bases name outside of themselves."""
    found: dict[str, None] = {}
    for base in kind.__mro__:
        if issubclass(base, nn.Module):
            for name, method in vars(base).items():
                if _is_compiled(method):
                    found[name] = None
                if isinstance(method, types.FunctionType):
                    found |= dict.fromkeys(name for name, value in _outside(method) if _is_compiled(value))
    return tuple(found)


def _outside(method: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = method.__code__
    yield from ((name, method.__globals__[name]) for name in code.co_names if name in method.__globals__)
    for name, cell in zip(code.co_freevars, method.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a name that is not bound yet
            yield name, cell.cell_contents


def _is_compiled(value: Any) -> bool:
    return isinstance(value, types.FunctionType) and hasattr(value, "get_compiler_config")
