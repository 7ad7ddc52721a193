"""Of the cuts near the smallest slowest stage, the one whose simulated step is the fastest.

The slowest stage is most of a step, and not all of it: with few microbatches, what comes before it and after it counts
as well, and so do transfers that no slowest stage shows. Candidates are cuts along the order of layers that a partition
gives, by a dynamic programme whose stages cost what a step costs through them; partitions known from elsewhere; and
their neighbours. Simulation picks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fxpipe.planning.judge import Judge
from fxpipe.planning.layout import Layout
from fxpipe.planning.search.problem import PartitionProblem, measure

Floats = NDArray[np.float64]
SLACKS = (1.0, 1.002, 1.005, 1.01, 1.02, 1.04, 1.08)  # of the best cost of a stage, when the sum is made small
MOST_ACTIONS = 400_000  # forwards and backwards simulated for one partition
LEAST_TRIES = 12  # however large the pipeline
MOST_TRIES = 400
WIDTH = 300  # places looked at for each boundary
FEW, ALL = 12, 800  # units of a graph, and partitions of it, of which all are simulated
NEAREST = 12  # neighbours of a cut that are simulated
HALF = 0.5
"""Share of its transfers that a stage waits for: those into it, while what it sends passes the other way."""
SHARES = (1.0, HALF)  # what a stage of a shortlisted cut may wait for


class Shortlist:
    """Cuts along one order of layers, judged by simulation, as long as the budget lasts."""

    def __init__(
        self, layout: Layout, problem: PartitionProblem, stage_of: Sequence[int], *, bare: bool = False
    ) -> None:
        """Take the order of layers from a partition.

        Args:
            layout: The layers, laid out.
            problem: With the groups that stay whole.
            stage_of: A partition of it.
            bare: Whether stages may be without parameters.
        """
        self.layout, self.problem = layout, problem
        self.judge = Judge(layout)
        self.best = tuple(stage_of)
        self.step_s = self.judge.step_s(self.best)
        self._start_s = self.step_s
        settings = layout.settings
        one = 2 * settings.stages * settings.num_microbatches
        self._tries = min(max(MOST_ACTIONS // one, LEAST_TRIES), MOST_TRIES)
        self._bare = bare
        self._units: list[Unit] = []
        self._seen = {self.best}

    def look_at(self, stage_of: Sequence[int]) -> bool:
        """Simulate a partition if it is possible, and keep it if it is the fastest so far; tells whether it is."""
        stage_of = tuple(stage_of)
        if stage_of in self._seen or self._tries <= 0 or not self._is_possible(stage_of):
            return False
        self._seen.add(stage_of)
        self._tries -= 1
        step_s = self.judge.step_s(stage_of)
        if step_s >= self.step_s:
            return False
        self.best, self.step_s = stage_of, step_s
        return True

    @property
    def gain(self) -> float:
        """Share of the step that the best one saves over the partition that was given."""
        return 1 - self.step_s / self._start_s if self._start_s else 0.0

    def _is_possible(self, stage_of: tuple[int, ...]) -> bool:
        layout, stages = self.layout, self.layout.settings.stages
        if len(set(stage_of)) < stages:
            return False
        if any(stage_of[before] > stage_of[after] for before, after in self.problem.edges):
            return False
        if any(len({stage_of[node] for node in group}) > 1 for group in self.problem.groups):
            return False
        if not self._bare and len({stage_of[node] for node in layout.anchors}) < stages:
            return False
        limit = layout.settings.memory_limit
        if limit is None:
            return True
        return max(measure(layout.problem, stage_of, placement=layout.placement).rank_memory) <= limit

    def search(self) -> None:
        """Look at cuts along the order of the best partition, then at neighbours of what is best; at all if few."""
        every = self._all()
        if every is not None:
            self._tries = len(every)
            for stage_of in every:
                self.look_at(stage_of)
            return
        line = _Line(self.layout, self.problem, self.best)
        for cut in line.cuts():
            self.look_at(line.stages(cut))
        while self._tries > 0:
            line = _Line(self.layout, self.problem, self.best)
            if any(self.look_at(line.stages(near)) for near in line.neighbours()[:NEAREST]):
                continue
            if not any(self.look_at(near) for near in self._other_orders()):
                return

    def _all(self) -> list[tuple[int, ...]] | None:
        """Give every partition that keeps the order; None where there are many."""
        stages = self.layout.settings.stages
        units = self._units = _units(self.problem)
        if len(units) > FEW:
            return None
        ways: list[dict[int, int]] = [{}]
        for own, before, after in sorted(units):
            more = []
            for way in ways:
                low = max((way[node] for node in before if node in way), default=0)
                high = min((way[node] for node in after if node in way), default=stages - 1)
                more += [way | dict.fromkeys(own, stage) for stage in range(low, high + 1)]
            ways = more
            if len(ways) > ALL:
                return None
        return [tuple(way[node] for node in range(len(self.best))) for way in ways]

    def _other_orders(self) -> Iterator[tuple[int, ...]]:
        """Move one unit to the stage before or after, where what it needs and what needs it lie elsewhere."""
        stage_of = self.best
        for own, before, after in self._units:
            stage = stage_of[own[0]]
            for other, possible in (
                (stage + 1, all(stage_of[node] > stage for node in after)),
                (stage - 1, all(stage_of[node] < stage for node in before)),
            ):
                if possible and 0 <= other < self.layout.settings.stages:
                    moved = list(stage_of)
                    for node in own:
                        moved[node] = other
                    yield tuple(moved)


Unit = tuple[list[int], set[int], set[int]]


def _units(problem: PartitionProblem) -> list[Unit]:
    """Give what stays together: its nodes, those that feed it, and those that it feeds."""
    home = list(range(len(problem.seconds)))
    for group in problem.groups:
        joined = {home[node] for node in group}
        least = min(joined)
        home = [least if place in joined else place for place in home] if len(joined) > 1 else home
    found: dict[int, Unit] = {}
    for node, place in enumerate(home):
        found.setdefault(place, ([], set(), set()))[0].append(node)
    for before, after in problem.edges:
        if home[before] != home[after]:
            found[home[after]][1].add(before)
            found[home[before]][2].add(after)
    return list(found.values())


class _Line:
    """Layers in one order, the places where it may be cut, and what stages between two of them would cost."""

    def __init__(self, layout: Layout, problem: PartitionProblem, stage_of: Sequence[int]) -> None:
        settings = layout.settings
        self._settings = settings
        count = len(stage_of)
        order = sorted(range(count), key=lambda node: (stage_of[node], node))
        place = {node: index for index, node in enumerate(order)}
        self._order = order
        inside = np.zeros(count + 1, dtype=np.int64)
        for group in problem.groups:
            own = [place[node] for node in group]
            inside[min(own) + 1] += 1
            inside[max(own) + 1] -= 1
        self.places = np.flatnonzero(np.cumsum(inside) == 0)
        costs = [layout.costs[layout.layers[node]] for node in order]
        self._work = _sums([cost.seconds for cost in costs])[self.places]
        self._forward = _sums([cost.forward_s for cost in costs])[self.places]
        moved = np.zeros((2, count + 1))
        for value in problem.values:
            own = [place[node] for node in value.nodes]
            low, high = min(own) + 1, max(own) + 1
            moved[0, low:high] += value.link_s(far=False)
            moved[1, low:high] += value.link_s(far=True)
        self._moved = moved[:, self.places]
        starts = [0] * (settings.stages + 1)
        for stage in stage_of:
            starts[stage + 1] += 1
        firsts = np.cumsum(starts)
        self.cut = tuple(int(np.searchsorted(self.places, first)) for first in firsts)
        ranks = settings.rank_of_stage
        self._same = [ranks[a] == ranks[b] for a, b in pairwise(range(settings.stages))]
        self._far = layout.placement.far
        self.one_stage_per_rank = settings.ranks == settings.stages

    def stages(self, cut: Sequence[int]) -> tuple[int, ...]:
        """Give the stage of each node; ``cut`` holds the place where each stage begins, and the end."""
        found = [0] * len(self._order)
        for stage, (low, high) in enumerate(pairwise(cut)):
            for index in range(self.places[low], self.places[high]):
                found[self._order[index]] = stage
        return tuple(found)

    def _boundary(self, stage: int, place: NDArray[np.int64] | int) -> Floats:
        """Give the seconds of what crosses into a stage that begins at a place."""
        if not 0 < stage < self._settings.stages or self._same[stage - 1]:
            return np.zeros_like(self._work[place])
        return np.asarray(self._moved[int(self._far[stage - 1])][place])

    def _through(
        self, stage: int, low: NDArray[np.int64] | int, high: NDArray[np.int64] | int, share: float = HALF
    ) -> Floats:
        """Give the seconds of a step through a stage between two places.

        All microbatches of the stage, what comes before it, and what comes after it and is not hidden behind forwards
        that the stage has in hand by then.

        Args:
            stage: Which one.
            low: Places where it begins.
            high: Places where it ends.
            share: Of transfers, that which the stage waits for.
        """
        settings, work, forward = self._settings, self._work, self._forward
        count = settings.num_microbatches
        own = work[high] - work[low] + share * (self._boundary(stage, low) + self._boundary(stage + 1, high))
        hidden = min(count, settings.stages - stage) - 1
        behind = np.maximum(work[-1] - work[high] - hidden * (forward[high] - forward[low]), 0.0)
        return np.asarray(count * own + work[low] + behind)

    def cost_s(self, cut: Sequence[int]) -> float:
        """Give about the seconds of a step, fast."""
        own = [float(self._through(stage, low, high)) for stage, (low, high) in enumerate(pairwise(cut))]
        if self.one_stage_per_rank:
            return max(own)
        ranks = [0.0] * self._settings.ranks
        for stage, seconds in enumerate(own):
            ranks[self._settings.rank_of_stage[stage]] += seconds
        return max(ranks)

    def cuts(self) -> Iterator[tuple[int, ...]]:
        """Give cuts worth simulating: the smallest largest cost, then small sums of transfers near it.

        None with several stages per rank, whose costs add up.
        """
        if self.one_stage_per_rank:
            yield from dict.fromkeys(cut for share in SHARES for cut in self._cuts(share))

    def _cuts(self, share: float) -> Iterator[tuple[int, ...]]:
        windows = [np.asarray([entry]) for entry in (0, len(self.places) - 1)]
        windows[1:1] = [self._window(stage) for stage in range(1, self._settings.stages)]
        pairs = []
        for stage, (lows, highs) in enumerate(pairwise(windows)):
            low, high = lows[:, None], highs[None, :]
            costs = self._through(stage, low, high, share)
            pairs.append((np.where(low < high, costs, math.inf), self._boundary(stage, low)))
        found = _path(windows, pairs, math.inf, total=False)
        if found is None:
            return
        least, cut = found
        yield cut
        for slack in SLACKS:
            found = _path(windows, pairs, least * slack * (1 + 1e-12), total=True)
            if found is not None:
                yield found[1]

    def _window(self, stage: int) -> NDArray[np.int64]:
        """Give the places that are looked at for the beginning of a stage: all, or those around where it begins."""
        last = len(self.places) - 1
        low = max(1, min(self.cut[stage] - WIDTH // 2, last - WIDTH))
        return np.arange(low, min(last, low + WIDTH))

    def neighbours(self) -> list[tuple[int, ...]]:
        """Give cuts that differ by one unit handed from a stage to another, all between moved up; best cost first."""
        found = []
        stages = self._settings.stages
        for low in range(1, stages):
            for high in range(low, stages):
                for step in (-1, 1):
                    cut = list(self.cut)
                    for boundary in range(low, high + 1):
                        cut[boundary] += step
                    if all(a < b for a, b in pairwise(cut)):
                        found.append((self.cost_s(cut), tuple(cut)))
        return [cut for _, cut in sorted(found)]


def _path(
    windows: Sequence[NDArray[np.int64]], pairs: Sequence[tuple[Floats, Floats]], bound: float, *, total: bool
) -> tuple[float, tuple[int, ...]] | None:
    """Find the cut of the smallest largest cost, or of the smallest sum of transfers with no cost above the bound."""
    before = np.zeros(1)
    back = []
    for costs, moved in pairs:
        if total:
            values = np.where(costs <= bound, before[:, None] + moved, math.inf)
        else:
            values = np.maximum(before[:, None], costs)
        back.append(np.argmin(values, axis=0))
        before = np.min(values, axis=0)
    if not math.isfinite(before[0]):
        return None
    entry, cut = 0, [int(windows[-1][0])]
    for stage in range(len(pairs) - 1, -1, -1):
        entry = int(back[stage][entry])
        cut.append(int(windows[stage][entry]))
    return float(before[0]), tuple(reversed(cut))


def _sums(numbers: Sequence[float]) -> Floats:
    return np.concatenate([[0.0], np.cumsum(np.asarray(numbers, dtype=np.float64))])
