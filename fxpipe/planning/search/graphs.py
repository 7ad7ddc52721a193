"""Read a networkx graph into a partition problem, and check a problem before it is searched."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain
from numbers import Integral, Real
from typing import Any

import networkx as nx
import numpy as np

from fxpipe.errors import PartitionError
from fxpipe.planning.search.problem import ROUTINGS, PartitionProblem, TransferValue, transfer_values


def read_graph(graph: nx.DiGraph[Any]) -> PartitionProblem:
    """Turn a directed graph with node attributes into a problem; nodes are numbered in the graph's order.

    Args:
        graph: Node attributes ``seconds``, ``memory`` (default 0), ``transfer`` (default 0), ``group`` (default none);
            or ``graph.graph["transfers"]``, a list of ``(seconds, nodes)``, instead of ``transfer``.

    Returns:
        The problem, checked by ``check_problem``.

    Raises:
        PartitionError: The graph is not a directed graph without cycles, or an attribute is missing or invalid.
    """
    if not isinstance(graph, nx.Graph) or not graph.is_directed():
        raise PartitionError(f"cannot partition a {type(graph).__name__}\n  pass a networkx.DiGraph")
    nodes = list(graph)
    if not nodes:
        raise PartitionError(
            "cannot partition a graph without nodes\n  add at least one node with a `seconds` attribute"
        )
    number = dict(zip(nodes, range(len(nodes)), strict=True))
    attributes = [data for _, data in graph.nodes(data=True)]
    seconds = _seconds(nodes, attributes)
    memory = tuple([data.get("memory", 0) for data in attributes])
    of_node = number.__getitem__
    readers = [tuple(map(of_node, after)) for _, after in graph.adjacency()]
    problem = PartitionProblem(
        seconds=seconds,
        edges=tuple([(before, after) for before, afters in enumerate(readers) for after in afters]),
        values=_values(graph, nodes, number, attributes, readers),
        memory=memory if any(memory) else (),
        groups=_groups(nodes, attributes),
        names=tuple(map(str, nodes)),
    )
    check_problem(problem)
    return problem


def _seconds(nodes: Sequence[Hashable], attributes: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    missing = [str(node) for node, data in zip(nodes, attributes, strict=True) if "seconds" not in data]
    if missing:
        raise PartitionError(
            f"{_listed('node', missing)} without `seconds`\n  set graph.nodes[node]['seconds'] to a number >= 0"
        )
    return tuple([data["seconds"] for data in attributes])


def _values(
    graph: nx.DiGraph[Any],
    nodes: Sequence[Hashable],
    number: dict[Hashable, int],
    attributes: Sequence[dict[str, Any]],
    readers: Sequence[tuple[int, ...]],
) -> tuple[TransferValue, ...]:
    producers = [index for index, data in enumerate(attributes) if "transfer" in data]
    if "transfers" not in graph.graph:
        return transfer_values(
            [attributes[index]["transfer"] for index in producers], [(index, *readers[index]) for index in producers]
        )
    if producers:
        raise PartitionError(
            f"both kinds of transfer: node {nodes[producers[0]]} has `transfer` and graph.graph has 'transfers'\n"
            "  use the node attribute for one value per node, or the list for several, not both"
        )
    values = []
    for position, entry in enumerate(_sequence(graph.graph["transfers"], "graph.graph['transfers']")):
        where = f"transfer {position}"
        pair = _sequence(entry, where)
        if len(pair) != 2:
            raise PartitionError(f"{where} is {entry!r}\n  expected a pair (seconds, nodes)")
        members = _sequence(pair[1], f"nodes of {where}")
        for member in members:
            if not isinstance(member, Hashable) or member not in number:
                raise PartitionError(f"{where} names the unknown node {member}\n  use nodes of the graph")
        if not members:
            raise PartitionError(f"{where} has no nodes\n  give its producer and all its readers")
        values.append(TransferValue(pair[0], tuple(dict.fromkeys(number[member] for member in members))))
    return tuple(values)


def _sequence(entry: Any, where: str) -> list[Any]:
    if isinstance(entry, Iterable) and not isinstance(entry, str | bytes):
        return list(entry)
    raise PartitionError(f"{where} is {entry!r}\n  expected a list")


def _groups(nodes: Sequence[Hashable], attributes: Sequence[dict[str, Any]]) -> tuple[tuple[int, ...], ...]:
    members: dict[Hashable, list[int]] = {}
    for index, data in enumerate(attributes):
        if "group" not in data:
            continue
        group = data["group"]
        if group is None:
            continue
        try:
            members.setdefault(group, []).append(index)
        except TypeError:
            raise PartitionError(
                f"the group of node {nodes[index]} is {group!r}, which cannot be compared\n  use a string or a number"
            ) from None
    return tuple(tuple(group) for group in members.values() if len(group) > 1)


def check_problem(problem: PartitionProblem) -> None:
    """Raise a ``PartitionError`` naming the node unless the problem is well formed.

    Args:
        problem: Any problem.

    Raises:
        PartitionError: No nodes, costs that are negative, infinite or not numbers, unknown nodes, or a cycle.
    """
    count = len(problem.seconds)
    if not count:
        raise PartitionError("cannot partition a graph without nodes\n  add at least one node")
    for what, costs in (("seconds", problem.seconds), ("memory", problem.memory), ("activation", problem.activation)):
        if costs and len(costs) != count:
            raise PartitionError(f"{len(costs)} entries of {what} for {count} nodes\n  give one per node, or none")
        _check_costs(costs, lambda index, what=what: f"{what} of node {problem.name(index)}")
    columns = dict(zip(TransferValue._fields, zip(*problem.values, strict=True), strict=False))
    _check_members(problem, "transfer", columns, columns.get("nodes", ()))
    shared = {name: tuple([getattr(tie, name) for tie in problem.ties]) for name in ("seconds", "bytes", "live_bytes")}
    _check_members(problem, "tie", shared, tuple([tie.nodes for tie in problem.ties]))
    _check_nodes(problem.anchors, count, "list of anchors")
    for group in problem.groups:
        _check_nodes(group, count, "group")
    _check_order(problem)


def _check_members(
    problem: PartitionProblem, what: str, columns: Mapping[str, Sequence[Any]], nodes: Sequence[tuple[int, ...]]
) -> None:
    for kind, column in columns.items():
        if kind == "nodes":
            continue
        amounts = [0 if amount is None else amount for amount in column] if kind == "far_seconds" else column
        named = "" if kind == "seconds" else f"{kind} of "
        _check_costs(amounts, lambda index, named=named: f"{named}{_member(problem, what, index)}")
    _check_nodes(list(chain.from_iterable(nodes)), len(problem.seconds), what)
    if not all(nodes):
        raise PartitionError(f"a {what} has no nodes\n  give its producer and all its readers")


def _member(problem: PartitionProblem, what: str, index: int) -> str:
    nodes = (problem.values if what == "transfer" else problem.ties)[index].nodes
    return f"{what} {index} of node {problem.name(nodes[0])}" if nodes else f"{what} {index}"


def _check_costs(costs: Sequence[Any], name: Any) -> None:
    """Check numbers by their types and in one array; look for the culprit only if something is wrong."""
    for kind in dict.fromkeys(map(type, costs)):
        if not issubclass(kind, Real) or issubclass(kind, bool):
            index = next(index for index, cost in enumerate(costs) if type(cost) is kind)
            raise PartitionError(
                f"{name(index)} is {costs[index]!r}, a {kind.__name__}\n  expected a finite number >= 0"
            )
    if not any(costs):
        return
    try:
        array = np.asarray(costs, dtype=np.float64)
        wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0))).tolist()
    except OverflowError:
        wrong = [next(index for index, cost in enumerate(costs) if cost > 1e300 or cost < 0)]
    if wrong:
        raise PartitionError(f"{name(wrong[0])} is {costs[wrong[0]]!r}\n  expected a finite number >= 0")


def _check_nodes(nodes: Sequence[int], count: int, what: str) -> None:
    if not nodes or (min(nodes) >= 0 and max(nodes) < count):
        return
    for node in nodes:
        if not 0 <= node < count:
            raise PartitionError(f"a {what} names the unknown node {node}\n  nodes are 0 to {count - 1}")


def _check_order(problem: PartitionProblem) -> None:
    if not problem.edges:
        return
    count = len(problem.seconds)
    ends = np.fromiter(chain.from_iterable(problem.edges), dtype=np.int64, count=2 * len(problem.edges)).reshape(-1, 2)
    if ends.min() < 0 or ends.max() >= count:
        _check_nodes([int(ends.min()), int(ends.max())], count, "edge")
    if bool((ends[:, 0] < ends[:, 1]).all()):
        return  # the given order is topological already
    graph = nx.DiGraph(problem.edges)
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [problem.name(edge[0]) for edge in nx.find_cycle(graph)]
        raise PartitionError(
            f"the graph has a cycle: {' -> '.join([*cycle[:8], *(['...'] if len(cycle) > 8 else []), cycle[0]])}\n"
            "  remove one of its edges, or give its nodes one `group` and no edges among them"
        )


def check_request(stages: Any, memory_limit: Any, routing: Any) -> None:
    """Raise a ``PartitionError`` unless number of stages, memory limit and routing make sense by themselves."""
    if not isinstance(stages, Integral) or isinstance(stages, bool) or stages < 1:
        raise PartitionError(f"stages is {stages!r}\n  expected a whole number >= 1")
    if routing not in ROUTINGS:
        raise PartitionError(f"routing is {routing!r}\n  expected one of {', '.join(ROUTINGS)}")
    if memory_limit is None:
        return
    if (
        not isinstance(memory_limit, Real)
        or isinstance(memory_limit, bool)
        or math.isnan(memory_limit)
        or memory_limit <= 0
    ):
        raise PartitionError(
            f"memory_limit is {memory_limit!r}\n  expected a number of bytes > 0, or None for no limit"
        )


def _listed(noun: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{noun if len(names) == 1 else noun + 's'} {shown}"
