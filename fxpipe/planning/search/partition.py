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

from fxpipe.errors import PartitionError
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
)
from fxpipe.planning.search.learned import Learned
from fxpipe.planning.search.problem import PartitionProblem, Placement, measure
from fxpipe.planning.search.request import Request
from fxpipe.planning.search.several.search import search_several
from fxpipe.planning.search.stages import Hints, search_stages


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
    learned: Learned | None = None,
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
        learned: What searches of the same graph, with other costs or groups, learned; this one adds to it.

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
    solved = _solve(problem, int(stages), memory_limit, routing, exactly, placement, start, goal, slack, even, learned)
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
    learned: Learned | None = None,
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
    hints = Hints(_merged_start(instance, start), instance.load_units(goal), slack, even, learned or Learned())
    hints.learned.tell()
    return _search(problem, instance, request, memory_limit, hints)


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
    problem: PartitionProblem, instance: Instance, request: Request, memory_limit: float | None, hints: Hints
) -> _Solved:
    if request.memory_limit is None or _most_memory(instance, request) <= request.memory_limit:
        instance, request = without_memory(instance), dataclasses.replace(request, memory_limit=None)
    if request.one_stage_per_rank:
        answer = search_stages(problem, instance, request, memory_limit, hints)
    else:
        answer = search_several(problem, instance, request, memory_limit, hints)
    stages = answer.found.stage_of.tolist()
    stage_of = tuple([stages[merged] for merged in instance.merged_of])
    return _Solved(instance, request, stage_of, answer.lower, answer.proven, answer.method)


def _most_memory(instance: Instance, request: Request) -> int:
    """Give what one rank with everything on it, and every value sent and received by every stage, would need."""
    stages = request.stages
    moved = instance.values.amounts.astype(object).sum(axis=0) * stages
    shared = instance.ties.amounts.astype(object).sum(axis=0) * stages
    alive = int(instance.activation.sum()) + int(moved[SENT] + moved[RECEIVED] + shared[TIE_LIVE])
    fixed = int(instance.static.sum()) + int(moved[SENT_FIXED] + moved[RECEIVED_FIXED] + shared[TIE_FIXED])
    most_live = max(sum(entry) for entries in request.placement.live for entry in entries)
    return fixed + most_live * alive


def _measured(problem: PartitionProblem, solved: _Solved) -> Partition:
    used = solved.request.stages if solved.request.exactly else max(solved.stage_of) + 1
    costs = measure(
        problem, solved.stage_of, routing=solved.request.routing, placement=solved.request.placement.first(used)
    )
    bottleneck = max(costs.rank_loads)
    bound = solved.instance.seconds(max(solved.lower - solved.instance.load_error, 0))
    return Partition(solved.stage_of, costs.loads, bottleneck, min(bottleneck, bound), solved.proven, solved.method)
