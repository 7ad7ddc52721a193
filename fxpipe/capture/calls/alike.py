"""When two calls of modules do the same: equal structure, equal arguments, and equal in whatever the first one read.

Attributes that hold numbers or texts are not compared by themselves: a block may keep its own number and never look at
it. What a call reads is observed, and the next call is alike if it would read the same there.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from fxpipe._torch import FakeTensor, replaced
from fxpipe.capture.calls.ambient import Ambient
from fxpipe.capture.calls.values import Same

_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)
_KNOWN_ELSEWHERE = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = frozenset(
    {int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, torch.memory_format}
)
_TORCH = nn.Module.__module__


class _Unknown(Exception):
    """Two calls cannot be told to be equal."""


def structure_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Give what is equal for two calls that do the same, attributes of numbers and texts aside.

    Args:
        module: What is called.
        args: Arguments of the call.
        kwargs: Its keyword arguments.

    Returns:
        A hashable value; None where it cannot be told.
    """
    try:
        own: dict[int, int] = {}
        parts = tuple(_spelled_module(part, own) for part in module.modules())
        given = _spelled((args, dict(kwargs)), own)
        return parts, given, torch.is_grad_enabled(), Ambient.now()
    except _Unknown:
        return None


class Reads:
    """The attributes of numbers and texts that a call of a module read, in it and in the modules inside.

    Attributes:
        is_all: Whether it may have read any of them.
    """

    def __init__(self) -> None:
        self.is_all = False
        self._values: dict[tuple[int, str], Any] = {}

    def note(self, place: int, name: str, value: Any) -> None:
        """Note a read; the first one counts: what the call has set itself it may read."""
        self._values.setdefault((place, name), value)

    def hold_in(self, module: nn.Module) -> bool:
        """Tell whether a module of the same structure has the same values wherever they were read."""
        if self.is_all:
            return False
        parts = list(module.modules())
        for (place, name), value in self._values.items():
            other = vars(parts[place]).get(name, _MISSING)
            if type(other) is not type(value) or other != value:
                return False
        return True


_MISSING = object()


@contextmanager
def watched_reads(module: nn.Module) -> Iterator[Reads]:
    """Observe which attributes a call of a module reads."""
    reads = Reads()
    places = {id(part): place for place, part in enumerate(module.modules())}
    with ExitStack() as stack:
        for kind in dict.fromkeys(type(part) for part in module.modules()):
            stack.enter_context(replaced(kind, "__getattribute__", _observed(kind, places, reads)))
        yield reads


def _observed(kind: type, places: Mapping[int, int], reads: Reads) -> Any:
    original: Any = kind.__getattribute__

    def __getattribute__(self: Any, name: str) -> Any:
        value = original(self, name)
        if type(value) in _PLAIN:
            place = places.get(id(self))
            if place is not None and name in object.__getattribute__(self, "__dict__"):
                reads.note(place, name, value)
        elif name == "__dict__" and id(self) in places and sys._getframe(1).f_globals.get("__name__") != _TORCH:
            reads.is_all = True
        return value

    return __getattribute__


def _spelled_module(module: nn.Module, own: dict[int, int]) -> Any:
    values = vars(module)
    if any(values.get(name) for name in _HOOKS):
        raise _Unknown
    attributes = tuple(
        (name, None if type(value) in _PLAIN and name != "training" else _spelled(value, own))
        for name, value in values.items()
        if name not in _KNOWN_ELSEWHERE
    )
    tensors = tuple(
        (name, None if tensor is None else _spelled(tensor, own))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    return type(module), attributes, tensors, tuple(module._modules)


def _spelled(value: Any, own: dict[int, int]) -> Any:
    if isinstance(value, torch.Tensor):
        return _spelled_tensor(value, own)
    if type(value) in _PLAIN:
        return type(value), value
    if type(value) in (tuple, list):
        return type(value), tuple(_spelled(item, own) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value), tuple((key, _spelled(item, own)) for key, item in value.items())
    return Same(value)


def _spelled_tensor(tensor: torch.Tensor, own: dict[int, int]) -> Any:
    seen = own.setdefault(id(tensor), len(own))
    if not isinstance(tensor, FakeTensor):  # the same values only in the same tensor
        return Same(tensor), tensor._version
    if tensor.layout != torch.strided:
        raise _Unknown
    flags = tensor.requires_grad, tensor.is_leaf, type(tensor), tensor.device, tensor.is_inference()
    return seen, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, flags
