"""The nodes that are free where a cut lies at one place of the spine, in parts that nothing connects.

What a part adds to a cut, whichever of its nodes lie before the cut, is a minimum cut of a small network: each value
costs where some but not all of its nodes are in, each node its load on one side, and no node is in without those
before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov

from fxpipe.planning.search.instance import Instance

MOST_TOGETHER = 160  # nodes of a part; what a larger one adds is not looked at
MOST_FLOW = 40_000  # nodes of all networks, before the others are not looked at

NOTHING_KNOWN, SOME_INSIDE, SOME_OUTSIDE = range(3)  # of a value's nodes that are not free


@dataclass(frozen=True, slots=True)
class Part:
    """Free nodes that are chosen together.

    Attributes:
        nodes: Their numbers, ascending.
        values: Values that cost something by their choice: the number, and which other nodes it has.
    """

    nodes: tuple[int, ...]
    values: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Added:
    """What a part adds to a cut: at least to ``P + x``, at most to ``P - x``."""

    end: int
    begin: int


class FreeParts:
    """What parts add to a cut, each of them worked out once."""

    def __init__(self, instance: Instance, crossing: Sequence[int]) -> None:
        self._instance, self._crossing = instance, crossing
        self._load = instance.load.tolist()
        self._sets = instance.values.sets()
        self._found: dict[tuple[Part, int | None, int | None], Added] = {}
        self._flow = MOST_FLOW

    def least(self, part: Part) -> Added:
        """Give what a part adds to any cut."""
        return self._added(part, None, None)

    def some(self, part: Part) -> Added:
        """Give what a part adds to a cut that some of it lies before."""
        own = set(part.nodes)
        firsts = [node for node in part.nodes if own.isdisjoint(self._instance.predecessors[node])]
        return _either(self._added(part, node, None) for node in firsts)

    def not_all(self, part: Part) -> Added:
        """Give what a part adds to a cut that not all of it lies before."""
        own = set(part.nodes)
        lasts = [node for node in part.nodes if own.isdisjoint(self._instance.successors[node])]
        return _either(self._added(part, None, node) for node in lasts)

    def _added(self, part: Part, inside: int | None, outside: int | None) -> Added:
        key = part, inside, outside
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._worked_out(part, inside, outside)
        return found

    def _worked_out(self, part: Part, inside: int | None, outside: int | None) -> Added:
        total = sum(self._load[node] for node in part.nodes)
        if len(part.nodes) > MOST_TOGETHER or self._flow < 0:
            return Added(0, total)
        nothing = sum(self._crossing[value] for value, others in part.values if others == SOME_INSIDE)
        everything = sum(self._crossing[value] for value, others in part.values if others == SOME_OUTSIDE)
        # The cuts at either end of the choice are the best ones where nothing crosses there.
        end = 0 if not nothing and inside is None else None
        begin = total if not everything and outside is None else None
        if len(part.nodes) == 1:
            choices = [(total, everything)] if outside is None else []
            choices += [(0, nothing)] if inside is None else []
            return Added(min(load + x for load, x in choices), max(load - x for load, x in choices))
        if end is None:
            end = self._cut(part, inside, outside, before=True)
        if begin is None:
            begin = total - self._cut(part, inside, outside, before=False)
        return Added(end, begin)

    def _cut(self, part: Part, inside: int | None, outside: int | None, *, before: bool) -> int:
        """Give the least of what crosses and the load of the nodes before the cut, or of those behind."""
        network: nx.DiGraph[object] = nx.DiGraph()
        network.add_nodes_from(("before", "behind"))
        own = set(part.nodes)
        forced = self._load[inside] if inside is not None and before else 0
        forced += self._load[outside] if outside is not None and not before else 0
        for node in part.nodes:
            if self._load[node] and node not in (inside, outside):
                ends = (node, "behind") if before else ("before", node)
                network.add_edge(*ends, capacity=self._load[node])
            network.add_edges_from((node, other) for other in self._instance.predecessors[node] if other in own)
        if inside is not None:
            network.add_edge("before", inside)
        if outside is not None:
            network.add_edge(outside, "behind")
        for value, others in part.values:
            members = [node for node in self._sets[value] if node in own]
            start: object = "before" if others == SOME_INSIDE else (value, 0)
            stop: object = "behind" if others == SOME_OUTSIDE else (value, 1)
            network.add_edge(start, stop, capacity=self._crossing[value])
            if others != SOME_INSIDE:
                network.add_edges_from((node, start) for node in members)
            if others != SOME_OUTSIDE:
                network.add_edges_from((stop, node) for node in members)
        self._flow -= len(network)
        return forced + int(nx.maximum_flow_value(network, "before", "behind", flow_func=boykov_kolmogorov))


def _either(found: Iterable[Added]) -> Added:
    added = list(found)
    return Added(min(one.end for one in added), max(one.begin for one in added))
