"""The first meeting of a pipeline's ranks: they compare what they are about to run, then make their groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch.distributed.device_mesh import DeviceMesh

from fxpipe.errors import ScheduleError
from fxpipe.ir.plan import PipelinePlan
from fxpipe.runtime.ranks.agreement import agree_first
from fxpipe.runtime.ranks.dimensions import dimensions
from fxpipe.runtime.ranks.groups import Groups, make_groups, start_process_group, stop_process_group
from fxpipe.runtime.ranks.meeting import meeting
from fxpipe.runtime.ranks.place import is_distributed, versions


def join_ranks(
    mesh: DeviceMesh | None,
    plan: PipelinePlan,
    device: torch.device,
    timeout: timedelta,
    same: Mapping[str, object],
    error: Exception | None,
) -> tuple[Groups | None, bool]:
    """Meet the other ranks, if there are any.

    Args:
        mesh: The user's, checked; None: all ranks are one pipeline.
        plan: What is run.
        device: Where this rank's stages run.
        timeout: How long a rank waits for another one.
        same: What must be the same on all ranks besides the plan, by what it is.
        error: What is wrong on this rank already: the others are told.

    Returns:
        The groups, None where one process holds all, and whether the process group was started here.

    Raises:
        FxpipeError: On every rank alike; ``error``, or what differs.
        RankError: Another rank did not come.
    """
    if not is_distributed():
        if error is not None:
            raise error
        return None, False
    with meeting("materialize", timeout, error) as met:
        started = start_process_group(device, timeout)
        met.start()
        planned = {**plan.described, "its fingerprint": plan.fingerprint}
        within = {"the versions of libraries": versions(), **same}
        agree_first(error, planned, within, lambda value: met.compare(value, device))
        return _groups(mesh, plan, device, timeout), started


@contextmanager
def closed_on_failure(groups: Groups | None, started: bool) -> Iterator[None]:
    """End the groups where nothing is made that could be closed later: the script may try again."""
    try:
        yield
    except BaseException:
        if groups is not None:
            groups.close()
            if started:
                stop_process_group()
        raise


def _groups(mesh: DeviceMesh | None, plan: PipelinePlan, device: torch.device, timeout: timedelta) -> Groups:
    found = dimensions(mesh)
    size = len(found.pipelines[0])
    if size != plan.num_ranks:
        raise ScheduleError(
            f"the plan is for {plan.num_ranks} ranks, but {size} processes were started\n"
            f"  use torchrun --nproc-per-node {plan.num_ranks}, or compile with {_stages_for(plan, size)}"
        )
    placement = {stage.index: stage.rank for stage in plan.stages}
    ties = [[placement[stage] for stage in tie.stages] for tie in plan.ties]
    return make_groups(found.pipelines, ties, device, timeout, replicas=found.replicas, unions=found.unions)


def _stages_for(plan: PipelinePlan, ranks: int) -> str:
    per_rank = plan.num_stages // plan.num_ranks
    return f"stages={ranks * per_rank}" if per_rank == 1 else f"stages={ranks * per_rank}, ranks={ranks}"
