"""A partition problem as whole numbers in numpy arrays, nodes that must share a stage already merged."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, pairwise

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from fxpipe.planning.search.problem import PartitionProblem, TransferValue

Ints = NDArray[np.int64]

LOAD_BUDGET = 2**52  # every sum of loads stays exact in float64 products, which the search over downsets uses
LARGE_LOAD_BUDGET = 2**57  # for graphs of many nodes, whose rounding adds up: a rank's stages still fit into int64
MANY_NODES = 5_000
MEMORY_BUDGET = 2**57
UNREACHABLE = np.iinfo(np.int64).max
ANY_LOAD = int(np.iinfo(np.int64).max // 4)  # above every sum of loads

# Columns of what a moving value costs, and of what a shared tensor costs.
NEAR_LOAD, FAR_LOAD, SENT, RECEIVED, SENT_FIXED, RECEIVED_FIXED = range(6)
TIE_LOAD, TIE_FIXED, TIE_LIVE = range(3)
MANY_SETS = 20_000  # beyond, equal sets are not looked for


@dataclass(frozen=True, slots=True)
class Members:
    """A list of node sets with amounts, flat: set ``i`` is ``nodes[start[i]:start[i + 1]]``, ascending."""

    nodes: Ints
    start: Ints
    amounts: Ints

    def __len__(self) -> int:
        return len(self.amounts)

    def sets(self) -> list[list[int]]:
        """Give the node sets as lists."""
        flat = self.nodes.tolist()
        bounds = self.start.tolist()
        return [flat[low:high] for low, high in pairwise(bounds)]

    def column(self, index: int) -> Ints:
        """Give one kind of amount of every set."""
        amounts: Ints = self.amounts[:, index]
        return amounts


@dataclass(frozen=True, slots=True)
class Instance:
    """The merged graph in whole numbers.

    Attributes:
        merged_of: Merged node of each original node.
        load: Load of each merged node.
        static: Static memory of each merged node.
        activation: Memory per live microbatch of each merged node.
        anchors: Anchors in each merged node; all of its nodes where none are named.
        successors: Successors of each merged node, ascending; the graph has no cycle.
        predecessors: Predecessors of each merged node, ascending.
        is_path: Whether the nodes' numbers are their only topological order.
        values: What moves: columns ``NEAR_LOAD`` to ``RECEIVED_FIXED``.
        ties: What is shared: columns ``TIE_LOAD`` to ``TIE_LIVE``.
        load_exponent: Loads are seconds · 2**load_exponent.
        memory_exponent: Memory is bytes · 2**memory_exponent.
        load_error: Largest difference, in load units, that rounding to whole numbers may make to a sum; 0 if exact.
    """

    merged_of: tuple[int, ...]
    load: Ints
    static: Ints
    activation: Ints
    anchors: Ints
    successors: tuple[tuple[int, ...], ...]
    predecessors: tuple[tuple[int, ...], ...]
    is_path: bool
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

    def load_units(self, seconds: float) -> int:
        """Give seconds as a load, rounded down; what any load keeps for infinitely many."""
        if math.isinf(seconds):
            return ANY_LOAD
        return math.floor(Fraction(seconds) * Fraction(2) ** self.load_exponent)

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
        max_live: Most live microbatches of any rank's stages together.

    Returns:
        The merged graph.
    """
    num_nodes = len(problem.seconds)
    merged_of, count = _merge(num_nodes, problem.edges, problem.groups)
    seconds = np.asarray(problem.seconds, dtype=np.float64)
    sets, links, moved = _value_columns(problem.values)
    tie_seconds = np.asarray([tie.seconds for tie in problem.ties], dtype=np.float64)
    total = float(seconds.sum() + 2 * links.max(axis=1, initial=0).sum() + tie_seconds.sum())
    budget = LOAD_BUDGET if num_nodes <= MANY_NODES else LARGE_LOAD_BUDGET
    load_exponent, exact = _exponent(np.concatenate([seconds, links.ravel(), tie_seconds]), total, budget)
    static = np.asarray(problem.memory or (0,) * num_nodes, dtype=np.float64)
    activation = np.asarray(problem.activation or (0,) * num_nodes, dtype=np.float64)
    shared = np.asarray([(tie.bytes, tie.live_bytes) for tie in problem.ties], dtype=np.float64).reshape(-1, 2)
    memory_exponent = _memory_exponent(static, activation, moved, shared, max_live)

    index = np.asarray(merged_of, dtype=np.int64)
    anchors = np.zeros(num_nodes, dtype=np.int64)
    anchors[list(problem.anchors) if problem.anchors else slice(None)] = 1
    successors, predecessors, is_path = _adjacency(index, problem.edges, count)
    ties, within = _members(
        [tie.nodes for tie in problem.ties],
        index,
        count,
        np.column_stack([_whole(tie_seconds, load_exponent), _whole_up(shared, memory_exponent)]),
    )
    values, _ = _members(
        sets,
        index,
        count,
        np.column_stack([_whole(links, load_exponent), _whole_up(moved, memory_exponent)]),
    )
    return Instance(
        merged_of=merged_of,
        load=_summed(index, _whole(seconds, load_exponent), count),
        static=_summed(index, _whole_up(static, memory_exponent), count) + within[:, TIE_FIXED],
        activation=_summed(index, _whole_up(activation, memory_exponent), count) + within[:, TIE_LIVE],
        anchors=_summed(index, anchors, count),
        successors=successors,
        predecessors=predecessors,
        is_path=is_path,
        values=values,
        ties=ties,
        load_exponent=load_exponent,
        memory_exponent=memory_exponent,
        load_error=0 if exact else num_nodes + 2 * len(problem.values) + len(problem.ties),
    )


def _memory_exponent(
    static: NDArray[np.float64],
    activation: NDArray[np.float64],
    moved: NDArray[np.float64],
    shared: NDArray[np.float64],
    max_live: int,
) -> int:
    """Choose the power of two of bytes, so that what all ranks together may need stays within budget."""
    alive = activation.sum() + moved[:, :2].sum() + shared[:, 1].sum()
    most = float(static.sum() + shared[:, 0].sum() + moved[:, 2:].sum() + max(max_live, 1) * alive)
    numbers = np.concatenate([static, activation, moved.ravel(), shared.ravel()])
    return _exponent(numbers, most, MEMORY_BUDGET)[0]


def _value_columns(
    values: Sequence[TransferValue],
) -> tuple[Sequence[tuple[int, ...]], NDArray[np.float64], NDArray[np.float64]]:
    """Give the nodes of all values, their seconds on a near and a far link, and the bytes that stages keep for them."""
    columns = list(zip(*values, strict=True)) or [()] * len(TransferValue._fields)
    near, far = columns[0], columns[2]
    links = np.empty((len(near), 2))
    links[:, 0] = links[:, 1] = near
    if far.count(None) < len(far):
        links[:, 1] = [n if f is None else f for n, f in zip(near, far, strict=True)]
    moved = np.zeros((len(near), len(columns) - 3))
    for kind, column in enumerate(columns[3:]):
        if any(column):
            moved[:, kind] = column
    return columns[1], links, moved


def without_memory(instance: Instance) -> Instance:
    """Give the instance with all memory set to nothing, for a search that no limit concerns."""
    return replace(
        instance,
        static=0 * instance.static,
        activation=0 * instance.activation,
        values=_only(instance.values, (NEAR_LOAD, FAR_LOAD)),
        ties=_only(instance.ties, (TIE_LOAD,)),
    )


def without_tie_loads(instance: Instance) -> Instance:
    """Give the instance with ties that cost no time."""
    return replace(instance, ties=_only(instance.ties, (TIE_FIXED, TIE_LIVE)))


def only_live_ties(instance: Instance) -> Instance:
    """Give the instance with ties that cost nothing but memory per live microbatch."""
    return replace(instance, ties=_only(instance.ties, (TIE_LIVE,)))


def _only(members: Members, columns: tuple[int, ...]) -> Members:
    """Keep some columns, and the sets that cost something in them."""
    amounts = np.zeros_like(members.amounts)
    amounts[:, columns] = members.amounts[:, columns]
    kept = amounts.any(axis=1)
    if kept.all():
        return Members(members.nodes, members.start, amounts)
    sizes = np.diff(members.start)
    return Members(members.nodes[np.repeat(kept, sizes)], _starts(sizes[kept]), amounts[kept])


def merged(instance: Instance, node_of: Ints, count: int) -> Instance:
    """Give the instance with its nodes merged into ``count`` nodes; merging must not make a cycle."""
    edges = [(before, after) for before, afters in enumerate(instance.successors) for after in afters]
    successors, predecessors, is_path = _adjacency(node_of, edges, count)
    node_list = node_of.tolist()
    ties, within = _flat_members(
        instance.ties.nodes, np.diff(instance.ties.start), node_of, count, instance.ties.amounts
    )
    values, _ = _flat_members(
        instance.values.nodes, np.diff(instance.values.start), node_of, count, instance.values.amounts
    )
    return replace(
        instance,
        merged_of=tuple([node_list[node] for node in instance.merged_of]),
        load=_summed(node_of, instance.load, count),
        static=_summed(node_of, instance.static, count) + within[:, TIE_FIXED],
        activation=_summed(node_of, instance.activation, count) + within[:, TIE_LIVE],
        anchors=_summed(node_of, instance.anchors, count),
        successors=successors,
        predecessors=predecessors,
        is_path=is_path,
        values=values,
        ties=ties,
    )


def count_anchored(problem: PartitionProblem) -> int:
    """Give how many of the merged nodes have an anchor: the most stages there can be."""
    merged_of, count = _merge(len(problem.seconds), problem.edges, problem.groups)
    return len({merged_of[node] for node in problem.anchors}) if problem.anchors else count


def _merge(
    num_nodes: int, edges: Sequence[tuple[int, int]], groups: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], int]:
    """Merge groups, then the cycles that makes; merged nodes are numbered by their first original node."""
    if not any(len(group) > 1 for group in groups):
        return tuple(range(num_nodes)), num_nodes
    together: nx.Graph[int] = nx.Graph((group[0], node) for group in groups for node in group)  # groups may overlap
    heads = list(range(num_nodes))
    for component in nx.connected_components(together):
        first = min(component)
        for node in component:
            heads[node] = first
    pairs = {(heads[before], heads[after]) for before, after in edges if heads[before] != heads[after]}
    if not _is_acyclic(num_nodes, pairs):
        graph: nx.DiGraph[int] = nx.DiGraph(sorted(pairs))
        graph.add_nodes_from(heads)
        component_of: dict[int, int] = {}
        for number, component in enumerate(nx.strongly_connected_components(graph)):
            component_of.update(dict.fromkeys(component, number))
        heads = [component_of[node] for node in heads]
    numbers: dict[int, int] = {}
    merged = tuple(numbers.setdefault(node, len(numbers)) for node in heads)
    return merged, len(numbers)


def _is_acyclic(num_nodes: int, pairs: Collection[tuple[int, int]]) -> bool:
    """Tell whether taking away nodes without predecessors, again and again, leaves nothing."""
    after: dict[int, list[int]] = {}
    waiting = [0] * num_nodes
    for before, behind in pairs:
        after.setdefault(before, []).append(behind)
        waiting[behind] += 1
    ready = [node for node, count in enumerate(waiting) if not count]
    taken = 0
    while ready:
        taken += 1
        for behind in after.get(ready.pop(), ()):
            waiting[behind] -= 1
            if not waiting[behind]:
                ready.append(behind)
    return taken == num_nodes


def _adjacency(
    merged_of: Ints, edges: Sequence[tuple[int, int]], count: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...], bool]:
    """Give successors, predecessors, and whether every edge goes up and every node reaches the next by an edge."""
    if not edges:
        return ((),) * count, ((),) * count, count == 1
    ends = merged_of[np.fromiter(chain.from_iterable(edges), dtype=np.int64, count=2 * len(edges))].reshape(-1, 2)
    ends = ends[ends[:, 0] != ends[:, 1]]
    keys = _unique(ends[:, 0] * count + ends[:, 1])
    before, after = keys // count, keys % count
    steps = int((after == before + 1).sum())
    is_path = steps == count - 1 and bool((before < after).all())
    if is_path and len(keys) == steps:
        links = tuple(zip(range(count)))
        return (*links[1:], ()), ((), *links[:-1]), True
    backwards = np.argsort(after, kind="stable")
    return _rows(before, after, count), _rows(after[backwards], before[backwards], count), is_path


def _unique(keys: Ints) -> Ints:
    """Sort and drop repeats; several times as fast as ``np.unique``, which hashes."""
    keys = np.sort(keys)
    unique: Ints = keys[np.concatenate([np.ones(min(len(keys), 1), dtype=bool), keys[1:] != keys[:-1]])]
    return unique


def _rows(keys: Ints, items: Ints, count: int) -> tuple[tuple[int, ...], ...]:
    bounds = np.searchsorted(keys, np.arange(count + 1)).tolist()
    flat = tuple(items.tolist())
    return tuple([flat[low:high] for low, high in pairwise(bounds)])


def _members(sets: Sequence[Sequence[int]], merged_of: Ints, count: int, amounts: Ints) -> tuple[Members, Ints]:
    sizes = np.fromiter(map(len, sets), dtype=np.int64, count=len(sets))
    flat = np.fromiter(chain.from_iterable(sets), dtype=np.int64, count=int(sizes.sum()))
    return _flat_members(flat, sizes, merged_of, count, amounts)


def _flat_members(flat: Ints, sizes: Ints, merged_of: Ints, count: int, amounts: Ints) -> tuple[Members, Ints]:
    """Keep the sets of two merged nodes or more that cost something; equal sets are added up.

    Returns:
        The sets, and for each merged node the amounts of the sets that lie wholly inside it.
    """
    owner = np.repeat(np.arange(len(sizes)), sizes)
    keys = _unique(owner * count + merged_of[flat])
    owner, nodes = keys // count, keys % count
    sizes = np.bincount(owner, minlength=len(sizes))
    single = sizes == 1
    within = np.zeros((count, amounts.shape[1]), dtype=np.int64)
    np.add.at(within, nodes[single[owner]], amounts[single])
    kept = (sizes > 1) & amounts.any(axis=1)
    members = Members(nodes[kept[owner]], _starts(sizes[kept]), amounts[kept])
    return (_added_up(members) if len(members) <= MANY_SETS else members), within


def _added_up(members: Members) -> Members:
    kept: dict[tuple[int, ...], Ints] = {}
    for nodes, amounts in zip(members.sets(), members.amounts, strict=True):
        key = tuple(nodes)
        kept[key] = kept[key] + amounts if key in kept else amounts
    if len(kept) == len(members):
        return members
    flat = np.asarray([node for nodes in kept for node in nodes], dtype=np.int64)
    sizes = np.asarray([len(nodes) for nodes in kept], dtype=np.int64)
    return Members(flat, _starts(sizes), np.asarray(list(kept.values()), dtype=np.int64))


def _starts(sizes: Ints) -> Ints:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])


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
    allowed = math.frexp(budget)[1] - 1 - math.frexp(total)[1]  # total < 2**its exponent
    return min(needed, allowed), needed <= allowed


def _whole(numbers: NDArray[np.float64], exponent: int) -> Ints:
    return np.rint(np.ldexp(numbers, exponent)).astype(np.int64)


def _whole_up(numbers: NDArray[np.float64], exponent: int) -> Ints:
    return np.ceil(np.ldexp(numbers, exponent)).astype(np.int64)
