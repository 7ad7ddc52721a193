"""``fxpipe.simulate``: from a plan, or from times of stages, to a simulated step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fxpipe.errors import PlanError
from fxpipe.ir.hardware import Hardware
from fxpipe.ir.orders import Order, orders_of
from fxpipe.ir.plan import PipelinePlan
from fxpipe.ir.schedule import live_sets, placement
from fxpipe.ir.simulation import Simulation
from fxpipe.ir.tensor import TensorMeta
from fxpipe.planning.simulation.engine import StageTimes, play


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What a rank's stages hold.

    Attributes:
        static: Bytes of each rank that do not depend on microbatches.
        per_live: Bytes of each stage per live microbatch.
    """

    static: tuple[int, ...]
    per_live: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reduction:
    """A sum of gradients over ranks when all of them are done.

    Attributes:
        ranks: The ranks that take part.
        seconds: How long it takes.
    """

    ranks: tuple[int, ...]
    seconds: float


def simulate(plan: PipelinePlan) -> Simulation:
    """Play one training step of a plan through: the actions of its schedule, on its ranks and links.

    A rank works in the order of the schedule; a message takes its link alone, and is overlapped with work as far as
    torch's engine overlaps it. Then tied gradients are added up. The optimiser is not part of it.

    Args:
        plan: Any plan with times, from ``fxpipe.compile`` or from JSON. Needs no torch.

    Returns:
        Time of the step, bubbles, live microbatches and memory of the ranks, and the whole time line. Linear in the
        number of actions: 256 ranks with 1,024 microbatches take seconds.

    Raises:
        PlanError: It is no plan, or a time in it is negative or not finite.
        ScheduleError: The plan's schedule cannot run its stages or microbatches.

    >>> from fxpipe.ir.plan import StagePlan
    >>> stages = tuple(StagePlan(i, i, (f"layer{i}",), forward_s=1.0, backward_s=2.0) for i in range(4))
    >>> done = simulate(PipelinePlan("Chain", "", stages, num_ranks=4, num_microbatches=8))
    >>> done.step_s, done.bubble[0], done.stage_peaks
    (33.0, 0.2727272727272727, (4, 3, 2, 1))
    """
    if not isinstance(plan, PipelinePlan):
        raise PlanError(
            f"simulate() got {type(plan).__name__}\n  pass a plan: pipe.plan, or PipelinePlan.from_json(text)"
        )
    times = times_of(plan)
    reductions = [
        Reduction(tuple(sorted({plan.stages[stage].rank for stage in tie.stages})), tie.seconds)
        for tie in plan.ties
        if tie.trainable and tie.seconds
    ]
    memory = StageMemory(_static(plan), tuple(stage.activation_bytes for stage in plan.stages))
    return simulate_stages(plan.schedule, times, plan.num_ranks, plan.num_microbatches, reductions, memory)


def times_of(plan: PipelinePlan) -> tuple[StageTimes, ...]:
    """Give the times of a plan's stages and messages."""
    replicas = plan.training.data_parallel
    times = []
    for stage, after in zip(plan.stages, (*plan.stages[1:], None), strict=True):
        send_s, return_s = 0.0, 0.0
        if after is not None and after.rank != stage.rank and plan.cost != "parameters":
            send_s, return_s = message_s(stage.sends, plan.hardware, stage.rank * replicas, after.rank * replicas)
        weight_s = stage.weight_grad_s
        times.append(StageTimes(stage.forward_s, stage.backward_s - weight_s, weight_s, send_s, return_s))
    return tuple(times)


def message_s(metas: Sequence[TensorMeta], hardware: Hardware, rank: int, other_rank: int) -> tuple[float, float]:
    """Give the seconds of sending tensors over a link, and of their gradients on the way back.

    >>> h100 = Hardware.preset("h100")
    >>> message_s((TensorMeta((45_000,), "float32", requires_grad=True), TensorMeta((9,), "int64")), h100, 0, 1)
    (1.0400160000000001e-05, 5.400000000000001e-06)
    """
    forward = [hardware.transfer_s(meta.nbytes, rank, other_rank) for meta in metas]
    back = [seconds for meta, seconds in zip(metas, forward, strict=True) if meta.requires_grad]
    return math.fsum(forward), math.fsum(back)


def simulate_stages(
    schedule: str,
    times: Sequence[StageTimes],
    num_ranks: int,
    num_microbatches: int,
    reductions: Sequence[Reduction] = (),
    memory: StageMemory | None = None,
    *,
    overlapped: bool = False,
) -> Simulation:
    """Simulate a step of stages of known times.

    Args:
        schedule: Name of the schedule.
        times: Seconds of each stage.
        num_ranks: Ranks that run them.
        num_microbatches: Microbatches of the step.
        reductions: Sums of gradients at the end, one after the other on each rank.
        memory: What stages hold; None: nothing.
        overlapped: Whether transfers hide behind work as papers assume it, rather than as torch's engine does.

    Returns:
        The whole simulation.

    Raises:
        PlanError: A time is negative or not finite.
        ScheduleError: The schedule cannot run so many stages or microbatches.
    """
    check_times(times, reductions)
    orders = orders_of(schedule, len(times), num_ranks, num_microbatches)
    ranks = placement(schedule, len(times), num_ranks)
    played = play(schedule, times, num_ranks, num_microbatches, overlapped=overlapped)
    step_s = _reduced(played.ends, reductions)
    busy_s = _busy(times, ranks, num_ranks, num_microbatches)
    memory = memory or StageMemory((0,) * num_ranks, (0,) * len(times))
    most, stage_peaks = _peaks(orders, len(times))
    return Simulation(
        schedule,
        num_microbatches,
        step_s,
        busy_s,
        tuple(1 - busy / step_s if step_s else 0.0 for busy in busy_s),
        most,
        stage_peaks,
        tuple(map(tuple, orders)),
        tuple(map(tuple, played.starts)),
        tuple((time.forward_s, time.input_grad_s, time.weight_grad_s) for time in times),
        memory.static,
        memory.per_live,
    )


def step_seconds(
    schedule: str,
    times: Sequence[StageTimes],
    num_ranks: int,
    num_microbatches: int,
    reductions: Sequence[Reduction] = (),
) -> float:
    """Give the seconds of a step and nothing else: what a search asks for again and again.

    Args:
        schedule: Name of the schedule.
        times: Seconds of each stage.
        num_ranks: Ranks that run them.
        num_microbatches: Microbatches of the step.
        reductions: Sums of gradients at the end.

    Raises:
        ScheduleError: The schedule cannot run so many stages or microbatches.

    >>> step_seconds("GPipe", [StageTimes(1, 1, 1)] * 4, 4, 8)
    33.0
    >>> step_seconds("ZBVZeroBubble", [StageTimes(1, 1, 1)] * 8, 4, 8)
    51.0
    """
    return _reduced(play(schedule, times, num_ranks, num_microbatches).ends, reductions)


def check_times(times: Sequence[StageTimes], reductions: Sequence[Reduction] = ()) -> None:
    """Raise unless every time is one.

    Raises:
        PlanError: Names the stage.
    """
    for index, stage in enumerate(times):
        for name in ("forward_s", "input_grad_s", "weight_grad_s", "send_s", "return_s"):
            seconds = getattr(stage, name)
            if not (math.isfinite(seconds) and seconds >= 0):
                raise PlanError(
                    f"{name} of stage {index} is {seconds!r}\n  a step is simulated from finite times >= 0; mend the "
                    "plan's seconds, or make the plan anew"
                )
    for reduction in reductions:
        if not (math.isfinite(reduction.seconds) and reduction.seconds >= 0):
            raise PlanError(
                f"adding up gradients of ranks {reduction.ranks} takes {reduction.seconds!r} s\n"
                "  a step is simulated from finite times >= 0"
            )


def _reduced(ends: Sequence[float], reductions: Sequence[Reduction]) -> float:
    """Add up gradients one after the other on each rank, in one order for all; gives when everything is done."""
    ends = list(ends)
    for reduction in reductions:
        end = max(ends[rank] for rank in reduction.ranks) + reduction.seconds
        for rank in reduction.ranks:
            ends[rank] = end
    return max(ends)


def _busy(
    times: Sequence[StageTimes], ranks: Sequence[int], num_ranks: int, num_microbatches: int
) -> tuple[float, ...]:
    own: list[list[float]] = [[] for _ in range(num_ranks)]
    for stage, rank in zip(times, ranks, strict=True):
        own[rank].append(stage.compute_s * num_microbatches)
    return tuple(map(math.fsum, own))


def _peaks(orders: Sequence[Order], num_stages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Count what is alive, from a forward to the backward, or the weight gradients, of the same microbatch.

    Returns:
        Most activations of each rank, and of each stage.
    """
    alive, peaks, most = [0] * num_stages, [0] * num_stages, []
    for order in orders:
        total = largest = 0
        for stage, kind, _ in order:
            if kind == "F":
                alive[stage] += 1
                total += 1
                if alive[stage] > peaks[stage]:
                    peaks[stage] = alive[stage]
                if total > largest:
                    largest = total
            elif kind != "I":
                alive[stage] -= 1
                total -= 1
        most.append(largest)
    return tuple(most), tuple(peaks)


def _static(plan: PipelinePlan) -> tuple[int, ...]:
    """Give what each rank of a plan holds without microbatches: its most, less what it keeps for them then."""
    most = [0] * plan.num_ranks
    own: list[list[int]] = [[] for _ in most]
    for stage in plan.stages:
        most[stage.rank] += stage.peak_bytes
        own[stage.rank].append(stage.activation_bytes)
    sets = live_sets(plan.schedule, plan.num_stages, plan.num_ranks, plan.num_microbatches)
    return tuple(
        max(peak - max(sum(n * size for n, size in zip(entry, sizes, strict=True)) for entry in entries), 0)
        for peak, sizes, entries in zip(most, own, sets, strict=True)
    )
