"""Ranks visited in passes, up or down: two passes at a time, cut exactly along one order.

With several stages per rank the stages visit the ranks in passes: up again and again (interleaved), or up and down (a
V). Along one order a stage costs ``F[right] - G[left]`` with ``F = P + x`` and ``G = P - x`` (see ``chains``), so what
the first ranks have of two passes depends on nothing but the two cuts behind their stages. A pair of cuts is a state,
rank after rank adds a stage to either pass, and a bound ``T`` is kept where some state before has
``w >= u' - T``: a running maximum over the two cuts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from fxpipe.planning.search.chains import OrderCosts
from fxpipe.planning.search.instance import Ints
from fxpipe.planning.search.request import FREE, Request

ANYWHERE = math.inf  # a width: cuts are looked for everywhere, as long as they are worth it
WIDTHS = (0.6, 1.5, 4.0)  # how far from even cuts are looked for, in mean stages; the evenest first
MOST_CUTS = 160  # cuts looked at per state; of more in reach, those where least crosses
MOST_MIDDLES = 60  # ends of the first pass that are tried
FINE = 2048  # a bottleneck is looked for to so small a part of it
SWEEPS = 3  # times that every pair of passes is cut again where there are more than two
NOWHERE = int(np.iinfo(np.int64).min // 2)


@dataclass(frozen=True, slots=True)
class _Line:
    """One pass over the cuts of a state, in the order in which its ranks are visited by the first pass.

    Attributes:
        cuts: For each step the cuts that may lie behind it, ascending; the first and the last one alone.
        ends: What each of them costs as the far end of a stage.
        begins: What each of them saves as the near end of the next stage.
        latest: For each of them, the place among the cuts before it up to which a stage between has an anchor.
    """

    cuts: tuple[Ints, ...]
    ends: tuple[Ints, ...]
    begins: tuple[Ints, ...]
    latest: tuple[Ints, ...]


def passes_of(ranks: Sequence[int]) -> tuple[bool, ...] | None:
    """Tell for each pass over all ranks whether it goes up; None where stages visit the ranks in another way.

    >>> passes_of((0, 1, 2, 0, 1, 2)), passes_of((0, 1, 1, 0)), passes_of((0, 1, 0))
    ((True, True), (True, False), None)
    """
    num_ranks = len(set(ranks))
    if num_ranks < 2 or len(ranks) % num_ranks or len(ranks) == num_ranks:
        return None
    up = tuple(range(num_ranks))
    runs = [tuple(ranks[first : first + num_ranks]) for first in range(0, len(ranks), num_ranks)]
    return tuple(run == up for run in runs) if all(run in (up, up[::-1]) for run in runs) else None


def cut_passes(
    costs: OrderCosts, request: Request, lower: int, start: Sequence[int], below: int | None = None
) -> list[int] | None:
    """Cut an order for ranks that are visited in passes, memory and ties aside.

    Args:
        costs: Costs of the order.
        request: Stages and ranks.
        lower: A rank load that is good enough: the search stops there.
        start: Cuts to begin with, both ends included; with two passes only their number matters.
        below: With two passes, only a rank load below this is of interest; None for any.

    Returns:
        The cuts, both ends included; None where the stages visit the ranks in no passes, or none were found.
    """
    passes = passes_of(request.ranks)
    if passes is None or costs.size < request.stages:
        return None
    work = _Passes(costs, request, passes, below)
    best: tuple[int, list[int]] | None = (work.bottleneck(start), list(start)) if len(passes) > 2 else None
    for _ in range(SWEEPS if len(passes) > 2 else 1):
        before = best
        for first, second in combinations(range(len(passes)), 2):
            best = work.cut_pair(first, second, best, lower)
        if best is None or best == before or best[0] <= lower:
            break
    return None if best is None else best[1]


class _Passes:
    def __init__(self, costs: OrderCosts, request: Request, passes: tuple[bool, ...], below: int | None) -> None:
        self._passes, self._ranks, self._stages = passes, len(set(request.ranks)), request.stages
        self._rank_of = np.asarray(request.ranks)
        self._below = 4 * int(costs.load[-1]) if below is None else below
        crossing = [costs.cross_load(kind) for kind in request.kinds]
        self._load, self._cross = costs.load, crossing
        anchors = costs.anchors if request.exactly else np.arange(costs.size + 1)
        self._latest = np.searchsorted(anchors, anchors, side="left") - 1  # the last cut that an anchor lies behind
        self._earliest = np.searchsorted(anchors, anchors, side="right")  # the first one that has an anchor before it
        self._mean = int(costs.load[-1]) // request.stages
        # Two passes at a time of more than two are cut better where even cuts are looked for first.
        self._worth = self._worth_looking_at(request) if len(passes) == 2 else None
        self._widths = WIDTHS if self._worth is None else (WIDTHS[0], ANYWHERE)

    def _worth_looking_at(self, request: Request) -> Ints | None:
        """Give the cuts that no other one can stand for, and those where least crosses; None where they are too many.

        A cut can stand for another that costs no less on either side. Of stages that hold next to nothing there may be
        several in a row: so the cheapest cuts are kept too, beside those that could stand for them.
        """
        paid = next((index for index, kind in enumerate(request.kinds[1:-1], 1) if kind != FREE), None)
        if paid is None:
            return None
        crossing = self._cross[paid]
        begins = self._load - crossing
        order = np.lexsort((-begins, self._load + crossing))
        most = np.maximum.accumulate(begins[order])
        best = order[np.concatenate([[True], begins[order][1:] > most[:-1]])]
        if len(best) > MOST_CUTS:
            return None
        cheapest = np.argsort(crossing, kind="stable")
        rest = cheapest[~np.isin(cheapest, best)][: MOST_CUTS - len(best)]
        return np.sort(np.concatenate([best, rest]))

    def bottleneck(self, cuts: Sequence[int]) -> int:
        """Give the largest rank load of some cuts."""
        return int(self._rank_loads(cuts).max())

    def _rank_loads(self, cuts: Sequence[int]) -> Ints:
        places = np.asarray(cuts)
        cross = np.asarray([self._cross[index][cut] for index, cut in enumerate(cuts)])
        loads = np.diff(self._load[places]) + cross[:-1] + cross[1:]
        sums = np.zeros(self._ranks, dtype=np.int64)
        np.add.at(sums, self._rank_of, loads)
        return sums

    def cut_pair(
        self, first: int, second: int, best: tuple[int, list[int]] | None, lower: int
    ) -> tuple[int, list[int]] | None:
        """Cut two passes anew, the others as they are; the evenest cuts first, others only where they are better."""
        size, count = len(self._load) - 1, len(self._passes)
        others = np.zeros(self._ranks, dtype=np.int64)
        bounds = (0, size) if best is None else (best[1][first * self._ranks], best[1][(second + 1) * self._ranks])
        if best is not None and count > 2:
            others = self._others(best[1], first, second)
        for width in self._widths:
            if second != first + 1:
                assert best is not None
                meets = [(best[1][(first + 1) * self._ranks], best[1][second * self._ranks])]
            elif self._passes[first] != self._passes[second]:
                meets = [(-1, -1)]
            else:
                middle = (self._load[bounds[0]] + self._load[bounds[1]]) // 2
                wide = width if width == ANYWHERE else min(width, self._ranks / 2)
                near = self._within(int(middle), wide, (first + 1) * self._ranks, bounds)
                nearest = np.argsort(np.abs(self._load[near] - middle), kind="stable")
                nearest = nearest if width == ANYWHERE else nearest[:MOST_MIDDLES]
                meets = [(cut, cut) for cut in near[nearest].tolist()]
            for ends in meets:
                lines = self._lines(first, second, bounds, ends, width)
                found = None if lines is None else self._search(lines, others, best, lower, meets=ends[0] < 0)
                if found is not None:
                    best = self._joined(first, second, best, found)
                if best is not None and best[0] <= lower:
                    return best
            if best is not None and best[0] <= lower + lower // FINE:
                break
        return best

    def _others(self, cuts: list[int], first: int, second: int) -> Ints:
        """Give what every rank has of the other passes."""
        places = np.asarray(cuts)
        cross = np.asarray([self._cross[index][cut] for index, cut in enumerate(cuts)])
        loads = np.diff(self._load[places]) + cross[:-1] + cross[1:]
        for index in (first, second):
            loads[index * self._ranks : (index + 1) * self._ranks] = 0
        sums = np.zeros(self._ranks, dtype=np.int64)
        np.add.at(sums, self._rank_of, loads)
        return sums if self._passes[first] else sums[::-1]

    def _within(self, target: int, width: float, boundary: int, bounds: tuple[int, int]) -> Ints:
        """Give the cuts about a load, or all worth it; of too many, those where least crosses at this boundary."""
        if width == ANYWHERE and self._worth is not None:
            return self._worth[slice(*np.searchsorted(self._worth, (bounds[0] + 1, bounds[1])))]
        reach = int(width * self._mean)
        low = max(int(np.searchsorted(self._load, target - reach, side="left")), bounds[0] + 1)
        high = min(int(np.searchsorted(self._load, target + reach, side="right")), bounds[1])
        cuts = np.arange(low, high)
        if len(cuts) > MOST_CUTS:
            cheapest = np.argsort(self._cross[boundary][cuts], kind="stable")[:MOST_CUTS]
            cuts = np.sort(cuts[cheapest])
        return cuts

    def _lines(
        self, first: int, second: int, bounds: tuple[int, int], ends: tuple[int, int], width: float
    ) -> tuple[_Line, _Line] | None:
        """Give the cuts of both passes, as the first pass visits the ranks; None where a step has none."""
        meets = ends[0] < 0  # a V turns in the last rank: where exactly, costs nothing
        middle = int((self._load[bounds[0]] + self._load[bounds[1]]) // 2)
        spans = ((bounds[0], ends[0]), (ends[1], bounds[1]))
        found = []
        for index, (begin, end) in zip((first, second), spans, strict=True):
            alike = self._passes[index] == self._passes[first]
            low, high = (middle if meets and cut < 0 else int(self._load[cut]) for cut in (begin, end))
            cuts = []
            for step in range(self._ranks + 1 - meets):
                place = step if alike else self._ranks - step
                if place in (0, self._ranks):
                    cuts.append(np.asarray([begin if place == 0 else end]))
                    continue
                target = low + (high - low) * place // self._ranks
                boundary = index * self._ranks + place
                inside = (max(begin, bounds[0]), bounds[1] if end < 0 else end)
                cuts.append(self._within(target, width, boundary, inside))
            if not all(len(part) for part in cuts):
                return None
            found.append(self._line(index, cuts, alike=alike))
        return found[0], found[1]

    def _line(self, index: int, cuts: list[Ints], *, alike: bool) -> _Line:
        ends, begins, latest = [], [], []
        for step, places in enumerate(cuts):
            cross = self._cross[index * self._ranks + (step if alike else self._ranks - step)][places]
            load = self._load[places]
            # Downwards a new cut is the left end of its stage, and the right end of the next one.
            ends.append(load + cross if alike else cross - load)
            begins.append(load - cross if alike else -load - cross)
            before = cuts[max(step - 1, 0)]
            if alike:
                latest.append(np.searchsorted(before, self._latest[places], side="right") - 1)
            else:
                latest.append(np.searchsorted(before, self._earliest[places], side="left"))
        return _Line(tuple(cuts), tuple(ends), tuple(begins), tuple(latest))

    def _search(
        self, lines: tuple[_Line, _Line], others: Ints, best: tuple[int, list[int]] | None, lower: int, *, meets: bool
    ) -> tuple[Ints, Ints] | None:
        """Look for a smaller and smaller bottleneck, until no smaller one is worth the search."""
        high = 2 * int(others.max()) + self._below if best is None else best[0]
        step = max(1, lower // FINE)
        bound = high - (step if best is not None else 1)
        found = self._kept(lines, others, bound, meets=meets)
        low = lower - 1
        while found is not None and low + step < bound:
            middle = (low + bound) // 2
            better = self._kept(lines, others, middle, meets=meets)
            if better is None:
                low = middle
            else:
                found, bound = better, middle
        return found

    def _kept(self, lines: tuple[_Line, _Line], others: Ints, bound: int, *, meets: bool) -> tuple[Ints, Ints] | None:
        """Give cuts of both passes by which every rank keeps the bound; None if there are none."""
        one, other = lines
        down = not bool(other.cuts[0][0] < other.cuts[1][0])
        states = [one.begins[0][:, None] + other.begins[0][None, :]]
        for step in range(1, len(one.cuts)):
            most = _running(states[-1], down=down)
            reached = _looked_up(most, one.latest[step], other.latest[step])
            used = one.ends[step][:, None] + other.ends[step][None, :]
            kept = (reached > NOWHERE) & (reached >= used - (bound - int(others[step - 1])))
            if not kept.any():
                return None
            begun = one.begins[step][:, None] + other.begins[step][None, :]
            states.append(np.where(kept, begun, NOWHERE))
        last = states[-1]
        if meets:  # the last rank has what lies between the two cuts
            room = self._earliest[self._earliest[one.cuts[-1]].clip(max=len(self._load) - 1)]
            fits = (last > NOWHERE) & (-last <= bound - int(others[-1])) & (room[:, None] <= other.cuts[-1][None, :])
            if not fits.any():
                return None
            end = divmod(int(np.where(fits, np.abs(last), -NOWHERE).argmin()), fits.shape[1])
        else:
            end = (0, 0)
        return self._traced(lines, states, end, others, bound, down=down)

    def _traced(
        self,
        lines: tuple[_Line, _Line],
        states: list[Ints],
        end: tuple[int, int],
        others: Ints,
        bound: int,
        *,
        down: bool,
    ) -> tuple[Ints, Ints]:
        """Go back from the last cuts; of the states that keep the bound, to that of the most even stages."""
        one, other = lines
        at, to = end
        cuts = [(int(one.cuts[-1][at]), int(other.cuts[-1][to]))]
        for step in range(len(states) - 1, 0, -1):
            ahead = slice(0, int(one.latest[step][at]) + 1)
            place = int(other.latest[step][to])
            beside = slice(place, None) if down else slice(0, place + 1)
            own, its = one.ends[step][at], other.ends[step][to]
            before = states[step - 1][ahead, beside]
            fits = (before > NOWHERE) & (before >= own + its - (bound - int(others[step - 1])))
            loads = own - one.begins[step - 1][ahead], its - other.begins[step - 1][beside]
            larger = np.maximum(loads[0][:, None], loads[1][None, :])
            at, to = divmod(int(np.where(fits, larger, -NOWHERE).argmin()), fits.shape[1])
            to += place if down else 0
            cuts.append((int(one.cuts[step - 1][at]), int(other.cuts[step - 1][to])))
        return np.asarray([cut for cut, _ in cuts[::-1]]), np.asarray([cut for _, cut in cuts[::-1]])

    def _joined(
        self, first: int, second: int, best: tuple[int, list[int]] | None, found: tuple[Ints, Ints]
    ) -> tuple[int, list[int]]:
        """Put the cuts of two passes among the others'."""
        cuts = [0] * (self._stages + 1) if best is None else list(best[1])
        for index, part in zip((first, second), found, strict=True):
            alike = self._passes[index] == self._passes[first]
            for step, cut in enumerate(part.tolist()):
                cuts[index * self._ranks + (step if alike else self._ranks - step)] = cut
        if len(found[0]) == self._ranks:  # between the last two cuts, as even as an anchor on either side allows
            turn = second * self._ranks
            low, high = int(self._earliest[cuts[turn - 1]]), int(self._latest[cuts[turn + 1]])
            goal = (self._load[cuts[turn - 1]] + self._load[cuts[turn + 1]]) // 2
            cuts[turn] = min(max(int(np.searchsorted(self._load, goal)), low), high)
        return self.bottleneck(cuts), cuts


def _running(states: Ints, *, down: bool) -> Ints:
    """Give for each pair of places the most of all states up to them; downwards, from the second place on."""
    most = np.maximum.accumulate(states, axis=0)
    if down:
        return np.maximum.accumulate(most[:, ::-1], axis=1)[:, ::-1]
    return np.maximum.accumulate(most, axis=1)


def _looked_up(most: Ints, rows: Ints, columns: Ints) -> Ints:
    inside: NDArray[np.bool_] = ((rows >= 0)[:, None]) & ((columns >= 0) & (columns < most.shape[1]))[None, :]
    found = most[np.maximum(rows, 0)[:, None], np.clip(columns, 0, most.shape[1] - 1)[None, :]]
    return np.where(inside, found, NOWHERE)
