"""The search where ranks have several stages, step by step."""

from __future__ import annotations

import dataclasses

import numpy as np

from fxpipe.errors import InfeasibleError
from fxpipe.planning.search.bounds import crossing_bound, load_bound
from fxpipe.planning.search.chains import order_costs
from fxpipe.planning.search.downsets import enumerate_downsets
from fxpipe.planning.search.evaluate import Found, evaluate, is_partition
from fxpipe.planning.search.instance import Instance, Ints, without_memory, without_tie_loads
from fxpipe.planning.search.orders import by_priority
from fxpipe.planning.search.pools import orders, stages_of_cuts
from fxpipe.planning.search.problem import PartitionProblem
from fxpipe.planning.search.reductions import Reduced, reduced
from fxpipe.planning.search.request import Request
from fxpipe.planning.search.several.frontier import frontier_bound
from fxpipe.planning.search.several.lines import line_bound
from fxpipe.planning.search.several.pairs import MOST_PAIRED, Paired, search_pairs
from fxpipe.planning.search.several.passes import cut_passes, passes_of
from fxpipe.planning.search.several.ranks import search_ranks
from fxpipe.planning.search.stages import Answer, Hints, infeasible, search_stages

CLOSE = 1_000  # a rank load so small a part above its bound is not bounded in another way
ENOUGH = 400  # a rank load so small a part above its bound is not looked for in other orders


def search_several(
    problem: PartitionProblem, instance: Instance, request: Request, memory_limit: float | None, hints: Hints
) -> Answer:
    """Search where ranks have several stages: first as if they had one each, which bounds what a rank can reach."""
    relaxed_hints = Hints(goal=hints.goal, learned=hints.learned, apart=True)
    relaxed = without_tie_loads(instance), request.apart()
    try:
        answer = search_stages(problem, *relaxed, memory_limit, relaxed_hints)
    except InfeasibleError:
        # More than the limit on one stage. Whether that is proven does not matter: the search below says more.
        unlimited = dataclasses.replace(relaxed[1], memory_limit=None)
        answer = search_stages(problem, without_memory(relaxed[0]), unlimited, None, relaxed_hints)
    lower = max(load_bound(instance, request), answer.lower)
    starts = [answer.found.stage_of]
    if hints.start is not None and is_partition(instance, request, hints.start):
        starts.append(hints.start)
    starts += _in_passes(instance, request, max(lower, hints.goal), answer.found.stage_of)
    limit = request.memory_limit
    if limit is not None and all(evaluate(instance, request, stage_of).memory > limit for stage_of in starts):
        least = search_ranks(instance, request, 0, starts, objective="memory")
        assert least.found is not None
        if least.found.value > limit:
            raise infeasible(problem, instance, request, least.found, memory_limit, proven=least.exact)
        starts.append(least.found.stage_of)
    best = _best(instance, request, starts)
    if hints.goal and best is not None and best.value <= hints.goal:
        return Answer(best, min(lower, best.value), best.value <= lower, "pool")
    if best is not None:
        lower = _bound(instance, request, lower, best.value, hints)
        paired = _paired(instance, request, lower, best.value)
        lower = paired.lower
        if paired.stage_of is not None:
            starts.append(paired.stage_of)
    searched = search_ranks(instance, request, lower, starts, slack=hints.slack)
    found = searched.found
    assert found is not None
    value = evaluate(instance, request, found.stage_of).bottleneck
    lower = min(searched.lower, value)
    proven = value <= lower or (searched.exact and not hints.slack)
    return Answer(Found(value, found.stage_of), lower, proven, "downsets" if searched.exact else "pool")


def _bound(instance: Instance, request: Request, lower: int, upper: int, hints: Hints) -> int:
    """Bound the largest rank load, in one way after the other while the bound is far below the best one known."""
    # A stage may have nothing but nodes that cost nothing: what crosses next to them then counts.
    whole = request.exactly and bool(instance.anchors.all())
    small = without_memory(instance if whole else reduced(without_memory(instance)).instance)
    lower = line_bound(small, request, lower, upper)
    if upper - lower > upper // CLOSE:
        lower = min(max(lower, crossing_bound(instance, request, upper)), upper)
        lower = frontier_bound(small, request, lower, upper, hints.learned)
    return lower


def _best(instance: Instance, request: Request, starts: list[Ints]) -> Found | None:
    """Give the best of some partitions that keep every condition."""
    kept = [stage_of for stage_of in starts if is_partition(instance, request, stage_of)]
    found = [Found(evaluate(instance, request, stage_of).bottleneck, stage_of) for stage_of in kept]
    return min(found, key=lambda one: one.value, default=None)


def _paired(instance: Instance, request: Request, lower: int, upper: int) -> Paired:
    """Search all pairs of downsets where they are few, or few once nodes that cost nothing are merged."""
    for small in (Reduced(instance, np.arange(instance.size)), reduced(without_memory(instance))):
        masks = enumerate_downsets(small.instance, MOST_PAIRED) if small.instance.size < MOST_PAIRED else None
        if masks is not None:
            whole = small.instance.size == instance.size or not instance.anchors.all()
            paired = search_pairs(small.instance, request, masks, lower, upper, whole=whole)
            stage_of = None if paired.stage_of is None else paired.stage_of[small.node_of]
            kept = stage_of is not None and is_partition(instance, request, stage_of)
            return Paired(paired.lower, stage_of if kept else None)
    return Paired(lower, None)


def _in_passes(instance: Instance, request: Request, lower: int, stage_of: Ints) -> list[Ints]:
    """Cut orders for ranks that are visited in passes: those of the partition that was found, then the others."""
    if request.routing == "direct" or passes_of(request.ranks) is None:
        return []
    found: list[Ints] = []
    below: int | None = None
    for make_order in (lambda: by_priority(instance, stage_of.tolist()), *orders(instance)):
        costs = order_costs(instance, make_order(), request.routing)
        start = np.searchsorted(stage_of[list(costs.order)], np.arange(request.stages + 1), side="left").tolist()
        cuts = cut_passes(costs, request, lower, start, below)
        if cuts is not None:
            found.append(stages_of_cuts(costs, cuts))
            reached = evaluate(instance, request, found[-1]).bottleneck
            below = reached if below is None else min(below, reached)
            if reached <= lower + lower // ENOUGH:
                break
    return found
