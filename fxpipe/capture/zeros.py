"""Run one module for real on zeros, where fake tensors cannot say what it returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxpipe._torch import FakeTensor, without_functions, without_modes
from fxpipe.capture.skeleton import named_tensors
from fxpipe.ir.tree import map_tree


def run_on_zeros(function: nn.Module | Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a module, or a function, on real zeros.

    Weights are one zero each, expanded, so they take no memory; only this module is computed.

    Args:
        function: What to call; its fake tensors are replaced in a copy.
        args: Its arguments; fake tensors in them are replaced.
        kwargs: Its keyword arguments, likewise.

    Returns:
        What it returns, with real tensors.
    """
    with without_modes(), without_functions():
        call, args, kwargs = on_zeros(function, args, kwargs)
        return call(*args, **kwargs)


def on_zeros(
    function: nn.Module | Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Give a function and arguments in which real zeros stand for fake tensors; to be called without modes."""
    if isinstance(function, nn.Module):
        memo: dict[int, Any] = {id(tensor): _weight(tensor) for _, tensor in named_tensors(function)}
        function = copy.deepcopy(function, memo)
    real_args, real_kwargs = map_tree(lambda _, leaf: _real(leaf), (args, dict(kwargs)))
    return function, real_args, real_kwargs


def as_fakes(value: Any, mode: Any) -> Any:
    """Replace real tensors by fake ones of the same shape, dtype and gradient flag."""

    def fake(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        with mode:
            made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cpu")
        return made.requires_grad_(leaf.requires_grad) if leaf.is_floating_point() or leaf.is_complex() else made

    with without_functions():
        return map_tree(fake, value)


def _weight(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, nn.Parameter):  # buffers are written to
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(torch.zeros((), dtype=tensor.dtype).expand(tensor.shape), tensor.requires_grad)


def _real(leaf: Any) -> Any:
    if not isinstance(leaf, FakeTensor):
        return leaf
    zeros = torch.zeros(leaf.shape, dtype=leaf.dtype)
    return zeros.requires_grad_() + 0 if leaf.requires_grad else zeros  # not a leaf: it may be written to
