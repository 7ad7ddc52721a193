"""What can be told of the values of calls: the tensors in them, their shapes and storages, and who is who."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxpipe._torch import storage_key
from fxpipe.ir.tensor import TensorMeta
from fxpipe.ir.tree import map_tree


def tensors_in(*values: Any) -> list[torch.Tensor]:
    """List the tensors among values, nested ones too, in order.

    >>> tensors_in({"a": [torch.ones(1), 2]}, slice(None, torch.zeros(1)))
    [tensor([1.]), tensor([0.])]
    """
    found: list[torch.Tensor] = []
    for value in values:
        _collect(value, found)
    return found


def _collect(value: Any, found: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, tuple | list | set):
        for item in value:
            _collect(item, found)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found)
    elif isinstance(value, slice):
        _collect((value.start, value.stop, value.step), found)
    elif hasattr(type(value), "__dataclass_fields__") and hasattr(value, "__dict__"):
        _collect(vars(value), found)


def has_tensor(value: Any) -> bool:
    """Tell whether a value is a tensor or holds one."""
    return isinstance(value, torch.Tensor) or bool(tensors_in(value))


def has_attributes(value: Any) -> bool:
    """Whether an object of the user's own keeps its parts in attributes."""
    return hasattr(value, "__dict__") and not isinstance(value, type | nn.Module | types.FunctionType)


class Place:
    """The place of a tensor in a template: a leaf, so no dataclass."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


def without_tensors(value: Any, *, also: type = torch.Tensor) -> tuple[Any, list[Any]]:
    """Take the tensors out of nested containers: a template with a ``Place`` for each, and the tensors in order.

    Args:
        value: A container, or a leaf.
        also: What else is taken out, by its own type.
    """
    tensors: list[Any] = []

    def take(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) and type(leaf) is not also:
            return leaf
        tensors.append(leaf)
        return Place(len(tensors) - 1)

    return map_tree(take, value), tensors


def filled(template: Any, tensors: Any) -> Any:
    """Put tensors into the places of a template."""
    return map_tree(lambda _, leaf: tensors[leaf.index] if isinstance(leaf, Place) else leaf, template)


@dataclass(frozen=True, slots=True, eq=False)
class Same:
    """An object, equal to nothing else; kept, so that no other takes its identity."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def tensor_meta(tensor: torch.Tensor) -> TensorMeta:
    """Give shape, dtype and gradient flag."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorMeta(tuple(tensor.shape), dtype, tensor.requires_grad)


def describe(tensor: torch.Tensor) -> str:
    """Give shape and dtype for a message."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their storage without holes or overlap, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def storage_of(tensor: torch.Tensor) -> int | None:
    """Give the identity of a tensor's storage; None for one without (sparse)."""
    return storage_key(tensor) if tensor.layout == torch.strided else None
