"""All stages in one process: a loop over microbatches, with the numbers of the distributed run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.ranks.failures import named_place
from fxpipe.runtime.run.refusals import CheckpointWatch, named_backward_error, refuse_modules
from fxpipe.runtime.run.timeline import SpanRecorder
from fxpipe.runtime.run.work import BoundaryGradients, Job, Pass, Tensors, Terms, add_losses, run_backward, run_forward

_UNTIMED: AbstractContextManager[None] = nullcontext()


class LocalEngine:
    """Runs jobs through stages that all live in this process; no schedule, no process group."""

    def __init__(self, stages: Sequence[StageModule]) -> None:
        self._stages = list(stages)
        self._recorder: SpanRecorder | None = None
        self._checkpoints = CheckpointWatch()

    def record(self, recorder: SpanRecorder) -> None:
        """Record what the stages do when."""
        self._recorder = recorder

    def check(self) -> None:
        """Refuse what the stages hold that would get wrong gradients.

        Raises:
            ScheduleError: Names the module.
        """
        refuse_modules(self._stages)

    def train(self, jobs: Sequence[Job]) -> torch.Tensor:
        """Run forward and backward of all microbatches, one after the other; gradients accumulate.

        Returns:
            The batch's loss: a detached scalar.

        Raises:
            ScheduleError: As ``check``.
        """
        self.check()
        with self._checkpoints.watch(), torch.enable_grad():
            losses = [self._train_one(job, index) for index, job in enumerate(jobs)]
        dtype = losses[0][1]
        return add_losses([terms for terms, _ in losses]).to(dtype)

    def infer(self, jobs: Sequence[Job], *, gather: bool = True) -> list[Tensors]:
        """Run forward only; ``gather`` is for other engines.

        Returns:
            The model's flat output tensors of each microbatch.
        """
        return [self._infer_one(job, index) for index, job in enumerate(jobs)]

    def evaluate(self, jobs: Sequence[Job]) -> torch.Tensor:
        """Run forward only, of programs with a loss.

        Returns:
            The batch's loss: a scalar.
        """
        with torch.no_grad():
            passes = [self._forward_one(job, index) for index, job in enumerate(jobs)]
        return add_losses([work.terms() for work in passes]).to(passes[0].loss_dtype)

    def _timed(self, kind: str, stage: int, microbatch: int) -> AbstractContextManager[None]:
        return _UNTIMED if self._recorder is None else self._recorder.span(kind, stage, microbatch)

    def _train_one(self, job: Job, index: int) -> tuple[Terms, torch.dtype]:
        passes: list[Pass] = []
        received: Tensors = ()
        for stage in self._stages:
            self._checkpoints.stage = stage
            with self._timed("forward", stage.stage_index, index):
                passes.append(_forward(stage, job, received, index, training=True))
            received = tuple(output.detach() for output in passes[-1].outputs)
        loss = passes[-1].terms(), passes[-1].loss_dtype
        gradients: BoundaryGradients = ()
        while passes:
            stage = self._stages[len(passes) - 1]
            try:
                with self._timed("backward", stage.stage_index, index):
                    gradients = run_backward(passes.pop(), gradients)
            except RuntimeError as error:
                raise named_backward_error(error, stage) from error
        return loss

    def _infer_one(self, job: Job, index: int) -> Tensors:
        with torch.no_grad():
            return self._forward_one(job, index).outputs[: len(job.program.outputs)]

    def _forward_one(self, job: Job, index: int) -> Pass:
        work = _forward(self._stages[0], job, (), index, training=False)
        for stage in self._stages[1:]:
            work = _forward(stage, job, work.outputs, index, training=False)
        return work


def _forward(stage: StageModule, job: Job, received: Tensors, index: int, *, training: bool) -> Pass:
    try:
        return run_forward(stage, job, received, training=training)
    except Exception as error:
        named_place(error, stage.stage_index, index, stage)
        raise
