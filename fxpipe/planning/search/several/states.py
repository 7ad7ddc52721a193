"""Downsets to make a partition of, where what every rank has so far is part of a state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fxpipe.planning.search.downsets import DownsetCosts, count_members
from fxpipe.planning.search.evaluate import evaluate
from fxpipe.planning.search.instance import (
    RECEIVED,
    RECEIVED_FIXED,
    SENT,
    SENT_FIXED,
    TIE_FIXED,
    TIE_LOAD,
    Instance,
    Ints,
    Members,
    only_live_ties,
)
from fxpipe.planning.search.request import FREE, Request

MOST_STATES = 4_000  # states kept after each stage, over all downsets
FEWER_STATES = 1_000  # the same once a search had to drop some, so that nothing can be proven any more
POOL_STATES = 400  # the same over a pool
MOST_PAIRS = 5_000_000  # pairs of states and downsets looked at in all, before the search stops being exact
USUAL_COLUMNS = 16  # sums of a state to which the numbers of states and pairs apply; of wider ones fewer are kept
LEAST_STATES = 50  # however wide they are
MOST_CELLS = 150_000_000  # sums computed in all searches for one partition; beyond, the best one known has to do
MOST_TIES = 5  # ties of which both ways, one holder or several, are followed
RANKS_PER_WORD = 63  # bits of a whole number that leave it positive
ANY = int(np.iinfo(np.int64).max // 4)

Score = tuple[int, int]


def score_of(instance: Instance, request: Request, stage_of: Ints, objective: str) -> Score | None:
    """Give the largest rank load and the largest stage load, or the largest memory; None over the memory limit."""
    costs = evaluate(instance, request, stage_of)
    if objective == "memory":
        return costs.memory, 0
    if request.memory_limit is not None and costs.memory > request.memory_limit:
        return None
    return costs.bottleneck, int(costs.loads.max())


@dataclass(slots=True)
class Effort:
    """What searches for one partition have done so far.

    Attributes:
        cells: Sums computed.
    """

    cells: int = 0

    @property
    def is_spent(self) -> bool:
        """Whether there has been enough of it."""
        return self.cells >= MOST_CELLS


@dataclass(slots=True)
class _States:
    """Partial partitions: downset reached, sums of every column, slowest stage so far, and who holds the ties."""

    at: Ints
    sums: Ints
    slowest: Ints
    holder: Ints
    parent: Ints

    def take(self, chosen: Ints | NDArray[np.bool_]) -> _States:
        return _States(
            self.at[chosen], self.sums[chosen], self.slowest[chosen], self.holder[chosen], self.parent[chosen]
        )


class Pool:
    """Downsets to make a partition of, and the search over them.

    Sums of a state are columns: the load of every rank, then for every rank its memory in each combination of live
    microbatches. ``holder`` says of each tie, in as many words as the ranks need: 0 nobody yet; else bits of the ranks
    that hold it, which all pay; or, where its first word is below 0, ``-1 - rank``: this rank alone, and nobody pays.
    """

    def __init__(
        self,
        instance: Instance,
        request: Request,
        masks: list[int],
        near: list[list[int]] | None,
        objective: str,
        effort: Effort | None = None,
    ) -> None:
        self.objective = objective
        self.effort = effort or Effort()
        self._instance, self._request = instance, request
        self._memory = objective == "memory" or request.memory_limit is not None
        costs = DownsetCosts(only_live_ties(instance), request.routing, masks)
        everything = np.arange(costs.size)
        free = replace(request, kinds=(FREE,) * len(request.kinds))
        self._costs, self._between = costs, costs.between(free, everything, everything, 0, memory=self._memory)
        self._near = None if near is None else [np.asarray(places) for places in near]
        self._by_load = np.argsort(costs.load, kind="stable")
        self._ties, self._counts, self._sizes = self._held(instance.ties, costs)
        self._words = -(-(max(request.ranks) + 1) // RANKS_PER_WORD)
        self._columns(request)
        self._work = 0
        self._dropped = False
        self.most = self._most()

    def _most(self) -> int:
        """Give a bound that every partition keeps; in Python's numbers, since it may be large."""
        values = self._instance.values.amounts.astype(object).sum(axis=0)
        ties = self._instance.ties.amounts.astype(object).sum(axis=0)
        live = max(sum(entry) for sets in self._request.placement.live for entry in sets)
        stages = self._request.stages
        if self.objective == "load":
            moved = 2 * stages * int(max(values[:2]))
            return min(int(self._instance.load.sum()) + moved + stages * int(ties[0]), ANY)
        alive = int(self._instance.activation.sum()) + stages * int(values[SENT] + values[RECEIVED] + ties[2])
        fixed = int(self._instance.static.sum()) + stages * int(values[SENT_FIXED] + values[RECEIVED_FIXED])
        return min(fixed + int(ties[1]) + live * alive, ANY)

    def _held(self, ties: Members, costs: DownsetCosts) -> tuple[Ints, Ints, Ints]:
        """Keep the ties that cost something in this search; those that cost time first."""
        amounts = ties.amounts[:, [TIE_LOAD, TIE_FIXED]] * np.asarray(
            [self.objective == "load", self._memory], dtype=np.int64
        )
        kept = np.flatnonzero(amounts.any(axis=1))
        kept = kept[np.argsort(amounts[kept, 0] == 0, kind="stable")]
        counts, sizes = count_members(costs.members, ties)
        return amounts[kept], counts[:, kept].astype(np.int64), sizes[kept]

    def _columns(self, request: Request) -> None:
        """Lay the columns out: which of them a stage adds its memory to, and how often its live part."""
        column = max(request.ranks) + 1 if self.objective == "load" else 0
        self._num_loads = column
        self._memory_columns: list[slice] = [slice(0, 0)] * request.stages
        self._live: list[Ints] = [np.zeros(0, dtype=np.int64)] * request.stages
        if self._memory:
            for stages, sets in zip(request.placement.stages_of_rank, request.placement.live, strict=True):
                for place, stage in enumerate(stages):
                    self._memory_columns[stage] = slice(column, column + len(sets))
                    self._live[stage] = np.asarray([entry[place] for entry in sets], dtype=np.int64)
                column += len(sets) if stages else 0
        self._num_columns = column
        self._width = max(column / USUAL_COLUMNS, 1.0)

    def search(self, bound: int, stage_bound: int, *, even: bool = False) -> tuple[tuple[Score, Ints] | None, bool]:
        """Find the best partition whose ranks keep ``bound`` and whose stages keep ``stage_bound``.

        With ``even`` the one whose largest stage is smallest, else the one whose ranks have least.

        Returns:
            Score and stages of the best one found, and whether nothing was left out. Nothing, once the effort is spent.
        """
        if self.effort.is_spent:
            return None, False
        request = self._request
        limits = np.full(self._num_columns, min(bound, self.most), dtype=np.int64)
        if self.objective == "load" and request.memory_limit is not None:
            limits[self._num_loads :] = request.memory_limit
        states = _States(
            np.asarray([self._costs.empty]),
            np.zeros((1, self._num_columns), dtype=np.int64),
            np.zeros(1, dtype=np.int64),
            np.zeros((1, len(self._ties) * self._words), dtype=np.int64),
            np.zeros(1, dtype=np.int64),
        )
        complete = self._near is None and int((self._ties[:, 0] > 0).sum()) <= MOST_TIES
        levels: list[_States] = []
        best: tuple[Score, int, int] | None = None
        for stage in range(request.stages):
            states = self._extended(states, stage, limits, stage_bound)
            states, dropped = self._kept(states, limits)
            complete = complete and not dropped
            self._dropped = self._dropped or dropped
            levels.append(states)
            ended = np.flatnonzero(states.at == self._costs.full)
            if len(ended) and (not request.exactly or stage == request.stages - 1):
                values = self._values(states.sums[ended])
                slowest = states.slowest[ended]
                first = np.lexsort((values, slowest) if even else (slowest, values))[0]
                score = int(values[first]), int(slowest[first]) if self.objective == "load" else 0
                if best is None or (score[::-1] < best[0][::-1] if even else score < best[0]):
                    best = score, stage, int(ended[first])
            if not len(states.at):
                break
        if best is None:
            return None, complete
        stage_of = self._traced(levels, best[1], best[2])
        true_score = score_of(self._instance, request, stage_of, self.objective)
        assert true_score is not None
        assert true_score[0] <= best[0][0]
        return (true_score, stage_of), complete

    def _values(self, sums: Ints) -> Ints:
        primary = sums[:, : self._num_loads] if self.objective == "load" else sums
        values: Ints = primary.max(axis=1)
        return values

    def _traced(self, levels: Sequence[_States], stage: int, index: int) -> Ints:
        stage_of = np.zeros(self._instance.size, dtype=np.int64)
        for level in reversed(range(stage + 1)):
            position = int(levels[level].at[index])
            stage_of += 1 - self._costs.members[position].astype(np.int64)
            index = int(levels[level].parent[index])
        return stage_of

    def _pairs(self, states: _States, stage: int, limits: Ints) -> tuple[Ints, Ints]:
        """Pair every state with the downsets its next stage may end at, by load."""
        costs, request = self._costs, self._request
        last = stage == request.stages - 1
        if last:
            places = np.asarray([costs.full])
        elif self._near is None:
            places = self._by_load
        else:
            places = self._near[stage][np.argsort(costs.load[self._near[stage]], kind="stable")]
        if request.exactly and not last:
            places = places[places != costs.full]
        low, high = np.zeros(len(states.at), dtype=np.int64), np.full(len(states.at), len(places))
        if self.objective == "load":
            loads = costs.load[places]
            own, rank = costs.load[states.at], request.ranks[stage]
            high = np.searchsorted(loads, own + (limits[rank] - states.sums[:, rank]), side="right")
            later = sorted(set(request.ranks[stage + 1 :]))
            room = (limits[later] - states.sums[:, later]).astype(np.float64).sum(axis=1)  # too large for whole numbers
            least = np.floor(float(costs.load[costs.full]) - room * (1 + 1e-12))
            low = np.searchsorted(loads, np.maximum(least, 0).astype(np.int64), side="left")
        counts = np.maximum(high - low, 0)
        which = np.repeat(np.arange(len(states.at)), counts)
        offset = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        to = places[np.repeat(low, counts) + offset]
        valid = self._between.valid[states.at[which], to]
        return which[valid], to[valid]

    def _extended(self, states: _States, stage: int, limits: Ints, stage_bound: int) -> _States:
        """Add one stage to every state in every way that keeps the limits."""
        onward = np.flatnonzero(states.at != self._costs.full)
        parts = []
        for first in range(0, len(onward), 256):
            block = onward[first : first + 256]
            parts.append(self._extended_block(states.take(block), block, stage, limits, stage_bound))
        if not parts:
            return states.take(np.zeros(0, dtype=np.int64))
        return _joined(parts)

    def _extended_block(self, states: _States, index: Ints, stage: int, limits: Ints, stage_bound: int) -> _States:
        costs, request = self._costs, self._request
        which, to = self._pairs(states, stage, limits)
        self._work += len(which)
        self.effort.cells += len(which) * (self._num_columns + USUAL_COLUMNS)
        at = states.at[which]
        before, after = request.kinds[stage], request.kinds[stage + 1]
        cost = self._between.load[at, to] + costs.cross_load(before)[at] + costs.cross_load(after)[to]
        if self.objective == "load":
            fits = (cost <= stage_bound) & (
                states.sums[which, request.ranks[stage]] + cost <= limits[request.ranks[stage]]
            )
            which, to, at, cost = which[fits], to[fits], at[fits], cost[fits]
        sums, holder = states.sums[which], states.holder[which]
        memory = self._memory_columns[stage]
        if self._memory:
            alive, static = self._between.alive[at, to], self._between.static[at, to]
            if before != FREE:
                alive, static = alive + costs.crossing[RECEIVED][at], static + costs.crossing[RECEIVED_FIXED][at]
            if after != FREE:
                alive, static = alive + costs.crossing[SENT][to], static + costs.crossing[SENT_FIXED][to]
            sums[:, memory] += static[:, None] + alive[:, None] * self._live[stage]
        found = _States(to, sums, cost, holder, index[which])
        slowest = states.slowest[which]
        for tie in range(len(self._ties)):
            found, slowest, at = self._with_tie(found, slowest, at, tie, stage)
        if self.objective == "load":
            found.sums[:, request.ranks[stage]] += found.slowest
        fits = (found.sums <= limits).all(axis=1)
        if self.objective == "load":
            fits &= found.slowest <= stage_bound
        found.slowest = np.maximum(found.slowest, slowest)
        return found.take(fits)

    def _with_tie(self, found: _States, slowest: Ints, at: Ints, tie: int, stage: int) -> tuple[_States, Ints, Ints]:
        """Let this stage's rank hold a tie where the stage uses it; a first holder may be the only one, or not."""
        rank = self._request.ranks[stage]
        load, fixed = self._ties[tie].tolist()
        memory = self._memory_columns[stage]
        first = tie * self._words
        word, bit = first + rank // RANKS_PER_WORD, 1 << rank % RANKS_PER_WORD
        single = found.holder[:, first]
        held = self._counts[at, tie] < self._counts[found.at, tie]
        refused = held & (single < 0) & (single != -1 - rank)
        new = held & (single >= 0) & (found.holder[:, word] & bit == 0)
        nobody = ~found.holder[:, first : first + self._words].any(axis=1)
        alone = new & nobody if load and tie < MOST_TIES else np.zeros(len(held), dtype=bool)
        only = found.take(alone)
        only.holder[:, first] = -1 - rank
        only.sums[:, memory] += fixed
        shared = new & (self._counts[found.at, tie] - self._counts[at, tie] < self._sizes[tie])
        found.holder[new, word] |= bit
        found.sums[np.flatnonzero(new)[:, None], np.arange(memory.start, memory.stop)] += fixed
        found.slowest[shared] += load
        kept = ~refused & (~new | shared) if load and tie < MOST_TIES else ~refused
        return (
            _joined([found.take(kept), only]),
            np.concatenate([slowest[kept], slowest[alone]]),
            np.concatenate([at[kept], at[alone]]),
        )

    def _kept(self, states: _States, limits: Ints) -> tuple[_States, bool]:
        """Keep one of equal states, that of the fastest stages; of many the most even ones, spread over downsets."""
        if not len(states.at):
            return states, False
        keys = np.column_stack([states.at, states.holder, states.sums])
        # Equal rows have equal digests, so they become neighbours; sorting by every column takes ten times as long.
        factors = np.random.default_rng(0).integers(1, 2**62, keys.shape[1], dtype=np.int64)
        order = np.lexsort((states.slowest, (keys * factors).sum(axis=1)))
        keys = keys[order]
        order = order[np.concatenate([[True], (keys[1:] != keys[:-1]).any(axis=1)])]
        states = states.take(order)
        exact = self._near is None and self._work * self._width < MOST_PAIRS
        most = (FEWER_STATES if self._dropped else MOST_STATES) if exact else POOL_STATES
        most = max(int(most / self._width), LEAST_STATES)
        if len(states.at) <= most:
            return states, False
        uneven = ((states.sums / np.maximum(limits, 1).astype(np.float64)) ** 2).sum(axis=1)
        order = np.lexsort((states.slowest, uneven, states.at))
        at = states.at[order]
        first = np.flatnonzero(np.concatenate([[True], at[1:] != at[:-1]]))
        place = np.arange(len(at)) - np.repeat(first, np.diff(np.concatenate([first, [len(at)]])))
        chosen = order[np.lexsort((uneven[order], place))[:most]]
        return states.take(np.sort(chosen)), True


def _joined(parts: Sequence[_States]) -> _States:
    return _States(
        np.concatenate([part.at for part in parts]),
        np.concatenate([part.sums for part in parts]),
        np.concatenate([part.slowest for part in parts]),
        np.concatenate([part.holder for part in parts]),
        np.concatenate([part.parent for part in parts]),
    )
