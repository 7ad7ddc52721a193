"""What every form of the report says in words and numbers: headline, balance, memory of ranks, warnings."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from fxpipe.ir.plan import PipelinePlan, StagePlan, TieGroup
from fxpipe.ir.units import ranges_text, seconds_text, size_text

BASELINES = "The same model cut by others' rules, at the same costs and links"


@dataclass(frozen=True, slots=True)
class Memory:
    """What fills a stage's or a rank's memory at its fullest, in bytes.

    Attributes:
        weights: Weights.
        gradients: Gradients as they accumulate.
        optimizer: State of the optimiser, master weights.
        activations: Activations of the live microbatches, buffers and whatever else.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_of(stage: StagePlan) -> Memory:
    """Split a stage's most memory into what fills it.

    >>> memory_of(StagePlan(0, 0, (), bytes=10, peak_bytes=100, gradient_bytes=20, optimizer_bytes=30)).activations
    40
    """
    held = stage.bytes + stage.gradient_bytes + stage.optimizer_bytes
    return Memory(stage.bytes, stage.gradient_bytes, stage.optimizer_bytes, max(stage.peak_bytes - held, 0))


def headline(plan: PipelinePlan) -> str:
    """Say what is planned, in one line."""
    size = f" of {plan.microbatch_size}" if plan.microbatch_size is not None else ""
    ranks = [counted(plan.num_ranks, "rank")] if plan.num_ranks != plan.num_stages else []
    return " · ".join(
        [
            plan.model,
            counted(plan.num_stages, "stage"),
            *ranks,
            plan.schedule,
            counted(plan.num_microbatches, "microbatch", "microbatches") + size,
            plan.hardware.name,
            f"cost: {plan.cost}",
        ]
    )


def mean_load(plan: PipelinePlan) -> float:
    """Give the mean load of the ranks, in seconds."""
    return sum(stage.seconds for stage in plan.stages) / max(len({stage.rank for stage in plan.stages}), 1)


def slowest_load(plan: PipelinePlan) -> float:
    """Give the load of the slowest rank, in seconds."""
    if plan.bottleneck:
        return plan.bottleneck
    loads: dict[int, float] = defaultdict(float)
    for stage in plan.stages:
        loads[stage.rank] += stage.seconds
    return max(loads.values())


def balance(plan: PipelinePlan) -> float:
    """Give the slowest rank's load over the mean; 1 is perfect."""
    mean = mean_load(plan)
    return slowest_load(plan) / mean if mean else 1.0


def memory_by_rank(plan: PipelinePlan) -> dict[int, int]:
    """Give the most bytes of each rank."""
    per_rank: dict[int, int] = defaultdict(int)
    for stage in plan.stages:
        per_rank[stage.rank] += stage.peak_bytes
    return per_rank


def notes(plan: PipelinePlan) -> list[str]:
    """Give warnings, and what was noted while planning."""
    per_rank = memory_by_rank(plan)
    too_much = [rank for rank, need in sorted(per_rank.items()) if need > plan.hardware.memory]
    warnings = []
    if too_much:
        who = f"rank {too_much[0]} needs" if len(too_much) == 1 else f"ranks {ranges_text(too_much)} need up to"
        warnings.append(
            f"{who} {size_text(max(per_rank[rank] for rank in too_much))}, and a {plan.hardware.name} has "
            f"{size_text(plan.hardware.memory)}: use more stages, smaller microbatches or memory_limit"
        )
    empty = [
        f"stage {stage.index} has no parameters: no possible partition into so many gives each some"
        for stage in plan.stages
        if not stage.parameters
    ]
    return [*warnings, *empty, *plan.notes]


def tie_names(tie: TieGroup) -> str:
    """Name a tie's tensor by its FQNs."""
    shown = " = ".join(tie.fqns[:3]) + (f" = … ({len(tie.fqns)} names)" if len(tie.fqns) > 3 else "")
    return shown if len(tie.fqns) > 1 else f"{shown} (called at several places)"


def tie_price(tie: TieGroup) -> str:
    """Say what keeping a tie's copies equal costs in a step."""
    if len(tie.stages) < 2:
        return "one copy"
    if not tie.trainable:
        return "frozen"
    return f"all-reduce {seconds_text(tie.seconds)}"


def counted(number: int, one: str, many: str | None = None) -> str:
    """Join a number and its noun.

    >>> counted(1, "stage"), counted(2, "stage"), counted(3, "microbatch", "microbatches")
    ('1 stage', '2 stages', '3 microbatches')
    """
    return f"{number} {one if number == 1 else many or one + 's'}"
