"""What the microbatches of a step must suit, and the cut that suits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxpipe.batch.example import as_microbatch
from fxpipe.batch.microbatches import fit_microbatches
from fxpipe.batch.split import Microbatch, batch_size_of, split_batch
from fxpipe.ir.schedule import check_microbatches


@dataclass(frozen=True, slots=True)
class Order:
    """What a step's microbatches must suit.

    Attributes:
        schedule: torch's name.
        stages: Number of stages.
        ranks: Number of ranks.
        microbatches: The plan's number of microbatches.
        microbatch_size: Samples of each in the plan; None without an example.
    """

    schedule: str
    stages: int
    ranks: int
    microbatches: int
    microbatch_size: int | None

    def split(self, batch: Microbatch | None, ready: Sequence[Any] | None) -> list[Microbatch]:
        """Cut a batch, or take ready-split microbatches.

        Args:
            batch: The whole batch; None where ``ready`` is given.
            ready: Ready-split microbatches, which may differ in shape.

        Raises:
            ScheduleError: The batch cannot be cut for the schedule, or there are too few microbatches for it.
        """
        if ready is not None:
            parts = [as_microbatch(part) for part in ready]
            check_microbatches(self.schedule, self.stages, self.ranks, len(parts))
            return parts
        assert batch is not None
        size = batch_size_of(*batch)
        number = self.microbatches
        if self.microbatch_size is None or size != self.microbatches * self.microbatch_size:
            number = fit_microbatches(size, self.stages, self.ranks, self.schedule, self.microbatches)
        return split_batch(*batch, num_microbatches=number, batch_size=size)
