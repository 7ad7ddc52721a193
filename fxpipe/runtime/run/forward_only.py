"""Forward passes alone, on every placement of stages: torch's schedules cannot (``eval`` fails on V placements)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from fxpipe.ir.tensor import TensorMeta
from fxpipe.program import BoundaryTensor
from fxpipe.runtime.build.boundary import conform, message_layout, pack, receive_buffers
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.ranks.groups import Groups
from fxpipe.runtime.run.work import Job, Pass, Tensors, run_forward


def infer(
    stages: Sequence[StageModule],
    placement: Sequence[int],
    jobs: Sequence[Job],
    groups: Groups,
    device: torch.device,
    *,
    gather: bool,
) -> list[Tensors] | None:
    """Run all microbatches through this rank's stages, one stage after the other.

    All messages have one order, by stage and then by microbatch, and every rank posts its own in that order: nothing
    waits in a circle, whatever the placement and the number of microbatches.

    Args:
        stages: This rank's stages, ascending.
        placement: Position of the rank of each stage.
        jobs: The microbatches; all ranks have as many, of the same programs.
        groups: The pipeline's groups.
        device: Where received tensors go.
        gather: Whether every rank gets the outputs.

    Returns:
        The flat output tensors of each microbatch; None on ranks that do not get them.
    """
    passes = run_forwards(stages, placement, jobs, groups, device)
    source = placement[-1]
    outputs = None
    if groups.position == source:
        outputs = [work.outputs[: len(job.program.outputs)] for work, job in zip(passes, jobs, strict=True)]
    if not gather:
        return outputs
    with groups.waiting():
        return _broadcast(outputs, source, groups, device)


def run_forwards(
    stages: Sequence[StageModule],
    placement: Sequence[int],
    jobs: Sequence[Job],
    groups: Groups,
    device: torch.device,
) -> list[Pass]:
    """Run all microbatches through this rank's stages; arguments as of ``infer``.

    Returns:
        Each microbatch in this rank's last stage.
    """
    sends: list[dist.Work | None] = []
    passes: list[Pass] = []
    for stage in stages:
        local = [work.outputs for work in passes] or [()] * len(jobs)
        passes = _run_stage(stage, placement, jobs, groups, device, local, sends)
    with groups.waiting():
        _wait(sends)
    return passes


def _run_stage(
    stage: StageModule,
    placement: Sequence[int],
    jobs: Sequence[Job],
    groups: Groups,
    device: torch.device,
    local: Sequence[Tensors],
    sends: list[dist.Work | None],
) -> list[Pass]:
    """Run one stage; ``local`` is what the rank's stage before computed, and is taken if that is the stage before."""
    index = stage.stage_index
    from_rank = placement[index - 1] if index else groups.position
    to_rank = placement[index + 1] if index + 1 < len(placement) else groups.position
    waiting: list[tuple[list[dist.Work | None], Tensors]] = []
    for job in jobs if from_rank != groups.position else ():
        messages, tensors = receive_buffers(message_layout(job.program.stages[index].received), device)
        works = [dist.irecv(message, group=groups.pipeline, group_src=from_rank) for message in messages]
        waiting.append((works, tuple(tensors)))
    results: list[Pass] = []
    for number, job in enumerate(jobs):
        received = local[number] if index else ()
        if waiting:
            works, received = waiting[number]
            with groups.waiting():
                _wait(works)
        with groups.work(index, "F", number, stage):
            results.append(run_forward(stage, job, received, training=False))
        if to_rank != groups.position:
            for message in pack(message_layout(job.program.stages[index].sent), results[-1].outputs):
                sends.append(dist.isend(message, group=groups.pipeline, group_dst=to_rank))
    return results


def _wait(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:  # torch's type for a rank outside the group
            work.wait()


def _broadcast(outputs: list[Tensors] | None, source: int, groups: Groups, device: torch.device) -> list[Tensors]:
    """Give every rank the last stage's outputs; shapes first, since only the last stage knows them."""
    described: list[list[tuple[BoundaryTensor, ...]]] = [[]]
    if outputs is not None:
        described = [[tuple(map(_declared, flat)) for flat in outputs]]
    dist.broadcast_object_list(described, group=groups.control, group_src=source)
    everywhere: list[Tensors] = []
    for number, declared in enumerate(described[0]):
        layout = message_layout(declared)
        if outputs is not None:
            flat = tuple(conform(tensor, what) for tensor, what in zip(outputs[number], declared, strict=True))
            messages = pack(layout, flat)
        else:
            messages, tensors = receive_buffers(layout, device)
            flat = tuple(tensors)
        for message in messages:
            dist.broadcast(message, group=groups.pipeline, group_src=source)
        everywhere.append(flat)
    return everywhere


def _declared(tensor: torch.Tensor) -> BoundaryTensor:
    return BoundaryTensor("", TensorMeta(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
