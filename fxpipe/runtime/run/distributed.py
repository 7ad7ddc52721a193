"""The stages of one rank among others: torch's schedules give the order, fxpipe's stages do the work."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fxpipe.ir.schedule import placement, schedule_named
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.ranks.groups import Groups
from fxpipe.runtime.run.engine_stage import EngineStage
from fxpipe.runtime.run.forward_only import infer, run_forwards
from fxpipe.runtime.run.reduction import let_shards_return
from fxpipe.runtime.run.refusals import CheckpointWatch, refuse_modules
from fxpipe.runtime.run.schedule import forget_exchanges, make_schedule, without_dumps
from fxpipe.runtime.run.timeline import SpanRecorder
from fxpipe.runtime.run.work import Job, Tensors, Terms, add_losses


class DistributedEngine:
    """Runs jobs through the stages of all ranks of a pipeline."""

    def __init__(
        self,
        stages: Sequence[StageModule],
        num_stages: int,
        schedule: str,
        groups: Groups,
        device: torch.device,
        *,
        defer_recv: bool = False,
        when_done: Callable[[int], None] | None = None,
    ) -> None:
        self._modules = list(stages)
        self._name = schedule
        self._split_by = schedule if schedule_named(schedule).splits_backward else None
        self._groups = groups
        self._device = device
        self._defer_recv = defer_recv
        self._placement = placement(schedule, num_stages, len(groups.ranks))
        self._checkpoints = CheckpointWatch(self._split_by)
        self._stages = [EngineStage(stage, num_stages, device, groups.pipeline, groups.control) for stage in stages]
        for stage in self._stages:
            stage.checkpoints = self._checkpoints
            stage.replicas = groups.replicas.control if groups.replicas is not None else None
            stage.when_done = when_done or stage.when_done
            stage.work = groups.work
            stage.one_by_one = schedule_named(schedule).stages_per_rank == 1
        self._schedules: dict[int, Any] = {}
        self._loss_dtypes: dict[Any, torch.dtype] = {}
        if groups.failures is not None:
            groups.failures.before_closing(self._let_go)

    def record(self, recorder: SpanRecorder) -> None:
        """Record what the stages do when."""
        for stage in self._stages:
            stage.recorder = recorder

    def check(self) -> None:
        """Refuse what this rank's stages hold that the schedule would get wrong; without communication.

        Raises:
            ScheduleError: Names the module.
        """
        refuse_modules(self._modules, self._split_by)

    def train(self, jobs: Sequence[Job]) -> torch.Tensor:
        """Run forward and backward of all microbatches; gradients accumulate, ties are not summed yet.

        Args:
            jobs: The same number on all ranks, of programs all ranks agree on.

        Returns:
            The loss of the batch, of all replicas' together: a detached scalar, the same on every rank.

        Raises:
            RankError: Another rank failed.
        """
        with self._groups.guard("step"), torch.enable_grad():
            for stage in self._stages:
                stage.jobs = jobs
            with without_dumps(), self._checkpoints.watch(), self._groups.waiting():
                # The stages have their inputs; torch's schedule only asks that there be as many targets.
                self._schedule(len(jobs)).step(target=torch.empty(len(jobs)), return_outputs=False)
                for stage in self._stages:
                    stage.end_sends()
            for stage in self._stages:
                stage.jobs = ()
            last = self._stages[-1] if self._stages[-1].is_last else None
            losses = [last.losses[index] for index in sorted(last.losses)] if last else []
            return self._share_loss(jobs[0].shared_key, losses, last.loss_dtype if last else None)

    def infer(self, jobs: Sequence[Job], *, gather: bool = True) -> list[Tensors] | None:
        """Run forward only, any number of microbatches.

        Args:
            jobs: The same number on all ranks.
            gather: Whether every rank gets the outputs; else only the last stage's rank does.

        Returns:
            The model's flat output tensors of each microbatch; None on a rank that does not get them.
        """
        with self._groups.guard("infer"), torch.no_grad():
            outputs = infer(self._modules, self._placement, jobs, self._groups, self._device, gather=gather)
            let_shards_return(self._modules)
            return outputs

    def evaluate(self, jobs: Sequence[Job]) -> torch.Tensor:
        """Run forward only, of programs with a loss; no output travels further than to the last stage.

        Returns:
            The loss of the batch, of all replicas' together: a scalar, the same on every rank.
        """
        with self._groups.guard("evaluate"), torch.no_grad():
            passes = run_forwards(self._modules, self._placement, jobs, self._groups, self._device)
            let_shards_return(self._modules)
            if self._placement[-1] != self._groups.position:
                return self._share_loss(jobs[0].shared_key, [], None)
            return self._share_loss(jobs[0].shared_key, [work.terms() for work in passes], passes[-1].loss_dtype)

    def _schedule(self, num_microbatches: int) -> Any:
        if num_microbatches not in self._schedules:
            self._schedules[num_microbatches] = make_schedule(
                self._name, self._stages, num_microbatches, defer_recv=self._defer_recv
            )
        return self._schedules[num_microbatches]

    def _let_go(self, error: BaseException | None) -> None:
        if error is not None:
            forget_exchanges(error)
        for stage in self._stages:
            stage.let_go()
        self._schedules.clear()

    def _share_loss(self, key: Hashable, losses: Sequence[Terms], dtype: torch.dtype | None) -> torch.Tensor:
        """Give every rank the sum of what the last stage computed, which has any losses."""
        with self._groups.waiting():
            return self._shared(self._placement[-1], key, losses, dtype)

    def _shared(self, source: int, key: Hashable, losses: Sequence[Terms], dtype: torch.dtype | None) -> torch.Tensor:
        if key not in self._loss_dtypes:
            dtypes = [dtype]
            dist.broadcast_object_list(dtypes, group=self._groups.control, group_src=source)
            self._loss_dtypes[key] = dtypes[0] or torch.float64
        if losses:
            loss = add_losses(losses)
            if self._groups.replicas is not None:
                dist.all_reduce(loss, group=self._groups.replicas.gradients)
        else:
            loss = torch.zeros((), dtype=torch.float64, device=self._device)
        dist.broadcast(loss, group=self._groups.pipeline, group_src=source)
        return loss.to(self._loss_dtypes[key])
