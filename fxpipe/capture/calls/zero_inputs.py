"""Real zeros in the place of fake tensors, for calls whose result fake tensors cannot tell."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxpipe._torch import FakeTensor, without_functions, without_modes
from fxpipe.capture.calls.counting import LayerCounter
from fxpipe.capture.calls.values import tensors_in
from fxpipe.capture.model.skeleton import Skeleton, named_tensors
from fxpipe.ir.cost import LayerCounts
from fxpipe.ir.tree import map_tree


def run_on_zeros(
    mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, exact: bool = False
) -> Any:
    """Run a function and give what it returns, with fake tensors.

    Args:
        mode: The fake mode of the tensors.
        function: The function.
        args: Arguments, with fake tensors.
        kwargs: Keyword arguments, likewise.
        exact: Whether integers in the result depend on real arguments alone; they stay real.
    """
    with without_modes(), without_functions():
        call, real_args, real_kwargs = on_zeros(function, args, kwargs)
        result = call(*real_args, **real_kwargs)
    return as_fakes(result, mode, lambda tensor: exact and not tensor.is_floating_point())


def counts_on_zeros(
    counter: LayerCounter,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    trace: Any,
    attention: tuple[str, ...],
) -> LayerCounts:
    """Count a call on zeros; arguments as of ``LayerCounter.counts``."""
    with without_functions(), without_modes():
        call, real_args, real_kwargs = on_zeros(function, args, kwargs)
        pairs = zip(tensors_in(args, kwargs), tensors_in(real_args, real_kwargs), strict=True)
        own = [id(real) for tensor, real in pairs if counter.is_own(tensor)]
        return counter.counts(call, real_args, real_kwargs, trace, attention, own=own)


def on_zeros(
    function: nn.Module | Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    span: tuple[float, float] | None = None,
    skeleton: Skeleton | None = None,
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Give a function and arguments in which real zeros stand for fake tensors; to be called without modes.

    Args:
        function: The function.
        args: Its arguments.
        kwargs: Its keyword arguments.
        span: From where to where floats that are given rise instead; parameters and integers are ones then.
        skeleton: Knows the values of buffers that a module reads as numbers; those it has keep them.
    """
    if isinstance(function, nn.Module):
        memo: dict[int, Any] = {
            id(tensor): _weight(tensor, span is not None, skeleton) for _, tensor in named_tensors(function)
        }
        function = copy.deepcopy(function, memo)
    real_args, real_kwargs = map_tree(lambda _, leaf: _real(leaf, span), (args, dict(kwargs)))
    return function, real_args, real_kwargs


def as_fakes(value: Any, mode: Any, keeps: Callable[[torch.Tensor], bool]) -> Any:
    """Replace real tensors, all but those that ``keeps`` names, by fake ones of the same shape, dtype and flag."""

    def fake(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or keeps(leaf):
            return leaf
        with mode:
            made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cpu")
        return made.requires_grad_(leaf.requires_grad) if leaf.is_floating_point() or leaf.is_complex() else made

    with without_functions():
        return map_tree(fake, value)


def with_other_integers(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], chosen: Callable[[torch.Tensor], bool]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield arguments whose chosen real integers and booleans hold other values: lengths, masks, numbers of anything.

    They are all the least, all the greatest, one less and one more; not all of that suits every function.
    """

    def constant(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.expand(tensor.shape).clone()

    makers: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
        lambda tensor: constant(tensor, tensor.amin()),
        lambda tensor: constant(tensor, tensor.amax()),
        lambda tensor: torch.zeros_like(tensor) if tensor.dtype == torch.bool else (tensor - 1).clamp(min=0),
        lambda tensor: torch.ones_like(tensor) if tensor.dtype == torch.bool else tensor + 1,
    )
    for make in makers:

        def other(_: str, leaf: Any, make: Callable[[torch.Tensor], torch.Tensor] = make) -> Any:
            if not isinstance(leaf, torch.Tensor) or not leaf.numel() or not chosen(leaf):
                return leaf
            with without_modes():
                return make(leaf)

        with without_functions():
            found = map_tree(other, (args, dict(kwargs)))
        yield found


def _weight(tensor: torch.Tensor, one: bool, skeleton: Skeleton | None) -> torch.Tensor:
    if not isinstance(tensor, nn.Parameter):  # buffers are written to
        known = skeleton.number_in(tensor) if skeleton is not None else None
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if known is None else known.cpu().clone()
    value = torch.full((), int(one), dtype=tensor.dtype)
    return nn.Parameter(value.expand(tensor.shape), tensor.requires_grad)


def _real(leaf: Any, span: tuple[float, float] | None) -> Any:
    if isinstance(leaf, slice):
        return slice(*(_real(part, span) for part in (leaf.start, leaf.stop, leaf.step)))
    if not isinstance(leaf, FakeTensor):
        return leaf
    values = torch.full(leaf.shape, int(span is not None), dtype=leaf.dtype)
    if span is not None and leaf.is_floating_point():
        values = torch.linspace(*span, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)
    return values.requires_grad_() + 0 if leaf.requires_grad else values  # not a leaf: it may be written to
