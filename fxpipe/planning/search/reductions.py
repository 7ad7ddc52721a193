"""Merge nodes that cost nothing into a neighbour, where no best partition is lost: fewer nodes, far fewer downsets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxpipe.planning.search.instance import Instance, Ints, merged


@dataclass(frozen=True, slots=True)
class Reduced:
    """A smaller instance and the node of it that each node of the larger one went into."""

    instance: Instance
    node_of: Ints


def reduced(instance: Instance) -> Reduced:
    """Merge every node without load, memory or ties into its only neighbour on one side, where that is never worse.

    Moving such a node ``u`` to the stage of its only predecessor ``p`` saves, at every stage on the way, what the
    values of just ``p`` and ``u`` cost there, and adds at most what the values that hold ``u`` but not ``p`` cost.
    Where the first is at least the second, in every kind of seconds and bytes, some best partition has both in one
    stage. The same holds for the only successor. (With a fixed number of stages the bound of the smaller instance
    stays true.)
    """
    if not ((instance.load == 0) & (instance.static == 0) & (instance.activation == 0)).any():
        return Reduced(instance, np.arange(instance.size))
    work = _Merging(instance)
    waiting = list(range(instance.size))
    while waiting:
        node = waiting.pop()
        neighbour = work.host(node)
        if neighbour is not None:
            waiting.extend(work.merge(node, neighbour))
    return work.result()


class _Merging:
    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        size = instance.size
        self._before = [set(nodes) for nodes in instance.predecessors]
        self._after = [set(nodes) for nodes in instance.successors]
        self._members = [set(nodes) for nodes in instance.values.sets()]
        self._amounts = instance.values.amounts
        self._values: list[set[int]] = [set() for _ in range(size)]
        for value, nodes in enumerate(self._members):
            for node in nodes:
                self._values[node].add(value)
        free = (instance.load == 0) & (instance.static == 0) & (instance.activation == 0)
        free[instance.ties.nodes] = False
        if not instance.anchors.all():  # named anchors must stay apart: every stage needs one
            free &= instance.anchors == 0
        self._free = free.tolist()
        self._into = list(range(size))

    def host(self, node: int) -> int | None:
        """Give the neighbour that ``node`` can go into, None if there is none."""
        if not self._free[node] or self._into[node] != node:
            return None
        for neighbours in (self._before[node], self._after[node]):
            if len(neighbours) == 1:
                (neighbour,) = neighbours
                if self._never_worse(node, neighbour):
                    return neighbour
        return None

    def _never_worse(self, node: int, neighbour: int) -> bool:
        balance = np.zeros(self._amounts.shape[1], dtype=np.int64)
        for value in self._values[node]:
            members = self._members[value]
            sign = (1 if len(members) == 2 else 0) if neighbour in members else -1
            balance += sign * self._amounts[value]
        return bool((balance >= 0).all())

    def merge(self, node: int, host: int) -> list[int]:
        """Put ``node`` into ``host``; give the nodes whose neighbourhood changed."""
        changed = {host}
        self._into[node] = host
        for mine, other in ((self._before, self._after), (self._after, self._before)):
            for neighbour in mine[node]:
                other[neighbour].discard(node)
                if neighbour != host:
                    mine[host].add(neighbour)
                    other[neighbour].add(host)
                    changed.add(neighbour)
        for value in self._values[node]:
            members = self._members[value]
            members.discard(node)
            members.add(host)
            self._values[host].add(value)
            if len(members) == 1:
                self._values[host].discard(value)
            changed |= members
        changed |= self._before[host] | self._after[host]
        return sorted(changed)

    def result(self) -> Reduced:
        """Build the smaller instance; its nodes keep the order of the nodes that the others went into."""
        instance = self._instance
        heads = [self._head(node) for node in range(instance.size)]
        kept, node_of = np.unique(np.asarray(heads, dtype=np.int64), return_inverse=True)
        return Reduced(merged(instance, node_of, len(kept)), node_of)

    def _head(self, node: int) -> int:
        while self._into[node] != node:
            node = self._into[node]
        return node
