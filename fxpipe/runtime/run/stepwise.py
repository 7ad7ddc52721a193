"""All stages one after the other, on whichever rank holds them: no schedule and no engine, only slower.

What a pipeline's numbers are held against where the model does not fit one rank: every stage runs by itself, from the
boundary tensors that the stage before gave, with autograd's whole backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.ranks.groups import Groups
from fxpipe.runtime.run.reduction import let_shards_return
from fxpipe.runtime.run.work import BoundaryGradients, Job, Pass, Tensors, add_losses, run_backward, run_forward


class StepwiseEngine:
    """Runs jobs through stages of several ranks, one microbatch and one stage at a time.

    Args:
        stages: This rank's stages.
        placement: Rank of each stage, by position in the groups.
        groups: The pipeline's groups; what crosses goes through the CPU.
        device: Where this rank's stages run.
    """

    def __init__(
        self, stages: Sequence[StageModule], placement: Sequence[int], groups: Groups, device: torch.device
    ) -> None:
        self._stages: Mapping[int, StageModule] = {stage.stage_index: stage for stage in stages}
        self._placement = list(placement)
        self._groups = groups
        self._device = device

    def train(self, jobs: Sequence[Job]) -> torch.Tensor:
        """Run forward and backward of all microbatches; gradients accumulate, ties are not summed yet.

        Returns:
            The batch's loss: a detached scalar of float64, the same on every rank.
        """
        losses = []
        with torch.enable_grad():
            for number, job in enumerate(jobs):
                passes = self._forward(number, job, training=True)[0]
                last = passes.get(len(self._placement) - 1)
                (loss,) = self._shared(self._placement[-1], (add_losses([last.terms()]),) if last else ())
                losses.append(loss)
                self._backward(number, passes)
        total = torch.stack(losses).sum()
        if self._groups.replicas is not None:
            total = total.cpu()
            dist.all_reduce(total, group=self._groups.replicas.control)
        return total

    def infer(self, jobs: Sequence[Job]) -> list[Tensors]:
        """Run forward only; gives the model's flat output tensors of each microbatch, on every rank."""
        with torch.no_grad():
            outputs = [
                self._forward(number, job, training=False)[1][: len(job.program.outputs)]
                for number, job in enumerate(jobs)
            ]
            let_shards_return(self._stages.values())
            return outputs

    def _forward(self, number: int, job: Job, *, training: bool) -> tuple[dict[int, Pass], Tensors]:
        """Give this rank's passes by stage, and what the last stage gave."""
        passes: dict[int, Pass] = {}
        tensors: Tensors = ()
        for index, rank in enumerate(self._placement):
            if index in self._stages:
                with self._groups.work(index, "F", number, self._stages[index]):
                    passes[index] = run_forward(self._stages[index], job, tensors, training=training)
            tensors = self._shared(rank, passes[index].outputs if index in passes else ())
        return passes, tensors

    def _backward(self, number: int, passes: dict[int, Pass]) -> None:
        gradients: BoundaryGradients = ()
        for index, rank in reversed(list(enumerate(self._placement))):
            own: BoundaryGradients = ()
            if index in passes:
                with self._groups.work(index, "B", number, self._stages[index]):
                    own = run_backward(passes.pop(index), gradients)
            gradients = self._shared(rank, own)

    def _shared(self, rank: int, tensors: BoundaryGradients) -> Any:
        """Give every rank what one of them has: tensors, or gradients that may be None."""
        box: list[Any] = [tuple(None if tensor is None else tensor.detach().cpu() for tensor in tensors)]
        with self._groups.waiting():
            dist.broadcast_object_list(box, group=self._groups.control, group_src=rank)
        return tuple(None if tensor is None else tensor.to(self._device) for tensor in box[0])
