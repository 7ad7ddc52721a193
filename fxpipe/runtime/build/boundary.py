"""What crosses from one stage to the next: how tensors become messages, and messages tensors again.

A message is a flat tensor of bytes, so every dtype crosses as it is. Small tensors share one message, since a message
costs about as much as 100 KiB; large ones are sent and received in place, without a copy.

A gradient that is None crosses as a tensor with every bit set: a NaN that no arithmetic gives, whatever the dtype. It
costs no message, and a look at one element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from fxpipe._torch import UNVIEWED
from fxpipe.program import BoundaryTensor

PACKED_BYTES = 256 * 1024
"""Tensors are packed into one message while they take no more than this together."""
MOST_LAYOUTS = 256
"""How many are remembered: a run whose every step has other lengths needs none of them again."""

_ALIGNMENT = 16  # bytes; the widest dtype, complex128, needs as much
_ALL_BITS = 255


@dataclass(frozen=True, slots=True)
class MessageLayout:
    """How the tensors of a boundary lie in messages.

    Attributes:
        tensors: The tensors, in the order of the boundary.
        offsets: Byte at which each lies in the packed message; None for one that is a message of its own.
        packed_bytes: Size of the packed message; 0 where there is none.
        memory: Shape, strides and dtype of each.
    """

    tensors: tuple[BoundaryTensor, ...]
    offsets: tuple[int | None, ...]
    packed_bytes: int
    memory: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        memory = tuple(
            (each.meta.shape, each.strides or _contiguous(each.meta.shape), getattr(torch, each.meta.dtype))
            for each in self.tensors
        )
        object.__setattr__(self, "memory", memory)

    @property
    def num_messages(self) -> int:
        """Messages per microbatch."""
        alone = sum(
            offset is None and tensor.meta.nbytes > 0 for offset, tensor in zip(self.offsets, self.tensors, strict=True)
        )
        return alone + (self.packed_bytes > 0)


@lru_cache(maxsize=MOST_LAYOUTS)
def message_layout(tensors: tuple[BoundaryTensor, ...]) -> MessageLayout:
    """Decide which tensors share a message: the smallest ones, up to ``PACKED_BYTES`` together.

    >>> from fxpipe.ir.tensor import TensorMeta
    >>> small, large = TensorMeta((3,), "float32"), TensorMeta((1024, 1024), "float32")
    >>> layout = message_layout(tuple(BoundaryTensor(n, m) for n, m in (("a", small), ("b", large), ("c", small))))
    >>> layout.offsets, layout.packed_bytes
    ((0, None, 16), 28)
    """
    chosen: set[int] = set()
    total = 0
    for index in sorted(range(len(tensors)), key=lambda index: tensors[index].meta.nbytes):
        total = _aligned(total) + tensors[index].meta.nbytes
        if total > PACKED_BYTES:
            break
        chosen.add(index)
    if sum(tensors[index].meta.nbytes > 0 for index in chosen) < 2:
        return MessageLayout(tensors, (None,) * len(tensors), 0)
    offsets: list[int | None] = []
    end = 0
    for index, tensor in enumerate(tensors):
        if index not in chosen:
            offsets.append(None)
            continue
        offsets.append(_aligned(end))
        end = _aligned(end) + tensor.meta.nbytes
    return MessageLayout(tensors, tuple(offsets), end)


@lru_cache(maxsize=MOST_LAYOUTS)
def gradient_layout(tensors: tuple[BoundaryTensor, ...]) -> MessageLayout:
    """Lay out the gradients that come back: those of the tensors a gradient flows through."""
    return message_layout(tuple(tensor for tensor in tensors if tensor.meta.requires_grad))


def pack(layout: MessageLayout, tensors: Sequence[torch.Tensor], *, as_bytes: bool = True) -> list[torch.Tensor]:
    """Turn tensors, in their declared strides, into messages; a message of one tensor shares its memory.

    Args:
        layout: Of the boundary.
        tensors: Its tensors.
        as_bytes: Whether a message of one tensor must be bytes; else it may be the tensor as it is, without a graph.
    """
    messages = []
    packed = None
    for tensor, offset in zip(tensors, layout.offsets, strict=True):
        if tensor.numel() == 0:
            continue
        if offset is None:
            messages.append(_message(tensor, as_bytes))
            continue
        if packed is None:
            packed = torch.empty(layout.packed_bytes, dtype=torch.uint8, device=tensor.device)
            messages.append(packed)
        flat = _flat_bytes(tensor)
        packed[offset : offset + flat.numel()].copy_(flat)
    return messages


def receive_buffers(
    layout: MessageLayout, device: torch.device, *, as_bytes: bool = True
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Allocate what a boundary is received in.

    Args:
        layout: Of the boundary.
        device: Where.
        as_bytes: As in ``pack``.

    Returns:
        The messages to receive, in the order ``pack`` gives them, and the tensors that lie in them. No two tensors
        share a version counter: writing into one of them does not count as writing into another.
    """
    messages: list[torch.Tensor] = []
    tensors: list[torch.Tensor] = []
    packed = None
    for (shape, strides, dtype), offset in zip(layout.memory, layout.offsets, strict=True):
        if offset is None or 0 in shape:
            tensor = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            if 0 not in shape:
                messages.append(_message(tensor, as_bytes))
        else:
            if packed is None:
                packed = torch.empty(layout.packed_bytes, dtype=torch.uint8, device=device)
                messages.append(packed)
            tensor = torch.empty(0, dtype=dtype, device=device)
            tensor.set_(packed.untyped_storage(), offset // dtype.itemsize, shape, strides)
        tensors.append(tensor)
    return messages, tensors


def conform(tensor: torch.Tensor, declared: BoundaryTensor) -> torch.Tensor:
    """Give the tensor in its declared strides: itself where it has them, else a copy; differentiable."""
    if torch.compiler.is_compiling() or tensor.is_conj() or tensor.is_neg():  # what is compiled cannot ask
        tensor = tensor.resolve_conj().resolve_neg()
    if not declared.strides:
        return tensor.contiguous()
    if tensor.stride() == declared.strides:
        return tensor
    return torch.empty_strided(tensor.shape, declared.strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def absent(declared: BoundaryTensor, device: torch.device) -> torch.Tensor:
    """Give what crosses for a gradient that is None.

    >>> from fxpipe.ir.tensor import TensorMeta
    >>> mark = absent(BoundaryTensor("x", TensorMeta((2, 3), "float32", True)), torch.device("cpu"))
    >>> is_absent(mark), is_absent(torch.full((2, 3), float("nan")))
    (True, False)
    """
    shape, strides = declared.meta.shape, declared.strides or _contiguous(declared.meta.shape)
    mark = torch.empty_strided(shape, strides, dtype=getattr(torch, declared.meta.dtype), device=device)
    _flat_bytes(mark).fill_(_ALL_BITS)
    return mark


def is_absent(gradient: torch.Tensor) -> bool:
    """Tell whether what crossed stands for None; waits for the device. One without elements never does."""
    if gradient.numel() == 0:
        return False
    first = gradient[(0,) * gradient.dim()].item()
    return first != first and bool((_flat_bytes(gradient) == _ALL_BITS).all())


class _Join(torch.autograd.Function):
    """Tensors as they are, not views, behind one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.joins = _Join
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return gradients


def join(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Put the tensors that take part in the backward behind one autograd node, without a copy.

    What comes out is never a view (``detach_`` refuses views, and torch's split backward calls it) and never a leaf (a
    leaf that requires a gradient refuses to be written into). The one node matters to the split backward too: it finds
    weights by the nodes that lie above both the weight and an input of the stage, and would lose the gradient of one
    that reaches an output on a path of its own.

    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> (y,) = join([x.view(6)])
    >>> y.is_leaf, y.data_ptr() == x.data_ptr()
    (False, True)
    """
    places = [index for index, tensor in enumerate(tensors) if tensor.requires_grad]
    if not places or not torch.is_grad_enabled() or (len(places) == 1 and _stands_alone(tensors[places[0]])):
        return tuple(tensors)
    joined = list(tensors)
    if len(places) == 1 and tensors[places[0]].is_contiguous():
        (place,) = places
        joined[place] = UNVIEWED(tensors[place], tensors[place].shape)  # without Python in the backward
        return tuple(joined)
    through = _Join.apply(*(tensors[index] for index in places))  # type: ignore[no-untyped-call]
    for index, tensor in zip(places, through, strict=True):
        joined[index] = tensor
    return tuple(joined)


def before_join(edge: GradientEdge) -> GradientEdge:
    """Give where a gradient goes on to that comes to some of what ``join`` gave alone: other edges are as they were.

    From the one node on, it would go on to all that was joined, with gradients that are None: hooks would be called
    that are not called in the model, and custom functions take None for zeros.

    >>> x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    >>> _ = y.register_hook(lambda gradient: gradient * 2)
    >>> joined = join([x * 3, y * 3])
    >>> start = before_join(torch.autograd.graph.get_gradient_edge(joined[0]))
    >>> torch.autograd.backward([start], [torch.ones(2)])
    >>> x.grad, y.grad
    (tensor([3., 3.]), None)
    """
    if getattr(edge.node, "joins", None) is not _Join:
        return edge
    return GradientEdge(*edge.node.next_functions[edge.output_nr])  # type: ignore[arg-type]


def _stands_alone(tensor: torch.Tensor) -> bool:
    """Whether a tensor that takes part in the backward is what ``join`` would make of it alone: no view and no leaf."""
    return tensor._base is None and not tensor.is_leaf


def _message(tensor: torch.Tensor, as_bytes: bool) -> torch.Tensor:
    return _flat_bytes(tensor) if as_bytes or not tensor.is_contiguous() else tensor.detach()


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Give the memory of a dense tensor as bytes."""
    tensor = tensor.detach()
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()).view(torch.uint8)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
