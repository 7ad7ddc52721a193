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
from fxpipe.planning.downsets import DownsetCosts, best_chain, enumerate_downsets
from fxpipe.planning.evaluate import evaluate
from fxpipe.planning.graphs import check_problem, check_request, read_graph
from fxpipe.planning.instance import Instance, Ints, make_instance
from fxpipe.planning.orders import has_one_order
from fxpipe.planning.pool import Found, cut_order, orders, search_pool
from fxpipe.planning.problem import PartitionProblem, measure
from fxpipe.planning.request import Request

MOST_DOWNSETS = 40_000


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
            ``transfer``, ``graph.graph["transfers"]``: a list of ``(seconds, nodes)``: one value, its producer
            and its readers. Edges only order: stage(u) <= stage(v).
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
    lower = load_bound(instance, request)
    found = search_pool(instance, request, lower)
    single = has_one_order(instance)
    settled = single if found is None else single or found.value <= lower
    downsets = None if settled else _downset_costs(instance, request)
    if found is None:
        found = _least_memory(problem, instance, request, downsets, memory_limit, proven=single or downsets is not None)
        found = search_pool(instance, request, lower, [found]) or found
    method, proven = ("chain" if single else "pool"), single or found.value <= lower
    lower = found.value if proven else lower
    if downsets is not None and not proven:
        chain = best_chain(downsets[1], request, found.value)
        method, proven, lower = "downsets", True, found.value
        if chain is not None:
            found = Found(chain[0], _stages_of_chain(instance, downsets[0], chain[1]))
            lower = chain[0]
    return _result(problem, instance, request, found, lower, proven, method)


def _downset_costs(instance: Instance, request: Request) -> tuple[list[int], DownsetCosts] | None:
    downsets = enumerate_downsets(instance, MOST_DOWNSETS) if instance.size < MOST_DOWNSETS else None
    return None if downsets is None else (downsets, DownsetCosts(instance, request, downsets))


def _stages_of_chain(instance: Instance, downsets: Sequence[int], chain: Sequence[int]) -> Ints:
    stage_of = np.zeros(instance.size, dtype=np.int64)
    for downset in chain[1:-1]:
        stage_of += np.asarray([not downsets[downset] >> node & 1 for node in range(instance.size)], dtype=np.int64)
    return stage_of


def _least_memory(
    problem: PartitionProblem,
    instance: Instance,
    request: Request,
    downsets: tuple[list[int], DownsetCosts] | None,
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
        chain = best_chain(downsets[1], request, best.value, objective="memory")
        if chain is not None:
            best = Found(chain[0], _stages_of_chain(instance, downsets[0], chain[1]))
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
    problem: PartitionProblem,
    instance: Instance,
    request: Request,
    found: Found,
    lower: int,
    proven: bool,
    method: str,
) -> Partition:
    merged_stage = found.stage_of.tolist()
    stage_of = tuple([merged_stage[merged] for merged in instance.merged_of])
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
    bound = instance.seconds(max(lower - instance.load_error, 0))
    return Partition(stage_of, costs.loads, bottleneck, min(bottleneck, bound), proven, method)
