"""The whole of planning: from a graph with estimated layers to a plan."""

from __future__ import annotations

from dataclasses import replace

from fxpipe.errors import InfeasibleError, PartitionError
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.plan import PipelinePlan
from fxpipe.ir.schedule import schedule_named
from fxpipe.ir.units import folded
from fxpipe.planning.costs.estimate import Estimate
from fxpipe.planning.costs.recompute import recomputed_modules
from fxpipe.planning.fit import choices_of, lay_out
from fxpipe.planning.layout import Layout, make_layout
from fxpipe.planning.limits import explained, limited_by, memory_hint, needs_hint, settings_that_fit
from fxpipe.planning.plan import make_plan
from fxpipe.planning.recut import recut
from fxpipe.planning.search.learned import Learned
from fxpipe.planning.search.partition import Partition
from fxpipe.planning.search.problem import measure
from fxpipe.planning.settings import Settings
from fxpipe.planning.solve import ROUNDING, Solution, solve

SHOWN_BLOCKS = 4
NOTICED = 1e-4  # share of a step below which its gain is not said

_METHODS = {
    "chain": "the layers' only order, cut exactly",
    "downsets": "all possible cuts",
    "pool": "a pool of orders, with local improvement",
    "simulated": "cuts with the recomputation that makes them fit, simulated",
}


def plan_pipeline(
    graph: LayerGraph, estimate: Estimate, settings: Settings, learned: Learned | None = None
) -> PipelinePlan:
    """Plan a pipeline: partition the graph at the settings' grain and put the result into a plan.

    Args:
        graph: The layers; at op grain with their ``blocks``, or at block grain.
        estimate: Seconds of each layer (``estimate_costs``).
        settings: What was asked for (``Settings.of``).
        learned: What searches of this graph learn for one another, and whom they tell that they go on.

    Returns:
        The plan. It keeps ``settings.memory_limit`` on every rank, and every stage has parameters if that is possible.

    Raises:
        PartitionError: There are fewer parts than stages; the message says how many stages are possible.
        InfeasibleError: No partition keeps the memory limit; the message says the least one that works, and which of
            recomputation, more stages and another schedule help, each of them tried.
    """
    made = bare_plan(graph, estimate, settings, learned)
    if not needs_hint(made):
        return made
    try:
        tight = settings_that_fit(settings)
        layout, solution = _with_recomputation(graph, estimate, tight, learned or Learned(), helped=False)
        fitting: PipelinePlan | PartitionError = plan_of(layout, solution, estimate)
    except PartitionError as error:
        fitting = error
    return replace(made, notes=(*made.notes, memory_hint(made, fitting)))


def bare_plan(
    graph: LayerGraph, estimate: Estimate, settings: Settings, learned: Learned | None = None
) -> PipelinePlan:
    """Plan as ``plan_pipeline`` does, and leave out what would help a plan that does not fit.

    Raises:
        PartitionError: As ``plan_pipeline``.
        InfeasibleError: As ``plan_pipeline``.
    """
    layout, solution = solve_pipeline(graph, estimate, settings, learned)
    return replace(plan_of(layout, solution, estimate), training=settings.training)


def solve_pipeline(
    graph: LayerGraph,
    estimate: Estimate,
    settings: Settings,
    learned: Learned | None = None,
    *,
    simulated: bool = True,
) -> tuple[Layout, Solution]:
    """Partition as ``plan_pipeline`` does, without making the plan.

    ``simulated=False`` asks for the smallest bottleneck rather than for the fastest simulated step.
    ``layout.stages(solution.partition.stage_of)`` gives the stage of every layer, ``solution.opened`` the calls of
    blocks that a cut crosses.

    Raises:
        PartitionError: As ``plan_pipeline``.
        InfeasibleError: As ``plan_pipeline``.
    """
    if settings.training.recompute == "auto":
        return _with_recomputation(graph, estimate, settings, learned or Learned())
    layout = replace(make_layout(graph, estimate, settings), learned=learned or Learned())
    try:
        return layout, solve(layout, simulated=simulated)
    except InfeasibleError as error:
        raise explained(error, layout, estimate) from None


def _with_recomputation(
    graph: LayerGraph, estimate: Estimate, settings: Settings, learned: Learned, *, helped: bool = True
) -> tuple[Layout, Solution]:
    """Choose what is recomputed together with the cut; nothing where all fits as it is."""
    plain = replace(lay_out(graph, estimate, settings), learned=learned)
    free = solve(replace(plain, settings=plain.settings.without_limit()))
    limit = settings.memory_limit
    needs = measure(plain.problem, free.partition.stage_of, placement=plain.placement).rank_memory
    if limit is None:
        return plain, free
    choices = choices_of(graph, estimate, settings)
    starts = [free.partition.stage_of]
    failed: InfeasibleError | None = None
    for modules in () if max(needs) <= limit else ((), recomputed_modules(graph, "block")):
        layout = replace(lay_out(graph, estimate, settings, modules), learned=learned) if modules else plain
        if modules and schedule_named(settings.schedule).splits_backward:
            continue
        try:
            starts.append(solve(layout, simulated=False).partition.stage_of)
        except InfeasibleError as error:
            failed = min((known for known in (failed, error) if known), key=lambda known: known.least_memory_limit or 0)
    found = recut(choices, limit, starts, _solved)
    if found is None:
        assert failed is not None
        raise (explained(failed, plain, estimate) if helped else failed) from None
    layout = found.fitted.layout
    return layout, _solution_of(layout, found.stage_of, free)


def _solved(layout: Layout) -> tuple[int, ...] | None:
    try:
        return solve(layout, simulated=False).partition.stage_of
    except PartitionError:
        return None


def _solution_of(layout: Layout, stage_of: tuple[int, ...], free: Solution) -> Solution:
    """Give a partition found by simulation; no partition at all has a smaller bottleneck than without recomputation."""
    measured = measure(layout.problem, stage_of, placement=layout.placement)
    bottleneck = max(measured.rank_loads)
    bound = min(free.partition.lower_bound, bottleneck)
    partition = Partition(stage_of, measured.loads, bottleneck, bound, bottleneck <= bound, "simulated")
    return Solution(layout.problem, partition, layout.cut_blocks(stage_of), free.bare)


def plan_of(layout: Layout, solution: Solution, estimate: Estimate) -> PipelinePlan:
    """Put a solved partition into a plan, with how good it is and what limits it."""
    partition = solution.partition
    method = _METHODS[partition.method]
    proven = partition.proven or partition.bottleneck <= partition.lower_bound * (1 + ROUNDING)
    if proven:
        method += ": proven best"
    elif partition.lower_bound > 0:
        method += f": within {100 * (partition.bottleneck / partition.lower_bound - 1):.2g} % of the lower bound"
    if solution.step_gain > NOTICED:
        method += f"; of cuts near it the fastest step, by {100 * solution.step_gain:.2g} %"
    return make_plan(
        layout,
        partition.stage_of,
        method=method,
        proven=proven,
        lower_bound=partition.lower_bound,
        limited_by=limited_by(layout, solution),
        notes=(*_gained(solution), *estimate.notes),
    )


def _gained(solution: Solution) -> tuple[str, ...]:
    if not solution.gain:
        return ()
    shown = folded((block.fqn for block in solution.opened), SHOWN_BLOCKS)
    return (f"opened {shown}: saves {100 * solution.gain:.1f} % of a simulated step",)
