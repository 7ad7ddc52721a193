"""What keeps a plan from being faster, and what helps where it does not fit: said once it has been computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from fxpipe.errors import InfeasibleError, PartitionError, ScheduleError
from fxpipe.ir.plan import PipelinePlan
from fxpipe.ir.schedule import SCHEDULES, schedule_named
from fxpipe.planning.costs.estimate import Estimate
from fxpipe.planning.layout import Layout, make_layout
from fxpipe.planning.search.partition import partition_nodes
from fxpipe.planning.search.problem import Measured, measure
from fxpipe.planning.settings import Settings, device_limit
from fxpipe.planning.simulation.simulate import simulate
from fxpipe.planning.solve import Solution, least_memory, solve

SMALL = 1_000  # layers of a model whose every way out is tried with opened blocks too
NOTICED = 0.02  # share of the bottleneck below which nothing is said to limit it


def limited_by(layout: Layout, solution: Solution) -> str:
    """Say what keeps the slowest stage from being faster: memory, one layer, a link, or nothing but the mean load."""
    measured = measure(layout.problem, solution.partition.stage_of, placement=layout.placement)
    rank = max(range(len(measured.rank_loads)), key=lambda rank: measured.rank_loads[rank])
    own = layout.placement.stages_of_rank[rank]
    stage = max(own, key=lambda stage: measured.loads[stage])
    where = f"stage {stage}" if len(own) == 1 else f"stages {', '.join(map(str, own))} of rank {rank}"
    bottleneck = measured.rank_loads[rank]
    name, seconds = _largest_unit(layout, solution, stage)
    mean = math.fsum(layout.problem.seconds) / layout.settings.ranks
    if bottleneck <= mean * (1 + NOTICED):
        return where
    if layout.settings.memory_limit is not None:
        free = replace(layout, settings=layout.settings.without_limit())
        if _searched_again(free, solution) < bottleneck * (1 - NOTICED):
            return f"memory_limit, at {where}"
    unsplit = f"{name} of stage {stage}, which is not split"
    if seconds >= (bottleneck - _moved_s(layout, solution, measured, stage)) * (1 - NOTICED):
        return unsplit
    moved = math.fsum(_moved_s(layout, solution, measured, index) for index in own)
    if len(own) > 1:  # not solved again: that takes long
        if moved >= bottleneck * NOTICED and bottleneck - moved <= mean * (1 + NOTICED):
            return f"links of {where}, {100 * moved / bottleneck:.0f} % of its time"
    else:
        saved = 1 - _with_free_links(layout, solution) / bottleneck
        if saved >= NOTICED:
            return f"links of {where}: free ones would save {100 * saved:.0f} %"
    return unsplit if seconds > 0.5 * bottleneck else where


def _moved_s(layout: Layout, solution: Solution, measured: Measured, stage: int) -> float:
    seconds = layout.problem.seconds
    own = (seconds[node] for node, where in enumerate(solution.partition.stage_of) if where == stage)
    return max(measured.loads[stage] - math.fsum(own), 0.0)


def _largest_unit(layout: Layout, solution: Solution, stage: int) -> tuple[str, float]:
    """Give the largest thing of a stage that is kept whole, a block or a layer, and its seconds."""
    opened = {block.fqn for block in solution.opened}
    seconds = layout.problem.seconds
    units: dict[str, list[float]] = {}
    inside: set[int] = set()
    whole = [] if layout.settings.grain == "op" else [block for block in layout.blocks if block.fqn not in opened]
    for block in whole:
        inside.update(block.layers)
        if solution.partition.stage_of[block.layers[0]] == stage:
            kind = "layer" if len(block.layers) == 1 else "block"
            units[f"{kind} {block.name}"] = [seconds[node] for node in block.layers]
    for node, where in enumerate(solution.partition.stage_of):
        if where == stage and node not in inside:
            units[f"layer {layout.problem.name(node)}"] = [seconds[node]]
    largest = max(units, key=lambda unit: math.fsum(units[unit]))
    return largest, math.fsum(units[largest])


def _with_free_links(layout: Layout, solution: Solution) -> float:
    values = tuple(value._replace(seconds=0.0, far_seconds=0.0) for value in layout.problem.values)
    return _searched_again(replace(layout, problem=replace(layout.problem, values=values)), solution)


def _searched_again(layout: Layout, solution: Solution) -> float:
    """Give the bottleneck with other links or no limit: one search, with any blocks open where some may be."""
    problem = layout.grouped() if layout.settings.grain == "block" else layout.problem
    found = partition_nodes(
        problem if solution.bare else replace(problem, anchors=layout.anchors),
        layout.settings.stages,
        memory_limit=layout.settings.memory_limit,
        exactly=True,
        placement=layout.placement,
        start=solution.partition.stage_of,
        learned=layout.learned,
    )
    return found.bottleneck


def explained(error: InfeasibleError, layout: Layout, estimate: Estimate) -> InfeasibleError:
    """Give the error with what would help: each way out is tried first.

    Args:
        error: What the search said.
        layout: What it was asked.
        estimate: Seconds of the layers.
    """
    settings, least = layout.settings, error.least_memory_limit
    helping = [way for way, other in _ways_out(layout) if _fits(layout, estimate, other)]
    first = str(error).splitlines()[0]
    raised = f"memory_limit={least}"
    if helping:
        return InfeasibleError(f"{first}\n  what helps: {'; '.join([*helping, raised])}", least)
    tried = ["recompute"] if settings.training.recompute is None else []
    others = ", ".join([*tried, "more stages"])
    return InfeasibleError(
        f"{first}\n  raise it: {raised}; {others} and another schedule were tried, and none is enough", least
    )


def _ways_out(layout: Layout) -> Iterator[tuple[str, Settings]]:
    """Name changes that need less memory, the cheapest first, with the settings they make."""
    settings = layout.settings
    changes: list[tuple[str, dict[str, object]]] = []
    if settings.training.recompute is None and any(block.is_repeated for block in layout.blocks):
        changes.append(('recompute="block"', {"training": replace(settings.training, recompute="block")}))
    per_rank = settings.stages // settings.ranks
    for name in SCHEDULES:
        if name != settings.schedule:
            changes.append((f'schedule="{name}"', {"schedule": name}))
    for factor in (2, 4):
        stages, ranks = factor * settings.stages, factor * settings.ranks
        named = f"stages={stages}" if per_rank == 1 else f"stages={stages} on {ranks} ranks"
        changes.append((named, {"stages": stages, "ranks": ranks}))
    for way, change in changes:
        try:
            yield way, settings.changed(**change)  # type: ignore[arg-type]  # each change names its own field
        except ScheduleError:
            continue


def _fits(layout: Layout, estimate: Estimate, settings: Settings) -> bool:
    """Tell whether some partition keeps the limit; blocks stay whole unless the model is small."""
    other = make_layout(layout.graph, estimate, replace(settings, grain="block"))
    if least_memory(other) > (settings.memory_limit or math.inf):
        return False
    try:
        solve(other, simulated=False)
    except PartitionError:
        if settings.grain == "block" or len(layout.layers) > SMALL:
            return False
        try:
            solve(replace(other, settings=replace(settings, grain="op")), simulated=False)
        except PartitionError:
            return False
    return True


def needs_hint(plan: PipelinePlan) -> bool:
    """Tell whether a plan without a limit needs more than a device has, and recomputation might help."""
    training = plan.training
    if plan.memory_limit is not None or training.recompute not in (None, "auto"):
        return False
    needs: dict[int, int] = {}
    for stage in plan.stages:
        needs[stage.rank] = needs.get(stage.rank, 0) + stage.peak_bytes
    return max(needs.values()) > plan.hardware.memory


def settings_that_fit(settings: Settings) -> Settings:
    """Give the settings under the device's limit, with recomputation chosen, at block grain: that is fast to try."""
    training = replace(settings.training, recompute="auto")
    return replace(settings, training=training, memory_limit=device_limit(settings.hardware), grain="block")


def memory_hint(plan: PipelinePlan, fitting: PipelinePlan | PartitionError) -> str:
    """Say which recomputation would make a plan fit, and what that would cost.

    Args:
        plan: A plan that does not fit.
        fitting: One that does, or why there is none.
    """
    if schedule_named(plan.schedule).splits_backward:
        return f"no recomputation makes it fit: {plan.schedule} splits the backward, and recomputes nothing"
    if not isinstance(fitting, PipelinePlan):
        return f"no recomputation makes it fit: {str(fitting).splitlines()[0]}"
    more = simulate(fitting).step_s / simulate(plan).step_s - 1
    stages = [stage for stage in fitting.stages if stage.recompute]
    count = sum(len(stage.recompute) for stage in stages)
    modules = f"{count} module{'s' if count != 1 else ''}"
    where = f"stage{'s' if len(stages) != 1 else ''} {', '.join(str(stage.index) for stage in stages)}"
    what = f"recomputing {modules} in {where}" if stages else "another cut"
    return f'{what} makes it fit, for a step {100 * more:+.1f} %: Training(recompute="auto"), memory_limit="device"'
