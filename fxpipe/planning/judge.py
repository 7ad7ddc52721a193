"""Seconds of a whole step, for any partition of a layout: what a search's shortlist is judged by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fxpipe.planning.layout import Layout, tie_seconds
from fxpipe.planning.simulation.engine import StageTimes
from fxpipe.planning.simulation.simulate import Reduction, step_seconds

Floats = NDArray[np.float64]


def step_s(layout: Layout, stage_of_node: Sequence[int]) -> float:
    """Simulate one step of a partition.

    The same seconds as ``simulate`` of the plan that ``make_plan`` makes of it, without making the plan.

    Args:
        layout: The layers, laid out.
        stage_of_node: Stage of each node of the layout's problem.

    Returns:
        Seconds; linear in nodes and in stages times microbatches.
    """
    return Judge(layout).step_s(stage_of_node)


def stage_times(layout: Layout, stage_of_node: Sequence[int]) -> list[StageTimes]:
    """Give the times of a partition's stages, and of the messages between them."""
    return Judge(layout).stage_times(stage_of_node)


class Judge:
    """Judges many partitions of one layout: what they share is laid out once."""

    def __init__(self, layout: Layout) -> None:
        """Lay out seconds of nodes, and of what may cross boundaries, as arrays."""
        settings, graph = layout.settings, layout.graph
        self._layout = layout
        costs = [layout.costs[layer] for layer in layout.layers]
        self._seconds = np.asarray(
            [(cost.forward_s, cost.input_grad_s, cost.weight_grad_s) for cost in costs], dtype=np.float64
        ).reshape(len(costs), 3)
        node_of = {layer: node for node, layer in enumerate(layout.layers)}
        moved = []
        if settings.cost != "parameters":
            for value in graph.values:
                readers = [node_of[layer] for layer in value.readers if layer in node_of]
                if value.producer in node_of and readers:
                    moved.append((node_of[value.producer], readers, layout.precision.meta(value.meta)))
        self._producers = np.asarray([producer for producer, _, _ in moved], dtype=np.int64)
        self._readers = np.asarray([reader for _, readers, _ in moved for reader in readers], dtype=np.int64)
        self._starts = np.cumsum([0, *(len(readers) for _, readers, _ in moved)])[:-1]
        self._links: list[int | None] = []
        self._moved_s: list[Floats] = []
        known: dict[tuple[float, float], int] = {}
        ranks = settings.rank_of_stage
        for stage in range(settings.stages - 1):
            if ranks[stage] == ranks[stage + 1]:
                self._links.append(None)
                continue
            ends = settings.global_rank(ranks[stage]), settings.global_rank(ranks[stage + 1])
            link = settings.link(stage)
            if link not in known:
                known[link] = len(known)
                there = [settings.hardware.transfer_s(meta.nbytes, *ends) for _, _, meta in moved]
                back = [s if meta.requires_grad else 0.0 for s, (_, _, meta) in zip(there, moved, strict=True)]
                self._moved_s.append(np.asarray([there, back], dtype=np.float64))
            self._links.append(known[link])
        self._shared = [
            ([node_of[layer] for layer in shared.layers if layer in node_of], shared.gradient_bytes)
            for shared in layout.memory.shared
            if shared.gradient_bytes
        ]

    def step_s(self, stage_of_node: Sequence[int]) -> float:
        """Simulate one step of a partition (``step_s``)."""
        settings, times = self._layout.settings, self.stage_times(stage_of_node)
        reductions = self._reductions(stage_of_node)
        return step_seconds(settings.schedule, times, settings.ranks, settings.num_microbatches, reductions)

    def stage_times(self, stage_of_node: Sequence[int]) -> list[StageTimes]:
        """Give the times of a partition's stages, and of the messages between them."""
        stages = self._layout.settings.stages
        stage_of = np.asarray(stage_of_node, dtype=np.int64)
        own = [np.bincount(stage_of, column, minlength=stages) for column in self._seconds.T]
        moved = np.zeros((2, stages))
        if len(self._producers):
            first = stage_of[self._producers]
            last = np.maximum.reduceat(stage_of[self._readers], self._starts)
            for boundary, link in enumerate(self._links):
                if link is not None:
                    moved[:, boundary] = self._moved_s[link][:, (first <= boundary) & (boundary < last)].sum(axis=1)
        return [StageTimes(*map(float, parts)) for parts in zip(*own, *moved, strict=True)]

    def _reductions(self, stage_of_node: Sequence[int]) -> list[Reduction]:
        found, settings = [], self._layout.settings
        for nodes, nbytes in self._shared:
            holders = {stage_of_node[node] for node in nodes}
            ranks = tuple(sorted({settings.rank_of_stage[stage] for stage in holders}))
            if len(ranks) > 1:
                found.append(Reduction(ranks, tie_seconds(nbytes, ranks, settings)))
        return found
