"""Cut any directed graph into stages so that the slowest one is as fast as possible, and prove how good that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np

from fxpipe.errors import InfeasibleError, PartitionError
from fxpipe.planning.bound import load_bound
from fxpipe.planning.downsets import Downsets, all_downsets
from fxpipe.planning.evaluate import Found, evaluate
from fxpipe.planning.graphs import check_problem, check_request, read_graph
from fxpipe.planning.instance import Instance, Ints, make_instance, without_memory
from fxpipe.planning.orders import given_order, has_one_order
from fxpipe.planning.pool import cut_order, orders, search_pool
from fxpipe.planning.problem import PartitionProblem, measure
from fxpipe.planning.reduce import Reduced, reduced
from fxpipe.planning.request import Request


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
    those between twice.

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
    problem = read_graph(graph)
    found = _partition(problem, int(stages), memory_limit, routing)
    return dict(zip(graph, found.stage_of, strict=True))


def partition_nodes(
    problem: PartitionProblem,
    stages: int,
    *,
    memory_limit: float | None = None,
    routing: str = "adjacent",
    exactly: bool = False,
    live: Sequence[int] | None = None,
    rank_of_stage: Sequence[int] | None = None,
) -> Partition:
    """Cut a problem into stages; what ``partition`` and ``compile`` share. ``problem.measure`` defines the costs.

    Args:
        problem: Costs and structure.
        stages: Most stages, or with ``exactly`` their number.
        memory_limit: Most bytes of a rank; None for no limit.
        routing: ``"adjacent"`` or ``"direct"``.
        exactly: Use exactly ``stages`` stages, none empty.
        live: Live microbatches of each stage; None means 1.
        rank_of_stage: Rank of each stage; None means one stage per rank. With several, the largest sum of a rank's
            loads is minimised, then the largest load of a stage.

    Returns:
        The partition, its loads and how good it is.

    Raises:
        PartitionError: Invalid input, or fewer nodes than stages asked for with ``exactly``.
        InfeasibleError: No partition keeps the memory limit.
    """
    check_request(stages, memory_limit, routing)
    check_problem(problem)
    return _partition(problem, int(stages), memory_limit, routing, exactly, live, rank_of_stage)


def _partition(
    problem: PartitionProblem,
    stages: int,
    memory_limit: float | None,
    routing: str,
    exactly: bool = False,
    live: Sequence[int] | None = None,
    rank_of_stage: Sequence[int] | None = None,
) -> Partition:
    live = tuple(live or (1,) * stages)
    ranks = tuple(rank_of_stage or range(stages))
    _check_stages(stages, live, ranks)
    instance = make_instance(problem, max(live))
    if exactly and instance.size < stages:
        raise PartitionError(_too_many_stages(problem, instance, stages))
    request = Request(
        stages=stages if exactly else min(stages, instance.size),
        routing=routing,
        exactly=exactly,
        memory_limit=instance.memory_units(memory_limit),
        live=live,
        ranks=ranks,
    )
    if not exactly:
        request = dataclasses.replace(request, live=live[: request.stages], ranks=ranks[: request.stages])
    return _search(problem, instance, request, memory_limit)


def _check_stages(stages: int, live: Sequence[int], ranks: Sequence[int]) -> None:
    for what, entries, least in (("live", live, 1), ("rank_of_stage", ranks, 0)):
        if len(entries) != stages or any(not isinstance(entry, int) or entry < least for entry in entries):
            raise PartitionError(
                f"{what} is {tuple(entries)}\n  expected {stages} whole numbers >= {least}, one per stage"
            )


def _too_many_stages(problem: PartitionProblem, instance: Instance, stages: int) -> str:
    nodes = len(problem.seconds)
    merged = "" if instance.size == nodes else f", which groups and cycles merge into {instance.size}"
    return f"cannot cut {nodes} nodes{merged} into {stages} stages\n  use 1 to {instance.size} stages, or finer nodes"


def _search(problem: PartitionProblem, instance: Instance, request: Request, memory_limit: float | None) -> Partition:
    if request.memory_limit is None or _most_memory(instance, request) <= request.memory_limit:
        instance, request = without_memory(instance), dataclasses.replace(request, memory_limit=None)
    small = reduced(instance)
    if small.instance.size < (2 * request.stages if request.exactly else 1):
        small = Reduced(instance, np.arange(instance.size))
    whole = small.instance.size == instance.size
    lower = load_bound(small.instance, request)
    found = search_pool(small.instance, request, lower)
    single = has_one_order(small.instance)
    downsets = None
    if not single and (found is None or found.value > lower):
        downsets = all_downsets(small.instance, request)
    if found is None:
        found = _least_memory(
            problem, small.instance, request, downsets, memory_limit, proven=single or downsets is not None
        )
        found = search_pool(small.instance, request, lower, [found]) or found
    answer = _Answer(found, lower, "pool")
    if single:
        answer = _Answer(found, _chain_bound(small.instance, request, found, whole=whole), "chain")
    elif downsets is not None and found.value > lower:
        answer = _exact(downsets, request, found, whole=whole)
    merged_stage = answer.found.stage_of[small.node_of]
    return _result(problem, instance, request, answer, merged_stage)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What was found, a proven lower bound, and how."""

    found: Found
    lower: int
    method: str


def _most_memory(instance: Instance, request: Request) -> int:
    """Give what one rank with everything on it, and every value paid twice by every stage, would need."""
    alive = int(instance.activation.sum()) + 2 * int(instance.values.bytes.sum()) * request.stages
    copies = int((instance.ties.bytes * np.diff(instance.ties.start)).sum())
    return int(instance.static.sum()) + copies + max(request.live) * alive


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
        return _Answer(found, found.value, "downsets")
    if not request.exactly or int(better.stage_of.max()) + 1 == request.stages:
        return _Answer(better, better.value, "downsets")
    fixed = downsets.best(request, found.value) or found
    return _Answer(fixed, fixed.value if whole else better.value, "downsets")


def _least_memory(
    problem: PartitionProblem,
    instance: Instance,
    request: Request,
    downsets: Downsets | None,
    memory_limit: float | None,
    *,
    proven: bool,
) -> Found:
    """Find the partition that needs least memory; raise if even that is too much, else give it as a start."""
    best: Found | None = None
    for make_order in orders(instance):
        other = cut_order(instance, request, make_order(), 0, best.value if best else None, objective="memory")
        if best is None or (other is not None and other.value < best.value):
            best = other
    assert best is not None
    if downsets is not None:
        best = downsets.best(request, best.value, objective="memory") or best
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


def _result(
    problem: PartitionProblem, instance: Instance, request: Request, answer: _Answer, merged_stage: Ints
) -> Partition:
    stages = merged_stage.tolist()
    stage_of = tuple([stages[merged] for merged in instance.merged_of])
    used = request.stages if request.exactly else max(stage_of) + 1
    costs = measure(
        problem,
        stage_of,
        routing=request.routing,
        live=request.live[:used],
        rank_of_stage=request.ranks[:used],
        num_stages=used,
    )
    bottleneck = max(costs.rank_loads)
    bound = min(bottleneck, instance.seconds(max(answer.lower - instance.load_error, 0)))
    return Partition(stage_of, costs.loads, bottleneck, bound, answer.found.value <= answer.lower, answer.method)
