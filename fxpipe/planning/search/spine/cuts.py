"""All cuts of a graph by the place where they lie along its heaviest path, the spine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fxpipe.planning.search.instance import NEAR_LOAD, Instance, Ints, merged
from fxpipe.planning.search.orders import given_order
from fxpipe.planning.search.spine.line import Mark, distinct
from fxpipe.planning.search.spine.parts import (
    NOTHING_KNOWN,
    SOME_INSIDE,
    SOME_OUTSIDE,
    FreeParts,
    Part,
)

LEAST_SHARE = 0.5  # of the load, which must lie on the heaviest path
MOST_FREE = 60_000  # free nodes that are looked at over all places; of graphs with more none are
OWN_MARKS = 16  # cuts that have a mark of their own: those where least crosses
FEW_OWN_MARKS = 6  # the same among those that no node of the path lies before
MOST_DEPTH = 2  # paths of the nodes that are free before a path, and before that


@dataclass(frozen=True, slots=True)
class Spine:
    """A path, and for each node between which places along it the node is free.

    At place ``i`` the first ``i`` nodes of the path lie before the cut, the others behind.

    Attributes:
        path: Nodes of the heaviest path.
        outside: For each node the last place at which it lies behind the cut; -1 for none.
        inside: For each node the first place at which it lies before the cut; past the last place for none.
    """

    path: tuple[int, ...]
    outside: Ints
    inside: Ints

    @classmethod
    def of(cls, instance: Instance) -> Spine:
        """Find the heaviest path and what comes before and after its nodes."""
        order = given_order(instance)
        load = instance.load.tolist()
        weight, source = [0] * instance.size, [-1] * instance.size
        for node in order:
            befores = instance.predecessors[node]
            if befores:
                source[node] = max(befores, key=weight.__getitem__)
                weight[node] = weight[source[node]]
            weight[node] += load[node]
        path = [max(order, key=weight.__getitem__)]
        while source[path[-1]] >= 0:
            path.append(source[path[-1]])
        path.reverse()
        place = {node: index for index, node in enumerate(path)}
        outside, inside = [0] * instance.size, [0] * instance.size
        for node in order:
            known = [outside[before] for before in instance.predecessors[node]]
            outside[node] = place.get(node, max(known, default=-1))
        for node in reversed(order):
            known = [inside[after] for after in instance.successors[node]]
            inside[node] = place[node] + 1 if node in place else min(known, default=len(path) + 1)
        return cls(tuple(path), np.asarray(outside), np.asarray(inside))

    @property
    def places(self) -> int:
        """Number of places."""
        return len(self.path) + 1


def spine_marks(instance: Instance, crossing: Ints, *, exactly: bool) -> list[Mark]:
    """Give marks that stand for all cuts of a graph, in a row.

    Args:
        instance: The merged graph. Where every stage has an anchor, no free nodes with anchors may have been merged.
        crossing: What each value costs a boundary at least.
        exactly: Whether every stage has a node of its own.

    Returns:
        The marks; none where nothing costs anything to cross, or too little of the graph lies on its heaviest path.
    """
    if not crossing.any():
        return []
    spine, total = Spine.of(instance), int(instance.load.sum())
    if int(instance.load[list(spine.path)].sum()) < total * LEAST_SHARE:
        return []
    cuts = _Cuts(_with_crossing(instance, crossing), spine)
    if not cuts.are_known:
        return []
    if exactly:
        return distinct(cuts.marks())
    shared: list[Mark] = [
        (end, begin, None) for end, begin in zip(cuts.ends.tolist(), cuts.begins.tolist(), strict=True)
    ]
    return distinct([(0, 0, None), *shared, (total, total, None)])


def _with_crossing(instance: Instance, crossing: Ints) -> Instance:
    """Give the instance with what values cost at least in the place of what they cost on a near link."""
    amounts = np.zeros_like(instance.values.amounts)
    amounts[:, NEAR_LOAD] = crossing
    return replace(instance, values=replace(instance.values, amounts=amounts))


class _Cuts:
    """What cuts at each place cost at least, and the cut at each place that no free node lies before.

    Attributes:
        ends: ``P + x`` of any cut at each place, at least.
        begins: ``P - x`` of any cut at each place, at most.
    """

    def __init__(self, instance: Instance, spine: Spine, depth: int = 0) -> None:
        self._instance, self._spine, self._depth = instance, spine, depth
        crossing = instance.values.column(NEAR_LOAD)
        self._parts = FreeParts(instance, crossing.tolist())
        places = self._spine.places
        starts, nodes = instance.values.start[:-1], instance.values.nodes
        inside, outside = self._spine.inside[nodes], self._spine.outside[nodes]
        self._first = np.minimum.reduceat(inside, starts) if len(starts) else starts
        self._last = np.maximum.reduceat(outside, starts) if len(starts) else starts
        self._whole = np.maximum.reduceat(inside, starts) if len(starts) else starts
        certain = _steps(self._first, self._last + 1, crossing, places)
        self.load = _steps(self._spine.inside, np.full(instance.size, places), instance.load, places)
        self.crossed = _steps(self._first, self._whole, crossing, places)  # with no free node before the cut
        self._at = list(self._parts_at_places())
        self.ends, self.begins = self.load + certain, self.load - certain
        for place, parts in enumerate(self._at):
            added = [self._parts.least(part) for part in parts]
            self.ends[place] += sum(one.end for one in added)
            self.begins[place] += sum(one.begin for one in added)

    @property
    def are_known(self) -> bool:
        """Whether the free nodes at all places were few enough to be looked at."""
        return len(self._at) == self._spine.places

    def marks(self) -> list[Mark]:
        """Give marks in a row for the cuts between two stages that both have a node."""
        last = self._spine.places - 1
        return self._before_the_path() + self._from(1, last, OWN_MARKS) + self._others(last, nothing=True)

    def _from(self, start: int, stop: int, count: int) -> list[Mark]:
        """Give marks for the cuts at some places, some of them of one cut alone: those where least crosses."""
        cheapest = np.argsort(self.crossed[start:stop], kind="stable")[:count] + start
        own = set(cheapest.tolist())
        found: list[Mark] = []
        for place in range(start, stop):
            if place in own:
                load, crossed = int(self.load[place]), int(self.crossed[place])
                inside = np.flatnonzero(self._spine.inside <= place).tolist()
                found.append((load + crossed, load - crossed, sum(1 << node for node in inside)))
                found += self._others(place, nothing=False)
            else:
                found.append((int(self.ends[place]), int(self.begins[place]), None))
        return found

    def _before_the_path(self) -> list[Mark]:
        """Give marks for the cuts that no node of the path lies before: along a path of the nodes that are free there.

        All that comes after the first node of the path is one node of the smaller graph, behind all of these cuts.
        """
        behind = self._spine.outside >= 0
        if behind.all():
            return []
        node_of = np.cumsum(~behind) - 1
        node_of[behind] = int(node_of[-1]) + 1
        rest = int(node_of.max())
        if self._depth < MOST_DEPTH:
            smaller = merged(self._instance, node_of, rest + 1)
            inner = _Cuts(smaller, Spine.of(smaller), self._depth + 1)
            path = inner._spine.path
            if inner.are_known and len(path) > 1 and path[-1] == rest:
                found = inner._before_the_path() + inner._from(1, len(path), FEW_OWN_MARKS)
                nodes = np.flatnonzero(~behind).tolist()
                return [(end, begin, None if cut is None else _bits(cut, nodes)) for end, begin, cut in found]
        return self._others(0, nothing=False)

    def _free(self, place: int) -> bool:
        """Tell whether any node is free at a place."""
        return bool(((self._spine.outside < place) & (place < self._spine.inside)).any())

    def _others(self, place: int, *, nothing: bool) -> list[Mark]:
        """Give a mark for the cuts at a place that some free node lies before, or with ``nothing``, behind."""
        if not self._free(place):
            return []
        end, begin = int(self.ends[place]), int(self.begins[place])
        changes = []
        for part in self._at[place]:
            base = self._parts.least(part)
            other = self._parts.not_all(part) if nothing else self._parts.some(part)
            changes.append((other.end - base.end, other.begin - base.begin))
        end += min(change for change, _ in changes)
        begin += max(change for _, change in changes)
        return [(end, begin, None)]

    def _parts_at_places(self) -> Iterator[tuple[Part, ...]]:
        """Give the parts of the free nodes at every place; nothing where there are too many to look at."""
        spine = self._spine
        values_of: list[list[int]] = [[] for _ in range(self._instance.size)]
        sets = self._instance.values.sets()
        paying = self._instance.values.column(NEAR_LOAD) > 0
        for value in np.flatnonzero(paying).tolist():
            for node in sets[value]:
                values_of[node].append(value)
        off_path = spine.outside + 1 < spine.inside
        touching = np.zeros(len(sets), dtype=bool)
        for node in np.flatnonzero(off_path).tolist():
            touching[values_of[node]] = True
        changes = np.concatenate(
            [
                spine.outside[off_path] + 1,
                spine.inside[off_path],
                self._first[touching],
                self._last[touching] + 1,
            ]
        )
        changed = np.zeros(spine.places + 2, dtype=bool)
        changed[changes] = True
        changed[0] = True
        counts = _steps(spine.outside + 1, spine.inside, np.ones_like(spine.inside), spine.places)
        if int(counts[changed[: spine.places]].sum()) > MOST_FREE:
            return
        opened: list[list[int]] = [[] for _ in range(spine.places + 1)]
        for node in np.flatnonzero(off_path).tolist():
            opened[int(spine.outside[node]) + 1].append(node)
        inside = spine.inside.tolist()
        free: list[int] = []
        parts: tuple[Part, ...] = ()
        for place in range(spine.places):
            if changed[place]:
                free = sorted([node for node in free if inside[node] > place] + opened[place])
                parts = tuple(self._split(free, place, values_of, sets))
            yield parts

    def _split(
        self, free: Sequence[int], place: int, values_of: Sequence[Sequence[int]], sets: Sequence[Sequence[int]]
    ) -> Iterator[Part]:
        """Split free nodes into parts: what a value or an order connects is chosen together."""
        left = dict.fromkeys(free)
        statuses: dict[int, int] = {}
        for start in free:
            if start not in left:
                continue
            del left[start]
            nodes, own, waiting = [], [], [start]
            while waiting:
                node = waiting.pop()
                nodes.append(node)
                near = [*self._instance.predecessors[node], *self._instance.successors[node]]
                for value in values_of[node]:
                    if value not in statuses:
                        inside, outside = self._first[value] <= place, self._last[value] >= place
                        statuses[value] = -1 if inside and outside else _status(inside=inside, outside=outside)
                        if statuses[value] >= 0:
                            own.append((value, statuses[value]))
                            near += sets[value]
                for other in near:
                    if other in left:
                        del left[other]
                        waiting.append(other)
            yield Part(tuple(sorted(nodes)), tuple(sorted(own)))


def _bits(cut: int, nodes: Sequence[int]) -> int:
    """Give the bits of other numbers of the nodes of a cut."""
    return sum(1 << node for index, node in enumerate(nodes) if cut >> index & 1)


def _status(*, inside: bool, outside: bool) -> int:
    return SOME_INSIDE if inside else SOME_OUTSIDE if outside else NOTHING_KNOWN


def _steps(first: Ints, stop: Ints, amounts: Ints, places: int) -> Ints:
    """Add up, for each place, the amounts that hold from one place to before another."""
    found = np.zeros(places + 2, dtype=np.int64)
    kept = first < stop
    np.add.at(found, np.minimum(first[kept], places), amounts[kept])
    np.subtract.at(found, np.minimum(stop[kept], places), amounts[kept])
    return np.cumsum(found)[:places]
