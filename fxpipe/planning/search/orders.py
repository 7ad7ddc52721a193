"""Topological orders of the merged graph: the lines along which a graph is cut."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

from fxpipe.planning.search.instance import NEAR_LOAD, Instance


def by_priority(instance: Instance, priority: Sequence[float]) -> list[int]:
    """Order the nodes topologically, always taking the ready node of lowest priority, then of lowest number.

    >>> from fxpipe.planning.search.problem import PartitionProblem
    >>> from fxpipe.planning.search.instance import make_instance
    >>> diamond = make_instance(PartitionProblem((1, 1, 1, 1), edges=((0, 1), (0, 2), (1, 3), (2, 3))))
    >>> by_priority(diamond, [0, 2, 1, 0])
    [0, 2, 1, 3]
    """
    waiting = [len(before) for before in instance.predecessors]
    ready = [(priority[node], node) for node, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        _, node = heapq.heappop(ready)
        order.append(node)
        for after in instance.successors[node]:
            waiting[after] -= 1
            if not waiting[after]:
                heapq.heappush(ready, (priority[after], after))
    return order


def given_order(instance: Instance) -> list[int]:
    """Give the order in which the nodes were added, as far as the edges allow it."""
    if instance.is_path or all(not after or after[0] > node for node, after in enumerate(instance.successors)):
        return list(range(instance.size))
    return by_priority(instance, range(instance.size))


def has_one_order(instance: Instance) -> bool:
    """Tell whether only one topological order exists: each node in it is a predecessor of the next."""
    if instance.is_path:
        return True
    order = given_order(instance)
    return all(after in instance.successors[before] for before, after in pairwise(order))


def late_order(instance: Instance) -> list[int]:
    """Order the nodes as late as possible: the reverse of a topological order of the reversed graph."""
    waiting = [len(after) for after in instance.successors]
    ready = [-node for node, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        node = -heapq.heappop(ready)
        order.append(node)
        for before in instance.predecessors[node]:
            waiting[before] -= 1
            if not waiting[before]:
                heapq.heappush(ready, -before)
    return order[::-1]


def depth_first_order(instance: Instance) -> list[int]:
    """Order the nodes depth first: a branch is finished before the next one starts."""
    waiting = [len(before) for before in instance.predecessors]
    ready = [node for node in range(instance.size - 1, -1, -1) if not waiting[node]]
    order = []
    while ready:
        node = ready.pop()
        order.append(node)
        for after in reversed(instance.successors[node]):
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)
    return order


def small_front_order(instance: Instance) -> list[int]:
    """Order the nodes so that little crosses: take the ready node that adds least to what is open.

    A node opens the values of which it is the first and closes those of which it is the last. What it would add is
    kept up to date as its values fill.
    """
    values = instance.values
    sets = values.sets()
    amounts = values.column(NEAR_LOAD).tolist()
    of_node: list[list[int]] = [[] for _ in range(instance.size)]
    for index, nodes in enumerate(sets):
        for node in nodes:
            of_node[node].append(index)
    missing = [len(nodes) for nodes in sets]
    adds = [sum(amounts[index] for index in own) for own in of_node]  # nothing is open yet
    waiting = [len(before) for before in instance.predecessors]
    ready = [(adds[node], node) for node, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    is_ready = [not count for count in waiting]
    done = [False] * instance.size
    order = []
    while ready:
        add, node = heapq.heappop(ready)
        if done[node] or add != adds[node]:
            continue
        done[node] = True
        order.append(node)
        for index in of_node[node]:
            opened = missing[index] == len(sets[index])
            missing[index] -= 1
            if not opened and missing[index] != 1:
                continue
            change = (amounts[index] if opened else 0) + (amounts[index] if missing[index] == 1 else 0)
            for other in sets[index]:
                if not done[other]:
                    adds[other] -= change
                    if is_ready[other]:
                        heapq.heappush(ready, (adds[other], other))
        for after in instance.successors[node]:
            waiting[after] -= 1
            if not waiting[after]:
                is_ready[after] = True
                heapq.heappush(ready, (adds[after], after))
    return order
