"""Everything in float64, whatever a model was written for, so that one judgement holds on every processor.

Which sums run in which order is the processor's matter, and a stage that gets a contiguous gradient may call another
kernel than the model does: in float32 that is some units of the last place, here or there. In float64 the same is
1e-16 of a tensor, and a mistake is as large as before.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

WIDE = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}
CASTS = dict.fromkeys((torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16), torch.Tensor.double)


TYPES = dict.fromkeys((torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor), torch.DoubleTensor)
KINDS = (torch.dtype, type(torch.FloatTensor))


def widened(value: Any) -> Any:
    """A dtype, a tensor type or a tensor in float64; the rest as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(WIDE.get(value.dtype, value.dtype))
    return WIDE.get(value, value) if isinstance(value, torch.dtype) else TYPES.get(value, value)


def grouped_product(rows: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor, **_: Any) -> torch.Tensor:
    """Multiply each group of rows with its own weight: torch's grouped products know no float64."""
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    parts = [rows[start:end] @ weight for start, end, weight in zip(starts, ends, weights, strict=True)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], weights.shape[-1])])


def _grouped() -> Iterator[Callable[..., Any]]:
    for owner, name in ((torch, "_grouped_mm"), (torch.nn.functional, "grouped_mm")):
        if hasattr(owner, name):
            yield getattr(owner, name)


GROUPED = set(_grouped())


class Wide(TorchFunctionMode):
    """Turns every cast to, and every tensor made in, a narrower type into one of float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in GROUPED:
            return grouped_product(*args, **kwargs)
        if any(isinstance(value, KINDS) for value in (*args, *kwargs.values())):
            args = tuple(widened(value) if isinstance(value, KINDS) else value for value in args)
            kwargs = {name: widened(value) if isinstance(value, KINDS) else value for name, value in kwargs.items()}
        return CASTS.get(func, func)(*args, **kwargs)


@contextlib.contextmanager
def in_float64(on: bool = True) -> Iterator[None]:
    """Compute in float64 within the context."""
    before = torch.get_default_dtype()
    with Wide() if on else contextlib.nullcontext():
        torch.set_default_dtype(torch.float64 if on else before)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def wide_model(model: nn.Module) -> nn.Module:
    """Copy a model, its parameters and buffers in float64."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # a buffer that two modules share stays one

    def once(tensor: torch.Tensor) -> torch.Tensor:
        return made.setdefault(id(tensor), (tensor, widened(tensor)))[1]

    return copy.deepcopy(model)._apply(once)


def wide_inputs(inputs: Any) -> Any:
    """Copy inputs, their floating-point tensors in float64."""
    return tree_map(lambda leaf: widened(leaf) if isinstance(leaf, torch.Tensor) else leaf, inputs)
