"""What the microbatches of a step must suit, and the cut that suits it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fxpipe.batch.dims import BatchDims, BatchLayout, Microbatch
from fxpipe.batch.example import as_microbatch, out_of_inference, with_own_target
from fxpipe.batch.microbatches import fit_microbatches
from fxpipe.batch.split import check_ready_split, cut
from fxpipe.errors import ScheduleError
from fxpipe.ir.plan import PipelinePlan
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
        dims: Where samples lie in a batch.
        own_target: Whether the model, and no loss function, takes what is called ``target``.
    """

    schedule: str
    stages: int
    ranks: int
    microbatches: int
    microbatch_size: int | None
    dims: BatchDims = field(default_factory=BatchDims)
    own_target: bool = False

    @classmethod
    def of(cls, plan: PipelinePlan, dims: BatchDims, *, own_target: bool = False) -> Order:
        """Give what the steps of a plan must suit."""
        numbers = plan.num_stages, plan.num_ranks, plan.num_microbatches, plan.microbatch_size
        return cls(plan.schedule, *numbers, dims, own_target)

    def split(
        self, batch: Microbatch | None, ready: Sequence[Any] | None
    ) -> tuple[list[Microbatch], list[BatchLayout]]:
        """Cut a batch, or take ready-split microbatches.

        Args:
            batch: The whole batch; None where ``ready`` is given.
            ready: Ready-split microbatches, which may differ in shape.

        Returns:
            The microbatches, and where the samples of each lie.

        Raises:
            ScheduleError: The batch cannot be cut for the schedule, or there are too few microbatches for it.
        """
        if ready is not None:
            if not isinstance(ready, Iterable):
                raise ScheduleError(
                    f"microbatches is a {type(ready).__name__}\n  pass a list of ready-split ones: microbatches=[...]"
                )
            parts = [out_of_inference(as_microbatch(part)) for part in ready]
            parts = [with_own_target(part) for part in parts] if self.own_target else parts
            check_ready_split(parts, self.dims)
            check_microbatches(self.schedule, self.stages, self.ranks, len(parts))
            return parts, [self.dims.layout(part, split=False) for part in parts]
        assert batch is not None
        layout = self.dims.layout(batch, split=False)
        size = layout.size
        number = self.microbatches
        if self.microbatch_size is None or size != self.microbatches * self.microbatch_size:
            number = fit_microbatches(size, self.stages, self.ranks, self.schedule, self.microbatches)
        if number > 1:
            layout.check_clear()
        return cut(batch, layout, number, self.dims), [replace(layout, size=size // number)] * number


def check_call(
    batch: Microbatch, ready: Sequence[Any] | None, *, needs_target: bool, first: Sequence[str] = ()
) -> None:
    """Refuse a batch given twice or not at all, and a target that is missing or that nothing takes.

    Args:
        batch: What the call got.
        ready: Its ready-split microbatches.
        needs_target: Whether a loss function compares with one.
        first: Paths of the tensors that were split in the example.

    Raises:
        ScheduleError: Says how to call ``step``.
    """
    args, kwargs, target = batch
    if ready is not None:
        if args or kwargs or target is not None:
            raise ScheduleError(
                "step got a batch and microbatches=[...]\n  pass one of them, targets within the microbatches"
            )
        return
    if first and not args and not kwargs and target is None:
        raise ScheduleError(f"step got no batch\n  pass one as in the example, which had {', '.join(first)}")
    if needs_target and target is None:
        raise ScheduleError("step got no target for loss_fn\n  pass it by name: pipe.step(inputs, target=targets)")
    if not needs_target and target is not None:
        raise ScheduleError(
            "step got a target, but the pipeline was compiled without a loss_fn that takes one\n"
            "  compile with loss_fn=, or pass the model's own argument (labels=)"
        )
