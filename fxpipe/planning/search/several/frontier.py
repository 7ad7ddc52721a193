"""Ranks visited in two passes, over cuts that stand for all cuts of a graph: a bound that needs no pairs of downsets.

What the first ranks have of two passes depends on nothing but the two cuts behind their stages, as in ``passes``. The
cuts of a frontier are ordered by what they cost and by what they save alike, so of the second cuts that go with a
first one the furthest serves every later rank best: one number for each first cut, rank after rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fxpipe.planning.search.bounds import Frontier, least_crossing, window_frontier
from fxpipe.planning.search.downsets import downset_costs
from fxpipe.planning.search.instance import Instance, Ints
from fxpipe.planning.search.learned import Learned
from fxpipe.planning.search.request import Request
from fxpipe.planning.search.several.passes import FINE, NOWHERE, passes_of

MOST_DOWNSETS = 60_000  # of graphs with more, windows of load say what crosses at least
LEVELS = (512, 4096)  # cuts that stand for all of them, first few, then more
ROWS = 16  # ranges of the cut between the passes looked at together
RANGES = 32  # into which all of them are split at first
WORK = 40_000_000  # first cuts looked at, over all ranks, ranges and bounds, before the search is given up
PROBE = 300  # the share below a known partition that is asked for first


def frontier_bound(
    instance: Instance,
    request: Request,
    lower: int,
    upper: int,
    learned: Learned,
    *,
    most_downsets: int = MOST_DOWNSETS,
) -> int:
    """Give a bound below which no rank of two stages can stay; memory aside, ties cost nothing.

    Args:
        instance: The merged graph; where every stage has an anchor, with no free nodes merged.
        request: Stages, ranks and links.
        lower: A bound that is known.
        upper: The largest rank load of a partition that is known.
        learned: What searches before this one learned of the graph.
        most_downsets: Up to how many downsets all of them are looked at.

    Returns:
        The bound, between ``lower`` and ``upper``.
    """
    passes = passes_of(request.ranks)
    if passes is None or len(passes) != 2 or not passes[0] or request.routing == "direct":
        return lower
    turns = not passes[1]
    turn = request.stages // 2 if turns else 0  # what crosses there costs nothing
    kinds = {kind for boundary, kind in enumerate(request.kinds) if boundary not in (0, turn, request.stages)}
    crossing = least_crossing(instance, sorted(kinds))
    frontier = _frontier(instance, request, crossing, learned, most_downsets)
    if frontier is None:
        return lower
    step = max(1, upper // FINE)
    for count in LEVELS:
        work = _Work(frontier.thinned(count), int(instance.load.sum()), len(set(request.ranks)), turns=turns)
        high, middle = upper, upper - upper // PROBE
        while high - lower > step and not work.is_spent:
            middle = middle if lower < middle < high else (lower + high) // 2
            if work.may_keep(middle):
                high = middle
            else:
                lower = middle + 1
            middle = (lower + high) // 2
        if work.is_spent or upper - lower <= step or len(frontier.ends) <= count:
            break
    return lower


def _frontier(
    instance: Instance, request: Request, crossing: Ints, learned: Learned, most_downsets: int
) -> Frontier | None:
    """Give cuts that stand for all: from all downsets where they are few, else from windows of load."""
    masks = learned.downsets(instance, most_downsets) if instance.size < most_downsets else None
    if masks is None:
        return window_frontier(instance, request, crossing)
    loads, crossed, anchors = downset_costs(instance, masks, crossing)
    if request.exactly:
        inner = (anchors > 0) & (anchors < int(instance.anchors.sum()))
        loads, crossed = loads[inner], crossed[inner]
    return Frontier.of(loads + crossed, loads - crossed) if len(loads) else None


class _Work:
    """Whether ranks of two stages may keep a bound, by the cuts of a frontier."""

    def __init__(self, frontier: Frontier, total: int, ranks: int, *, turns: bool) -> None:
        self._ends, self._begins = frontier.ends, frontier.begins
        self._total, self._ranks, self._turns = total, ranks, turns
        self._work = WORK

    @property
    def is_spent(self) -> bool:
        """Whether the search was given up."""
        return self._work < 0

    def may_keep(self, bound: int) -> bool:
        """Tell whether every rank may keep the bound; so it is, too, once the search was given up."""
        return self._turning(bound) if self._turns else self._again(bound)

    def _turning(self, bound: int) -> bool:
        """Let the second pass go down again: its cuts as near to the first pass's as the ranks between can fill."""
        ends, begins = self._ends, self._begins
        nowhere = -NOWHERE
        need = ends + self._total - bound  # what the second cut must save at least
        for step in range(1, self._ranks):
            place = np.searchsorted(begins, need, side="left")
            reached = np.where(place < len(ends), ends[np.minimum(place, len(ends) - 1)], nowhere)
            if step == self._ranks - 1:
                return bool((reached - begins <= bound).any())
            least = np.minimum.accumulate(np.where(reached < nowhere, reached - begins, nowhere))
            need = ends + np.minimum(least, nowhere // 2) - bound
        return self._total <= bound

    def _again(self, bound: int) -> bool:
        """Let the second pass go up again from where the first one ended: in ever shorter ranges, likely ones first."""
        size = len(self._ends)
        edges = np.unique(np.linspace(0, size, min(RANGES, size) + 1).astype(np.int64))
        waiting = list(zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), strict=True))
        waiting.sort(key=lambda ends: abs(sum(ends) - size), reverse=True)
        while waiting:
            taken, waiting = waiting[-ROWS:], waiting[:-ROWS]
            first, last = np.asarray(taken).T
            kept = self._ranges(bound, first, last)
            if self.is_spent:
                return True
            for low, high in zip(first[kept].tolist(), last[kept].tolist(), strict=True):
                if low == high:
                    return True
                waiting += [(low, (low + high) // 2), ((low + high) // 2 + 1, high)]
        return False

    def _ranges(self, bound: int, first: Ints, last: Ints) -> NDArray[np.bool_]:
        """Tell which ranges may hold the cut between the passes: the second begins at their end at best."""
        size = int(last.max()) + 1
        ends, begins = self._ends[:size], self._begins[:size]
        places = np.arange(size)
        inside = places <= last[:, None]
        room = bound - ends + self._begins[last][:, None]
        for _ in range(1, self._ranks):
            self._work -= room.size
            place = np.searchsorted(self._ends, room, side="right") - 1
            reached = self._begins[np.maximum(place, 0)]
            valid = inside & (place >= first[:, None])
            most = np.maximum.accumulate(np.where(valid, reached + begins, NOWHERE), axis=1)
            room = bound - ends + np.maximum(most, NOWHERE // 2)
        fits = (room >= self._total) & inside & (places >= first[:, None])
        return np.asarray(fits.any(axis=1))
