"""Whole configurations, each planned at block grain and simulated: which of them is the fastest that fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from fxpipe.errors import FxpipeError, InfeasibleError, PartitionError, ScheduleError
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.plan import PipelinePlan
from fxpipe.ir.schedule import SCHEDULES, fits_microbatches, placement, schedule_named
from fxpipe.ir.units import seconds_text, size_text
from fxpipe.planning.costs.estimate import Estimate
from fxpipe.planning.costs.recompute import recomputed_modules
from fxpipe.planning.fastest import Shortlist
from fxpipe.planning.fit import choices_of, lay_out
from fxpipe.planning.plan import make_plan
from fxpipe.planning.recut import recut
from fxpipe.planning.settings import Settings
from fxpipe.planning.simulation.simulate import simulate
from fxpipe.planning.solve import solve

SHOWN = 4  # runners-up in one line
SHARPENED = 6  # configurations that are cut again, as many as a budget shows
MOST_SHARPENED, NEAR = 12, 0.25  # so many, as long as they are no more than this share behind the best
MOST_COUNTS = 6  # numbers of microbatches that are tried

Offer = Callable[[int], tuple[LayerGraph, Estimate]]
"""Gives the counted graph and its seconds, without recomputation, for a number of microbatches."""

Cuts = dict[tuple[object, ...], tuple[int, ...]]
"""Stage of each node, by graph and number of stages."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a pipeline could be.

    Attributes:
        stages: Number of stages.
        ranks: Ranks of the pipeline.
        schedule: Name of the schedule.
        num_microbatches: Microbatches of a step.
        training: Recomputation, replicas, sharding.
    """

    stages: int
    ranks: int
    schedule: str
    num_microbatches: int
    training: Training = field(default_factory=Training)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a configuration.

    Attributes:
        configuration: Which one.
        plan: Its plan; None where there is none.
        step_s: Seconds of the simulated step.
        bubble: Mean idle share of the ranks.
        peak_bytes: Most memory of a rank.
        limit: Bytes of a rank that it had to keep; None for no limit.
        problem: Why there is no plan.
        stage_of: Stage of each node of its layout, where no recomputation was chosen.
    """

    configuration: Configuration
    plan: PipelinePlan | None = None
    step_s: float = math.inf
    bubble: float = 0.0
    peak_bytes: int = 0
    limit: int | None = None
    problem: str = ""
    stage_of: tuple[int, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether there is a plan that keeps the limit."""
        return self.plan is not None and (self.limit is None or self.peak_bytes <= self.limit)


def outcome(
    configuration: Configuration,
    offer: Offer,
    hardware: Hardware,
    limit: int | None,
    cost: str = "roofline",
    cuts: Cuts | None = None,
) -> Outcome:
    """Plan a configuration at block grain and simulate its step.

    First without a limit; where that is too much, under the limit, with recomputation if that may be chosen. Where
    nothing fits, the outcome is the plan that does not. Ranks of several stages get the cut of as many ranks, which is
    near the best and takes no time: what is chosen is planned again with all care.

    Args:
        configuration: What to try.
        offer: Graph and seconds.
        hardware: What it would run on.
        limit: Bytes of each rank.
        cost: Name of the cost model.
        cuts: Cuts known from other configurations of the same offers; new ones are added.
    """
    found = Outcome(configuration, limit=limit)
    try:
        settings = _settings(configuration, configuration.schedule, configuration.ranks, hardware, cost)
        graph, estimate = offer(configuration.num_microbatches)
        stage_of = _cut(graph, estimate, configuration, hardware, cost, {} if cuts is None else cuts)
        choice = configuration.training.recompute
        modules = recomputed_modules(graph, choice)
        layout = lay_out(graph, estimate, settings, modules)
        found = _outcome(configuration, make_plan(layout, stage_of), limit, stage_of)
        if found.fits or limit is None:
            return found
        if choice == "auto":
            again = recut(choices_of(graph, estimate, settings), limit, [stage_of])
            return (
                found
                if again is None
                else _outcome(configuration, make_plan(again.fitted.layout, again.stage_of), limit)
            )
        if configuration.ranks == configuration.stages:
            tight = replace(layout, settings=replace(layout.settings, memory_limit=limit))
            stage_of = solve(tight).partition.stage_of
            found = _outcome(configuration, make_plan(tight, stage_of), limit, stage_of)
    except InfeasibleError:
        return found
    except (ScheduleError, PartitionError) as error:
        return Outcome(configuration, limit=limit, problem=str(error).splitlines()[0])
    return found


def sharpened(outcomes: Iterable[Outcome], offer: Offer) -> list[Outcome]:
    """Order outcomes, the best of them cut again for the fastest simulated step: which is first may hang on it."""
    found = ordered(outcomes)
    again: list[Outcome] = []
    for each in found:
        least = min((other.step_s for other in again if other.fits >= each.fits), default=math.inf)
        near = len(again) < MOST_SHARPENED and each.step_s <= least * (1 + NEAR)
        if len(again) >= SHARPENED and not near:
            break
        again.append(cut_again(each, offer))
    return ordered([*again, *found[len(again) :]])


def cut_again(found: Outcome, offer: Offer) -> Outcome:
    """Cut a configuration for the fastest simulated step, beginning from its plan and keeping what that keeps.

    As it is where recomputation was chosen with the cut, which is by simulation already.
    """
    made, plan = found.configuration, found.plan
    if plan is None or not found.stage_of:
        return found
    settings = _settings(made, made.schedule, made.ranks, plan.hardware, plan.cost)
    graph, estimate = offer(made.num_microbatches)
    asked = lay_out(graph, estimate, settings, recomputed_modules(graph, made.training.recompute))
    asked = replace(asked, settings=replace(asked.settings, memory_limit=plan.memory_limit))
    layout = replace(asked, settings=replace(asked.settings, memory_limit=found.limit if found.fits else None))
    bare = len({found.stage_of[node] for node in layout.anchors}) < made.stages
    shortlist = Shortlist(layout, layout.grouped(), found.stage_of, bare=bare)
    if made.ranks < made.stages:  # what was known is the cut of as many ranks
        shortlist.look_at(solve(layout, simulated=False).partition.stage_of)
    shortlist.search()
    if not shortlist.gain:
        return found
    again = _outcome(made, make_plan(asked, shortlist.best), found.limit, shortlist.best)
    return again if again.step_s < found.step_s and again.fits >= found.fits else found


def _settings(configuration: Configuration, schedule: str, ranks: int, hardware: Hardware, cost: str) -> Settings:
    return Settings.of(
        stages=configuration.stages,
        ranks=ranks,
        schedule=schedule,
        num_microbatches=configuration.num_microbatches,
        hardware=hardware,
        training=configuration.training,
        cost=cost,
        grain="block",
    )


def _cut(
    graph: LayerGraph, estimate: Estimate, configuration: Configuration, hardware: Hardware, cost: str, cuts: Cuts
) -> tuple[int, ...]:
    """Cut without a limit, as if every stage had a rank of its own; the same cut serves all schedules."""
    replicas, choice = configuration.training.data_parallel, configuration.training.recompute
    key = id(graph), configuration.stages, replicas, hardware, None if choice == "auto" else choice
    if key not in cuts:
        settings = _settings(configuration, "GPipe", configuration.stages, hardware, cost)
        layout = lay_out(graph, estimate, settings, recomputed_modules(graph, choice))
        cuts[key] = solve(layout, simulated=False).partition.stage_of
    return cuts[key]


def _outcome(
    configuration: Configuration, plan: PipelinePlan, limit: int | None, stage_of: tuple[int, ...] = ()
) -> Outcome:
    done = simulate(plan)
    return Outcome(configuration, plan, done.step_s, done.mean_bubble, rank_peak(plan), limit, stage_of=stage_of)


def rank_peak(plan: PipelinePlan) -> int:
    """Give the most bytes that a rank of a plan needs."""
    needs = [0] * plan.num_ranks
    for stage in plan.stages:
        needs[stage.rank] += stage.peak_bytes
    return max(needs)


def ordered(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Put those that fit first, the fastest first; of equally fast ones the one that needs least memory."""
    return sorted(outcomes, key=lambda found: (not found.fits, found.plan is None, found.step_s, found.peak_bytes))


def shapes(
    *, stages: int | None, ranks: int | None, schedule: str | None, per_rank: Sequence[int] = (1, 2)
) -> Iterator[tuple[int, int, str]]:
    """Give stages, ranks and schedule of what is left open.

    Args:
        stages: Number of stages; None: ``per_rank`` times the ranks, as the schedule wants it.
        ranks: Number of ranks; None: as many as stages.
        schedule: One schedule; None: all of them.
        per_rank: Stages of each rank that are tried where the schedule takes any number.

    >>> list(shapes(stages=None, ranks=4, schedule="Interleaved1F1B"))
    [(4, 4, 'Interleaved1F1B'), (8, 4, 'Interleaved1F1B')]
    >>> [name for _, _, name in shapes(stages=4, ranks=2, schedule=None)][:2]
    ['Interleaved1F1B', 'LoopedBFS']
    """
    for name in [schedule] if schedule is not None else list(SCHEDULES):
        known = schedule_named(name)
        counts = (known.stages_per_rank,) if known.stages_per_rank else tuple(per_rank)
        for count in counts if stages is None else (0,):
            number = stages if stages is not None else count * (ranks or 1)
            try:
                placement(name, number, ranks or number)
            except ScheduleError:
                continue
            yield number, ranks or number, name


def microbatch_counts(batch: int, stages: int, ranks: int, schedule: str) -> list[int]:
    """Give numbers of microbatches worth trying: divisors of the batch that the schedule can run, spread over them.

    >>> microbatch_counts(64, 4, 4, "1F1B")
    [4, 8, 16, 32, 64]
    """
    counts = [m for m in range(1, batch + 1) if batch % m == 0 and fits_microbatches(schedule, stages, ranks, m)]
    if len(counts) <= MOST_COUNTS:
        return counts
    enough = [m for m in counts if m >= ranks] or counts
    if len(enough) <= MOST_COUNTS:
        return enough
    step = (len(enough) - 1) / (MOST_COUNTS - 1)
    return [enough[round(place * step)] for place in range(MOST_COUNTS)]


def fewest_stages(most: int, tried: Callable[[int], Outcome | None]) -> list[Outcome]:
    """Try 1, 2, 3, … stages until one fits; gives all outcomes, that one first.

    Args:
        most: Most stages to try.
        tried: Gives the best outcome of a number of stages; None where it cannot be run.
    """
    seen: list[Outcome] = []
    for stages in range(1, most + 1):
        found = tried(stages)
        if found is not None:
            seen.insert(0, found)
            if found.fits:
                break
    return seen


def explain_choice(
    best: Outcome, others: Sequence[Outcome], open_: Sequence[str], plan: PipelinePlan | None = None
) -> str:
    """Say in one line what was chosen, and what came next: ``1F1B 412 ms; DualPipeV 371 ms but 92.0 GiB > 80.0 GiB``.

    Args:
        best: What was chosen.
        others: All outcomes.
        open_: What was left open: ``"schedule"``, ``"microbatches"``, ``"stages"``.
        plan: What was then planned of it with all care, where that is known: its numbers are said.
    """
    runners = [other for other in others if other is not best and other.plan is not None]
    fewer = best.configuration.ranks
    faster = [
        other
        for other in runners
        if not other.fits and (other.step_s < best.step_s or other.configuration.ranks < fewer)
    ]
    slower = [other for other in ordered(runners) if other.fits or not best.fits]
    shown = [*sorted(faster, key=lambda other: other.step_s)[: SHOWN // 2], *slower]
    said = "; ".join(_said(other, open_) for other in list(dict.fromkeys(shown))[:SHOWN])
    if plan is not None:
        best = _outcome(best.configuration, plan, best.limit)
    chosen = f"chosen by simulation: {_said(best, open_)}"
    return f"{chosen}; runners-up: {said}" if said else f"{chosen}; nothing else can be run"


def _said(found: Outcome, open_: Sequence[str]) -> str:
    configuration = found.configuration
    parts = [configuration.schedule] if "schedule" in open_ or "stages" not in open_ else []
    if "stages" in open_:
        on = f" on {configuration.ranks} ranks" if configuration.ranks != configuration.stages else ""
        parts.append(f"{configuration.stages} stages{on}")
    if "microbatches" in open_:
        parts.append(f"{configuration.num_microbatches} microbatches")
    said = f"{', '.join(parts)} {seconds_text(found.step_s)}"
    if found.limit is not None and not found.fits:
        said += f" but {size_text(found.peak_bytes)} > {size_text(found.limit)}"
    return said


def none_fits(outcomes: Sequence[Outcome], hardware: Hardware) -> FxpipeError:
    """Give the error that says that no configuration fits, and how near the nearest comes."""
    planned = [found for found in outcomes if found.plan is not None]
    if not planned:
        problems = dict.fromkeys(found.problem for found in outcomes)
        return PartitionError(
            f"no configuration can be planned: {'; '.join(list(problems)[:3])}\n  use other stages, ranks or batches"
        )
    nearest = min(planned, key=lambda found: found.peak_bytes)
    limit = nearest.limit or 0
    return InfeasibleError(
        f"none of {len(planned)} configurations keeps {size_text(limit)} per rank of {hardware.name}: the nearest, "
        f"{_said(nearest, ('schedule', 'stages', 'microbatches'))}\n"
        '  use more ranks, smaller microbatches, or Training(recompute="auto")',
        nearest.peak_bytes,
    )
