"""Lower bounds: what no partition can beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxpipe.planning.search.instance import (
    FAR_LOAD,
    NEAR_LOAD,
    Instance,
    Ints,
)
from fxpipe.planning.search.orders import given_order
from fxpipe.planning.search.request import FAR, FREE, NEAR, Request
from fxpipe.planning.search.spine.cuts import spine_marks
from fxpipe.planning.search.spine.line import Line

MOST_NODES = 12_000  # larger graphs get the simple bound alone
ROWS = 512  # nodes whose predecessors are added up together
PATHS = 6  # paths of a flow
MOST_PAIRS = 12  # pairs of a first and a last node of which all are tried
WINDOWS = 512  # loads in a row of which each has its own least crossing
MOST_ENTRIES = 600_000  # nodes times windows; of larger graphs fewer windows are looked at
FINE = 4096  # a bound is looked for to so small a part of it
MOST_MARKS = 448  # along the heaviest path; more say too little
NEARLY = 4  # such parts below a known partition a bound is good enough
PARTS = 8  # cuts that stand for all of one window
INFINITE = int(np.iinfo(np.int64).max // 4)


def load_bound(instance: Instance, request: Request) -> int:
    """Give a load that the largest rank load of no partition is below: the largest node, and the mean of all ranks."""
    total = int(instance.load.sum())
    num_ranks = len(set(request.ranks))
    return max(int(instance.load.max()), -(-total // num_ranks))


def crossing_bound(instance: Instance, request: Request, upper: int) -> int:
    """Give a load that no partition is below, what must cross included, if none is to be above ``upper``.

    Where stages have at most ``upper``, the ``k`` stages before a boundary hold at most ``k · upper``, and those behind
    it at most so many times ``upper``. So a node with more than that among its predecessors lies behind the boundary,
    one with more than the stages behind can hold among its successors lies before, and what crosses costs at least what
    can flow from these to those, where every value lets its cost through. A few paths, the widest first, give such a
    flow.
    The mean of what the stages then have, transfers included, is the bound.

    Args:
        instance: The merged graph.
        request: Stages and links.
        upper: A load that some partition keeps.

    Returns:
        The bound; at least that of the loads alone.
    """
    simple = load_bound(instance, request)
    several = len(set(request.ranks)) < request.stages
    if request.routing == "direct" or not len(instance.values) or instance.size > MOST_NODES or request.stages < 2:
        return simple
    if several and not request.exactly:
        return simple  # fewer stages may still use every rank
    order = given_order(instance)
    before = _closed_loads(instance, order, instance.predecessors)
    after = _closed_loads(instance, order[::-1], instance.successors)
    boundaries = np.arange(1, request.stages)
    inside = after[:, None] > (request.stages - boundaries) * upper
    outside = before[:, None] > boundaries * upper
    kinds = np.asarray(request.kinds[1:-1])
    near, far = instance.values.column(NEAR_LOAD)[:, None], instance.values.column(FAR_LOAD)[:, None]
    room = np.where(kinds == FAR, far, np.where(kinds == FREE, 0, near))
    crossed = _least_flow(instance, request, room, inside, outside)
    total = int(instance.load.sum()) + 2 * sum(crossed)
    bound = -(-total // len(set(request.ranks)))
    if not request.exactly:  # with fewer stages less has to cross, but each stage has more
        bound = min(bound, -(-int(instance.load.sum()) // (request.stages - 1)))
    bound = max(simple, bound)
    return bound if several else _spaced_bound(instance, request, bound, upper)


def _spaced_bound(instance: Instance, request: Request, lower: int, upper: int) -> int:
    """Give a bound for one stage on each rank: where stages can end, and what crosses there at least.

    By cuts that stand for all cuts the furthest way is greedy, as in ``chains.fast_cuts``.
    """
    crossing = least_crossing(instance, sorted(set(request.kinds[1:-1])))
    step = max(1, upper // FINE)
    marks = spine_marks(instance, crossing, exactly=request.exactly)
    if 0 < len(marks) <= MOST_MARKS:
        line, high = Line.of(marks), upper
        while high - lower > step:
            middle = (lower + high) // 2
            kept = line.may_keep(middle, request.stages, int(instance.load.sum()))
            lower, high = (lower, middle) if kept else (middle + 1, high)
        if upper - lower <= NEARLY * step:
            return lower
    frontier = window_frontier(instance, request, crossing)
    while frontier is not None and upper - lower > step:
        middle = (lower + upper) // 2
        begin, total = 0, int(instance.load.sum())
        for _ in range(request.stages - 1):
            place = int(np.searchsorted(frontier.ends, middle + begin, side="right")) - 1
            begin = int(frontier.begins[place]) if place >= 0 else -upper
        lower, upper = (lower, middle) if middle + begin >= total else (middle + 1, upper)
    return lower


@dataclass(frozen=True, slots=True)
class Frontier:
    """Cuts of which, for every cut of the graph, one costs no more on either side; memory and ties aside.

    With ``P`` the load before a cut and ``x`` what crosses it, a stage costs ``P + x`` of the cut behind it less
    ``P - x`` of the cut before. So a cut may stand for another where its first number is no more, and its second no
    less. Those that no other one can stand for have both numbers ascending. All cuts of a partition, one within the
    next, can be replaced so that they still follow each other: where the first number of a later one is below that of
    an earlier one, the later one can stand for both.

    Attributes:
        ends: ``P + x`` of each cut, ascending.
        begins: ``P - x`` of each cut, ascending.
    """

    ends: Ints
    begins: Ints

    @classmethod
    def of(cls, ends: Ints, begins: Ints) -> Frontier:
        """Keep of some cuts those that no other one can stand for."""
        order = np.lexsort((-begins, ends))
        ends, begins = ends[order], begins[order]
        most = np.maximum.accumulate(begins)
        kept = np.concatenate([np.ones(min(len(ends), 1), dtype=bool), begins[1:] > most[:-1]])
        return cls(ends[kept], begins[kept])

    def thinned(self, count: int) -> Frontier:
        """Let one cut, that need not exist, stand for several neighbours, so that about ``count`` are left."""
        if len(self.ends) <= count:
            return self
        bounds = np.linspace(0, len(self.ends), count + 1).astype(np.int64)
        return Frontier(self.ends[bounds[:-1]], self.begins[bounds[1:] - 1])


def least_crossing(instance: Instance, kinds: Sequence[int]) -> Ints:
    """Give what each value costs a boundary of any of these kinds at least."""
    columns = [instance.values.column(NEAR_LOAD if kind == NEAR else FAR_LOAD) for kind in kinds if kind != FREE]
    nothing = np.zeros(len(instance.values), dtype=np.int64)
    return nothing if FREE in kinds or not columns else np.minimum.reduce(columns)


def window_frontier(instance: Instance, request: Request, crossing: Ints) -> Frontier | None:
    """Give cuts that stand for all cuts of a graph, from what must cross where so much load lies before the cut.

    Where at least ``a`` of the load lies before a cut, a node that more than the rest comes after lies before it too;
    where at most ``b`` does, a node that more than that comes before lies behind. What flows from the ones to the
    others crosses every cut with a load between ``a`` and ``b`` before it.

    Args:
        instance: The merged graph. Where every stage has an anchor, no free nodes with anchors may have been merged.
        request: Whether every stage has an anchor.
        crossing: What each value costs a boundary at least.

    Returns:
        The cuts; None where they say nothing: links or nodes cost nothing, or the graph is too large.
    """
    total = int(instance.load.sum())
    count = min(WINDOWS, MOST_ENTRIES // instance.size)
    if not crossing.any() or not count or not total:
        return None
    order = given_order(instance)
    before = _closed_loads(instance, order, instance.predecessors)[:, None]
    after = _closed_loads(instance, order[::-1], instance.successors)[:, None]
    loads = np.linspace(0, total, count + 1).astype(np.int64)
    room = np.repeat(crossing[:, None], count, axis=1)
    crossed = _least_flow(instance, request, room, after > total - loads[:-1], before > loads[1:])
    least = np.repeat(np.asarray(crossed, dtype=np.int64), PARTS)
    loads = np.linspace(0, total, count * PARTS + 1).astype(np.int64)
    ends, begins = loads[:-1] + least, loads[1:] - least
    if not request.exactly:  # stages may be left out
        ends, begins = np.concatenate([[0], ends, [total]]), np.concatenate([[0], begins, [total]])
    return Frontier.of(ends, begins)


def _least_flow(
    instance: Instance, request: Request, room: Ints, inside: NDArray[np.bool_], outside: NDArray[np.bool_]
) -> list[int]:
    """Give for each boundary what flows at least: some first anchor lies before it, and some last one behind.

    Which ones is not known: the least over all pairs holds. Where there are many pairs, only what is known for every
    boundary counts.

    Args:
        instance: The merged graph.
        request: Whether every stage has an anchor.
        room: For each value and boundary, what the value costs there.
        inside: For each node and boundary, whether the node is known to lie before it.
        outside: The same for behind.
    """
    order = given_order(instance)
    anchored = instance.anchors > 0 if request.exactly else np.ones(instance.size, dtype=bool)
    firsts = _foremost(anchored, order, instance.predecessors)
    lasts = _foremost(anchored, order[::-1], instance.successors)
    if len(firsts) * len(lasts) > MOST_PAIRS:
        return _flow(instance, room, order, inside, outside)
    least: list[int] | None = None
    for first in firsts:
        for last in lasts:
            before, behind = inside.copy(), outside.copy()
            before[first] = behind[last] = True
            crossed = _flow(instance, room, order, before, behind)
            least = crossed if least is None else list(map(min, least, crossed))
    assert least is not None
    return least


def _foremost(anchored: NDArray[np.bool_], order: list[int], before: tuple[tuple[int, ...], ...]) -> list[int]:
    """Give the anchored nodes that no other one comes before."""
    behind = [False] * len(order)
    found = []
    for node in order:
        behind[node] = any(behind[other] or anchored[other] for other in before[node])
        if anchored[node] and not behind[node]:
            found.append(node)
    return found


def _closed_loads(instance: Instance, order: list[int], neighbours: tuple[tuple[int, ...], ...]) -> Ints:
    """Give for each node the load of all nodes that a path leads from to it, and its own."""
    words = -(-instance.size // 8)
    reached = [0] * instance.size
    found = np.zeros(instance.size, dtype=np.int64)
    low = (instance.load & (2**26 - 1)).astype(np.float64)
    high = (instance.load >> 26).astype(np.float64)  # in two parts, so that float64 adds them exactly
    for first in range(0, len(order), ROWS):
        block = order[first : first + ROWS]
        for node in block:
            mask = 1 << node
            for other in neighbours[node]:
                mask |= reached[other]
            reached[node] = mask
        raw = b"".join(reached[node].to_bytes(words, "little") for node in block)
        inside = np.unpackbits(np.frombuffer(raw, dtype=np.uint8).reshape(len(block), words), axis=1, bitorder="little")
        rows = inside[:, : instance.size].astype(np.float64)
        found[block] = (rows @ low).astype(np.int64) + ((rows @ high).astype(np.int64) << 26)
    return found


def _flow(
    instance: Instance, room: Ints, order: list[int], inside: NDArray[np.bool_], outside: NDArray[np.bool_]
) -> list[int]:
    """Give for each boundary what flows from inside to outside along a few paths; values are the pipes.

    Of paths as wide as each other the shortest is taken: it leaves most values to those behind it.
    """
    room = np.array(room)
    steps = _steps(instance, order)
    total = np.zeros(room.shape[1], dtype=np.int64)
    outside = outside & ~inside
    for _ in range(PATHS):
        width = np.where(inside, INFINITE, 0)
        length = np.zeros(width.shape, dtype=np.int32)
        source = np.full(width.shape, -1, dtype=np.int64)
        for index, (before, node, values) in enumerate(steps):
            through = np.minimum(width[before], room[values].sum(axis=0) if len(values) > 1 else room[values[0]])
            longer = length[before] + 1
            better = (through > width[node]) | ((through == width[node]) & (longer < length[node]))
            np.copyto(width[node], through, where=better)
            np.copyto(length[node], longer, where=better)
            np.copyto(source[node], index, where=better)
        widths = np.where(outside, width, 0).max(axis=0)
        if not widths.any():
            break
        ends = np.where(outside & (width == widths), length, len(order)).argmin(axis=0)
        total += widths
        for boundary in np.flatnonzero(widths).tolist():
            _fill(room[:, boundary], steps, source[:, boundary], int(ends[boundary]), int(widths[boundary]))
    return total.tolist()


def _steps(instance: Instance, order: list[int]) -> list[tuple[int, int, list[int]]]:
    """List the edges along which a value goes, by their later node, with their values."""
    values_of: list[set[int]] = [set() for _ in range(instance.size)]
    for index, nodes in enumerate(instance.values.sets()):
        for node in nodes:
            values_of[node].add(index)
    found = ((before, node) for node in order for before in instance.predecessors[node])
    return [
        (before, node, sorted(values_of[before] & values_of[node]))
        for before, node in found
        if not values_of[before].isdisjoint(values_of[node])
    ]


def _fill(room: Ints, steps: list[tuple[int, int, list[int]]], source: Ints, node: int, width: int) -> None:
    """Take a path's width out of the values it goes through, each once."""
    taken: dict[int, int] = {}
    while source[node] >= 0:
        before, _, values = steps[int(source[node])]
        rest = width - sum(taken.get(value, 0) for value in values)
        for value in values:
            part = min(rest, int(room[value]) - taken.get(value, 0))
            if part > 0:
                taken[value] = taken.get(value, 0) + part
                rest -= part
        node = before
    for value, part in taken.items():
        room[value] -= part
