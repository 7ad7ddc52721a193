"""Tensors and modules that functions and objects hold: what belongs to one copy of a model."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxpipe.program import MARKS


def held_by(value: Any, depth: int = 4) -> Any:
    """Find a tensor or a module that a function or an object holds: such an argument belongs to one copy of a model.

    Returns:
        What was found; None for nothing.

    >>> def scaled_by(weight):
    ...     return lambda x: x * weight
    >>> held_by(scaled_by(torch.ones(1))), held_by(len)
    (tensor([1.]), None)
    """
    if isinstance(value, torch.Tensor | nn.Module):
        return value
    if depth == 0 or isinstance(value, type | types.ModuleType | str | int | float):
        return None
    parts: list[Any] = []
    if isinstance(value, types.FunctionType):
        parts = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        parts += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    elif isinstance(value, types.MethodType):
        parts = [value.__self__, value.__func__]
    elif isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, tuple | list | set | frozenset):
        parts = list(value)
    elif hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
        parts = [value.func, *value.args, *value.keywords.values()]
    elif hasattr(value, "__dict__"):
        parts = list(vars(value).values())
    return next((found for part in parts if (found := held_by(part, depth - 1)) is not None), None)


def with_marks(fake: nn.Parameter, own: torch.Tensor) -> nn.Parameter:
    """Let a copy of a parameter know what was set on the user's own, for those of the stages.

    Optimisers are told so which ones decay and how fast they learn: ``weight.no_weight_decay = True``.
    """
    found = {name: value for name, value in vars(own).items() if name not in vars(fake) and held_by(value) is None}
    if found:
        setattr(fake, MARKS, found)
    return fake


_CALL_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("ward_hooks", "ward_pre_hooks")))
"""Where a module keeps what is called around its forward and its backward."""


def has_hooks(module: nn.Module) -> bool:
    """Tell whether anything is called around a module's own forward or backward."""
    return any(vars(module).get(name) for name in _CALL_HOOKS)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a name that is not bound yet
        return False
    return True
