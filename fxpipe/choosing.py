"""What ``compile`` was asked to choose itself: schedule, microbatches, stages; tried by simulation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tqdm import tqdm

from fxpipe.batch.dims import BatchDims, Microbatch
from fxpipe.batch.example import split_example
from fxpipe.capture.calls.counting import LayerCounter
from fxpipe.capture.capture import Capture
from fxpipe.errors import PartitionError, ScheduleError
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.plan import PipelinePlan
from fxpipe.ir.profile import Profile
from fxpipe.ir.schedule import schedule_named
from fxpipe.planning.configurations import (
    Configuration,
    Cuts,
    Outcome,
    explain_choice,
    fewest_stages,
    microbatch_counts,
    none_fits,
    ordered,
    outcome,
    shapes,
    sharpened,
)
from fxpipe.planning.costs.estimate import Estimate, estimate_costs
from fxpipe.planning.settings import device_limit

MOST_STAGES = 128  # tried for the fewest stages that fit


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for; ``None`` where it is to be chosen.

    Attributes:
        stages: Number of stages.
        ranks: Number of ranks; None also where it follows from the stages.
        schedule: Name of the schedule.
        microbatches: Number of microbatches; 0: by the rule of ``compile``.
        limit: Bytes of each rank; None: none was given, and the device's are kept if anything fits them.
    """

    stages: int | None
    ranks: int | None
    schedule: str | None
    microbatches: int | None
    limit: int | None

    @classmethod
    def of(
        cls,
        *,
        stages: int | str,
        ranks: int | None,
        schedule: str,
        microbatches: int | str | None,
        limit: int | None,
    ) -> Asked:
        """Read the arguments of ``compile``, where ``"auto"`` stands for what is to be chosen."""
        return cls(
            None if isinstance(stages, str) else stages,
            ranks,
            None if schedule == "auto" else schedule_named(schedule).name,
            None if isinstance(microbatches, str) else microbatches or 0,
            limit,
        )

    @property
    def open(self) -> tuple[str, ...]:
        """What is to be chosen, in words."""
        values = (("schedule", self.schedule), ("stages", self.stages), ("microbatches", self.microbatches))
        return tuple(name for name, value in values if value is None)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen.

    Attributes:
        stages: Number of stages.
        ranks: Number of ranks.
        schedule: Name of the schedule.
        num_microbatches: Microbatches of a step.
        limit: Bytes of each rank that the plan must keep; None where it fits without being told.
    """

    stages: int
    ranks: int
    schedule: str
    num_microbatches: int
    limit: int | None


class Chooser:
    """Captures a model at block grain once for each size of microbatch, and tries configurations."""

    def __init__(
        self,
        capture: Capture,
        example: Microbatch | None,
        dims: BatchDims,
        cost: str | Mapping[str, float] | Profile,
        hardware: Hardware,
        training: Training,
    ) -> None:
        if example is None:
            raise ScheduleError(
                'a configuration cannot be chosen without an example batch\n  pass example_args, or no "auto"'
            )
        if cost == "parameters":
            raise ScheduleError('cost="parameters" has no times to choose by\n  use another cost, or no "auto"')
        self._capture, self._example, self._cost = capture, example, "roofline" if cost == "profile" else cost
        self._hardware, self._training = hardware, training
        self._counter = LayerCounter(capture.skeleton, fused_attention=hardware.device != "cpu")
        self._cost_name = self._cost if isinstance(self._cost, str) else "given"
        self._cuts: Cuts = {}
        self._known: dict[int, tuple[LayerGraph, Estimate]] = {}
        self._dims = dims
        self.batch = dims.layout(example, split=False).size

    def offer(self, num_microbatches: int) -> tuple[LayerGraph, Estimate]:
        """Give graph and seconds of one of so many microbatches."""
        if num_microbatches not in self._known:
            cut = split_example(
                self._example, stages=1, ranks=1, schedule="GPipe", microbatches=num_microbatches, dims=self._dims
            )
            inputs = self._capture.inputs(*cut.first, cut.layout)
            captured = self._capture.capture(inputs, grain="block", counter=self._counter, weigh=False)
            graph = self._capture.layer_graph(captured, batch_size=cut.layout.size)
            training = replace(self._training, recompute=None)
            self._known[num_microbatches] = graph, estimate_costs(graph, self._cost, self._hardware, training)
        return self._known[num_microbatches]

    def choose(self, asked: Asked) -> tuple[Chosen, Callable[[PipelinePlan], str]]:
        """Choose what was left open.

        Args:
            asked: What is given.

        Returns:
            What is chosen, and what gives a line that explains it with the runners-up, from the plan made of it.

        Raises:
            InfeasibleError: Nothing fits.
            PartitionError: Nothing can be planned.
        """
        limit = asked.limit if asked.limit is not None else device_limit(self._hardware)
        if asked.stages is None and asked.ranks is None:
            found = fewest_stages(min(MOST_STAGES, len(self.offer(1)[0].specs)), self._on_ranks(asked, limit))
        else:
            found = sharpened(self._tried(asked, limit), self.offer)
        best = next((each for each in found if each.fits), None)
        if best is None and asked.limit is None and found and found[0].plan is not None:
            best = found[0]  # no limit was given: the report warns
        if best is None:
            raise none_fits(found, self._hardware) if found else PartitionError(_nothing(asked, self.batch))
        assert best.plan is not None
        made = best.configuration
        keeps = asked.limit if asked.limit is not None else best.plan.memory_limit
        chosen = Chosen(made.stages, made.ranks, made.schedule, made.num_microbatches, keeps)
        return chosen, lambda plan: explain_choice(best, found, asked.open, plan)

    def _on_ranks(self, asked: Asked, limit: int | None) -> Callable[[int], Outcome | None]:
        def best(ranks: int) -> Outcome | None:
            found = ordered(self._tried(replace(asked, ranks=ranks), limit))
            return next(iter(sharpened(found, self.offer) if found and found[0].fits else found), None)

        return best

    def _tried(self, asked: Asked, limit: int | None) -> list[Outcome]:
        wanted = []
        for stages, ranks, schedule in shapes(stages=asked.stages, ranks=asked.ranks, schedule=asked.schedule):
            if asked.microbatches is None:
                counts = microbatch_counts(self.batch, stages, ranks, schedule)
            else:
                counts = self._count(stages, ranks, schedule, asked.microbatches)
            training = self._training
            wanted += [Configuration(stages, ranks, schedule, count, training) for count in counts]
        bar = tqdm(wanted, desc="simulating configurations", leave=False, disable=not sys.stderr.isatty())
        offer, hardware, cost = self.offer, self._hardware, self._cost_name
        return [outcome(configuration, offer, hardware, limit, cost, self._cuts) for configuration in bar]

    def _count(self, stages: int, ranks: int, schedule: str, asked: int) -> list[int]:
        try:
            cut = split_example(
                self._example,
                stages=stages,
                ranks=ranks,
                schedule=schedule,
                microbatches=asked or None,
                dims=self._dims,
            )
        except ScheduleError:
            return []
        return [cut.number]


def _nothing(asked: Asked, batch: int) -> str:
    return (
        f"no schedule can run a batch of {batch} on {asked.stages or 'any'} stages and {asked.ranks or 'any'} ranks\n"
        "  give other stages, ranks or microbatches, or a larger batch"
    )
