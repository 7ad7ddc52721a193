"""Equal modules called alike do alike: a model of a hundred equal blocks runs one of them while it is captured."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxpipe._torch import FakeTensor
from fxpipe.capture.calls.ambient import Ambient
from fxpipe.capture.calls.values import Same, storage_of
from fxpipe.ir.tree import map_tree, tree_leaves

_OWN_PLACE = frozenset({"layer_idx", "layer_id", "layer_index", "block_idx"})
"""Attributes in which a block keeps its own number, for a cache; they decide nothing about shapes."""
_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)
_KNOWN_ELSEWHERE = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (int, float, bool, str, bytes, complex, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True, slots=True, eq=False)
class Repeat:
    """What a call gave.

    Attributes:
        result: A copy of what it returned, of which each further call gets one: the model may write into its own.
        trace: What it did below Python.
        attention: Forms of the attention calls inside.
    """

    result: Any
    trace: tuple[Any, ...]
    attention: tuple[str, ...]

    def again(self) -> Any:
        """Give the result of an equal call: other tensors, alike in everything that is known of them."""
        return _copied(self.result)


class Repeats:
    """The calls of whole modules that were seen in one forward and left nothing behind but their results."""

    def __init__(self) -> None:
        self._seen: dict[Any, Repeat] = {}
        self._known: dict[Any, Repeat] = {}

    def find(self, key: Any) -> Repeat | None:
        """Give what an equal call gave, if there was one."""
        return self._known.get(key) if key is not None else None

    def key(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Give what is equal for two calls that do the same; None where that cannot be told."""
        try:
            own: dict[int, int] = {}
            parts = tuple(self._spelled_module(part, own) for part in module.modules())
            given = self._spelled((args, dict(kwargs)), own)
            return parts, given, torch.is_grad_enabled(), Ambient.now()
        except _Unknown:
            return None

    def add(self, key: Any, given: Any, result: Any, trace: tuple[Any, ...], attention: tuple[str, ...]) -> None:
        """Remember a call that drew, read, wrote and kept nothing, unless its result shares memory or is unusual.

        Two calls have to do the same before a third is spared: what the first left in some global, the second would
        find.

        Args:
            key: Of the call, from before it.
            given: Every tensor it could reach.
            result: What it returned.
            trace: What it did below Python.
            attention: Forms of the attention calls inside.
        """
        tensors = [leaf for _, leaf in tree_leaves(result) if not isinstance(leaf, int | float | str | None)]
        if not all(isinstance(leaf, torch.Tensor) and _can_be_copied(leaf) for leaf in tensors):
            return
        storages = [storage_of(tensor) for tensor in tensors]
        taken = {storage_of(tensor) for tensor in given}
        if len(set(storages)) == len(storages) and taken.isdisjoint(storages):
            seen = self._seen.get(key)
            if seen is None:
                self._seen[key] = Repeat(_copied(result), trace, attention)
            elif seen.trace == trace:
                self._known[key] = seen

    def _spelled_module(self, module: nn.Module, own: dict[int, int]) -> Any:
        values = vars(module)
        if any(values.get(name) for name in _HOOKS):
            raise _Unknown
        attributes = tuple(
            (name, self._spelled(value, own))
            for name, value in values.items()
            if name not in _KNOWN_ELSEWHERE and name not in _OWN_PLACE
        )
        tensors = tuple(
            (name, None if tensor is None else self._spelled(tensor, own))
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
        )
        return type(module), attributes, tensors, tuple(module._modules)

    def _spelled(self, value: Any, own: dict[int, int]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._spelled_tensor(value, own)
        if value is None or type(value) in _PLAIN:
            return type(value), value
        if type(value) in (tuple, list):
            return type(value), tuple(self._spelled(item, own) for item in value)
        if type(value) in (dict, OrderedDict):
            return type(value), tuple((key, self._spelled(item, own)) for key, item in value.items())
        return Same(value)

    def _spelled_tensor(self, tensor: torch.Tensor, own: dict[int, int]) -> Any:
        seen = own.setdefault(id(tensor), len(own))
        if not isinstance(tensor, FakeTensor):  # the same values only in the same tensor
            return Same(tensor), tensor._version
        if tensor.layout != torch.strided:
            raise _Unknown
        flags = tensor.requires_grad, tensor.is_leaf, type(tensor), tensor.device, tensor.is_inference()
        return seen, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, flags


class _Unknown(Exception):
    """Two calls cannot be told to be equal."""


def _can_be_copied(tensor: torch.Tensor) -> bool:
    if type(tensor) is not FakeTensor or tensor.layout != torch.strided or tensor.storage_offset():
        return False
    unusual = tensor.is_conj() or tensor.is_neg() or tensor.is_inference() or (tensor.requires_grad and tensor.is_leaf)
    return not unusual and _alike(tensor).stride() == tensor.stride()


def _copied(result: Any) -> Any:
    return map_tree(lambda _, leaf: _alike(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)


def _alike(tensor: torch.Tensor) -> torch.Tensor:
    fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return fresh.requires_grad_().clone() if tensor.requires_grad else fresh  # a leaf could not be written into
