"""What torch's schedules call: a stage that exchanges exactly what crosses, and computes what the plan says.

Invariants:

- What two stages exchange follows from the job's program alone (``sent`` of one is ``received`` of the next), so that
  both sides count the same messages of the same bytes: in the schedule's order, which torch's engine keeps, or where
  messages carry names in any (``Exchange``; torch's engine then finds nothing to exchange).
- Shapes are the job's own. Nothing of a microbatch is kept for the next, and nothing outlives the step.
- What is received has no graph and is the stage's own: it becomes a leaf here, and the stage may write into it.
- Every received tensor that a gradient may flow through gives one back, or says that none came: the other side waits.
- ``failed`` is set before an error of the stage's own work leaves, and by nothing else: it tells a cause from a lost
  connection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from fxpipe._torch import WithoutMetadata
from fxpipe.program import StageProgram
from fxpipe.runtime.build.boundary import (
    MessageLayout,
    absent,
    gradient_layout,
    is_absent,
    message_layout,
    pack,
    receive_buffers,
)
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.run.exchange import Absences, Exchange, Kind, carries_names
from fxpipe.runtime.run.reduction import hold_reduction, reduce_now
from fxpipe.runtime.run.refusals import CheckpointWatch, named_backward_error
from fxpipe.runtime.run.timeline import SpanRecorder
from fxpipe.runtime.run.work import (
    BoundaryGradients,
    Job,
    Pass,
    Tensors,
    Terms,
    run_backward,
    run_backward_for_inputs,
    run_backward_for_weights,
    stage_arguments,
    take_outputs,
)

_UNTIMED: AbstractContextManager[None] = nullcontext()
Work = Callable[[int, str, int, StageModule], AbstractContextManager[None]]


class EngineStage(WithoutMetadata, PipelineStage):
    """One stage of a schedule; the shapes of each microbatch are those of its own job.

    Attributes:
        jobs: The microbatches of this step.
        checkpoints: Is told that the stage's forward runs; watches for the engine.
        submod: The stage's module.
        losses: On the last stage: the terms of the loss of each microbatch so far.
        loss_dtype: On the last stage: dtype of the model's own loss.
        work: Goes around this stage's own work, with its index, the kind of action, the microbatch, and the module.
        replicas: The group of the replicas, whose losses are parts of one batch's, for tensors on the CPU; None: there
            are none.
        one_by_one: Whether the schedule lets a stage wait for a send before the next one of its kind.
        recorder: Records what is done when; None for nothing.
        when_done: Called with the stage's index after its last backward of a step.
    """

    submod: StageModule

    def __init__(
        self,
        module: StageModule,
        num_stages: int,
        device: torch.device,
        group: dist.ProcessGroup,
        control: dist.ProcessGroup,
    ) -> None:
        """Store what to run; ``control`` is the group for tensors on the CPU."""
        super().__init__(module, module.stage_index, num_stages, device, group=group)
        self.jobs: Sequence[Job] = ()
        self.checkpoints = CheckpointWatch()
        self.losses: dict[int, Terms] = {}
        self.loss_dtype: torch.dtype | None = None
        self.work: Work = lambda *_: nullcontext()
        self.replicas: dist.ProcessGroup | None = None
        self.one_by_one = False
        self.recorder: SpanRecorder | None = None
        self.when_done: Callable[[int], None] = lambda stage_index: None
        self._passes: dict[int, Pass] = {}
        self._received: dict[int, Tensors] = {}
        self._gradients: dict[int, BoundaryGradients] = {}
        self._given: dict[int, BoundaryGradients] = {}
        self._weights: list[torch.Tensor] | None = None
        self._sharded = False
        self._exchange: Exchange | None = None
        self._absences: Absences | None = None
        if carries_names(device):
            self._exchange = Exchange(group, module.stage_index, device)
        else:
            self._absences = Absences(control, module.stage_index)

    # --- what crosses ---

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive what the stage before sends; allocated now, in the shapes of this microbatch."""
        return self._receive("forward", self._received, fwd_chunk_id, self.stage_index - 1)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Send what the next stage receives."""
        if self.is_last:
            return []
        layout = message_layout(self._program(fwd_chunk_id).sent)
        return self._send("forward", fwd_chunk_id, layout, self._passes[fwd_chunk_id].outputs, self.stage_index + 1)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive the gradients of what was sent, where one flows."""
        return self._receive("backward", self._gradients, bwd_chunk_id, self.stage_index + 1)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Send the gradients of what was received, where one flows."""
        layout = gradient_layout(self._program(bwd_chunk_id).received)
        given = self._given.pop(bwd_chunk_id, ())
        if self._absences is not None and given:
            rank = self.stage_index_to_group_rank[self.stage_index - 1]
            self._absences.tell(bwd_chunk_id, rank, [gradient is None for gradient in given])
        sent = tuple(
            [
                absent(what, self.device) if each is None else each
                for what, each in zip(layout.tensors, given, strict=True)
            ]
        )
        return self._send("backward", bwd_chunk_id, layout, sent, self.stage_index - 1)

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """Take what the stage before, on this rank, computed."""
        self._received[mb_index] = tuple(output.detach() for output in prev_stage_outputs)

    def get_local_bwd_output(self, mb_index: int) -> BoundaryGradients:
        """Give the gradients of what was received to the stage before, on this rank."""
        return self._given.pop(mb_index)

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """Take the gradients from the next stage, on this rank."""
        self._gradients[mb_index] = next_stage_bwd_outputs

    # --- the work ---

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Tensors:
        """Run the forward of one microbatch."""
        job, program = self.jobs[fwd_chunk_id], self._program(fwd_chunk_id)
        received = self._taken("forward", self._received, fwd_chunk_id)
        self.checkpoints.stage = self.submod
        with self.work(self.stage_index, "F", fwd_chunk_id, self.submod), self._timed("forward", fwd_chunk_id):
            outputs = self.submod(*stage_arguments(program, job, received, training=self.has_backward))
            work = take_outputs(program, job, received, outputs)
        self._passes[fwd_chunk_id] = work
        if self.is_last:
            self.losses[fwd_chunk_id] = work.terms()
            self.loss_dtype = work.loss_dtype
        return work.outputs

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run the backward of one microbatch, or the half of it that other stages wait for."""
        gradients = self._gradients_taken(bwd_chunk_id)
        kind = "B" if full_backward else "I"
        with self.work(self.stage_index, kind, bwd_chunk_id, self.submod), self._timed("backward", bwd_chunk_id):
            try:
                if full_backward:
                    given = run_backward(self._passes.pop(bwd_chunk_id), gradients)
                else:
                    given = run_backward_for_inputs(self._passes[bwd_chunk_id], self._trainable(), gradients)
            except RuntimeError as error:
                raise named_backward_error(error, self.submod) from error
        if not self.is_first:
            self._given[bwd_chunk_id] = given

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Run the other half of a split backward."""
        with self.work(self.stage_index, "W", bwd_chunk_id, self.submod), self._timed("weights", bwd_chunk_id):
            run_backward_for_weights(self._passes.pop(bwd_chunk_id))

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Reduce the gradients of sharded modules, once per step, and say that no others will come."""
        with self.work(self.stage_index, "REDUCE_GRAD", -1, self.submod), self._timed("communication", -1):
            if self._sharded:
                reduce_now(self.submod, self.replicas)
            self.when_done(self.stage_index)

    def clear_runtime_states(self) -> None:
        """Begin a step."""
        for kept in (self.losses, self._passes, self._received, self._gradients, self._given):
            kept.clear()
        if self._exchange is not None:
            self._exchange.clear()
        self._weights = None
        self._sharded = hold_reduction(self.submod, over_replicas=self.replicas is not None)

    def end_sends(self) -> None:
        """Wait until all that was sent has left; torch's engine waits for its own operations by itself."""
        if self._exchange is not None:
            self._exchange.end_sends()
        if self._absences is not None:
            self._absences.end()

    def let_go(self) -> None:
        """Let go of the groups, and of what is under way."""
        for name, value in list(vars(self).items()):
            if isinstance(value, dist.ProcessGroup):  # torch keeps one, or from 2.14 one per direction too
                setattr(self, name, None)
        self.clear_runtime_states()
        if self._exchange is not None:
            self._exchange.close()
        if self._absences is not None:
            self._absences.close()

    def _timed(self, kind: str, microbatch: int) -> AbstractContextManager[None]:
        return _UNTIMED if self.recorder is None else self.recorder.span(kind, self.stage_index, microbatch)

    def _trainable(self) -> list[torch.Tensor]:
        # Sharded parameters come and go while a step runs.
        if self._weights is None or self._sharded:
            self._weights = [parameter for parameter in self.submod.parameters() if parameter.requires_grad]
        return self._weights

    def _program(self, index: int) -> StageProgram:
        return self.jobs[index].program.stages[self.stage_index]

    def _layout(self, kind: Kind, index: int) -> MessageLayout:
        """Give how what this stage receives lies in messages."""
        program = self._program(index)
        return message_layout(program.received) if kind == "forward" else gradient_layout(program.sent)

    def _receive(self, kind: Kind, kept: dict[int, Any], index: int, stage: int) -> list[dist.P2POp]:
        if not 0 <= stage < self.num_stages:
            return []
        if self._exchange is not None:
            rank = self.stage_index_to_group_rank[stage]
            self._exchange.ask(kind, index, rank, len(self.jobs), partial(self._layout, kind))
            return []
        layout = self._layout(kind, index)
        if not layout.tensors:
            return []
        messages, tensors = receive_buffers(layout, self.device)
        kept[index] = tuple(tensors)
        return [self._operation(dist.irecv, message, stage) for message in messages]

    def _taken(self, kind: Kind, kept: dict[int, Any], index: int) -> Tensors:
        """Give what was received for a microbatch, once it is there; a stage of this rank has kept it."""
        found = kept.pop(index, None)
        if found is None and self._exchange is not None:
            found = self._exchange.take(kind, index)
            if found and kind == "backward":
                self._exchange.end_send("forward", index)  # it has arrived: this is the answer
        return found or ()

    def _gradients_taken(self, index: int) -> BoundaryGradients:
        """Give the gradients of what was sent for a microbatch; a next stage on this rank gives them as they are."""
        if self.is_last:
            return ()
        next_rank = self.stage_index_to_group_rank[self.stage_index + 1]
        if next_rank == self.group_rank:
            return self._gradients.pop(index)
        found = self._taken("backward", self._gradients, index)
        if self._absences is None:
            flags = [is_absent(gradient) for gradient in found]
        else:
            flags = self._absences.hear(index, next_rank, len(found)) if found else []
        return tuple([None if flag else gradient for flag, gradient in zip(flags, found, strict=True)])

    def _send(self, kind: Kind, index: int, layout: MessageLayout, tensors: Tensors, stage: int) -> list[dist.P2POp]:
        if stage < 0:
            return []
        if self._exchange is None:
            return [self._operation(dist.isend, message, stage) for message in pack(layout, tensors)]
        self._exchange.send(kind, index, self.stage_index_to_group_rank[stage], layout, tensors)
        if kind == "backward" and self.one_by_one:
            self._exchange.end_send(kind, index - 1)
        return []

    def _operation(self, kind: Any, message: torch.Tensor, stage: int) -> dist.P2POp:
        return dist.P2POp(kind, message, group=self.group, group_peer=self.stage_index_to_group_rank[stage])
