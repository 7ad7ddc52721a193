"""What limits a step, and which change would help most: each change is made to the plan and simulated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from fxpipe.errors import ScheduleError
from fxpipe.ir.plan import PipelinePlan, StagePlan
from fxpipe.ir.schedule import SCHEDULES, check_microbatches, default_ranks, placement
from fxpipe.ir.simulation import Change, Explanation, Simulation
from fxpipe.planning.simulation.engine import StageTimes
from fxpipe.planning.simulation.simulate import Reduction, simulate, step_seconds, times_of

NOTICED = 0.005  # share of the time of a microbatch below which a change is not worth a line


EXPLAINED = 20_000
"""Stages times microbatches up to which a report is explained: that takes a dozen simulations."""


def explain(plan: PipelinePlan, simulation: Simulation | None = None) -> Explanation:
    """Say what limits a plan's step, and which of some changes help.

    Tried are: one more round of microbatches, every other schedule that can run these stages, links that cost nothing,
    no recomputation (where there is some), stages of equal time, and, where the head cannot be split, its vocabulary
    over all ranks (arXiv 2411.05288).

    Args:
        plan: The plan.
        simulation: Its step, where that is known.

    Returns:
        The limit, and changes with their simulated gains.

    >>> stages = tuple(StagePlan(i, i, (f"l{i}",), forward_s=1.0, backward_s=2.0) for i in range(4))
    >>> print(explain(PipelinePlan("Chain", "", stages, num_ranks=4, num_microbatches=8)).line)
    limited by the bubble; 4 more microbatches of this size would save 9.1 %
    """
    done = simulation or simulate(plan)
    times = times_of(plan)
    reductions = _reductions(plan)
    slowest = max(range(plan.num_ranks), key=lambda rank: done.busy_s[rank])
    free = [replace(time, send_s=0.0, return_s=0.0) for time in times]
    unlinked_s = _step_s(plan, free, [])
    links = 1 - unlinked_s / done.step_s if done.step_s else 0.0
    compute = done.busy_s[slowest] / done.step_s if done.step_s else 1.0
    idle = max(1 - compute - links, 0.0)
    changes = [change for change in _changes(plan, times, reductions, done, links) if change.gain > NOTICED]
    changes.sort(key=lambda change: -change.gain)
    return Explanation(_limit(plan, done, slowest, links, idle), (compute, links, idle), tuple(changes))


def advice_of(plan: PipelinePlan, simulation: Simulation) -> Explanation | None:
    """Give what a report says of a step; None for a plan so large that the dozen simulations would take long.

    Args:
        plan: The plan.
        simulation: Its step.
    """
    if plan.num_stages * plan.num_microbatches > EXPLAINED:
        return None
    return explain(plan, simulation)


def _limit(plan: PipelinePlan, done: Simulation, slowest: int, links: float, idle: float) -> str:
    mean = math.fsum(done.busy_s) / len(done.busy_s)
    uneven = 1 - mean / done.busy_s[slowest] if done.busy_s[slowest] else 0.0
    causes = {"the bubble": idle, "links": links, "uneven stages": uneven}
    cause = max(causes, key=lambda name: causes[name])
    own = [stage.index for stage in plan.stages if stage.rank == slowest]
    where = f"stage{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}"
    if plan.memory_limit is not None and "memory" in plan.limited_by:
        return f"the memory limit, at {where}"
    if causes[cause] < 0.05 or cause == "uneven stages":
        return where
    return cause


def _changes(
    plan: PipelinePlan, times: tuple[StageTimes, ...], reductions: list[Reduction], done: Simulation, links: float
) -> Iterator[Change]:
    count = plan.num_microbatches
    more = count + plan.num_ranks
    try:
        each = _step_s(replace(plan, num_microbatches=more), times, reductions) / more
        size = (("batch", more * plan.microbatch_size),) if plan.microbatch_size else ()
        options = (*size, ("microbatches", more))
        yield Change(f"{plan.num_ranks} more microbatches of this size", 1 - each * count / done.step_s, options)
    except ScheduleError:
        pass
    for name in SCHEDULES:
        if name == plan.schedule or (SCHEDULES[name].splits_backward and any(s.recompute for s in plan.stages)):
            continue
        try:
            ranks = placement(name, plan.num_stages, plan.num_ranks)
            check_microbatches(name, plan.num_stages, plan.num_ranks, count)
        except ScheduleError:
            continue
        stages = tuple(replace(stage, rank=rank) for stage, rank in zip(plan.stages, ranks, strict=True))
        other = replace(plan, schedule=name, stages=stages)
        gain = 1 - _step_s(other, times_of(other), reductions) / done.step_s
        usual = default_ranks(name, plan.num_stages) == plan.num_ranks
        yield Change(f"schedule {name}", gain, (("schedule", name), ("ranks", None if usual else plan.num_ranks)))
    yield Change("links that cost nothing", links)
    if any(stage.recompute for stage in plan.stages):
        gain = 1 - _step_s(plan, _without_recompute(plan, times), reductions) / done.step_s
        yield Change("no recomputation", gain, (("recompute", None),))
    even = _evened(times)
    yield Change("stages of equal time", 1 - _step_s(plan, even, reductions) / done.step_s)
    split = split_vocabulary(plan, times)
    if split is not None:
        name, spread = split
        yield Change(
            f"the vocabulary of {name} split over the ranks (not built yet)",
            1 - _step_s(plan, spread, reductions) / done.step_s,
        )


def _step_s(plan: PipelinePlan, times: tuple[StageTimes, ...] | list[StageTimes], reductions: list[Reduction]) -> float:
    return step_seconds(plan.schedule, times, plan.num_ranks, plan.num_microbatches, reductions)


def _reductions(plan: PipelinePlan) -> list[Reduction]:
    ties = [tie for tie in plan.ties if tie.trainable and tie.seconds]
    return [Reduction(tuple(sorted({plan.stages[s].rank for s in tie.stages})), tie.seconds) for tie in ties]


def _evened(times: tuple[StageTimes, ...]) -> list[StageTimes]:
    """Give every stage the mean of all."""
    parts = [(time.forward_s, time.input_grad_s, time.weight_grad_s) for time in times]
    mean = [math.fsum(column) / len(times) for column in zip(*parts, strict=True)]
    return [replace(time, forward_s=mean[0], input_grad_s=mean[1], weight_grad_s=mean[2]) for time in times]


def _without_recompute(plan: PipelinePlan, times: tuple[StageTimes, ...]) -> list[StageTimes]:
    """Take the recomputed forwards out of the backwards: the share of a stage's blocks that recompute."""
    return [
        replace(time, input_grad_s=max(time.input_grad_s - stage.recompute_s, 0.0))
        for stage, time in zip(plan.stages, times, strict=True)
    ]


def split_vocabulary(plan: PipelinePlan, times: tuple[StageTimes, ...]) -> tuple[str, list[StageTimes]] | None:
    """Spread the head and the loss over all ranks, as if their vocabulary were split; None where they limit nothing.

    The seconds of head and loss go in equal parts to every rank; what the ranks then have to exchange (a maximum and a
    sum per token, and the hidden state to all) is taken as hidden. After arXiv 2411.05288, vocabulary parallelism.
    """
    last: StagePlan = plan.stages[-1]
    head = last.head_s
    mean = math.fsum(time.compute_s for time in times) / plan.num_ranks
    own = math.fsum(times[stage.index].compute_s for stage in plan.stages if stage.rank == last.rank)
    if not head or own <= mean * (1 + NOTICED) or plan.num_ranks < 2:
        return None
    forward_s, backward_s = head[0], head[1]
    spread = [
        replace(
            time,
            forward_s=time.forward_s + forward_s / plan.num_stages,
            input_grad_s=time.input_grad_s + backward_s / plan.num_stages,
        )
        for time in times
    ]
    spread[-1] = replace(
        times[-1],
        forward_s=max(times[-1].forward_s - forward_s, 0.0) + forward_s / plan.num_stages,
        input_grad_s=max(times[-1].input_grad_s - backward_s, 0.0) + backward_s / plan.num_stages,
    )
    return last.head, spread
