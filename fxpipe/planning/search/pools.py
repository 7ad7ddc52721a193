"""The best cut over a pool of orders, with local improvement: the search where downsets are too many."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from fxpipe.planning.search.chains import TABLE_ENTRIES, OrderCosts, coarsened, fast_cuts, general_cuts, order_costs
from fxpipe.planning.search.evaluate import Found, evaluate, has_all_stages
from fxpipe.planning.search.instance import UNREACHABLE, Instance, Ints
from fxpipe.planning.search.orders import (
    by_priority,
    depth_first_order,
    given_order,
    has_one_order,
    late_order,
    small_front_order,
)
from fxpipe.planning.search.request import Request

NODE_BUDGET = 600_000  # nodes ordered and cut in improvement rounds of the fast programme
GENERAL_BUDGET = 20_000  # the same for the general programme
ROUNDS = 200
FEW_ROUNDS = 10  # where an exact search follows, or a quick answer is wanted
EVENED_ENTRIES = 200_000  # stages times nodes up to which a partition is made more even
COARSE_UNITS = 400  # units of the coarse cut that comes before a fine one of which no bound is known


def search_pool(instance: Instance, request: Request, lower: int, start: Sequence[Found] = ()) -> Found | None:
    """Cut several topological orders exactly.

    Args:
        instance: The merged graph.
        request: Stages and limits; one stage per rank.
        lower: A bottleneck that is good enough: the search stops there.
        start: Partitions known to be feasible, the first to be beaten.

    Returns:
        The best partition found, None if none is feasible.
    """
    best = min(start, key=lambda found: found.value, default=None)
    for make_order in orders(instance):
        if best is not None and best.value <= lower:
            return best
        best = _better(best, cut_order(instance, request, make_order(), lower, best.value if best else None))
    return best


def orders(instance: Instance) -> list[Callable[[], list[int]]]:
    """Name the orders tried, the given one first: its exact cut is never beaten by a peer that cuts that order."""
    makers = [given_order]
    if not has_one_order(instance):
        makers += [late_order, depth_first_order, small_front_order]
    return [lambda make=make: make(instance) for make in makers]  # type: ignore[misc]


def cut_order(
    instance: Instance,
    request: Request,
    order: Sequence[int],
    lower: int,
    upper: int | None,
    *,
    objective: str = "load",
) -> Found | None:
    """Cut one order exactly; None if nothing below ``upper`` is feasible."""
    costs = order_costs(instance, order, request.routing)
    kind = request.one_kind
    if objective == "load" and not costs.sets and kind is not None:
        cut = fast_cuts(costs, request.stages, kind, lower, upper)
        if cut is None:
            return None
        found = _found(instance, request, costs.order, costs.starts, cut[1])
        if _fits(instance, request, found.stage_of):
            return found
    if (request.stages + 1) * (costs.size + 1) > TABLE_ENTRIES:
        costs = coarsened(instance, costs, TABLE_ENTRIES // (request.stages + 1), request.routing)
    if upper is None:
        upper = _some_upper(instance, request, costs, objective)
    units = max(COARSE_UNITS, 4 * request.stages)
    if upper is None and costs.size > units:  # a coarse cut makes the windows of the fine one short
        coarse = coarsened(instance, costs, units, request.routing)
        cut = general_cuts(coarse, request, UNREACHABLE // 4, objective=objective)
        upper = None if cut is None else cut[0] + 1
    cut = general_cuts(costs, request, UNREACHABLE // 4 if upper is None else upper, objective=objective)
    return None if cut is None else _found(instance, request, costs.order, costs.starts, cut[1], objective)


def _fits(instance: Instance, request: Request, stage_of: Ints) -> bool:
    if not has_all_stages(instance, request, stage_of):
        return False
    if request.memory_limit is None:
        return True
    return evaluate(instance, request, stage_of).memory <= request.memory_limit


def _some_upper(instance: Instance, request: Request, costs: OrderCosts, objective: str) -> int | None:
    """Give a bottleneck that the best cut is surely below: that of even cuts, None where they are not feasible."""
    goals = np.linspace(0, costs.load[-1], request.stages + 1)[1:-1]
    cuts = np.searchsorted(costs.load, goals)
    if request.exactly:
        steps = np.arange(1, request.stages)
        cuts = np.minimum(np.maximum.accumulate(cuts - steps) + steps, costs.size - request.stages + steps)
        cuts = np.maximum(cuts, steps)
    cuts = np.unique(np.concatenate([[0], cuts, [costs.size]]))
    stage_of = _stages(costs.order, costs.starts, cuts.tolist())
    found = evaluate(instance, request, stage_of)
    free = replace(request, memory_limit=None) if objective == "memory" else request
    if not _fits(instance, free, stage_of):
        return None
    return (found.memory if objective == "memory" else found.bottleneck) + 1


def stages_of_cuts(costs: OrderCosts, cuts: Sequence[int]) -> Ints:
    """Give each merged node's stage from the cuts of an order, both ends included."""
    return _stages(costs.order, costs.starts, cuts)


def _stages(order: Sequence[int], starts: Ints, cuts: Sequence[int]) -> Ints:
    bounds = starts[np.asarray(cuts)]
    stage_of = np.empty(len(order), dtype=np.int64)
    stage_of[np.asarray(order)] = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    return stage_of


def _found(
    instance: Instance,
    request: Request,
    order: Sequence[int],
    starts: Ints,
    cuts: Sequence[int],
    objective: str = "load",
) -> Found:
    stage_of = _stages(order, starts, cuts)
    costs = evaluate(instance, request, stage_of)
    return Found(costs.bottleneck if objective == "load" else costs.memory, stage_of)


def _better(best: Found | None, other: Found | None) -> Found | None:
    if best is None or (other is not None and other.value < best.value):
        return other
    return best


def improved(
    instance: Instance,
    request: Request,
    lower: int,
    best: Found,
    rounds: int = ROUNDS,
    tell: Callable[[], object] = lambda: None,
) -> Found:
    """Reorder within the stages and cut again: every prefix of the best partition stays a prefix, so nothing is lost.

    Args:
        instance: The merged graph.
        request: Stages and limits; one stage per rank.
        lower: A bottleneck that is good enough: the search stops there.
        best: A feasible partition.
        rounds: Most orders tried; fewer on large graphs.
        tell: Called before each of them.

    Returns:
        ``best``, or a better one.
    """
    if has_one_order(instance):
        return best
    numbers = random.Random(0)  # the same in every process
    fast = request.routing == "adjacent" and not len(instance.ties) and request.memory_limit is None
    fast = fast and request.one_kind is not None
    rounds = min(rounds, (NODE_BUDGET if fast else GENERAL_BUDGET) // instance.size)
    for _ in range(rounds):
        if best.value <= lower:
            break
        tell()
        shuffled = [stage + numbers.random() for stage in best.stage_of.tolist()]
        other = cut_order(instance, request, by_priority(instance, shuffled), lower, best.value)
        best = _better(best, other) or best
    return best


def evened(instance: Instance, request: Request, found: Found) -> Found:
    """Cut the partition's order again: of all cuts whose slowest stage is no slower, the one of the most even loads.

    Even means the least sum of squares; large graphs are left as they are.
    """
    if (request.stages + 1) * (instance.size + 1) > EVENED_ENTRIES:
        return found
    costs = order_costs(instance, by_priority(instance, found.stage_of.tolist()), request.routing)
    cut = general_cuts(costs, request, found.value + 1, objective="even")
    if cut is None:
        return found
    other = _found(instance, request, costs.order, costs.starts, cut[1])
    return other if other.value <= found.value and _fits(instance, request, other.stage_of) else found
