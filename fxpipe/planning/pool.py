"""The best cut over a pool of orders, with local improvement: the search where downsets are too many."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from fxpipe.planning.chain import TABLE_ENTRIES, coarsened, fast_cuts, general_cuts, order_costs
from fxpipe.planning.evaluate import Found, evaluate
from fxpipe.planning.instance import UNREACHABLE, Instance, Ints
from fxpipe.planning.orders import (
    by_priority,
    depth_first_order,
    given_order,
    has_one_order,
    late_order,
    small_front_order,
)
from fxpipe.planning.request import Request

NODE_BUDGET = 600_000  # nodes ordered and cut in improvement rounds of the fast programme
GENERAL_BUDGET = 60_000  # the same for the general programme
ROUNDS = 200


def search_pool(instance: Instance, request: Request, lower: int, start: Sequence[Found] = ()) -> Found | None:
    """Cut several topological orders exactly, then reorder within the stages of the best and cut again.

    Args:
        instance: The merged graph.
        request: Stages and limits; one stage per rank.
        lower: A proven lower bound: the search stops there.
        start: Partitions known to be feasible, the first to be beaten.

    Returns:
        The best partition found, None if none is feasible.
    """
    best = min(start, key=lambda found: found.value, default=None)
    for make_order in orders(instance):
        if best is not None and best.value <= lower:
            return best
        best = _better(best, cut_order(instance, request, make_order(), lower, best.value if best else None))
    if best is None or best.value <= lower:
        return best
    return _improved(instance, request, lower, best)


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
    plain = objective == "load" and not costs.sets and all(request.paid)
    if plain:
        cut = fast_cuts(costs, request.stages, lower, upper)
        if cut is None:
            return None
        found = _found(instance, request, costs.order, costs.starts, cut[1])
        if _fits(instance, request, found.stage_of, cut[1]):
            return found
    if (request.stages + 1) * (costs.size + 1) > TABLE_ENTRIES:
        costs = coarsened(instance, costs, TABLE_ENTRIES // (request.stages + 1), request.routing)
    if upper is None:
        upper = _some_upper(instance, request, costs.order, costs.starts, objective)
    cut = general_cuts(costs, request, upper, objective=objective)
    return None if cut is None else _found(instance, request, costs.order, costs.starts, cut[1], objective)


def _fits(instance: Instance, request: Request, stage_of: Ints, cuts: Sequence[int]) -> bool:
    if request.exactly and len(cuts) - 1 != request.stages:
        return False
    if request.memory_limit is None:
        return True
    return int(evaluate(instance, request, stage_of).rank_memory.max()) <= request.memory_limit


def _some_upper(instance: Instance, request: Request, order: Sequence[int], starts: Ints, objective: str) -> int:
    """A bottleneck that the best cut is surely below: of even cuts if they are feasible, else of one stage with all."""
    units = len(starts) - 1
    loads = np.concatenate([[0], np.cumsum(instance.load[np.asarray(order)])])[starts]
    goals = np.linspace(0, loads[-1], request.stages + 1)[1:-1]
    cuts = np.searchsorted(loads, goals)
    if request.exactly:
        steps = np.arange(1, request.stages)
        cuts = np.minimum(np.maximum.accumulate(cuts - steps) + steps, units - request.stages + steps)
        cuts = np.maximum(cuts, steps)
    cuts = np.unique(np.concatenate([[0], cuts, [units]]))
    stage_of = _stages(order, starts, cuts.tolist())
    costs = evaluate(instance, request, stage_of)
    memory = int(costs.rank_memory.max())
    if objective == "memory":
        return memory + 1
    if request.memory_limit is None or memory <= request.memory_limit:
        return costs.bottleneck + 1
    return UNREACHABLE // 4


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
    return Found(costs.bottleneck if objective == "load" else int(costs.rank_memory.max()), stage_of)


def _better(best: Found | None, other: Found | None) -> Found | None:
    if best is None or (other is not None and other.value < best.value):
        return other
    return best


def _improved(instance: Instance, request: Request, lower: int, best: Found) -> Found:
    """Shuffle within stages and cut again: every prefix of the best partition stays a prefix, so nothing is lost."""
    if has_one_order(instance):
        return best
    numbers = random.Random(0)  # the same in every process
    fast = request.routing == "adjacent" and not len(instance.ties) and request.memory_limit is None
    rounds = min(ROUNDS, (NODE_BUDGET if fast else GENERAL_BUDGET) // instance.size)
    for _ in range(rounds):
        if best.value <= lower:
            break
        shuffled = [stage + numbers.random() for stage in best.stage_of.tolist()]
        other = cut_order(instance, request, by_priority(instance, shuffled), lower, best.value)
        best = _better(best, other) or best
    return best
