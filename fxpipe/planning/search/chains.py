"""The best cut of a graph in one order: exact dynamic programming over where the order is cut.

An order puts the nodes at positions ``0 … n-1``; cut ``c`` lies before position ``c``, so a stage is ``order[i:j]``.
With ``P`` the prefix sums of the loads and ``x[c]`` what crosses cut ``c``, a stage costs
``P[j] - P[i] + x[i] + x[j]``: a number of its right cut minus a number of its left one. That is what makes the fast
programme fast; what does not have this form (memory, ties, direct routing) takes the general one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fxpipe.planning.search.instance import (
    FAR_LOAD,
    NEAR_LOAD,
    RECEIVED,
    RECEIVED_FIXED,
    SENT,
    SENT_FIXED,
    TIE_FIXED,
    TIE_LIVE,
    TIE_LOAD,
    UNREACHABLE,
    Instance,
    Ints,
    Members,
)
from fxpipe.planning.search.request import FREE, NEAR, Request

TABLE_ENTRIES = 40_000_000  # entries of the general programme's table; a longer order is coarsened first


@dataclass(frozen=True, slots=True)
class TouchingSet:
    """A set of positions that stages pay for by touching it.

    Attributes:
        places: Positions, ascending.
        load: Load of each stage that holds some but not all.
        live: Memory per live microbatch of each stage that holds some but not all.
        fixed: Static memory of each stage that holds some but not all.
        always_live: Memory per live microbatch of each stage that holds any.
        always_fixed: Static memory of each stage that holds any.
    """

    places: tuple[int, ...]
    load: int = 0
    live: int = 0
    fixed: int = 0
    always_live: int = 0
    always_fixed: int = 0


@dataclass(frozen=True, slots=True)
class OrderCosts:
    """What cutting one order costs, in the instance's units; arrays over the ``n + 1`` cuts.

    Attributes:
        order: Merged nodes by position, as (possibly longer) runs: unit ``p`` is ``order[starts[p]:starts[p + 1]]``.
        starts: First position of each unit, and the end.
        load: Prefix sums of load.
        static: Prefix sums of static memory.
        activation: Prefix sums of memory per live microbatch.
        anchors: Prefix sums of anchors.
        crossing: What crosses each cut: rows as the columns of the instance's values.
        sets: What is paid by touching.
    """

    order: tuple[int, ...]
    starts: Ints
    load: Ints
    static: Ints
    activation: Ints
    anchors: Ints
    crossing: Ints
    sets: tuple[TouchingSet, ...]

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.load) - 1

    def cross_load(self, kind: int) -> Ints:
        """Give the load of what crosses each cut, at a boundary of this kind."""
        if kind == FREE:
            return np.zeros_like(self.load)
        row: Ints = self.crossing[NEAR_LOAD if kind == NEAR else FAR_LOAD]
        return row


def order_costs(instance: Instance, order: Sequence[int], routing: str) -> OrderCosts:
    """Compute what cutting ``order`` (a topological order of the merged nodes) costs."""
    nodes = np.asarray(order, dtype=np.int64)
    count = len(nodes)
    position = np.empty(count, dtype=np.int64)
    position[nodes] = np.arange(count)
    return _costs(instance, tuple(nodes.tolist()), np.arange(count + 1), nodes, position, routing)


def coarsened(instance: Instance, costs: OrderCosts, units: int, routing: str) -> OrderCosts:
    """Join neighbours of the order into about ``units`` runs of equal load, and as many of equal numbers of nodes."""
    goals = np.linspace(0, costs.load[-1], units // 2 + 1)
    even = np.linspace(0, costs.size, units // 2 + 1).astype(np.int64)
    kept = np.unique(np.concatenate([even, np.searchsorted(costs.load, goals), [0, costs.size]]))
    nodes = np.asarray(costs.order, dtype=np.int64)
    unit_of = np.empty(len(nodes), dtype=np.int64)
    unit_of[nodes] = np.repeat(np.arange(len(kept) - 1), np.diff(kept))
    return _costs(instance, costs.order, kept, nodes, unit_of, routing)


def _costs(
    instance: Instance, order: tuple[int, ...], starts: Ints, nodes: Ints, position: Ints, routing: str
) -> OrderCosts:
    count = len(starts) - 1
    values, ties = instance.values, instance.ties
    first, last = _span(values, position)
    near = (last - first <= 1) if routing == "direct" else np.ones(len(values), dtype=bool)
    amounts = values.amounts
    if routing == "direct":  # between neighbours too, each of the two stages holds all of it
        amounts = amounts.copy()
        for one, other in ((SENT, RECEIVED), (SENT_FIXED, RECEIVED_FIXED)):
            amounts[:, one] = amounts[:, other] = values.amounts[:, one] + values.amounts[:, other]
        amounts[:, FAR_LOAD] = amounts[:, NEAR_LOAD]
    sets = [
        TouchingSet(places, load=entry[NEAR_LOAD], live=entry[SENT], fixed=entry[SENT_FIXED])
        for places, entry in _places(values, position, np.flatnonzero(~near), amounts)
        if len(places) > 1
    ]
    sets += [
        TouchingSet(places, load=entry[TIE_LOAD], always_live=entry[TIE_LIVE], always_fixed=entry[TIE_FIXED])
        for places, entry in _places(ties, position, np.arange(len(ties)), ties.amounts)
    ]
    return OrderCosts(
        order=order,
        starts=starts,
        load=_prefix(instance.load[nodes])[starts],
        static=_prefix(instance.static[nodes])[starts],
        activation=_prefix(instance.activation[nodes])[starts],
        anchors=_prefix(instance.anchors[nodes])[starts],
        crossing=_crossing(first[near], last[near], amounts[near], count),
        sets=tuple(sets),
    )


def _prefix(amounts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(amounts)])


def _span(members: Members, position: Ints) -> tuple[Ints, Ints]:
    if not len(members):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    places = position[members.nodes]
    return np.minimum.reduceat(places, members.start[:-1]), np.maximum.reduceat(places, members.start[:-1])


def _crossing(first: Ints, last: Ints, amounts: Ints, count: int) -> Ints:
    steps = np.zeros((amounts.shape[1], count + 2), dtype=np.int64)
    for row, column in zip(steps, amounts.T, strict=True):
        if column.any():
            np.add.at(row, first + 1, column)
            np.subtract.at(row, last + 1, column)
    crossing: Ints = np.cumsum(steps, axis=1)[:, : count + 1]
    return crossing


def _places(
    members: Members, position: Ints, chosen: Ints, amounts: Ints
) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Give the positions of each chosen set, ascending and once, and its amounts."""
    if not len(chosen):
        return
    size = int(position.max()) + 1
    owner = np.repeat(np.arange(len(members)), np.diff(members.start))
    keys = np.sort(owner * size + position[members.nodes])
    keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])]
    bounds = np.searchsorted(keys, np.arange(len(members) + 1) * size).tolist()
    flat = (keys % size).tolist()
    for index, entry in zip(chosen.tolist(), amounts[chosen].tolist(), strict=True):
        yield tuple(flat[bounds[index] : bounds[index + 1]]), entry


def fast_cuts(
    costs: OrderCosts, stages: int, kind: int = NEAR, lower: int = 0, upper: int | None = None
) -> tuple[int, list[int]] | None:
    """Cut an order into at most ``stages`` stages with the smallest bottleneck, memory aside. Exact.

    For a bottleneck ``T`` the furthest way is greedy: with ``f = P + x`` and ``g = P - x`` a stage ``i → j`` fits when
    ``f[j] <= T + g[i]``, so of all cuts within reach the one with the largest ``g`` leaves most room; a cut further
    back with a larger ``g`` would have been within reach before it. Cuts sorted by ``f`` with a running maximum of
    ``g`` make one step a binary search: ``O(n log n + S log n · log(range))``.

    Args:
        costs: Costs without ``sets``.
        stages: Most stages.
        kind: Kind of all boundaries.
        lower: A bottleneck that is good enough, or known not to be beaten.
        upper: Only a bottleneck below this is of interest; None means any.

    Returns:
        The bottleneck and the cuts, both ends included; None if it is not below ``upper``.
    """
    crossing = costs.cross_load(kind)
    far, near = costs.load + crossing, costs.load - crossing
    total = int(costs.load[-1])
    inner = np.argsort(far[1:-1], kind="stable") + 1
    reach = far[inner].tolist()
    room = near[inner]
    running = np.maximum.accumulate(room)
    best_room = running.tolist()
    newest = np.where(room == running, np.arange(len(room)), 0)
    best_cut = inner[np.maximum.accumulate(newest)].tolist() if len(room) else []

    def cuts_within(limit: int) -> tuple[list[int] | None, int]:
        """Give the cuts; or None, and a limit below which it stays so, since no other cut comes within reach."""
        cuts, left, change = [0], 0, total
        for remaining in range(stages, 0, -1):
            rest = total - left
            if rest <= limit:
                return [*cuts, costs.size], limit
            if rest > limit * remaining:  # what crosses only adds to it
                return None, min(change, -(-rest // remaining))
            index = bisect_right(reach, limit + left)
            change = min(change, rest, reach[index] - left if index < len(reach) else rest)
            if index == 0 or best_room[index - 1] <= left:
                return None, change
            left = best_room[index - 1]
            cuts.append(best_cut[index - 1])
        return None, change

    def bottleneck(cuts: list[int]) -> int:
        return int((far[cuts[1:]] - near[cuts[:-1]]).max())

    high = total + 1 if upper is None else min(upper, total + 1)
    return _smallest(cuts_within, bottleneck, min(lower, high - 1), high, max(1, total >> 12))


def _smallest(
    cuts_within: Callable[[int], tuple[list[int] | None, int]],
    bottleneck: Callable[[list[int]], int],
    lower: int,
    high: int,
    step: int,
) -> tuple[int, list[int]] | None:
    """Look for the smallest limit from ``lower`` on and below ``high`` that cuts keep, in ever larger steps first."""
    best: list[int] | None = None
    low = lower - 1  # what fits within low is of no interest
    while low + 1 < high:
        middle = min(low + step, (low + high) // 2)
        found, change = cuts_within(middle)
        if found is None:
            low = max(middle, change - 1)
            step *= 2
        else:
            best, high = found, bottleneck(found)
    return None if best is None else (high, best)


def general_cuts(
    costs: OrderCosts, request: Request, upper: int, *, objective: str = "load"
) -> tuple[int, list[int]] | None:
    """Cut an order as ``fast_cuts`` does, with memory limits, ties, direct routing, stage-dependent costs too. Exact.

    ``best[s, i]`` is the smallest bottleneck of ``order[i:]`` in the stages ``s, s+1, …``. The sweep goes from the last
    position to the first and keeps, for the current left cut, what every right cut adds by the sets it touches. Windows
    keep it short: a stage is at most ``upper``, so ``s`` stages before ``i`` and the rest after it must have room.
    To even out, ``best`` is a sum over stages, that of the squares of ``load / upper``.

    Args:
        costs: Costs of the order.
        request: Stages, limits and live microbatches; one stage per rank.
        upper: Only a bottleneck below this is of interest.
        objective: ``"load"``, within the memory limit; ``"memory"``, whatever the load; or ``"even"``: the most even
            loads, within the memory limit and all below ``upper``.

    Returns:
        The bottleneck (0 for ``"even"``) and the cuts, both ends included; None if none is below ``upper``.
    """
    # Long: one sweep of a dynamic programme over arrays that belong together.
    even = objective == "even"
    size, stages = costs.size, request.stages
    live = np.asarray(request.live, dtype=np.int64)[:, None]
    kinds = np.asarray(request.kinds)
    paid = (kinds != FREE).astype(np.int64)
    cross_loads = np.stack([costs.cross_load(kind) for kind in kinds])
    memory_base = costs.static + int(live.min()) * costs.activation
    base = memory_base if objective == "memory" else costs.load
    limit = None if objective == "memory" else request.memory_limit
    needs_memory = objective == "memory" or limit is not None
    unreachable = math.inf if even else UNREACHABLE
    best = np.full((stages + 1, size + 1), unreachable, dtype=np.float64 if even else np.int64)
    best[stages if request.exactly else slice(None), size] = 0
    choice = np.zeros((stages, size + 1), dtype=np.int32)
    bounds = [(base, upper - 1)] + ([] if limit is None else [(memory_base, limit)])
    windows = _all_windows(costs, request, bounds)
    touch = _Touches(costs, 3 if needs_memory else 1)
    for left in range(size - 1, -1, -1):
        touch.extend_to(left)
        low, high, start, end = windows[left]
        if low > high or end < start:
            continue
        right = slice(start, end + 1)
        touched = touch.from_to(left, right)
        if needs_memory:
            memory = _memory(costs, paid[low : high + 2, None], live[low : high + 1], touched, left, right)
        if objective == "memory":
            cost = memory
        else:
            cost = costs.load[right] - costs.load[left] + touched[0]
            cost = cost + cross_loads[low : high + 1, left, None] + cross_loads[low + 1 : high + 2, right]
        onward = best[low + 1 : high + 2, right]
        candidate = onward + (cost / upper) ** 2 if even else np.maximum(cost, onward)
        candidate[cost >= upper] = unreachable
        if limit is not None:
            candidate[memory > limit] = unreachable
        chosen = candidate.argmin(axis=1)
        best[low : high + 1, left] = candidate[np.arange(len(chosen)), chosen]
        choice[low : high + 1, left] = chosen + start
    if best[0, 0] == unreachable:
        return None
    return 0 if even else int(best[0, 0]), _trace(choice, size)


def _memory(costs: OrderCosts, paid: Ints, live: Ints, touched: Sequence[Ints | int], left: int, right: slice) -> Ints:
    """Give the memory of some stages in a row from one left cut to many right ones.

    Args:
        costs: Costs of the order.
        paid: For the boundary before each of the stages and the one after the last, whether anything is kept there.
        live: Live microbatches of each of the stages.
        touched: What touching sets add.
        left: The left cut.
        right: The right cuts.
    """
    before, after = paid[:-1], paid[1:]
    alive = costs.activation[right] - costs.activation[left] + touched[1]
    alive = alive + before * costs.crossing[RECEIVED, left] + after * costs.crossing[SENT, right]
    memory = costs.static[right] - costs.static[left] + touched[2] + live * alive
    found: Ints = memory + before * costs.crossing[RECEIVED_FIXED, left] + after * costs.crossing[SENT_FIXED, right]
    return found


def _trace(choice: np.ndarray[tuple[int, int], np.dtype[np.int32]], size: int) -> list[int]:
    cuts = [0]
    while cuts[-1] < size:
        cuts.append(int(choice[len(cuts) - 1, cuts[-1]]))
    return cuts


def _all_windows(
    costs: OrderCosts, request: Request, bounds: Sequence[tuple[Ints, int]]
) -> list[tuple[int, int, int, int]]:
    """Give for each left cut the first and last stage that may start there, and the first and last cut it may end at.

    Args:
        costs: Costs of the order.
        request: Stages.
        bounds: Numbers per cut whose difference a stage has at least, and the most of them it may have.
    """
    size, count = costs.size, request.stages
    first, last = np.zeros(size + 1, dtype=np.int64), np.full(size + 1, count)
    starts, ends = np.arange(size + 1) + 1, np.full(size + 1, size)
    for base, most in bounds:
        first_fitting, last_fitting = _windows(base, costs.anchors, request, most)
        first, last = np.maximum(first, first_fitting), np.minimum(last, last_fitting)
        ends = np.minimum(ends, np.searchsorted(base, base + most, side="right") - 1)
    if request.exactly:
        starts = np.maximum(starts, np.searchsorted(costs.anchors, costs.anchors, side="right"))
    return list(zip(first.tolist(), last.tolist(), starts.tolist(), ends.tolist(), strict=True))


def _windows(base: Ints, anchors: Ints, request: Request, most: int) -> tuple[Ints, Ints]:
    """For each left cut, the first and the last stage index that can start there if no stage has more than ``most``."""
    most = max(most, 1)
    left = np.arange(len(base))
    first = np.where(left > 0, np.maximum(-(-base // most), 1), 0)
    last = request.stages - np.maximum(-(-(base[-1] - base) // most), 1)
    if request.exactly:
        first = np.maximum(first, request.stages - (anchors[-1] - anchors))
        last = np.minimum(last, anchors)
    return first, np.minimum(last, left)


class _Touches:
    """What the stages that start at the current left cut pay for touching sets, as steps over the right cut.

    Rows are load, memory per live microbatch and static memory; the first alone where memory does not matter.
    """

    def __init__(self, costs: OrderCosts, rows: int) -> None:
        self._at: dict[int, list[int]] = {}
        self._sets: list[tuple[int, int, Ints, Ints]] = []
        for entry in costs.sets:
            partly = np.asarray((entry.load, entry.live, entry.fixed)[:rows], dtype=np.int64)
            always = np.asarray((0, entry.always_live, entry.always_fixed)[:rows], dtype=np.int64)
            if not partly.any() and not always.any():
                continue
            for place in entry.places:
                self._at.setdefault(place, []).append(len(self._sets))
            self._sets.append((entry.places[0], entry.places[-1], partly, partly + always))
        self._next: list[int | None] = [None] * len(self._sets)
        self._rows = rows
        self._steps = np.zeros((rows, costs.size + 2), dtype=np.int64) if self._sets else None

    def extend_to(self, left: int) -> None:
        """Move the left cut one position to the left."""
        if self._steps is None:
            return
        for index in self._at.get(left, ()):
            first, last, partly, amounts = self._sets[index]
            following = self._next[index]
            if following is not None:
                self._steps[:, following + 1] -= amounts
            self._steps[:, left + 1] += amounts
            if left == first:  # all of it inside: nothing for a part of it
                self._steps[:, last + 1] -= partly
            self._next[index] = left

    def from_to(self, left: int, right: slice) -> Sequence[Ints | int]:
        """Give every row's sum for every right cut of a slice."""
        if self._steps is None:
            return (0,) * self._rows
        sums = np.add.accumulate(self._steps[:, left + 1 : right.stop], axis=1)
        return list(sums[:, right.start - left - 1 :])
