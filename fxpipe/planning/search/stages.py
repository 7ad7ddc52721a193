"""One stage per rank: orders are cut first, then all downsets are searched where they are few, else more orders."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from fxpipe.errors import InfeasibleError
from fxpipe.ir.units import size_text
from fxpipe.planning.search.bounds import crossing_bound, load_bound
from fxpipe.planning.search.evaluate import Found, evaluate, has_all_stages, is_partition
from fxpipe.planning.search.instance import Instance, Ints
from fxpipe.planning.search.learned import Learned
from fxpipe.planning.search.orders import given_order, has_one_order
from fxpipe.planning.search.paths import Downsets, TooManyPairsError, all_downsets
from fxpipe.planning.search.pools import FEW_ROUNDS, ROUNDS, cut_order, evened, improved, orders, search_pool
from fxpipe.planning.search.problem import PartitionProblem
from fxpipe.planning.search.reductions import Reduced, reduced
from fxpipe.planning.search.request import Request


@dataclass(frozen=True, slots=True)
class Hints:
    """How to search, besides what for.

    Attributes:
        start: Stage of each merged node in a partition to start with; None for none.
        goal: A load that is good enough; 0 for none.
        slack: Share of the best rank load that ranks may have more, for the sake of the largest stage.
        even: Whether to even out, with one stage per rank.
        learned: What searches before this one learned.
        apart: Whether it stands for stages that share ranks, whose bound another search finds.
    """

    start: Ints | None = None
    goal: int = 0
    slack: float = 0.0
    even: bool = False
    learned: Learned = field(default_factory=Learned)
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found, a proven lower bound, and how."""

    found: Found
    lower: int
    proven: bool
    method: str


def search_stages(
    problem: PartitionProblem, instance: Instance, request: Request, memory_limit: float | None, hints: Hints
) -> Answer:
    """Search where every rank has one stage."""
    single = has_one_order(instance)
    small = Reduced(instance, np.arange(instance.size)) if single else reduced(instance)
    # A free node by itself may be what keeps a stage from being empty.
    few = request.memory_limit is not None or small.instance.size < 2 * request.stages
    if request.exactly and instance.anchors.all() and few:
        small = Reduced(instance, np.arange(instance.size))
    single = single or has_one_order(small.instance)
    whole = len(small.node_of) == small.instance.size or not instance.anchors.all()
    searched = _search_small(problem, small, request, memory_limit, hints, single=single, whole=whole)
    if searched.method == "pool" and not hints.goal and not hints.apart:
        # What merged nodes would cross may be less where one stands alone.
        lower = crossing_bound(small.instance if whole else instance, request, searched.found.value)
        lower = min(max(lower, searched.lower), searched.found.value)
        searched = dataclasses.replace(searched, lower=lower, proven=searched.found.value <= lower)
    found = Found(searched.found.value, searched.found.stage_of[small.node_of])
    return dataclasses.replace(searched, found=evened(instance, request, found) if hints.even else found)


def _search_small(
    problem: PartitionProblem,
    small: Reduced,
    request: Request,
    memory_limit: float | None,
    hints: Hints,
    *,
    single: bool,
    whole: bool,
) -> Answer:
    """Cut orders first; then look at all downsets where they are few, else reorder and cut again."""
    instance = small.instance
    lower = load_bound(instance, request)
    goal = max(lower, hints.goal)
    found = search_pool(instance, request, goal, _started(small, request, hints))
    downsets = None
    if not single and (found is None or (not hints.goal and found.value > lower)):
        downsets = all_downsets(instance, request, hints.learned)
    if found is None:
        found = _least_memory(problem, instance, request, downsets, memory_limit, single=single)
        found = search_pool(instance, request, goal, [found]) or found
    if single:
        settled = found.value > goal or goal == lower  # a search that stopped at the goal says nothing of what is below
        bound = _chain_bound(instance, request, found, whole=whole) if settled else min(lower, found.value)
        return Answer(found, bound, found.value <= bound, "chain")
    rounds = ROUNDS if downsets is None and not hints.goal else FEW_ROUNDS
    found = improved(instance, request, goal, found, rounds, hints.learned.tell)
    if downsets is not None and found.value > lower:
        try:
            return _exact(downsets, request, found, whole=whole)
        except TooManyPairsError:
            found = improved(instance, request, goal, found, tell=hints.learned.tell)
    return Answer(found, lower, found.value <= lower, "pool")


def _started(small: Reduced, request: Request, hints: Hints) -> list[Found]:
    """Give the partition to start with, if there is one and it keeps every condition."""
    if hints.start is None:
        return []
    instance = small.instance
    stage_of = np.zeros(instance.size, dtype=np.int64)
    stage_of[small.node_of] = hints.start
    if not is_partition(instance, request, stage_of):
        return []
    return [Found(evaluate(instance, request, stage_of).bottleneck, stage_of)]


def _chain_bound(instance: Instance, request: Request, found: Found, *, whole: bool) -> int:
    if whole or not request.exactly:
        return found.value
    relaxed = dataclasses.replace(request, exactly=False)
    better = cut_order(instance, relaxed, given_order(instance), 0, found.value)
    return found.value if better is None else better.value


def _exact(downsets: Downsets, request: Request, found: Found, *, whole: bool) -> Answer:
    """Search all downsets for what beats ``found``.

    With a fixed number of stages the search with at most as many comes first: where it finds nothing better, ``found``
    is proven, and its bound stays true on a graph whose free nodes were merged (``whole`` false).
    """
    relaxed = dataclasses.replace(request, exactly=False)
    better = downsets.best(relaxed, found.value)
    if better is None:
        return Answer(found, found.value, True, "downsets")
    if not request.exactly or has_all_stages(downsets.instance, request, better.stage_of):
        return Answer(better, better.value, True, "downsets")
    fixed = downsets.best(request, found.value) or found
    bound = fixed.value if whole else better.value
    return Answer(fixed, bound, fixed.value <= bound, "downsets")


def _least_memory(
    problem: PartitionProblem,
    instance: Instance,
    request: Request,
    downsets: Downsets | None,
    memory_limit: float | None,
    *,
    single: bool,
) -> Found:
    """Find the partition that needs least memory; raise if even that is too much, else give it as a start."""
    best: Found | None = None
    for make_order in orders(instance):
        other = cut_order(instance, request, make_order(), 0, best.value if best else None, objective="memory")
        if best is None or (other is not None and other.value < best.value):
            best = other
    assert best is not None
    proven = single
    if downsets is not None:
        try:
            best = downsets.best(request, best.value, objective="memory") or best
            proven = True
        except TooManyPairsError:
            proven = False
    limit = request.memory_limit
    assert limit is not None
    if best.value > limit:
        raise infeasible(problem, instance, request, best, memory_limit, proven=proven)
    return Found(evaluate(instance, request, best.stage_of).bottleneck, best.stage_of)


def infeasible(
    problem: PartitionProblem,
    instance: Instance,
    request: Request,
    best: Found,
    memory_limit: float | None,
    *,
    proven: bool,
) -> InfeasibleError:
    """Say that no partition keeps the memory limit, which is the least that works, and whether one node needs it."""
    least = instance.bytes(best.value)
    alone = instance.static + min(request.live) * instance.activation
    heaviest = int(alone.argmax())
    single = int(alone[heaviest]) == best.value
    reason = ""
    if single:
        nodes = [node for node, merged in enumerate(instance.merged_of) if merged == heaviest]
        what = f"node {problem.name(nodes[0])}" if len(nodes) == 1 else f"the group of node {problem.name(nodes[0])}"
        reason = f"; {what} alone needs that much"
    limit = size_text(memory_limit or 0)
    return InfeasibleError(
        f"no partition into {request.stages} stages keeps memory_limit={limit}: the least limit that "
        f"works {'is' if proven or single else 'found is'} {size_text(least)}{reason}\n"
        f"  raise it to memory_limit={least}, use more stages, or nodes that need less memory",
        least,
    )
