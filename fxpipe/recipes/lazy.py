"""Layers of torch that find out their sizes in their first forward, while a constructor is recorded."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fxpipe._torch import replaced, without_functions, without_modes


@contextlib.contextmanager
def recorded_lazily() -> Iterator[None]:
    """Let ``nn.LazyLinear`` and the like be recorded.

    Until they know their shape, such parameters are as in a plain build: they hold nothing that could be recorded.
    torch then gives them memory and another class, which a tensor without memory cannot get; here the tensor that the
    layer holds becomes the one that was recorded.
    """
    with contextlib.ExitStack() as stack:
        for kind in (UninitializedParameter, UninitializedBuffer):
            new = staticmethod(functools.partial(_made, kind.__new__))
            stack.enter_context(replaced(kind, "__new__", new))
            stack.enter_context(replaced(kind, "materialize", _materialize))
        yield


def _made(new: Callable[..., Any], kind: type, *args: Any, **kwargs: Any) -> Any:
    with without_modes(), without_functions():
        return new(kind, *args, **kwargs)


def _materialize(
    tensor: Any, shape: Sequence[int], device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    made: torch.Tensor = torch.empty(shape, device=device or tensor.data.device, dtype=dtype or tensor.data.dtype)
    if tensor.cls_to_become is nn.Parameter:
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    vars(made).update(vars(tensor))
    torch.utils.swap_tensors(tensor, made)  # type: ignore[no-untyped-call]
