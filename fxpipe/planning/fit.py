"""Recomputation that makes a partition fit: the least time for the bytes that each rank must save.

For every block there are up to three ways: keep all, recompute its attention, recompute all of it. Which blocks of a
rank do what is a knapsack, solved over the Pareto front of time and bytes (after AdaPipe, ASPLOS 2024,
doi 10.1145/3620666.3651359, where it is a dynamic programme per stage).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.schedule import schedule_named
from fxpipe.planning.costs.estimate import Estimate
from fxpipe.planning.costs.recompute import checkpoints, recomputed_modules, with_recompute
from fxpipe.planning.layout import Layout, make_layout
from fxpipe.planning.search.problem import Measured, measure
from fxpipe.planning.settings import Settings

Floats = NDArray[np.float64]
MOST_POINTS = 400  # of a Pareto front; beyond, the nearest neighbours are left out
MOST_ROUNDS = 8  # of measuring what was chosen, and asking for what is missing


@dataclass(frozen=True, slots=True)
class Way:
    """One way of running a block.

    Attributes:
        modules: What is recomputed.
        seconds: What that adds to the backward of one microbatch.
        kept: Bytes per live microbatch.
        working: Bytes of what is computed anew, of one microbatch at a time.
    """

    modules: tuple[str, ...] = ()
    seconds: float = 0.0
    kept: float = 0.0
    working: float = 0.0


@dataclass(frozen=True, slots=True)
class Choices:
    """What there is to choose.

    Attributes:
        layout: Laid out with nothing recomputed.
        estimate: Seconds without recomputation.
        ways: For each of the layout's blocks its ways; the first keeps all.
    """

    layout: Layout
    estimate: Estimate
    ways: tuple[tuple[Way, ...], ...]


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What one rank recomputes.

    Attributes:
        modules: FQNs.
        seconds: For each stage of the rank what that adds to the backward of one microbatch.
    """

    modules: tuple[str, ...]
    seconds: dict[int, float]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A partition that keeps the limit.

    Attributes:
        layout: Laid out with what is recomputed.
        modules: What is.
    """

    layout: Layout
    modules: tuple[str, ...]


def base_settings(settings: Settings, modules: Sequence[str] = ()) -> Settings:
    """Give the settings with exactly these modules recomputed."""
    return replace(settings, training=replace(settings.training, recompute=tuple(modules) or None))


def lay_out(graph: LayerGraph, estimate: Estimate, settings: Settings, modules: Sequence[str] = ()) -> Layout:
    """Lay a graph out with these modules recomputed.

    Args:
        graph: The layers.
        estimate: Seconds without recomputation.
        settings: What was asked for.
        modules: FQNs.
    """
    costs = with_recompute(graph, estimate.costs, modules)
    return make_layout(graph, replace(estimate, costs=costs), base_settings(settings, modules))


def choices_of(graph: LayerGraph, estimate: Estimate, settings: Settings) -> Choices:
    """Find what every block could recompute, what it costs and what it saves.

    Nothing where the schedule splits the backward. A block that is called several times, or lies in a module that
    another block names too, recomputes in all its calls or in none: those are left alone.
    """
    layout = lay_out(graph, estimate, settings)
    none = tuple((Way(kept=_kept(layout, block.layers)),) for block in layout.blocks)
    if schedule_named(settings.schedule).splits_backward:
        return Choices(layout, estimate, none)
    ways = [list(entry) for entry in none]
    calls: dict[str, int] = {}
    for block in layout.blocks:
        calls[block.fqn] = calls.get(block.fqn, 0) + 1
    for choice in ("attention", "block"):
        modules = recomputed_modules(graph, choice)
        if not modules or (choice == "attention" and modules == recomputed_modules(graph, "block")):
            continue
        other = lay_out(graph, estimate, settings, modules)
        inside = checkpoints(graph, modules)
        working = _working(other)
        for block, entry in zip(layout.blocks, ways, strict=True):
            own = [layer for layer in map(layout.layers.__getitem__, block.layers) if layer in inside]
            if not own or calls[block.fqn] > 1:
                continue
            names = tuple(dict.fromkeys(inside[layer].partition("@")[0] for layer in own))
            seconds = float(np.sum([estimate.costs[layer].forward_s for layer in own]))
            kept = _kept(other, block.layers)
            if kept < entry[0].kept:
                entry.append(Way(names, seconds, kept, max(working.get(layer, 0) for layer in own)))
    return Choices(layout, estimate, tuple(map(tuple, ways)))


def _kept(layout: Layout, nodes: Sequence[int]) -> float:
    return float(sum(layout.problem.activation[node] for node in nodes))


def _working(layout: Layout) -> dict[int, int]:
    """Give for each layer the bytes of the recomputed module around it, from the steps that ranks hold of them."""
    found: dict[int, int] = {}
    for shared in layout.memory.shared:
        if shared.is_working:
            for layer in shared.layers:
                found[layer] = found.get(layer, 0) + shared.bytes
    return found


@dataclass(slots=True)
class Front:
    """Pareto-best ways of some blocks: seconds ascending, bytes descending; each knows how it came about."""

    seconds: Floats
    kept: Floats
    before: NDArray[np.int64]
    way: NDArray[np.int64]
    parent: Front | None = None
    children: dict[tuple[tuple[float, float], ...], Front] = field(default_factory=dict)

    @classmethod
    def empty(cls) -> Front:
        """Give the front of no blocks."""
        zero = np.zeros(1)
        return cls(zero, zero, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))

    def extended(self, ways: tuple[tuple[float, float], ...]) -> Front:
        """Add a block that can be run in these ways, each ``(seconds, bytes)``; equal blocks are added once."""
        if ways not in self.children:
            seconds = np.concatenate([self.seconds + more for more, _ in ways])
            kept = np.concatenate([self.kept + more for _, more in ways])
            before = np.tile(np.arange(len(self.seconds)), len(ways))
            way = np.repeat(np.arange(len(ways)), len(self.seconds))
            order = np.lexsort((kept, seconds))
            best = np.minimum.accumulate(kept[order])
            order = order[np.concatenate([[True], best[1:] < best[:-1]])]
            if len(order) > MOST_POINTS:
                order = order[np.unique(np.linspace(0, len(order) - 1, MOST_POINTS).astype(np.int64))]
            self.children[ways] = Front(seconds[order], kept[order], before[order], way[order], self)
        return self.children[ways]

    def first_within(self, room: float) -> int:
        """Give the fastest point that keeps no more than ``room``; -1 where there is none."""
        place = int(np.searchsorted(-self.kept, -room, side="left"))
        return place if place < len(self.kept) else -1

    def ways_of(self, place: int) -> list[int]:
        """Give the way of each block, in the order in which they were added."""
        found: list[int] = []
        front: Front | None = self
        while front is not None and front.parent is not None:
            found.append(int(front.way[place]))
            place = int(front.before[place])
            front = front.parent
        return found[::-1]


def fit(
    choices: Choices, stage_of: Sequence[int], limit: float, root: Front | None = None, always: tuple[str, ...] = ()
) -> Fitted | None:
    """Make a partition keep a memory limit by recomputing as little time as possible on each rank.

    What is chosen is laid out and measured; where it is still too much, which happens as blocks share what they keep,
    the rank is asked for what is missing.

    Args:
        choices: What there is to choose.
        stage_of: Stage of each node.
        limit: Bytes of each rank.
        root: Front to start from, kept between calls.
        always: Modules that are recomputed in any case, such as blocks that a cut crosses: several ranks share them.

    Returns:
        What is recomputed; None where nothing makes it fit.
    """
    layout = choices.layout
    settings, placement = layout.settings, layout.placement
    asked = [float(limit)] * settings.ranks
    modules = always
    fitted = lay_out(layout.graph, choices.estimate, settings, modules) if modules else layout
    plain = measure(fitted.problem, stage_of, placement=placement)
    for turn in range(MOST_ROUNDS):
        needs = measure(fitted.problem, stage_of, placement=placement).rank_memory if turn else plain.rank_memory
        over = [rank for rank in range(settings.ranks) if needs[rank] > limit]
        if not over:
            return Fitted(fitted, modules)
        if turn:
            for rank in over:
                asked[rank] -= max(needs[rank] - limit, 1.0)
        found = recomputed(choices, stage_of, asked, root or Front.empty(), plain)
        chosen = (*always, *(name for own in found or () for name in own.modules))
        if found is None or chosen == modules:
            return None
        modules = chosen
        fitted = lay_out(layout.graph, choices.estimate, settings, modules)
    return None


def recomputed(
    choices: Choices,
    stage_of: Sequence[int],
    limits: Sequence[float],
    root: Front,
    plain: Measured | None = None,
) -> list[Recomputed] | None:
    """Choose what each rank recomputes, from what blocks keep each by itself.

    Args:
        choices: What there is to choose.
        stage_of: Stage of each node.
        limits: Bytes of each rank.
        root: Front to start from.
        plain: The partition's bytes without recomputation, where they are known.

    Returns:
        One entry for each rank; None where one cannot save enough.
    """
    plain = plain or measure(choices.layout.problem, stage_of, placement=choices.layout.placement)
    found = []
    for rank, limit in enumerate(limits):
        own = _chosen(choices, stage_of, rank, plain.rank_memory[rank] - limit, root, plain)
        if own is None:
            return None
        found.append(own)
    return found


def _chosen(
    choices: Choices, stage_of: Sequence[int], rank: int, missing: float, root: Front, plain: Measured
) -> Recomputed | None:
    """Choose what a rank recomputes to save ``missing`` bytes; None where all of it is not enough."""
    if missing <= 0:
        return Recomputed((), {})
    layout = choices.layout
    stages = layout.placement.stages_of_rank[rank]
    live = dict(zip(stages, _weights(layout, rank, plain), strict=True))
    blocks = [
        (place, live[stage_of[block.layers[0]]])
        for place, block in enumerate(layout.blocks)
        if len(choices.ways[place]) > 1
        and stage_of[block.layers[0]] in live
        and len({stage_of[node] for node in block.layers}) == 1
    ]
    best: tuple[float, Recomputed] | None = None
    for working in sorted({way.working for place, _ in blocks for way in choices.ways[place]}):
        front = root
        usable = [[way for way in choices.ways[place] if way.working <= working] for place, _ in blocks]
        for (_, count), ways in zip(blocks, usable, strict=True):
            keep = ways[0].kept
            front = front.extended(tuple((way.seconds, count * (way.kept - keep)) for way in ways))
        point = front.first_within(-missing - working)
        if point >= 0 and (best is None or front.seconds[point] < best[0]):
            taken = [ways[way] for ways, way in zip(usable, front.ways_of(point), strict=True)]
            seconds = dict.fromkeys(stages, 0.0)
            for (place, _), way in zip(blocks, taken, strict=True):
                seconds[stage_of[layout.blocks[place].layers[0]]] += way.seconds
            best = float(front.seconds[point]), Recomputed(tuple(n for way in taken for n in way.modules), seconds)
    return None if best is None else best[1]


def _weights(layout: Layout, rank: int, plain: Measured) -> tuple[int, ...]:
    """Give how many microbatches each stage of a rank keeps when the rank needs most."""
    stages = layout.placement.stages_of_rank[rank]
    return max(
        layout.placement.live[rank],
        key=lambda entry: sum(count * plain.per_live[stage] for count, stage in zip(entry, stages, strict=True)),
    )
