"""Seconds of a whole step, for any partition of a layout: what a search's shortlist is judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fxpipe.planning.layout import Layout, tie_seconds
from fxpipe.planning.simulation.engine import StageTimes
from fxpipe.planning.simulation.simulate import Reduction, message_s, step_seconds


def step_s(layout: Layout, stage_of_node: Sequence[int]) -> float:
    """Simulate one step of a partition.

    The same seconds as ``simulate`` of the plan that ``make_plan`` makes of it, without making the plan.

    Args:
        layout: The layers, laid out.
        stage_of_node: Stage of each node of the layout's problem.

    Returns:
        Seconds; linear in nodes and in stages times microbatches.
    """
    settings = layout.settings
    return step_seconds(
        settings.schedule,
        stage_times(layout, stage_of_node),
        settings.ranks,
        settings.num_microbatches,
        _reductions(layout, stage_of_node),
    )


def stage_times(layout: Layout, stage_of_node: Sequence[int]) -> list[StageTimes]:
    """Give the times of a partition's stages, and of the messages between them."""
    settings, graph = layout.settings, layout.graph
    ranks = settings.rank_of_stage
    sums: list[tuple[list[float], list[float], list[float]]] = [([], [], []) for _ in range(settings.stages)]
    for node, stage in enumerate(stage_of_node):
        cost = layout.costs[layout.layers[node]]
        for column, seconds in zip(sums[stage], (cost.forward_s, cost.input_grad_s, cost.weight_grad_s), strict=True):
            column.append(seconds)
    crossing: list[list[int]] = [[] for _ in range(settings.stages)]
    if settings.cost != "parameters":
        node_of = {layer: node for node, layer in enumerate(layout.layers)}
        for index, value in enumerate(graph.values):
            if value.producer not in node_of:
                continue
            places = [stage_of_node[node_of[layer]] for layer in value.readers if layer in node_of]
            for boundary in range(stage_of_node[node_of[value.producer]], max(places, default=-1)):
                crossing[boundary].append(index)
    times = []
    for stage, columns in enumerate(sums):
        send_s = return_s = 0.0
        if crossing[stage] and ranks[stage] != ranks[stage + 1]:
            metas = [layout.precision.meta(graph.values[index].meta) for index in crossing[stage]]
            places_of = (settings.global_rank(ranks[stage]), settings.global_rank(ranks[stage + 1]))
            send_s, return_s = message_s(metas, settings.hardware, *places_of)
        forward_s, input_s, weight_s = map(math.fsum, columns)
        times.append(StageTimes(forward_s, input_s, weight_s, send_s, return_s))
    return times


def _reductions(layout: Layout, stage_of_node: Sequence[int]) -> list[Reduction]:
    node_of = {layer: node for node, layer in enumerate(layout.layers)}
    found = []
    for shared in layout.memory.shared:
        if shared.gradient_bytes:
            holders = {stage_of_node[node_of[layer]] for layer in shared.layers if layer in node_of}
            ranks = tuple(sorted({layout.settings.rank_of_stage[stage] for stage in holders}))
            if len(ranks) > 1:
                found.append(Reduction(ranks, tie_seconds(shared.gradient_bytes, ranks, layout.settings)))
    return found
