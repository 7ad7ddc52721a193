"""Lower bounds: what no partition can beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fxpipe.planning.search.instance import (
    FAR_LOAD,
    NEAR_LOAD,
    Instance,
    Ints,
)
from fxpipe.planning.search.orders import given_order
from fxpipe.planning.search.request import FAR, FREE, Request

MOST_NODES = 12_000  # larger graphs get the simple bound alone
ROWS = 512  # nodes whose predecessors are added up together
PATHS = 6  # paths of a flow
MOST_PAIRS = 12  # pairs of a first and a last node of which all are tried
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
    crossed = _least_flow(instance, request, order, inside, outside)
    total = int(instance.load.sum()) + 2 * sum(crossed)
    bound = -(-total // len(set(request.ranks)))
    if not request.exactly:  # with fewer stages less has to cross, but each stage has more
        bound = min(bound, -(-int(instance.load.sum()) // (request.stages - 1)))
    return max(simple, bound)


def _least_flow(
    instance: Instance, request: Request, order: list[int], inside: NDArray[np.bool_], outside: NDArray[np.bool_]
) -> list[int]:
    """Give for each boundary what flows at least: some first anchor lies before it, and some last one behind.

    Which ones is not known: the least over all pairs holds. Where there are many pairs, only what is known for every
    boundary counts.
    """
    anchored = instance.anchors > 0 if request.exactly else np.ones(instance.size, dtype=bool)
    firsts = _foremost(anchored, order, instance.predecessors)
    lasts = _foremost(anchored, order[::-1], instance.successors)
    if len(firsts) * len(lasts) > MOST_PAIRS:
        return _flow(instance, request, order, inside, outside)
    least: list[int] | None = None
    for first in firsts:
        for last in lasts:
            before, behind = inside.copy(), outside.copy()
            before[first] = behind[last] = True
            crossed = _flow(instance, request, order, before, behind)
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
    instance: Instance, request: Request, order: list[int], inside: NDArray[np.bool_], outside: NDArray[np.bool_]
) -> list[int]:
    """Give for each boundary what flows from inside to outside along a few paths; values are the pipes."""
    kinds = np.asarray(request.kinds[1:-1])
    near, far = instance.values.column(NEAR_LOAD)[:, None], instance.values.column(FAR_LOAD)[:, None]
    room = np.where(kinds == FAR, far, np.where(kinds == FREE, 0, near))
    steps = _steps(instance, order)
    total = np.zeros(len(kinds), dtype=np.int64)
    outside = outside & ~inside
    for _ in range(PATHS):
        width = np.where(inside, INFINITE, 0)
        source = np.full(width.shape, -1, dtype=np.int64)
        for index, (before, node, values) in enumerate(steps):
            through = np.minimum(width[before], room[values].sum(axis=0) if len(values) > 1 else room[values[0]])
            wider = through > width[node]
            width[node][wider] = through[wider]
            source[node][wider] = index
        ends = np.where(outside, width, 0).argmax(axis=0)
        widths = np.where(outside, width, 0).max(axis=0)
        if not widths.any():
            break
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
