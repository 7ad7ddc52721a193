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

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _EarlierBuffers(modules)

    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts, **kwargs)


class _EarlierBuffers:
    """Lets modules run again on copies of their buffers, as these were before the first forward.

    What moves in a forward (running statistics, the vectors of a spectral norm) then moves once, and the second forward
    computes what the first one did. Which buffers move cannot be told: the kernels of batch norm leave no trace in a
    tensor's version.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        copies: dict[int, torch.Tensor] = {}
        self._earlier = [
            (part, name, copies.setdefault(id(buffer), buffer.detach().clone()))
            for module in modules
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        self._now: list[tuple[nn.Module, str, torch.Tensor | None]] = []

    def __enter__(self) -> None:
        copies: dict[int, torch.Tensor] = {}  # there may be another recomputation
        for part, name, earlier in self._earlier:
            self._now.append((part, name, part._buffers[name]))
            part._buffers[name] = copies.setdefault(id(earlier), earlier.clone())

    def __exit__(self, *error: Any) -> None:
        now, self._now = self._now, []
        for part, name, buffer in now:
            part._buffers[name] = buffer
