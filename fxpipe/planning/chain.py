"""The best cut of a graph in one order: exact dynamic programming over where the order is cut.

An order puts the nodes at positions ``0 … n-1``; cut ``c`` lies before position ``c``, so a stage is ``order[i:j]``.
With ``P`` the prefix sums of the loads and ``x[c]`` what crosses cut ``c``, a stage costs
``P[j] - P[i] + x[i] + x[j]``: a number of its right cut minus a number of its left one. That is what makes the fast
programme fast; what does not have this form (memory, ties, direct routing) takes the general one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxpipe.planning.instance import UNREACHABLE, Instance, Ints, Members
from fxpipe.planning.request import Request

TABLE_ENTRIES = 40_000_000  # entries of the general programme's table; a longer order is coarsened first


@dataclass(frozen=True, slots=True)
class OrderCosts:
    """What cutting one order costs, in the instance's units; arrays over the ``n + 1`` cuts.

    Attributes:
        order: Merged nodes by position, as (possibly longer) runs: unit ``p`` is ``order[starts[p]:starts[p + 1]]``.
        starts: First position of each unit, and the end.
        load: Prefix sums of load.
        static: Prefix sums of static memory.
        activation: Prefix sums of memory per live microbatch.
        cross_load: Load of the values that cross each cut, paid on both of its sides.
        cross_bytes: Their bytes.
        sets: Position sets paid by touching: ``(load, bytes per live microbatch, static bytes, positions)``.
    """

    order: tuple[int, ...]
    starts: Ints
    load: Ints
    static: Ints
    activation: Ints
    cross_load: Ints
    cross_bytes: Ints
    sets: tuple[tuple[int, int, int, tuple[int, ...]], ...]

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.load) - 1


def order_costs(instance: Instance, order: Sequence[int], routing: str) -> OrderCosts:
    """Compute what cutting ``order`` (a topological order of the merged nodes) costs."""
    nodes = np.asarray(order, dtype=np.int64)
    count = len(nodes)
    position = np.empty(count, dtype=np.int64)
    position[nodes] = np.arange(count)
    return _costs(instance, tuple(nodes.tolist()), np.arange(count + 1), nodes, position, routing)


def coarsened(instance: Instance, costs: OrderCosts, units: int, routing: str) -> OrderCosts:
    """Join neighbours of the order into about ``units`` runs of equal load."""
    goals = np.linspace(0, costs.load[-1], units + 1)
    kept = np.unique(np.concatenate([[0], np.searchsorted(costs.load, goals), [costs.size]]))
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
    sets = [] if bool(near.all()) else _sets(values, position, np.flatnonzero(~near), direct=True)
    sets += _sets(ties, position, np.arange(len(ties)), direct=False)
    return OrderCosts(
        order=order,
        starts=starts,
        load=_prefix(instance.load[nodes])[starts],
        static=_prefix(instance.static[nodes])[starts],
        activation=_prefix(instance.activation[nodes])[starts],
        cross_load=_crossing(first[near], last[near], values.load[near], count),
        cross_bytes=_crossing(first[near], last[near], values.bytes[near], count),
        sets=tuple(sets),
    )


def _prefix(amounts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(amounts)])


def _span(members: Members, position: Ints) -> tuple[Ints, Ints]:
    if not len(members):
        return members.load, members.load
    places = position[members.nodes]
    return np.minimum.reduceat(places, members.start[:-1]), np.maximum.reduceat(places, members.start[:-1])


def _crossing(first: Ints, last: Ints, amounts: Ints, count: int) -> Ints:
    steps = np.zeros(count + 2, dtype=np.int64)
    np.add.at(steps, first + 1, amounts)
    np.subtract.at(steps, last + 1, amounts)
    return np.cumsum(steps)[: count + 1]


def _sets(
    members: Members, position: Ints, chosen: Ints, *, direct: bool
) -> list[tuple[int, int, int, tuple[int, ...]]]:
    sets = []
    for index in chosen.tolist():
        low, high = int(members.start[index]), int(members.start[index + 1])
        places = tuple(np.unique(position[members.nodes[low:high]]).tolist())
        size = int(members.bytes[index])
        if len(places) > 1 or not direct:
            sets.append((int(members.load[index]), size if direct else 0, 0 if direct else size, places))
    return sets


def fast_cuts(costs: OrderCosts, stages: int, lower: int = 0, upper: int | None = None) -> tuple[int, list[int]] | None:
    """Cut an order into at most ``stages`` stages with the smallest bottleneck, memory aside. Exact.

    For a bottleneck ``T`` the furthest way is greedy: with ``f = P + x`` and ``g = P - x`` a stage ``i → j`` fits when
    ``f[j] <= T + g[i]``, so of all cuts within reach the one with the largest ``g`` leaves most room; a cut further
    back with a larger ``g`` would have been within reach before it. Cuts sorted by ``f`` with a running maximum of
    ``g`` make one step a binary search: ``O(n log n + S log n · log(range))``.

    Args:
        costs: Costs without ``sets``.
        stages: Most stages.
        lower: A bottleneck known not to be beaten.
        upper: Only a bottleneck below this is of interest; None means any.

    Returns:
        The bottleneck and the cuts, both ends included; None if it is not below ``upper``.
    """
    far, near = costs.load + costs.cross_load, costs.load - costs.cross_load
    total = int(costs.load[-1])
    inner = np.argsort(far[1:-1], kind="stable") + 1
    reach = far[inner].tolist()
    room = near[inner]
    running = np.maximum.accumulate(room)
    best_room = running.tolist()
    newest = np.where(room == running, np.arange(len(room)), 0)
    best_cut = inner[np.maximum.accumulate(newest)].tolist() if len(room) else []

    def cuts_within(limit: int) -> list[int] | None:
        cuts, left = [0], 0
        for _ in range(stages - 1):
            if total <= limit + left:
                break
            index = bisect_right(reach, limit + left) - 1
            if index < 0 or best_room[index] <= left:
                return None
            left = best_room[index]
            cuts.append(best_cut[index])
        return [*cuts, costs.size] if total <= limit + left else None

    def bottleneck(cuts: list[int]) -> int:
        return int((far[cuts[1:]] - near[cuts[:-1]]).max())

    high = total + 1 if upper is None else min(upper, total + 1)
    best: list[int] | None = None
    low = min(lower, high) - 1  # nothing fits within low
    step = max(1, total >> 12)
    while low + 1 < high:
        middle = min(low + step, (low + high) // 2)
        found = cuts_within(middle)
        if found is None:
            low = middle
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

    Args:
        costs: Costs of the order.
        request: Stages, limits and live microbatches.
        upper: Only a bottleneck below this is of interest.
        objective: ``"load"``, within the memory limit; or ``"memory"``, whatever the load.

    Returns:
        The bottleneck and the cuts, both ends included; None if none is below ``upper``.
    """
    size, stages = costs.size, request.stages
    live = np.asarray(request.live, dtype=np.int64)
    paid = np.asarray(request.paid, dtype=np.int64)
    memory_base = costs.static + int(live.min()) * costs.activation
    base = costs.load if objective == "load" else memory_base
    limit = request.memory_limit if objective == "load" else None
    stage_dependent = objective == "memory" or not bool(paid.all())
    best = np.full((stages + 1, size + 1), UNREACHABLE, dtype=np.int64)
    best[stages if request.exactly else slice(None), size] = 0
    choice = np.zeros((stages, size + 1), dtype=np.int32)
    first_stage, last_stage = _windows(base, request, upper)
    ends = np.searchsorted(base, base + (upper - 1), side="right") - 1
    if limit is not None:
        ends = np.minimum(ends, np.searchsorted(memory_base, memory_base + limit, side="right") - 1)
    first_list, last_list, end_list = first_stage.tolist(), last_stage.tolist(), ends.tolist()
    touch = _Touches(costs)
    for left in range(size - 1, -1, -1):
        touch.extend_to(left)
        low, high, end = first_list[left], last_list[left], end_list[left]
        if low > high or end <= left:
            continue
        right = slice(left + 1, end + 1)
        pays_left, pays_right = paid[low : high + 1, None], paid[low + 1 : high + 2, None]
        lives = live[low : high + 1, None]
        if objective == "memory" or limit is not None:
            crossing = pays_left * costs.cross_bytes[left] + pays_right * costs.cross_bytes[right]
            alive = costs.activation[right] - costs.activation[left] + touch.bytes(right) + crossing
            memory = costs.static[right] - costs.static[left] + touch.static(right) + lives * alive
        if objective == "memory":
            cost = memory
        else:
            cost = costs.load[right] - costs.load[left] + touch.load(right)
            if stage_dependent:
                cost = cost + pays_left * costs.cross_load[left] + pays_right * costs.cross_load[right]
            else:
                cost = cost + costs.cross_load[left] + costs.cross_load[right]
        candidate = np.maximum(cost, best[low + 1 : high + 2, right])
        if limit is not None:
            candidate[memory > limit] = UNREACHABLE
        chosen = candidate.argmin(axis=1)
        value = candidate[np.arange(len(chosen)), chosen]
        value[value >= upper] = UNREACHABLE
        best[low : high + 1, left] = value
        choice[low : high + 1, left] = chosen + left + 1
    if best[0, 0] >= upper:
        return None
    return int(best[0, 0]), _trace(choice, size)


def _trace(choice: np.ndarray[tuple[int, int], np.dtype[np.int32]], size: int) -> list[int]:
    cuts = [0]
    while cuts[-1] < size:
        cuts.append(int(choice[len(cuts) - 1, cuts[-1]]))
    return cuts


def _windows(base: Ints, request: Request, upper: int) -> tuple[Ints, Ints]:
    """For each left cut, the first and the last stage index that can start there."""
    most = max(upper - 1, 1)
    first = -(-base // most)
    last = request.stages - np.maximum(-(-(base[-1] - base) // most), 1)
    if request.exactly:
        left = np.arange(len(base))
        first = np.maximum(first, np.where(left > 0, 1, 0))
        first = np.maximum(first, request.stages - (len(base) - 1 - left))
        last = np.minimum(last, left)
    else:
        last = np.minimum(last, np.arange(len(base)))
    return first, last


class _Touches:
    """What the stages that start at the current left cut pay for touching sets, as steps over the right cut."""

    def __init__(self, costs: OrderCosts) -> None:
        self._at: dict[int, list[int]] = {}
        self._sets = costs.sets
        for index, entry in enumerate(costs.sets):
            for place in entry[3]:
                self._at.setdefault(place, []).append(index)
        self._next: list[int | None] = [None] * len(costs.sets)
        self._steps = np.zeros((3, costs.size + 2), dtype=np.int64) if costs.sets else None

    def extend_to(self, left: int) -> None:
        if self._steps is None:
            return
        for index in self._at.get(left, ()):
            load, size, static, places = self._sets[index]
            amounts = np.asarray((load, size, static), dtype=np.int64)
            following = self._next[index]
            if following is not None:
                self._steps[:, following + 1] -= amounts
            self._steps[:, left + 1] += amounts
            if left == places[0]:  # all of it inside: no time, no buffer, but the copy stays
                self._steps[:2, places[-1] + 1] -= amounts[:2]
            self._next[index] = left

    def load(self, right: slice) -> Ints | int:
        return 0 if self._steps is None else np.cumsum(self._steps[0, right])

    def bytes(self, right: slice) -> Ints | int:
        return 0 if self._steps is None else np.cumsum(self._steps[1, right])

    def static(self, right: slice) -> Ints | int:
        return 0 if self._steps is None else np.cumsum(self._steps[2, right])
