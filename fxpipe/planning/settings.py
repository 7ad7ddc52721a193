"""What a plan depends on besides the graph and its costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fxpipe.errors import ScheduleError
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.schedule import SCHEDULES, check_microbatches, live_microbatches, live_sets, placement, schedule_named
from fxpipe.planning.search.problem import Placement

GRAINS = ("block", "op", "auto")
DEVICE_SHARE = 0.92
"""Share of a device's memory that a plan may take: the rest is for the runtime's context, kernels' workspaces, the
buffers of collectives, and memory that is free but in pieces."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user asked for, checked: everything a plan depends on besides the graph and its costs.

    ``Settings.of`` fills in what follows from the schedule.
    """

    stages: int
    ranks: int
    schedule: str
    rank_of_stage: tuple[int, ...]
    live_microbatches: tuple[int, ...]
    num_microbatches: int
    hardware: Hardware
    training: Training
    cost: str
    grain: str
    opened: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    memory_limit: int | None = None
    seed: int = 0

    @classmethod
    def of(
        cls,
        *,
        stages: int,
        ranks: int,
        schedule: str,
        num_microbatches: int,
        hardware: Hardware,
        training: Training,
        cost: str = "roofline",
        grain: str = "auto",
        leaves: tuple[str, ...] = (),
        memory_limit: int | None = None,
        seed: int = 0,
    ) -> Settings:
        """Check that schedule, stages, ranks, microbatches and recomputation fit, and place the stages.

        Raises:
            ScheduleError: They do not fit together.
        """
        check_recompute(schedule, training)
        rank_of_stage = placement(schedule, stages, ranks)
        check_microbatches(schedule, stages, ranks, num_microbatches)
        return cls(
            stages=stages,
            ranks=ranks,
            schedule=schedule,
            rank_of_stage=rank_of_stage,
            live_microbatches=live_microbatches(schedule, stages, ranks, num_microbatches),
            num_microbatches=num_microbatches,
            hardware=hardware,
            training=training,
            cost=cost,
            grain=grain,
            leaves=leaves,
            memory_limit=memory_limit,
            seed=seed,
        )

    def changed(
        self,
        *,
        stages: int | None = None,
        ranks: int | None = None,
        schedule: str | None = None,
        training: Training | None = None,
    ) -> Settings:
        """Give the settings for another number of stages or ranks, another schedule or another way of training.

        Raises:
            ScheduleError: They do not fit together.
        """
        return Settings.of(
            stages=self.stages if stages is None else stages,
            ranks=self.ranks if ranks is None else ranks,
            schedule=self.schedule if schedule is None else schedule,
            num_microbatches=self.num_microbatches,
            hardware=self.hardware,
            training=self.training if training is None else training,
            cost=self.cost,
            grain=self.grain,
            leaves=self.leaves,
            memory_limit=self.memory_limit,
            seed=self.seed,
        )

    def without_limit(self) -> Settings:
        """Give the settings without a memory limit."""
        return replace(self, memory_limit=None)

    def global_rank(self, rank: int) -> int:
        """Give the number of the first replica's rank among all accelerators, node by node.

        Replicas of one stage are neighbours, so stages lie ``data_parallel`` accelerators apart.
        """
        return rank * self.training.data_parallel

    def link(self, stage: int) -> tuple[float, float]:
        """Give bandwidth (bytes/s) and latency (s) of the link from a stage to the next."""
        ranks = [self.global_rank(self.rank_of_stage[index]) for index in (stage, stage + 1)]
        return self.hardware.link(*ranks)

    @property
    def near_link(self) -> tuple[float, float]:
        """Bandwidth and latency within a node."""
        return self.hardware.link_bandwidth, self.hardware.link_latency

    @property
    def far_link(self) -> tuple[float, float]:
        """Bandwidth and latency of the boundaries that lie between nodes; as within a node where there are none."""
        links = {self.link(stage) for stage in range(self.stages - 1)} - {self.near_link}
        return max(links, key=lambda link: (-link[0], link[1]), default=self.near_link)

    @property
    def placement(self) -> Placement:
        """Where stages run, what they keep alive, and which links are slower than those within a node."""
        return Placement(
            self.rank_of_stage,
            live_sets(self.schedule, self.stages, self.ranks, self.num_microbatches),
            tuple(self.link(stage) != self.near_link for stage in range(self.stages - 1)),
        )


def device_limit(hardware: Hardware) -> int | None:
    """Give the bytes of a device that a plan may take; None where its memory is not bounded.

    >>> device_limit(Hardware.preset("h100"))
    73600000000
    """
    return None if math.isinf(hardware.memory) else math.floor(hardware.memory * DEVICE_SHARE)


def check_recompute(schedule: str, training: Training) -> None:
    """Raise where activation checkpointing would be recomputed many times; ``"auto"`` then chooses none.

    Raises:
        ScheduleError: The schedule splits the backward, and modules are to be recomputed.
    """
    if training.recompute not in (None, "auto") and schedule_named(schedule).splits_backward:
        whole = ", ".join(name for name, known in SCHEDULES.items() if not known.splits_backward)
        raise ScheduleError(
            f"{schedule} splits the backward: recompute={training.recompute!r} would run the forward of a block once "
            f"for each group of its parameters\n  use {whole}, or recompute=None"
        )
