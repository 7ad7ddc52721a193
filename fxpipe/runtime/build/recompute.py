"""Modules whose activations are not kept: their forward runs once more in the backward, and moves nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_module(module: nn.Module, draws: Callable[[], bool]) -> None:
    """Let a module recompute its activations; the module object, its name and its hooks stay what they are.

    Args:
        module: Changed in place.
        draws: Tells whether random numbers are drawn while the stage runs, so that their state is put back.
    """
    forward = module.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return recompute(forward, [module], draws(), *args, **kwargs)

    module.forward = recomputed


def recompute(
    function: Callable[..., Any], modules: Sequence[nn.Module], draws: bool, *args: Any, **kwargs: Any
) -> Any:
    """Call a function whose activations are not kept.

    Args:
        function: What is called, now and once more in the backward.
        modules: Those it calls; their buffers (running statistics) move in the first call alone.
        draws: Whether it may draw random numbers.
        *args: Arguments of the function.
        **kwargs: Keyword arguments of the function.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)
    moving = _Moving(modules)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), moving

    result = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts, **kwargs)
    moving.observed()
    return result


class _Moving:
    """The buffers that a call changed, kept as they are while it runs again."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        buffers = (buffer for module in modules for buffer in module.buffers())
        self._buffers = [(buffer, buffer._version) for buffer in buffers]
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def observed(self) -> None:
        """Say that the first call is over."""
        self._buffers = [(buffer, version) for buffer, version in self._buffers if buffer._version != version]

    def __enter__(self) -> None:
        self._kept = [(buffer, buffer.detach().clone()) for buffer, _ in self._buffers]

    def __exit__(self, *error: Any) -> None:
        with torch.no_grad():
            for buffer, value in self._kept:
                buffer.copy_(value)
        self._kept = []
