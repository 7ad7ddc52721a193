"""Cut any directed graph into stages so that the slowest one is as fast as possible, and prove how good that is."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np

from fxpipe.errors import InfeasibleError, PartitionError
from fxpipe.planning.search.bounds import crossing_bound, load_bound
from fxpipe.planning.search.downsets import Downsets, TooManyPairsError, all_downsets
from fxpipe.planning.search.evaluate import Found, evaluate, has_all_stages, is_partition
from fxpipe.planning.search.graphs import check_problem, check_request, read_graph
from fxpipe.planning.search.instance import (
    MANY_NODES,
    RECEIVED,
    RECEIVED_FIXED,
    SENT,
    SENT_FIXED,
    TIE_FIXED,
    TIE_LIVE,
    Instance,
    Ints,
    count_anchored,
    make_instance,
    without_memory,
    without_tie_loads,
)
from fxpipe.planning.search.orders import given_order, has_one_order
from fxpipe.planning.search.pools import FEW_ROUNDS, ROUNDS, cut_order, evened, improved, orders, search_pool
from fxpipe.planning.search.problem import PartitionProblem, Placement, measure
from fxpipe.planning.search.ranks import search_ranks
from fxpipe.planning.search.reductions import Reduced, reduced
from fxpipe.planning.search.request import Request


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition and how good it is.

    Attributes:
        stage_of: Stage of each node.
        loads: Seconds of each stage, transfers and ties included.
        bottleneck: The largest load of a rank's stages together; of a stage, where every rank has one.
        lower_bound: Proven: no partition into as many stages has a smaller bottleneck.
        proven: Whether the bottleneck is the optimum (to the rounding of 2**-52 of the total that costs take).
        method: What was searched: ``"chain"``, ``"downsets"`` (all of them) or ``"pool"``.
    """

    stage_of: tuple[int, ...]
    loads: tuple[float, ...]
    bottleneck: float
    lower_bound: float
    proven: bool
    method: str


def partition(
    graph: nx.DiGraph[Any], stages: int, *, memory_limit: float | None = None, routing: str = "adjacent"
) -> dict[Any, int]:
    """Cut a directed graph into at most ``stages`` stages with the smallest largest load.

    The load of a stage is the sum of its nodes' ``seconds`` and of the transfers it takes part in. With
    ``routing="direct"`` a value whose nodes do not all lie in one stage is paid once by every stage that holds any of
    them; with ``routing="adjacent"`` it passes every stage from its first to its last, the first and the last pay once,
    those between twice. Of partitions that are equally good along the order found, the most even one is taken, unless
    the graph is large.

    Args:
        graph: Node attributes ``seconds`` (>= 0), ``memory`` (bytes, default 0), ``transfer`` (seconds to move the
            node's output over one link, default 0), ``group`` (nodes of one group share a stage). Instead of
            ``transfer``, ``graph.graph["transfers"]``: a list of ``(seconds, nodes)``, one value each, with its
            producer and all its readers. Edges only order: stage(u) <= stage(v).
        stages: Most stages.
        memory_limit: Most bytes of a stage; None for no limit.
        routing: ``"adjacent"`` or ``"direct"``.

    Returns:
        The stage of each node, from 0 without gaps, in the graph's order of nodes.

    Raises:
        PartitionError: The graph or an argument is invalid; the message names the node.
        InfeasibleError: No partition keeps the memory limit; ``least_memory_limit`` is the least that works.

    >>> import networkx as nx
    >>> graph = nx.DiGraph([("embed", "block"), ("block", "head")])
    >>> nx.set_node_attributes(graph, {"embed": 1.0, "block": 3.0, "head": 2.0}, "seconds")
    >>> partition(graph, 2)
    {'embed': 0, 'block': 0, 'head': 1}
    """
    check_request(stages, memory_limit, routing)
    with _uncollected(len(graph) if isinstance(graph, nx.Graph) else 0):
        stage_of = _solve(read_graph(graph), int(stages), memory_limit, routing, even=True).stage_of
    return dict(zip(graph, stage_of, strict=True))


@contextmanager
def _uncollected(num_nodes: int) -> Iterator[None]:
    """Keep the cycle collector from walking over a large graph again and again while tuples are made of it."""
    if num_nodes < MANY_NODES or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def partition_nodes(
    problem: PartitionProblem,
    stages: int,
    *,
    memory_limit: float | None = None,
    routing: str = "adjacent",
    exactly: bool = False,
    placement: Placement | None = None,
    live: Sequence[int] = (),
    rank_of_stage: Sequence[int] = (),
    start: Sequence[int] = (),
    goal: float = 0.0,
    slack: float = 0.0,
    even: bool = False,
) -> Partition:
    """Cut a problem into stages; what ``partition`` and ``compile`` share. ``problem.measure`` defines the costs.

    Args:
        problem: Costs and structure.
        stages: Most stages, or with ``exactly`` their number.
        memory_limit: Most bytes of a rank; None for no limit.
        routing: ``"adjacent"`` or ``"direct"``.
        exactly: Use exactly ``stages`` stages, each with one of the problem's anchors.
        placement: Rank of each stage, live microbatches, links; None means one stage per rank, one live microbatch and
            near links. With several stages per rank, the largest sum of a rank's loads is minimised, then the largest
            load of a stage.
        live: Instead of a placement: live microbatches of each stage.
        rank_of_stage: Instead of a placement: rank of each stage.
        start: A partition to improve on, the stage of each node; it is looked at only if it is possible.
        goal: Seconds that are good enough: the search stops there, and does not go on to prove anything.
        slack: With several stages per rank, the share of the best rank load that ranks may have more for the sake of
            the largest stage.
        even: With one stage per rank, take the most even one of equally good partitions along the order found.

    Returns:
        The partition, its loads and how good it is.

    Raises:
        PartitionError: Invalid input, or fewer nodes than stages asked for with ``exactly``.
        InfeasibleError: No partition keeps the memory limit.
    """
    check_request(stages, memory_limit, routing)
    check_problem(problem)
    if placement is None and (live or rank_of_stage):
        for name, entries in (("live", live), ("rank_of_stage", rank_of_stage)):
            if entries and len(entries) != stages:
                raise PartitionError(f"{name} is {tuple(entries)}\n  expected {stages} whole numbers, one per stage")
        placement = Placement.simple(int(stages), live=live, rank_of_stage=rank_of_stage)
    solved = _solve(problem, int(stages), memory_limit, routing, exactly, placement, start, goal, slack, even)
    return _measured(problem, solved)


def most_stages(problem: PartitionProblem) -> int:
    """Give the most stages a problem can be cut into, each with one of its anchors.

    >>> most_stages(PartitionProblem((1.0, 1.0, 1.0), edges=((0, 1), (1, 2)), groups=((0, 2),)))
    1
    """
    return count_anchored(problem)


@dataclass(frozen=True, slots=True)
class _Solved:
    """What a search found, and for what."""

    instance: Instance
    request: Request
    stage_of: tuple[int, ...]
    lower: int
    proven: bool
    method: str


def _solve(
    problem: PartitionProblem,
    stages: int,
    memory_limit: float | None,
    routing: str,
    exactly: bool = False,
    placement: Placement | None = None,
    start: Sequence[int] = (),
    goal: float = 0.0,
    slack: float = 0.0,
    even: bool = False,
) -> _Solved:
    if placement is not None:
        _check_placement(stages, placement)
    else:
        most = stages if exactly else min(stages, len(problem.seconds))
        placement = Placement.simple(most)
    live = max(sum(entry) for entries in placement.live for entry in entries)
    instance = make_instance(problem, live)
    if exactly and int((instance.anchors > 0).sum()) < stages:
        raise PartitionError(_too_many_stages(problem, instance, stages))
    used = stages if exactly else min(stages, instance.size)
    request = Request.of(used, routing, exactly, instance.memory_units(memory_limit), placement.first(used))
    hints = _Hints(_merged_start(instance, start), instance.load_units(goal), slack, even)
    return _search(problem, instance, request, memory_limit, hints)


@dataclass(frozen=True, slots=True)
class _Hints:
    """What a search may start with, a load good enough (0 for none), the slack of ranks, whether to even out."""

    start: Ints | None = None
    goal: int = 0
    slack: float = 0.0
    even: bool = False


def _merged_start(instance: Instance, start: Sequence[int]) -> Ints | None:
    """Give the merged nodes' stages; None where nodes of one lie in several, or there is nothing."""
    if len(start) != len(instance.merged_of):
        return None
    stages = np.asarray(start, dtype=np.int64)
    merged_of = np.asarray(instance.merged_of, dtype=np.int64)
    merged = np.zeros(instance.size, dtype=np.int64)
    merged[merged_of] = stages
    return merged if bool((merged[merged_of] == stages).all()) else None


def _check_placement(stages: int, placement: Placement) -> None:
    ranks, far = placement.rank_of_stage, placement.far
    whole = all(isinstance(entry, int) and entry >= 0 for entry in ranks)
    if len(ranks) != stages or not whole:
        raise PartitionError(f"rank_of_stage is {ranks}\n  expected {stages} whole numbers >= 0, one per stage")
    if len(far) != stages - 1:
        raise PartitionError(f"far is {far}\n  expected {stages - 1} truth values, one per boundary")
    counts = [ranks.count(rank) for rank in range(max(ranks) + 1)]
    for rank, (entries, count) in enumerate(zip(placement.live, counts, strict=False)):
        numbers = [number for entry in entries for number in entry]
        if not entries or any(len(entry) != count for entry in entries) or min(numbers, default=0) < 0:
            raise PartitionError(
                f"live of rank {rank} is {entries}\n  expected whole numbers >= 0, one per stage of it"
            )
    if len(placement.live) != len(counts):
        raise PartitionError(f"live is {placement.live}\n  expected one entry for each of {len(counts)} ranks")


def _too_many_stages(problem: PartitionProblem, instance: Instance, stages: int) -> str:
    nodes = len(problem.seconds)
    most = int((instance.anchors > 0).sum())
    merged = "" if instance.size == nodes else f", which groups and cycles merge into {instance.size}"
    anchored = "" if most == instance.size else f" ({most} with an anchor)"
    return f"cannot cut {nodes} nodes{merged}{anchored} into {stages} stages\n  use 1 to {most} stages, or finer nodes"


def _search(
    problem: PartitionProblem, instance: Instance, request: Request, memory_limit: float | None, hints: _Hints
) -> _Solved:
    if request.memory_limit is None or _most_memory(instance, request) <= request.memory_limit:
        instance, request = without_memory(instance), dataclasses.replace(request, memory_limit=None)
    if request.one_stage_per_rank:
        answer = _search_stages(problem, instance, request, memory_limit, hints)
    else:
        answer = _search_ranks(problem, instance, request, memory_limit, hints)
    stages = answer.found.stage_of.tolist()
    stage_of = tuple([stages[merged] for merged in instance.merged_of])
    return _Solved(instance, request, stage_of, answer.lower, answer.proven, answer.method)


def _search_stages(
    problem: PartitionProblem, instance: Instance, request: Request, memory_limit: float | None, hints: _Hints
) -> _Answer:
    """Search where every rank has one stage."""
    single = has_one_order(instance)
    small = Reduced(instance, np.arange(instance.size)) if single else reduced(instance)
    # A free node by itself may be what keeps a stage from being empty.
    few = request.memory_limit is not None or small.instance.size < 2 * request.stages
    if request.exactly and instance.anchors.all() and few:
        small = Reduced(instance, np.arange(instance.size))
    single = single or has_one_order(small.instance)
    searched = _search_small(problem, small, request, memory_limit, hints, single=single)
    found = Found(searched.found.value, searched.found.stage_of[small.node_of])
    return dataclasses.replace(searched, found=evened(instance, request, found) if hints.even else found)


def _search_small(
    problem: PartitionProblem,
    small: Reduced,
    request: Request,
    memory_limit: float | None,
    hints: _Hints,
    *,
    single: bool,
) -> _Answer:
    """Cut orders first; then look at all downsets where they are few, else reorder and cut again."""
    instance = small.instance
    lower = load_bound(instance, request)
    goal = max(lower, hints.goal)
    found = search_pool(instance, request, goal, _started(small, request, hints))
    downsets = None
    if not single and not hints.goal and (found is None or found.value > lower):
        downsets = all_downsets(instance, request)
    if found is None:
        found = _least_memory(problem, instance, request, downsets, memory_limit, single=single)
        found = search_pool(instance, request, goal, [found]) or found
    if single:
        whole = len(small.node_of) == instance.size or not instance.anchors.all()
        settled = found.value > goal or goal == lower  # a search that stopped at the goal says nothing of what is below
        bound = _chain_bound(instance, request, found, whole=whole) if settled else min(lower, found.value)
        return _Answer(found, bound, found.value <= bound, "chain")
    found = improved(instance, request, goal, found, ROUNDS if downsets is None and not hints.goal else FEW_ROUNDS)
    if downsets is not None and found.value > lower:
        whole = len(small.node_of) == instance.size or not instance.anchors.all()
        try:
            return _exact(downsets, request, found, whole=whole)
        except TooManyPairsError:
            found = improved(instance, request, goal, found)
    if not hints.goal:
        lower = min(max(lower, crossing_bound(instance, request, found.value)), found.value)
    return _Answer(found, lower, found.value <= lower, "pool")


def _started(small: Reduced, request: Request, hints: _Hints) -> list[Found]:
    """Give the partition to start with, if there is one and it keeps every condition."""
    if hints.start is None:
        return []
    instance = small.instance
    stage_of = np.zeros(instance.size, dtype=np.int64)
    stage_of[small.node_of] = hints.start
    if not is_partition(instance, request, stage_of):
        return []
    return [Found(evaluate(instance, request, stage_of).bottleneck, stage_of)]


def _search_ranks(
    problem: PartitionProblem, instance: Instance, request: Request, memory_limit: float | None, hints: _Hints
) -> _Answer:
    """Search where ranks have several stages: first as if they had one each, which bounds what a rank can reach."""
    relaxed = without_tie_loads(instance), request.apart()
    try:
        answer = _search_stages(problem, *relaxed, memory_limit, _Hints())
    except InfeasibleError:
        # More than the limit on one stage. Whether that is proven does not matter: the search below says more.
        unlimited = dataclasses.replace(relaxed[1], memory_limit=None)
        answer = _search_stages(problem, without_memory(relaxed[0]), unlimited, None, _Hints())
    lower = max(load_bound(instance, request), answer.lower)
    starts = [answer.found.stage_of]
    if hints.start is not None and is_partition(instance, request, hints.start):
        starts.append(hints.start)
    limit = request.memory_limit
    if limit is not None and all(evaluate(instance, request, stage_of).memory > limit for stage_of in starts):
        least = search_ranks(instance, request, 0, starts, objective="memory")
        assert least.found is not None
        if least.found.value > limit:
            raise _infeasible(problem, instance, request, least.found, memory_limit, proven=least.exact)
        starts.append(least.found.stage_of)
    searched = search_ranks(instance, request, lower, starts, slack=hints.slack)
    found = searched.found
    assert found is not None
    value = evaluate(instance, request, found.stage_of).bottleneck
    if not searched.exact:
        lower = min(max(searched.lower, crossing_bound(instance, request, value)), value)
        searched = dataclasses.replace(searched, lower=lower)
    method = "downsets" if searched.exact else "pool"
    proven = value <= searched.lower or (searched.exact and not hints.slack)
    return _Answer(Found(value, found.stage_of), searched.lower, proven, method)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What was found, a proven lower bound, and how."""

    found: Found
    lower: int
    proven: bool
    method: str


def _most_memory(instance: Instance, request: Request) -> int:
    """Give what one rank with everything on it, and every value sent and received by every stage, would need."""
    stages = request.stages
    moved = instance.values.amounts.astype(object).sum(axis=0) * stages
    shared = instance.ties.amounts.astype(object).sum(axis=0) * stages
    alive = int(instance.activation.sum()) + int(moved[SENT] + moved[RECEIVED] + shared[TIE_LIVE])
    fixed = int(instance.static.sum()) + int(moved[SENT_FIXED] + moved[RECEIVED_FIXED] + shared[TIE_FIXED])
    most_live = max(sum(entry) for entries in request.placement.live for entry in entries)
    return fixed + most_live * alive


def _chain_bound(instance: Instance, request: Request, found: Found, *, whole: bool) -> int:
    if whole or not request.exactly:
        return found.value
    relaxed = dataclasses.replace(request, exactly=False)
    better = cut_order(instance, relaxed, given_order(instance), 0, found.value)
    return found.value if better is None else better.value


def _exact(downsets: Downsets, request: Request, found: Found, *, whole: bool) -> _Answer:
    """Search all downsets for what beats ``found``.

    With a fixed number of stages the search with at most as many comes first: where it finds nothing better, ``found``
    is proven, and its bound stays true on a graph whose free nodes were merged (``whole`` false).
    """
    relaxed = dataclasses.replace(request, exactly=False)
    better = downsets.best(relaxed, found.value)
    if better is None:
        return _Answer(found, found.value, True, "downsets")
    if not request.exactly or has_all_stages(downsets.instance, request, better.stage_of):
        return _Answer(better, better.value, True, "downsets")
    fixed = downsets.best(request, found.value) or found
    bound = fixed.value if whole else better.value
    return _Answer(fixed, bound, fixed.value <= bound, "downsets")


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
        raise _infeasible(problem, instance, request, best, memory_limit, proven=proven)
    return Found(evaluate(instance, request, best.stage_of).bottleneck, best.stage_of)


def _infeasible(
    problem: PartitionProblem,
    instance: Instance,
    request: Request,
    best: Found,
    memory_limit: float | None,
    *,
    proven: bool,
) -> InfeasibleError:
    least = instance.bytes(best.value)
    alone = instance.static + min(request.live) * instance.activation
    heaviest = int(alone.argmax())
    single = int(alone[heaviest]) == best.value
    reason = ""
    if single:
        nodes = [node for node, merged in enumerate(instance.merged_of) if merged == heaviest]
        what = f"node {problem.name(nodes[0])}" if len(nodes) == 1 else f"the group of node {problem.name(nodes[0])}"
        reason = f"; {what} alone needs that much"
    return InfeasibleError(
        f"no partition into {request.stages} stages keeps memory_limit={memory_limit:g} bytes: the least limit that "
        f"works {'is' if proven or single else 'found is'} {least}{reason}\n"
        f"  raise the limit to {least}, use more stages, or nodes that need less memory",
        least,
    )


def _measured(problem: PartitionProblem, solved: _Solved) -> Partition:
    used = solved.request.stages if solved.request.exactly else max(solved.stage_of) + 1
    costs = measure(
        problem, solved.stage_of, routing=solved.request.routing, placement=solved.request.placement.first(used)
    )
    bottleneck = max(costs.rank_loads)
    bound = solved.instance.seconds(max(solved.lower - solved.instance.load_error, 0))
    return Partition(solved.stage_of, costs.loads, bottleneck, min(bottleneck, bound), solved.proven, solved.method)
