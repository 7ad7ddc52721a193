"""What can be told of the values of calls: the tensors in them, shapes and storages, where gradients go, who is who."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

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


Edges = Sequence[GradientEdge | None]
"""Where the gradient of each of some tensors goes; None for one that takes none."""
Reach = tuple[frozenset[int], ...] | None
"""Of each tensor in a call's result, the places of the given tensors to which its gradient goes; None: not known."""


def edges_of(tensors: Sequence[torch.Tensor]) -> Edges:
    """Give where the gradients of tensors go, as they are now: a write may change that."""
    enabled = torch.is_grad_enabled()  # without, a weight has no edge
    return [get_gradient_edge(tensor) if enabled and tensor.requires_grad else None for tensor in tensors]


def reach_of(results: Sequence[torch.Tensor], given: Edges, dead: Callable[[Node], Collection[int]]) -> Reach:
    """Follow the gradients of what a call gave back to what it was given.

    Args:
        results: The tensors that it gave.
        given: Where the gradients of those go that it was given, from before the call.
        dead: Tells of a node of the autograd graph to which of its inputs it gives no gradient all the same.

    >>> x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    >>> reach_of([x * y.detach(), x + y], edges_of([x, y]), lambda node: ())
    (frozenset({0}), frozenset({0, 1}))
    """
    places: dict[tuple[Node, int], list[int]] = {}
    for place, edge in enumerate(given):
        if edge is not None:
            places.setdefault((edge.node, edge.output_nr), []).append(place)
    return tuple(_reached_from(edge, places, dead) for edge in edges_of(results))


def _reached_from(
    start: GradientEdge | None, places: Mapping[tuple[Node, int], list[int]], dead: Callable[[Node], Collection[int]]
) -> frozenset[int]:
    found: set[int] = set()
    seen: set[Node] = set()
    todo = [(start.node, start.output_nr)] if start is not None else []
    while todo:
        node, output = todo.pop()
        if (node, output) in places:  # what lies beyond was there before the call
            found.update(places[node, output])
        elif node not in seen:
            seen.add(node)
            ends = dead(node)
            todo += [(to, nr) for at, (to, nr) in enumerate(node.next_functions) if to is not None and at not in ends]
    return frozenset(found)
