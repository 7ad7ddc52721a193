"""The whole of planning: from a graph with estimated layers to a plan."""

from __future__ import annotations

from fxpipe.errors import InfeasibleError
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.plan import PipelinePlan
from fxpipe.planning.costs.estimate import Estimate
from fxpipe.planning.layout import Layout, make_layout
from fxpipe.planning.limits import explained, limited_by
from fxpipe.planning.plan import make_plan
from fxpipe.planning.settings import Settings
from fxpipe.planning.solve import ROUNDING, Solution, solve

_METHODS = {
    "chain": "the layers' only order, cut exactly",
    "downsets": "all possible cuts",
    "pool": "a pool of orders, with local improvement",
}


def plan_pipeline(graph: LayerGraph, estimate: Estimate, settings: Settings) -> PipelinePlan:
    """Plan a pipeline: partition the graph at the settings' grain and put the result into a plan.

    Args:
        graph: The layers; at op grain with their ``blocks``, or at block grain.
        estimate: Seconds of each layer (``estimate_costs``).
        settings: What was asked for (``Settings.of``).

    Returns:
        The plan. It keeps ``settings.memory_limit`` on every rank, and every stage has parameters if that is possible.

    Raises:
        PartitionError: There are fewer parts than stages; the message says how many stages are possible.
        InfeasibleError: No partition keeps the memory limit; the message says the least one that works, and which of
            recomputation, more stages and another schedule help, each of them tried.
    """
    layout, solution = solve_pipeline(graph, estimate, settings)
    return plan_of(layout, solution, estimate)


def solve_pipeline(graph: LayerGraph, estimate: Estimate, settings: Settings) -> tuple[Layout, Solution]:
    """Partition as ``plan_pipeline`` does, without making the plan.

    ``layout.stages(solution.partition.stage_of)`` gives the stage of every layer, ``solution.opened`` the calls of
    blocks that a cut crosses.

    Raises:
        PartitionError: As ``plan_pipeline``.
        InfeasibleError: As ``plan_pipeline``.
    """
    layout = make_layout(graph, estimate, settings)
    try:
        return layout, solve(layout)
    except InfeasibleError as error:
        raise explained(error, layout, estimate) from None


def plan_of(layout: Layout, solution: Solution, estimate: Estimate) -> PipelinePlan:
    """Put a solved partition into a plan, with how good it is and what limits it."""
    partition = solution.partition
    method = _METHODS[partition.method]
    proven = partition.proven or partition.bottleneck <= partition.lower_bound * (1 + ROUNDING)
    if proven:
        method += ": proven best"
    elif partition.lower_bound > 0:
        method += f": within {100 * (partition.bottleneck / partition.lower_bound - 1):.2g} % of the lower bound"
    return make_plan(
        layout,
        partition.stage_of,
        method=method,
        proven=proven,
        lower_bound=partition.lower_bound,
        limited_by=limited_by(layout, solution),
        notes=estimate.notes,
    )
