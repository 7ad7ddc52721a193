"""Ranks that have several stages, over the marks of a line that stand for all cuts of a graph: a bound.

What the first ranks have of two passes depends on nothing but the two cuts behind their stages, as in ``passes``. Here
the marks of both are a state, and no mark that stands for one cut alone is taken twice: stages next to each other that
hold next to nothing then cost what they must.
"""

from __future__ import annotations

import numpy as np

from fxpipe.planning.search.bounds import MOST_MARKS, MOST_NODES, least_crossing
from fxpipe.planning.search.instance import Instance
from fxpipe.planning.search.request import FREE, Request
from fxpipe.planning.search.several.passes import FINE, passes_of
from fxpipe.planning.search.spine.cuts import spine_marks
from fxpipe.planning.search.spine.line import NOWHERE, Apart, Line, before, thinned

FEW_MARKS = 224  # of a line with more, neighbours are joined
TOGETHER = 400_000  # states of several ends of the first pass that are looked at together
WORK = 120_000_000  # states looked at, before the search is given up
PROBE = 300  # the share below a known partition that is asked for first


def line_bound(instance: Instance, request: Request, lower: int, upper: int) -> int:
    """Give a bound below which the largest rank load of no partition is; memory aside, ties cost nothing.

    Args:
        instance: The merged graph; where every stage has an anchor, with no free nodes merged.
        request: Stages, ranks and links.
        lower: A bound that is known.
        upper: The largest rank load of a partition that is known.

    Returns:
        The bound, between ``lower`` and ``upper``.
    """
    step = max(1, upper // FINE)
    if request.routing == "direct" or upper - lower <= step or instance.size > MOST_NODES:
        return lower
    kinds = sorted({kind for kind in request.kinds[1:-1] if kind != FREE})
    marks = spine_marks(instance, least_crossing(instance, kinds), exactly=request.exactly)
    if not 0 < len(marks) <= MOST_MARKS:
        return lower
    line = Line.of(thinned(marks, FEW_MARKS))
    passes = passes_of(request.ranks)
    # The turn of a V costs nothing and lies anywhere; other free boundaries are not known there.
    free = [boundary for boundary, kind in enumerate(request.kinds) if kind == FREE]
    turns = passes == (True, False) and free == [request.stages // 2]
    walks: _Mean | _Turning | _Again
    if turns:
        walks = _Turning(line, instance, request)
    elif passes == (True, True) and not free:
        walks = _Again(line, instance, request)
    else:
        walks = _Mean(line, instance, request)
    middle = upper - upper // PROBE
    while upper - lower > step:
        middle = middle if lower < middle < upper else (lower + upper) // 2
        kept = walks.may_keep(middle)
        if walks.is_spent:
            break
        lower, upper = (lower, middle) if kept else (middle + 1, upper)
        middle = (lower + upper) // 2
    return lower


class _Walks:
    """Whether ranks may keep a bound, by the marks of a line."""

    def __init__(self, line: Line, instance: Instance, request: Request) -> None:
        self.ends, self.begins, self.shared, self.apart = line.ends, line.begins, line.shared, line.apart
        self.total, self.ranks = int(instance.load.sum()), len(set(request.ranks))
        self.work = WORK

    @property
    def is_spent(self) -> bool:
        """Whether the search was given up."""
        return self.work < 0


class _Mean(_Walks):
    """Any way to visit the ranks: every stage alone keeps the bound, and so does the mean of all ranks."""

    def __init__(self, line: Line, instance: Instance, request: Request) -> None:
        super().__init__(line, instance, request)
        self._cuts = sum(kind != FREE for kind in request.kinds[1:-1])

    def may_keep(self, bound: int) -> bool:
        """Tell whether the bound may be kept."""
        size = len(self.ends)
        follows = self.ends[None, :] - self.begins[:, None] <= bound
        follows &= np.triu(np.ones((size, size), dtype=bool), 1) | np.diag(self.shared)
        crossed = np.maximum(self.ends - self.begins, 0)
        nowhere = -NOWHERE
        least = np.where(self.ends <= bound, crossed, nowhere)
        for _ in range(1, self._cuts):
            self.work -= size * size
            before = np.where(follows, least[:, None], nowhere).min(axis=0)
            least = np.where(before < nowhere, before + crossed, nowhere)
        least = np.where(self.total - self.begins <= bound, least, nowhere)
        if not self._cuts:
            return self.total <= bound * self.ranks
        return int(least.min()) < nowhere and self.total + int(least.min()) <= bound * self.ranks


class _Turning(_Walks):
    """Two passes, up and down again."""

    def may_keep(self, bound: int) -> bool:
        """Tell whether the bound may be kept."""
        ends, begins = self.ends, self.begins
        down = _turned(self.apart, len(ends))
        states = np.where(ends[:, None] + self.total - begins <= bound, begins[:, None] - ends, NOWHERE)
        for _ in range(2, self.ranks):
            self.work -= states.size
            most = before(states, self.shared, self.apart)
            most = before(most[:, ::-1].T, self.shared[::-1], down).T[:, ::-1]
            kept = most >= np.maximum(ends[:, None] - begins - bound, NOWHERE + 1)
            if not kept.any():
                return False
            states = np.where(kept, begins[:, None] - ends, NOWHERE)
        meets = np.triu(np.ones(states.shape, dtype=bool), 1) | np.diag(self.shared)
        return bool(((states > NOWHERE) & (-states <= bound) & meets).any())


class _Again(_Walks):
    """Two passes, both of them up: all marks between them are tried, several at once."""

    def may_keep(self, bound: int) -> bool:
        """Tell whether the bound may be kept; so it is, too, once the search was given up."""
        ranges = sorted(self._ranges(), key=lambda ends: abs(int(self.ends[list(ends)].sum()) - self.total))
        return any(self._reaches(bound, first, last) or self.is_spent for first, last in ranges)

    def _ranges(self) -> list[tuple[int, int]]:
        """Split the marks between the passes into ranges that are looked at together."""
        found, first, size = [], 0, len(self.ends)
        while first < size:
            last = first
            while last + 1 < size and (last + 2) * (last + 2 - first) * (size - first) <= TOGETHER:
                last += 1
            found.append((first, last))
            first = last + 1
        return found

    def _reaches(self, bound: int, first: int, last: int) -> bool:
        """Tell whether the bound may be kept where the first pass ends at one of these marks."""
        here, up, on = slice(first, last + 1), slice(0, last + 1), slice(first, None)
        middles = np.arange(first, last + 1)
        ends, begins, shared = self.ends, self.begins, self.shared
        same = shared[middles]
        inner = (np.arange(last + 1)[:, None] < middles) | ((np.arange(last + 1)[:, None] == middles) & same)
        later = np.arange(first, len(ends))
        outer = (middles[:, None] < later) | ((middles[:, None] == later) & same[:, None])
        allowed = inner[:, :, None] & outer
        used = ends[up, None] + ends[None, on]
        begun = (begins[up, None] + begins[None, on])[:, None, :]
        kept = (used[:, None, :] - begins[here][:, None] <= bound) & allowed
        need = np.maximum(used - bound, NOWHERE + 1)[:, None, :]
        later_apart = {
            row - first: tuple(other - first for other in others if other >= first)
            for row, others in self.apart.items()
        }
        for _ in range(2, self.ranks):
            self.work -= kept.size
            if self.is_spent or not kept.any():
                return False
            most = before(np.where(kept, begun, NOWHERE), shared[up], self.apart)
            most = before(most.transpose(2, 0, 1), shared[on], later_apart).transpose(1, 2, 0)
            kept = (most >= need) & allowed
        most = np.where(kept, begun, NOWHERE).max(axis=(0, 2))
        return bool((most >= np.maximum(ends[here] + self.total - bound, NOWHERE + 1)).any())


def _turned(apart: Apart, size: int) -> Apart:
    """Give which rows may not come before which where rows are counted from the last one."""
    found: dict[int, list[int]] = {}
    for row, others in apart.items():
        for other in others:
            found.setdefault(size - 1 - other, []).append(size - 1 - row)
    return {row: tuple(others) for row, others in found.items()}
