"""Sums over a process group, many tensors in few messages, while other work goes on; and those of FSDP2 inside stages.

FSDP2's gradients are reduced once per step, not once per microbatch. torch's stage does this where the stage itself is
wrapped. Here it holds for every outermost wrapped module, so that blocks may be wrapped alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fxpipe._torch import reduce_sharded_gradients
from fxpipe.errors import ScheduleError
from fxpipe.runtime.build.holdings import parts_of

BUCKET_BYTES = 25 << 20
"""Largest message that several tensors share: large enough for a link's full speed, small enough to start early."""


class GroupSum:
    """Adds tensors up over a group, in place: ``start`` any number of times in one order on all ranks, then ``finish``.

    Args:
        group: Its ranks start sums of equally many tensors, of the same shapes and dtypes.
        bucket_bytes: Largest message that several tensors share.
    """

    def __init__(self, group: dist.ProcessGroup, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._group = group
        self._bucket_bytes = bucket_bytes
        self._pending: list[tuple[dist.Work | None, torch.Tensor, list[torch.Tensor]]] = []

    def start(self, tensors: Iterable[torch.Tensor]) -> None:
        """Begin to add up; the tensors must not be touched until ``finish``."""
        for bucket in _buckets(tensors, self._bucket_bytes):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                message = bucket[0]
            else:
                message = torch.cat([tensor.reshape(-1) for tensor in bucket])
            self._pending.append((dist.all_reduce(message, group=self._group, async_op=True), message, bucket))

    def finish(self) -> None:
        """Wait for the sums, and put each where its tensor is."""
        pending, self._pending = self._pending, []
        for work, message, bucket in pending:
            if work is not None:  # torch's type for a rank outside the group
                work.wait()
            if message is not bucket[0]:
                parts = torch.split(message, [tensor.numel() for tensor in bucket])
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))


MOST_NUMBERS = 1024
"""Numbers that ranks may add up at once: they may hold different counts of them."""


def sum_over(group: dist.ProcessGroup, numbers: Sequence[float]) -> tuple[float, ...]:
    """Add numbers up over a group for tensors on the CPU; a rank that has fewer of them counts zeros.

    Raises:
        ScheduleError: There are more than can be added up.
    """
    if len(numbers) > MOST_NUMBERS:
        raise ScheduleError(
            f"the loss has {len(numbers)} terms, and replicas weigh at most {MOST_NUMBERS}\n"
            "  add the terms up within the model"
        )
    table = torch.zeros(MOST_NUMBERS, dtype=torch.float64)
    table[: len(numbers)] = torch.tensor(tuple(numbers), dtype=torch.float64)
    dist.all_reduce(table, group=group)
    return tuple(table[: len(numbers)].tolist())


def any_over(group: dist.ProcessGroup, flags: Sequence[bool]) -> list[bool]:
    """Give for each flag whether it is set on any rank of a group for tensors on the CPU."""
    votes = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
    return [bool(vote) for vote in votes.tolist()]


def _buckets(tensors: Iterable[torch.Tensor], most: int) -> list[list[torch.Tensor]]:
    """Put tensors of one dtype and device together, in order, as long as they fit."""
    found: list[list[torch.Tensor]] = []
    open_ones: dict[tuple[torch.dtype, torch.device], tuple[list[torch.Tensor], int]] = {}
    for tensor in tensors:
        key, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        bucket, filled = open_ones.get(key, ([], most))
        if filled + size > most:
            bucket, filled = [], 0
            found.append(bucket)
        bucket.append(tensor)
        open_ones[key] = bucket, filled + size
    return found


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


def reduce_now(module: nn.Module, replicas: dist.ProcessGroup | None = None) -> None:
    """Reduce and scatter what has accumulated.

    Args:
        module: A stage.
        replicas: The group of those that hold the same stage, for tensors on the CPU: what one of them has no gradient
            of (no target in its batch is valid, say) it reduces as zeros. None: there are none.
    """
    on_all = partial(any_over, replicas) if replicas is not None else None
    for part in _outermost(module):
        part.set_is_last_backward(True)
        part.set_reshard_after_backward(True)
        part.set_requires_gradient_sync(True)
        reduce_sharded_gradients(part, on_all)


def let_shards_return(modules: Iterable[nn.Module]) -> None:
    """Let go of the weights that forwards without a backward gathered, so that modules hold their shards again.

    What is gathered knows nothing of a later optimiser's step, and its gradients are not the shards'.
    """
    for part in parts_of(modules):
        if isinstance(part, FSDPModule):
            part.reshard()


def _outermost(module: nn.Module) -> list[Any]:
    found: list[Any] = []
    todo = [module]
    while todo:
        part = todo.pop()
        if isinstance(part, FSDPModule):
            found.append(part)
        elif part._modules:
            todo.extend([child for child in part._modules.values() if child is not None])
    return found
