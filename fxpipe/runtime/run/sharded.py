"""FSDP2 inside stages: gradients are reduced once per step, not once per microbatch.

torch's stage does this where the stage itself is wrapped. Here it holds for every outermost wrapped module, so that
blocks may be wrapped alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from fxpipe._torch import reduce_sharded_gradients


def _sum_over_replicas(module: nn.Module) -> None:
    """Let gradients be added up, not averaged: replicas weigh their losses. And let weights be gathered once a step.

    Torch's own division by the number of replicas would be one too many; and what is resharded after a forward is
    gathered again for the backward of every microbatch.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            part.set_reshard_after_forward(False, recurse=False)


def hold_reduction(module: nn.Module, *, over_replicas: bool = False) -> bool:
    """Let gradients accumulate unsharded until ``reduce_now``; tells whether anything in the module is sharded.

    Args:
        module: A stage.
        over_replicas: Whether the losses of replicas are parts of one batch's.
    """
    sharded = _outermost(module)
    if sharded and over_replicas:
        _sum_over_replicas(module)
    for part in sharded:
        part.set_is_last_backward(False)
        part.set_reshard_after_backward(False)
        part.set_requires_gradient_sync(False)
    return bool(sharded)


def reduce_now(module: nn.Module) -> None:
    """Reduce and scatter what has accumulated."""
    for part in _outermost(module):
        part.set_is_last_backward(True)
        part.set_reshard_after_backward(True)
        part.set_requires_gradient_sync(True)
        reduce_sharded_gradients(part)


def _outermost(module: nn.Module) -> list[Any]:
    found: list[Any] = []
    todo = [module]
    while todo:
        part = todo.pop()
        if isinstance(part, FSDPModule):
            found.append(part)
        else:
            todo.extend(part.children())
    return found
