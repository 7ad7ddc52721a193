"""Ranks visited in two passes, over all downsets: the best there is, where they are few.

A pair of downsets, those behind the stages that the first ranks have of either pass, is a state, as in ``passes``; what
leads to it is a running maximum along the diagram of the downsets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxpipe.planning.search.downsets import DownsetCosts
from fxpipe.planning.search.instance import Instance, Ints, only_live_ties, without_memory
from fxpipe.planning.search.request import Request
from fxpipe.planning.search.several.passes import FINE, NOWHERE, passes_of

MOST_PAIRED = 800  # downsets up to which all pairs of them are looked at
PAIR_WORK = 250_000_000  # pairs looked at in all, before the search is given up
TOGETHER = 500_000  # pairs looked at together, over several ends of the first pass
PROBE = 300  # the share below a known partition that is asked for first


@dataclass(frozen=True, slots=True)
class Paired:
    """What is known of two passes.

    Attributes:
        lower: No partition's largest rank load is below.
        stage_of: Stage of each node in a partition better than the known one; None where none was found.
    """

    lower: int
    stage_of: Ints | None


def search_pairs(
    instance: Instance, request: Request, masks: list[int], lower: int, upper: int, *, whole: bool
) -> Paired:
    """Search the pairs of all downsets for what ranks of two stages can reach; memory aside, ties cost nothing.

    Args:
        instance: The merged graph.
        request: Stages, ranks and links.
        masks: All its downsets.
        lower: A bound that is known.
        upper: The largest rank load of a partition that is known.
        whole: Whether every stage of a partition has a node of this instance with an anchor; if not, nodes were merged,
            and stages may be empty here. That lets more partitions in, so the bound stays true.

    Returns:
        A bound, and a better partition, empty stages and all, if there is one.
    """
    passes = passes_of(request.ranks)
    if passes is None or len(passes) != 2 or not passes[0] or request.routing == "direct":
        return Paired(lower, None)
    work = _Pairs(instance, request, masks, turns=not passes[1], full=whole and request.exactly)
    step = max(1, upper // FINE)
    middle = upper - upper // PROBE  # first, whether what is known is nearly the best
    found = None
    while upper - lower > step:
        middle = middle if lower < middle < upper else (lower + upper) // 2
        kept = work.keeps(middle)
        if kept is None and work.is_spent:
            break
        if kept is None:
            lower = middle + 1
        else:
            upper, found = middle, kept
        middle = (lower + upper) // 2
    return Paired(lower, found)


class _Pairs:
    """Whether ranks of two stages can keep a bound, over all pairs of downsets."""

    def __init__(self, instance: Instance, request: Request, masks: list[int], *, turns: bool, full: bool) -> None:
        costs = DownsetCosts(without_memory(only_live_ties(instance)), request.routing, masks)
        cross = [costs.cross_load(kind) for kind in request.kinds]
        self._costs = costs
        self._ends = [costs.load + row for row in cross]
        self._begins = [costs.load - row for row in cross]
        self._anchors = costs.anchors if full else None
        self._ranks, self._turns, self._size = len(set(request.ranks)), turns, costs.size
        self._below = _covers(masks)
        self._above: list[list[int]] = [[] for _ in masks]
        for index, lower in enumerate(self._below):
            for other in lower:
                self._above[other].append(index)
        self._inside = costs.subsets()
        self._work = PAIR_WORK

    @property
    def is_spent(self) -> bool:
        """Whether the search was given up."""
        return self._work < 0

    def keeps(self, bound: int) -> Ints | None:
        """Give stages by which every rank keeps the bound; None where there are none, or the search was given up."""
        if self._turns:
            return self._turning(bound)
        load = self._costs.load
        for first, last in sorted(self._ranges(), key=lambda ends: abs(int(load[list(ends)].sum() - load[-1]))):
            kept = self._reaching(bound, first, last)
            if len(kept):
                return self._meeting(bound, int(kept[np.abs(2 * load[kept] - load[-1]).argmin()]))
            if self.is_spent:
                break
        return None

    def _ranges(self) -> list[tuple[int, int]]:
        """Split the ends of the first pass into ranges that are looked at together."""
        found, first = [], 0
        while first < self._size:
            last = first
            while last + 1 < self._size and (last + 2) * (last + 2 - first) * (self._size - first) <= TOGETHER:
                last += 1
            found.append((first, last))
            first = last + 1
        return found

    def _reaching(self, bound: int, first: int, last: int) -> Ints:
        """Give those of some ends of the first pass with which every rank keeps the bound; all of them at once."""
        ranks, size = self._ranks, self._size - first
        middles = np.arange(first, last + 1)
        above = [[other - first for other in lower if other >= first] for lower in self._below[first:]]
        inner = None if self._anchors is None else self._anchors[: last + 1]
        outer = None if self._anchors is None else self._anchors[first:]
        within = self._inside[: last + 1, middles][:, :, None]
        states = np.full((last + 1, len(middles), size), NOWHERE)
        states[0, middles - first, middles - first] = self._begins[0][0] + self._begins[ranks][middles]
        for step in range(1, ranks + 1):
            self._work -= states.size
            if self.is_spent:
                break
            most = _closed(states, self._below[: last + 1], inner)
            most = _closed(most.transpose(2, 0, 1), above, outer).transpose(1, 2, 0)
            used = self._ends[step][: last + 1, None] + self._ends[ranks + step][None, first:]
            kept = (most >= np.maximum(used - bound, NOWHERE + 1)[:, None, :]) & within
            if step == ranks:
                return np.asarray(middles[kept[middles, middles - first, -1]])
            if not kept.any():
                break
            begun = self._begins[step][: last + 1, None] + self._begins[ranks + step][None, first:]
            states = np.where(kept, begun[:, None, :], NOWHERE)
        return middles[:0]

    def _meeting(self, bound: int, middle: int) -> Ints | None:
        """Let the first pass end, and the second begin, at this downset."""
        ranks, size = self._ranks, self._size - middle
        above = [[other - middle for other in lower if other >= middle] for lower in self._below[middle:]]
        inner = None if self._anchors is None else self._anchors[: middle + 1]
        outer = None if self._anchors is None else self._anchors[middle:]
        states = np.full((middle + 1, size), NOWHERE)
        states[0, 0] = self._begins[0][0] + self._begins[ranks][middle]
        reached = [states > NOWHERE]
        for step in range(1, ranks + 1):
            self._work -= states.size
            if self.is_spent:
                return None
            most = _closed(_closed(states, self._below[: middle + 1], inner).T, above, outer).T
            used = self._ends[step][: middle + 1, None] + self._ends[ranks + step][None, middle:]
            kept = (most > NOWHERE) & (most >= used - bound)
            if not kept.any():
                return None
            begun = self._begins[step][: middle + 1, None] + self._begins[(ranks + step) % (2 * ranks)][None, middle:]
            states = np.where(kept, begun, NOWHERE)
            reached.append(kept)
        if not reached[-1][-1, -1]:
            return None
        at, to = middle, self._size - 1
        first, second = [at], [to]
        for step in range(ranks, 0, -1):
            own = self._ends[step][at] - self._begins[step - 1][: middle + 1]
            its = self._ends[ranks + step][to] - self._begins[ranks + step - 1][middle:]
            fits = reached[step - 1] & (own[:, None] + its[None, :] <= bound)
            fits &= self._inner(at)[: middle + 1, None] & self._inner(to)[None, middle:]
            at, to = _evenest(fits, own, its)
            to += middle
            first.append(at)
            second.append(to)
        return self._stages([*first[::-1], *second[::-1][1:]])

    def _turning(self, bound: int) -> Ints | None:
        """Let the second pass go down again."""
        ranks, last = self._ranks, 2 * self._ranks
        self._work -= ranks * self._size**2
        if self.is_spent:
            return None
        states = np.full((self._size, self._size), NOWHERE)
        states[0, -1] = self._begins[0][0] - self._ends[last][-1]
        reached = [states > NOWHERE]
        backwards = [[self._size - 1 - other for other in upper] for upper in self._above[::-1]]
        down = None if self._anchors is None else -self._anchors[::-1]
        for step in range(1, ranks):
            most = _closed(_closed(states, self._below, self._anchors).T[::-1], backwards, down)[::-1].T
            used = self._ends[step][:, None] - self._begins[last - step][None, :]
            begun = self._begins[step][:, None] - self._ends[last - step][None, :]
            kept = (most > NOWHERE) & (most >= used - bound)
            states = np.where(kept, begun, NOWHERE)
            reached.append(kept)
        fits = (states > NOWHERE) & (-states <= bound) & self._inside & self._has_room()
        if not fits.any():
            return None
        at, to = divmod(int(np.where(fits, -states, -NOWHERE).argmin()), self._size)
        first, second = [at], [to]
        for step in range(ranks - 1, 0, -1):
            own = self._ends[step][at] - self._begins[step - 1]
            its = self._ends[last - step + 1] - self._begins[last - step][to]
            fits = reached[step - 1] & (own[:, None] + its[None, :] <= bound)
            fits &= self._inner(at)[:, None] & self._outer(to)[None, :]
            at, to = _evenest(fits, own, its)
            first.append(at)
            second.append(to)
        return self._stages([*first[::-1], self._between(first[0], second[0]), *second])

    def _inner(self, place: int) -> NDArray[np.bool_]:
        """Tell which downsets a stage that ends at this one may begin at."""
        inside: NDArray[np.bool_] = self._inside[:, place]
        return inside if self._anchors is None else inside & (self._anchors < self._anchors[place])

    def _outer(self, place: int) -> NDArray[np.bool_]:
        """Tell which downsets a stage that begins at this one may end at."""
        outside: NDArray[np.bool_] = self._inside[place]
        return outside if self._anchors is None else outside & (self._anchors > self._anchors[place])

    def _has_room(self) -> NDArray[np.bool_] | bool:
        """Tell between which downsets two stages fit."""
        if self._anchors is None:
            return True
        stage = (self._inside & (self._anchors[:, None] < self._anchors[None, :])).astype(np.float32)
        room: NDArray[np.bool_] = stage @ stage > 0
        return room

    def _between(self, first: int, second: int) -> int:
        """Choose where the pass turns: as even as may be."""
        load = self._costs.load
        fits = self._outer(first) & self._inner(second)
        uneven = np.abs(2 * load - load[first] - load[second])
        return int(np.where(fits, uneven, -NOWHERE).argmin())

    def _stages(self, chain: list[int]) -> Ints:
        stage_of = np.zeros(self._costs.members.shape[1], dtype=np.int64)
        for place in chain[1:-1]:
            stage_of += 1 - self._costs.members[place].astype(np.int64)
        return stage_of


def _evenest(fits: NDArray[np.bool_], own: Ints, its: Ints) -> tuple[int, int]:
    larger = np.where(fits, np.maximum(own[:, None], its[None, :]), -NOWHERE)
    place, columns = int(larger.argmin()), int(larger.shape[1])
    return place // columns, place % columns


def _covers(masks: list[int]) -> list[list[int]]:
    """Give for each downset, ascending as numbers, those that lack one of its nodes."""
    by_count: dict[int, list[int]] = {}
    for index, mask in enumerate(masks):
        by_count.setdefault(mask.bit_count(), []).append(index)
    return [[other for other in by_count.get(mask.bit_count() - 1, ()) if masks[other] & ~mask == 0] for mask in masks]


def _closed(states: Ints, below: list[list[int]], anchors: Ints | None) -> Ints:
    """Give for each row the most of it and of all rows that lead to it; with anchors, of those that have fewer."""
    most = np.array(states, order="C")
    if anchors is None:
        for row, others in enumerate(below):
            for other in others:
                np.maximum(most[row], most[other], out=most[row])
        return most
    fewer = np.full_like(most, NOWHERE)
    counts = anchors.tolist()
    for row, others in enumerate(below):
        for other in others:
            np.maximum(most[row], most[other], out=most[row])
            np.maximum(fewer[row], (most if counts[other] < counts[row] else fewer)[other], out=fewer[row])
    return fewer
