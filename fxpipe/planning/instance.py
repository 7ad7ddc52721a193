"""A partition problem as whole numbers in numpy arrays, nodes that must share a stage already merged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from fxpipe.planning.problem import PartitionProblem

Ints = NDArray[np.int64]

LOAD_BUDGET = 2**52  # every sum of loads stays exact in float64 products, which the search over downsets uses
LARGE_LOAD_BUDGET = 2**61  # for graphs of many nodes, whose rounding adds up: exact in int64
MANY_NODES = 5_000
MEMORY_BUDGET = 2**60
UNREACHABLE = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Members:
    """A list of node sets with a weight each, flat: set ``i`` is ``nodes[start[i]:start[i + 1]]``, ascending."""

    nodes: Ints
    start: Ints
    load: Ints
    bytes: Ints

    def __len__(self) -> int:
        return len(self.load)

    def sets(self) -> list[list[int]]:
        """Give the node sets as lists."""
        flat = self.nodes.tolist()
        bounds = self.start.tolist()
        return [flat[low:high] for low, high in pairwise(bounds)]


@dataclass(frozen=True, slots=True)
class Instance:
    """The merged graph in whole numbers.

    Attributes:
        merged_of: Merged node of each original node.
        load: Load of each merged node.
        static: Static memory of each merged node.
        activation: Memory per live microbatch of each merged node.
        successors: Successors of each merged node, ascending; the graph has no cycle.
        predecessors: Predecessors of each merged node, ascending.
        values: What moves: load and bytes per payment.
        ties: Tied tensors: load of a holder where there are several, bytes per holder.
        load_exponent: Loads are seconds · 2**load_exponent.
        memory_exponent: Memory is bytes · 2**memory_exponent.
        load_error: Largest difference, in load units, that rounding to whole numbers may make to a sum; 0 if exact.
    """

    merged_of: tuple[int, ...]
    load: Ints
    static: Ints
    activation: Ints
    successors: tuple[tuple[int, ...], ...]
    predecessors: tuple[tuple[int, ...], ...]
    values: Members
    ties: Members
    load_exponent: int
    memory_exponent: int
    load_error: int

    @property
    def size(self) -> int:
        """Number of merged nodes."""
        return len(self.load)

    def seconds(self, load: int) -> float:
        """Give a load in seconds."""
        return math.ldexp(float(load), -self.load_exponent)

    def bytes(self, memory: int) -> int:
        """Give a memory in bytes, rounded up."""
        return math.ceil(math.ldexp(float(memory), -self.memory_exponent))

    def memory_units(self, limit: float | None) -> int | None:
        """Give a limit of bytes in memory units, rounded down; None stays None."""
        if limit is None or math.isinf(limit):
            return None
        return math.floor(Fraction(limit) * Fraction(2) ** self.memory_exponent)


def make_instance(problem: PartitionProblem, max_live: int = 1) -> Instance:
    """Merge what must share a stage and turn seconds and bytes into whole numbers.

    Seconds are scaled by a power of two. Numbers that are whole, or sums of powers of two, stay exact; others are
    rounded to about 2**-52 of the total, and ``load_error`` says by how much a sum can be off. Memory rounds up.

    Args:
        problem: A valid problem.
        max_live: Most live microbatches of any stage.

    Returns:
        The merged graph.
    """
    num_nodes = len(problem.seconds)
    merged_of, count = _merge(num_nodes, problem.edges, problem.groups)
    seconds = np.asarray(problem.seconds, dtype=np.float64)
    value_seconds = np.asarray([value.seconds for value in problem.values], dtype=np.float64)
    tie_seconds = np.asarray([tie.seconds for tie in problem.ties], dtype=np.float64)
    total = float(seconds.sum() + 2 * value_seconds.sum() + tie_seconds.sum())
    budget = LOAD_BUDGET if num_nodes <= MANY_NODES else LARGE_LOAD_BUDGET
    load_exponent, exact = _exponent(np.concatenate([seconds, value_seconds, tie_seconds]), total, budget)
    static = np.asarray(problem.memory or (0,) * num_nodes, dtype=np.float64)
    activation = np.asarray(problem.activation or (0,) * num_nodes, dtype=np.float64)
    value_bytes = np.asarray([value.bytes for value in problem.values], dtype=np.float64)
    tie_bytes = np.asarray([tie.bytes for tie in problem.ties], dtype=np.float64)
    most = float(static.sum() + tie_bytes.sum() + max_live * (activation.sum() + 2 * value_bytes.sum()))
    memory_exponent, _ = _exponent(np.concatenate([static, activation, value_bytes, tie_bytes]), most, MEMORY_BUDGET)

    index = np.asarray(merged_of, dtype=np.int64)
    load_units = _whole(seconds, load_exponent)
    tie_load, tie_units = _whole(tie_seconds, load_exponent), _whole_up(tie_bytes, memory_exponent)
    static_units = _summed(index, _whole_up(static, memory_exponent), count)
    tie_sets = [sorted({merged_of[node] for node in tie.nodes}) for tie in problem.ties]
    for nodes, extra in zip(tie_sets, tie_units.tolist(), strict=True):
        if len(nodes) == 1:
            static_units[nodes[0]] += extra
    successors, predecessors = _adjacency(index, problem.edges, count)
    values = _members(
        (_merged_set(value.nodes, merged_of) for value in problem.values),
        _whole(value_seconds, load_exponent),
        _whole_up(value_bytes, memory_exponent),
    )
    return Instance(
        merged_of=merged_of,
        load=_summed(index, load_units, count),
        static=static_units,
        activation=_summed(index, _whole_up(activation, memory_exponent), count),
        successors=successors,
        predecessors=predecessors,
        values=values,
        ties=_members(tie_sets, tie_load, tie_units),
        load_exponent=load_exponent,
        memory_exponent=memory_exponent,
        load_error=0 if exact else num_nodes + 2 * len(problem.values) + len(problem.ties),
    )


def without_memory(instance: Instance) -> Instance:
    """Give the instance with all memory set to nothing, for a search that no limit concerns."""
    values, ties = instance.values, instance.ties
    return replace(
        instance,
        static=0 * instance.static,
        activation=0 * instance.activation,
        values=_members(values.sets(), values.load, 0 * values.bytes),
        ties=_members(ties.sets(), ties.load, 0 * ties.bytes),
    )


def merged(instance: Instance, node_of: Ints, count: int) -> Instance:
    """Give the instance with its nodes merged into ``count`` nodes; merging must not make a cycle."""
    edges = [(before, after) for before, afters in enumerate(instance.successors) for after in afters]
    successors, predecessors = _adjacency(node_of, edges, count)
    node_list = node_of.tolist()
    static = _summed(node_of, instance.static, count)
    tie_sets = [_merged_set(nodes, node_list) for nodes in instance.ties.sets()]
    for nodes, extra in zip(tie_sets, instance.ties.bytes.tolist(), strict=True):
        if len(nodes) == 1:
            static[nodes[0]] += extra
    values = (_merged_set(nodes, node_list) for nodes in instance.values.sets())
    return replace(
        instance,
        merged_of=tuple(node_list[node] for node in instance.merged_of),
        load=_summed(node_of, instance.load, count),
        static=static,
        activation=_summed(node_of, instance.activation, count),
        successors=successors,
        predecessors=predecessors,
        values=_members(values, instance.values.load, instance.values.bytes),
        ties=_members(tie_sets, instance.ties.load, instance.ties.bytes),
    )


def _merged_set(nodes: Sequence[int], merged_of: Sequence[int]) -> list[int]:
    if len(nodes) == 2:
        first, second = merged_of[nodes[0]], merged_of[nodes[1]]
        return [first, second] if first < second else [second, first] if second < first else [first]
    return sorted({merged_of[node] for node in nodes})


def _merge(
    num_nodes: int, edges: Sequence[tuple[int, int]], groups: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], int]:
    """Merge groups, then the cycles that makes; merged nodes are numbered by their first original node."""
    if not any(len(group) > 1 for group in groups):
        return tuple(range(num_nodes)), num_nodes
    head = list(range(num_nodes))
    for group in groups:
        for node in group:
            head[node] = group[0]
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(head)
    graph.add_edges_from((head[before], head[after]) for before, after in edges)
    component_of: dict[int, int] = {}
    for number, component in enumerate(nx.strongly_connected_components(graph)):
        component_of.update(dict.fromkeys(component, number))
    numbers: dict[int, int] = {}
    merged = tuple(numbers.setdefault(component_of[head[node]], len(numbers)) for node in range(num_nodes))
    return merged, len(numbers)


def _adjacency(
    merged_of: Ints, edges: Sequence[tuple[int, int]], count: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    if not edges:
        return ((),) * count, ((),) * count
    ends = merged_of[np.asarray(edges, dtype=np.int64)]
    ends = ends[ends[:, 0] != ends[:, 1]]
    keys = np.unique(ends[:, 0] * count + ends[:, 1])
    before, after = keys // count, keys % count
    backwards = np.argsort(after, kind="stable")
    return _rows(before, after, count), _rows(after[backwards], before[backwards], count)


def _rows(keys: Ints, items: Ints, count: int) -> tuple[tuple[int, ...], ...]:
    bounds = np.searchsorted(keys, np.arange(count + 1)).tolist()
    flat = items.tolist()
    return tuple(tuple(flat[low:high]) for low, high in pairwise(bounds))


def _members(sets: Iterable[list[int]], load: Ints, size: Ints) -> Members:
    """Keep the sets of two nodes or more that cost something; equal sets are added up."""
    kept: dict[tuple[int, ...], list[int]] = {}
    for nodes, seconds, extra in zip(sets, load.tolist(), size.tolist(), strict=True):
        if len(nodes) > 1 and (seconds or extra):
            entry = kept.setdefault(tuple(nodes), [0, 0])
            entry[0] += seconds
            entry[1] += extra
    start = np.cumsum([0, *(len(nodes) for nodes in kept)], dtype=np.int64)
    flat = np.fromiter((node for nodes in kept for node in nodes), dtype=np.int64, count=int(start[-1]))
    sums = np.asarray(list(kept.values()), dtype=np.int64).reshape(-1, 2)
    return Members(flat, start, sums[:, 0].copy(), sums[:, 1].copy())


def _summed(index: Ints, amounts: Ints, count: int) -> Ints:
    sums = np.zeros(count, dtype=np.int64)
    np.add.at(sums, index, amounts)
    return sums


def _exponent(numbers: NDArray[np.float64], total: float, budget: int) -> tuple[int, bool]:
    """Choose the power of two that makes all numbers whole, or the largest one that keeps ``total`` within budget."""
    positive = numbers[numbers > 0]
    if not len(positive):
        return 0, True
    mantissa, exponent = np.frexp(positive)
    digits = (mantissa * 2.0**53).astype(np.int64)
    lowest = np.frexp((digits & -digits).astype(np.float64))[1] - 1
    needed = int((53 - exponent - lowest).max())
    allowed = math.frexp(budget / total)[1] - 1
    return min(needed, allowed), needed <= allowed


def _whole(numbers: NDArray[np.float64], exponent: int) -> Ints:
    return np.rint(np.ldexp(numbers, exponent)).astype(np.int64)


def _whole_up(numbers: NDArray[np.float64], exponent: int) -> Ints:
    return np.ceil(np.ldexp(numbers, exponent)).astype(np.int64)
