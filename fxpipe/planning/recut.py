"""Cut and recomputation chosen together: the fastest step that keeps a memory limit.

The first stages of 1F1B keep most microbatches, so they recompute, take longer, and should hold fewer layers. Candidate
cuts come from a dynamic programme over the model's blocks in the order of calling, in which a stage costs what it costs
with the least recomputation that makes it fit (AdaPipe, ASPLOS 2024); from the cuts of other searches, made to fit; and
from their neighbours. Simulation picks. Where there are few cuts, all are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np

from fxpipe.planning.fit import Choices, Fitted, Floats, Front, fit, recomputed
from fxpipe.planning.judge import Judge, stage_times
from fxpipe.planning.layout import Layout
from fxpipe.planning.search.problem import measure
from fxpipe.planning.simulation.engine import StageTimes
from fxpipe.planning.simulation.simulate import step_seconds

ALL_CUTS = 250  # so many cuts, or fewer, are all tried
WIDTH = 3.0  # times the mean load that a stage may have in the dynamic programme
SLACKS = (1.0, 1.005, 1.01, 1.02, 1.04, 1.07, 1.1, 1.15, 1.25)  # of the bottleneck, when the sum is made small
ROUNDS = 3  # of cutting anew what is recomputed as found, and choosing anew what is
MOST_MOVES = 60  # improvements by moving one boundary


@dataclass(frozen=True, slots=True)
class Recut:
    """What was found.

    Attributes:
        stage_of: Stage of each node.
        fitted: What is recomputed, and the layout with it.
        step_s: Seconds of the simulated step.
    """

    stage_of: tuple[int, ...]
    fitted: Fitted
    step_s: float


def recut(
    choices: Choices,
    limit: float,
    starts: Sequence[Sequence[int]] = (),
    solver: Callable[[Layout], Sequence[int] | None] | None = None,
) -> Recut | None:
    """Find the fastest partition that keeps the limit.

    Args:
        choices: What blocks could recompute.
        limit: Bytes of each rank.
        starts: Partitions known from other searches.
        solver: Partitions a layout at its grain, with what it recomputes as given; opened blocks come from it.

    Returns:
        The best one; None where none was found that fits.
    """
    search = _Search(choices, limit)
    everything = tuple(name for ways in choices.ways for name in ways[-1].modules)
    for start in starts:
        search.look_at(tuple(start), everything)
    for cut in search.cuts():
        search.look_at(search.stages(cut))
    search.improve()
    for _ in range(ROUNDS):
        if solver is None or search.best is None:
            break
        other = solver(search.best.fitted.layout)
        if other is None or not search.look_at(tuple(other)):
            break
        search.improve()
    return search.best


class _Search:
    def __init__(self, choices: Choices, limit: float) -> None:
        self.choices = choices
        self.limit = limit
        self.layout = choices.layout
        self.units = runs_of(self.layout)
        self.root = Front.empty()
        self._judge = Judge(self.layout)
        self.best: Recut | None = None
        self._seen: set[tuple[int, ...]] = set()

    def stages(self, cut: Sequence[int]) -> tuple[int, ...]:
        """Give the stage of each node; ``cut`` holds the first unit of each stage, and the number of units."""
        stage_of = [0] * len(self.layout.layers)
        for stage, (low, high) in enumerate(pairwise(cut)):
            for start, stop in self.units[low:high]:
                stage_of[start:stop] = [stage] * (stop - start)
        return tuple(stage_of)

    def look_at(self, stage_of: tuple[int, ...], otherwise: tuple[str, ...] = ()) -> bool:
        """Make a partition fit, and keep it if it is the fastest so far; tells whether it is.

        Args:
            stage_of: Stage of each node.
            otherwise: What to recompute where a choice of blocks is not found.
        """
        if stage_of in self._seen or len(set(stage_of)) < self.layout.settings.stages:
            return False
        self._seen.add(stage_of)
        found = self._kept(stage_of, ())
        crossed = [
            ways[-1].modules
            for block, ways in zip(self.layout.blocks, self.choices.ways, strict=True)
            if len(ways) > 1 and len({stage_of[node] for node in block.layers}) > 1
        ]
        found = (bool(crossed) and self._kept(stage_of, sum(crossed, ()))) or found
        return found or (bool(otherwise) and self._kept(stage_of, otherwise))

    def _kept(self, stage_of: tuple[int, ...], always: tuple[str, ...]) -> bool:
        if self.best is not None and not always:
            # What blocks keep each by itself tells nearly all; only what looks better is laid out and measured.
            limits = [self.limit] * self.layout.settings.ranks
            added = recomputed(self.choices, stage_of, limits, self.root)
            if added is None:
                return False
            more = {stage: seconds for rank in added for stage, seconds in rank.seconds.items()}
            times = [
                replace(time, input_grad_s=time.input_grad_s + more.get(stage, 0.0))
                for stage, time in enumerate(self._judge.stage_times(stage_of))
            ]
            if self._step_s(times) >= self.best.step_s:
                return False
        fitted = fit(self.choices, stage_of, self.limit, self.root, always)
        if fitted is None:
            return False
        step_s = self._step_s(stage_times(fitted.layout, stage_of))
        if self.best is not None and step_s >= self.best.step_s:
            return False
        self.best = Recut(stage_of, fitted, step_s)
        return True

    def _step_s(self, times: Sequence[StageTimes]) -> float:
        settings = self.layout.settings
        return step_seconds(settings.schedule, times, settings.ranks, settings.num_microbatches)

    def improve(self) -> None:
        """Move single boundaries by a unit as long as the step gets faster."""
        for _ in range(MOST_MOVES):
            if self.best is None or not any(self.look_at(near) for near in self._neighbours(self.best.stage_of)):
                return

    def _neighbours(self, stage_of: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Move each boundary by the last unit before it, or the first behind it; only where units are whole."""
        stage_of_unit = [{*stage_of[start:stop]} for start, stop in self.units]
        if any(len(own) > 1 for own in stage_of_unit):
            return
        firsts = [min(own) for own in stage_of_unit]
        if firsts != sorted(firsts):
            return
        cut = [firsts.index(stage) for stage in range(self.layout.settings.stages)] + [len(firsts)]
        # The slowest stages first: that is where something is to be had.
        loads = measure(self.layout.problem, stage_of, placement=self.layout.placement).loads
        order = sorted(range(1, len(cut) - 1), key=lambda place: -max(loads[place - 1], loads[place]))
        for place in order:
            for step in (-1, 1):
                moved = [*cut[:place], cut[place] + step, *cut[place + 1 :]]
                if all(low < high for low, high in pairwise(moved)):
                    yield self.stages(moved)

    def cuts(self) -> Iterator[tuple[int, ...]]:
        """Give cuts worth looking at, the most promising first."""
        count, stages = len(self.units), self.layout.settings.stages
        if count < stages:
            return
        if math.comb(count - 1, stages - 1) <= ALL_CUTS:
            yield from ((0, *inner, count) for inner in combinations(range(1, count), stages - 1))
        elif self.layout.settings.ranks == stages:
            yield from _Programme(self).cuts()


class _Programme:
    """The dynamic programme: first the smallest largest stage, then small sums of stages under bounds near it."""

    def __init__(self, search: _Search) -> None:
        self._search = search
        layout = search.layout
        self._layout = layout
        self._live = layout.placement.most_live
        problem, units = layout.problem, search.units
        self._count = len(units)
        bounds = [units[0][0], *(stop for _, stop in units)]
        self._seconds = _sums([sum(problem.seconds[a:b]) for a, b in units])
        self._static = _sums([sum(problem.memory[a:b]) if problem.memory else 0.0 for a, b in units])
        self._kept = _sums([sum(problem.activation[a:b]) if problem.activation else 0.0 for a, b in units])
        unit_of = [unit for unit, (a, b) in enumerate(units) for _ in range(a, b)]
        self._crossing = np.zeros((6, len(bounds)))
        for value in problem.values:
            low, high = unit_of[min(value.nodes)] + 1, unit_of[max(value.nodes)] + 1
            parts = (
                value.link_s(far=False), value.link_s(far=True), value.sent_bytes, value.received_bytes,
                value.sent_buffer_bytes, value.received_buffer_bytes,
            )  # fmt: skip
            self._crossing[:, low:high] += np.asarray(parts)[:, None]
        self._ties = [
            (sorted({unit_of[node] for node in tie.nodes}), tie.bytes, tie.live_bytes) for tie in problem.ties
        ]
        self._ways = self._unit_ways(unit_of)
        self._anchored = _sums([float(any(a <= node < b for node in layout.anchors)) for a, b in units])

    def _unit_ways(self, unit_of: Sequence[int]) -> list[list[tuple[float, float, float]]]:
        ways: list[list[tuple[float, float, float]]] = [[] for _ in range(self._count)]
        for block, entry in zip(self._layout.blocks, self._search.choices.ways, strict=True):
            if len(entry) > 1 and not ways[unit_of[block.layers[0]]]:
                keep = entry[0].kept
                ways[unit_of[block.layers[0]]] = [(way.seconds, way.kept - keep, way.working) for way in entry]
        return ways

    def cuts(self) -> Iterator[tuple[int, ...]]:
        costs = self._costs()
        best = self._solved(costs, math.inf, total=False)
        if best is None:
            return
        bottleneck, cut = best
        yield cut
        known = {cut}
        for slack in SLACKS:
            found = self._solved(costs, bottleneck * slack * (1 + 1e-12), total=True)
            if found is not None and found[1] not in known:
                known.add(found[1])
                yield found[1]

    def _costs(self) -> list[list[list[tuple[int, float]]]]:
        """Give for each stage and each unit it may end before the units it may start at, with its seconds."""
        layout = self._layout
        stages, count = layout.settings.stages, self._count
        widest = max(WIDTH * self._seconds[-1] / stages, 2 * float(np.max(np.diff(self._seconds))))
        found: list[list[list[tuple[int, float]]]] = [[[] for _ in range(count + 1)] for _ in range(stages)]
        need_anchor = self._anchored[-1] >= stages
        for start in range(count):
            fronts = _Fronts(self._ways, self._search.root)
            for stop in range(start + 1, count + 1):
                fronts.add(stop - 1)
                seconds = self._seconds[stop] - self._seconds[start]
                if seconds > widest:
                    break
                if need_anchor and self._anchored[stop] == self._anchored[start]:
                    continue
                held = self._held(start, stop)
                for stage in range(max(0, stages - (count - start)), min(start, stages - 1) + 1):
                    if (stage == 0) != (start == 0) or (stage == stages - 1) != (stop == count):
                        continue
                    cost = self._stage_s(stage, start, stop, seconds, held, fronts)
                    if cost is not None:
                        found[stage][stop].append((start, cost))
        return found

    def _held(self, start: int, stop: int) -> tuple[float, float]:
        """Give the fixed bytes of a stage, and those per live microbatch, without recomputation."""
        static, kept = self._static[stop] - self._static[start], self._kept[stop] - self._kept[start]
        for units, nbytes, live_bytes in self._ties:
            place = int(np.searchsorted(units, start))
            if place < len(units) and units[place] < stop:
                static += nbytes
                kept += live_bytes
        if start > 0:
            kept += self._crossing[3, start]
            static += self._crossing[5, start]
        if stop < self._count:
            kept += self._crossing[2, stop]
            static += self._crossing[4, stop]
        return static, kept

    def _stage_s(
        self, stage: int, start: int, stop: int, seconds: float, held: tuple[float, float], fronts: _Fronts
    ) -> float | None:
        far = self._layout.placement.far
        if stage > 0:
            seconds += self._crossing[int(far[stage - 1]), start]
        if stop < self._count:
            seconds += self._crossing[int(far[stage]), stop]
        room = self._search.limit - held[0]
        live = self._live[stage]
        if live * held[1] <= room:
            return float(seconds)
        more = fronts.least_s(room, live, held[1])
        return None if more is None else float(seconds + more)

    def _solved(
        self, costs: list[list[list[tuple[int, float]]]], bound: float, *, total: bool
    ) -> tuple[float, tuple[int, ...]] | None:
        """Cut with the smallest largest stage, or the smallest sum of stages none of which exceeds the bound."""
        before = [math.inf] * (self._count + 1)
        before[0] = 0.0
        back: list[list[int]] = []
        for stage in costs:
            after, froms = [math.inf] * (self._count + 1), [-1] * (self._count + 1)
            for stop, entries in enumerate(stage):
                for start, seconds in entries:
                    if seconds > bound or before[start] == math.inf:
                        continue
                    value = before[start] + seconds if total else max(before[start], seconds)
                    if value < after[stop]:
                        after[stop], froms[stop] = value, start
            back.append(froms)
            before = after
        if before[-1] == math.inf:
            return None
        cut = [self._count]
        for froms in reversed(back):
            cut.append(froms[cut[-1]])
        return before[-1], tuple(reversed(cut))


class _Fronts:
    """Fronts of a growing row of units, one for each size of what may be computed anew at a time."""

    def __init__(self, ways: list[list[tuple[float, float, float]]], root: Front) -> None:
        self._ways = ways
        self._sizes = sorted({working for entry in ways for _, _, working in entry if working})
        self._fronts = [root] * len(self._sizes)

    def add(self, unit: int) -> None:
        """Add a unit."""
        if self._ways[unit]:
            for place, size in enumerate(self._sizes):
                usable = tuple((more, kept) for more, kept, working in self._ways[unit] if working <= size)
                self._fronts[place] = self._fronts[place].extended(usable)

    def least_s(self, room: float, live: int, kept: float) -> float | None:
        """Give the least seconds of recomputation that leave no more than the room; None where none do."""
        found = None
        for size, front in zip(self._sizes, self._fronts, strict=True):
            point = front.first_within((room - size) / live - kept)
            if point >= 0 and (found is None or front.seconds[point] < found):
                found = float(front.seconds[point])
        return found


def runs_of(layout: Layout) -> tuple[tuple[int, int], ...]:
    """Give runs of nodes ``[start, stop)`` that stay together: blocks and groups; where they overlap, all of them."""
    stop_of = list(range(1, len(layout.layers) + 1))
    for nodes in (*(block.layers for block in layout.blocks), *layout.problem.groups):
        stop_of[min(nodes)] = max(stop_of[min(nodes)], max(nodes) + 1)
    units: list[tuple[int, int]] = []
    start = 0
    while start < len(stop_of):
        stop, node = stop_of[start], start
        while node < stop:
            stop = max(stop, stop_of[node])
            node += 1
        units.append((start, stop))
        start = stop
    return tuple(units)


def _sums(numbers: Sequence[float]) -> Floats:
    return np.concatenate([[0.0], np.cumsum(np.asarray(numbers, dtype=np.float64))])
