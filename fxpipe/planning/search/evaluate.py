"""What a partition of the merged graph costs, in whole numbers: ``problem.measure`` in numpy."""

from __future__ import annotations

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
    Instance,
    Ints,
)
from fxpipe.planning.search.request import FAR, FREE, NEAR, Request


@dataclass(frozen=True, slots=True)
class Found:
    """A partition: its bottleneck (or largest memory) and the stage of each merged node."""

    value: int
    stage_of: Ints


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Loads of the stages, loads and memory of the ranks, in the instance's units."""

    loads: Ints
    rank_loads: Ints
    rank_memory: Ints

    @property
    def bottleneck(self) -> int:
        """Largest load of a rank; of a stage, where every rank has one."""
        return int(self.rank_loads.max())

    @property
    def memory(self) -> int:
        """Largest memory of a rank."""
        return int(self.rank_memory.max())


def evaluate(instance: Instance, request: Request, stage_of: Ints) -> Evaluated:
    """Evaluate ``stage_of`` (stage of each merged node)."""
    stages = request.stages
    ranks = np.asarray(request.ranks)
    loads = _added(stage_of, instance.load, stages)
    static = _added(stage_of, instance.static, stages)
    alive = _added(stage_of, instance.activation, stages)
    values, ties = instance.values, instance.ties
    if len(values):
        if request.routing == "direct":
            owner, stage = _holders(values.start, stage_of[values.nodes], stages)
            several = np.bincount(owner, minlength=len(values))[owner] > 1
            where, amounts = stage[several], values.amounts[owner[several]]
            np.add.at(loads, where, amounts[:, NEAR_LOAD])
            np.add.at(alive, where, amounts[:, SENT] + amounts[:, RECEIVED])
            np.add.at(static, where, amounts[:, SENT_FIXED] + amounts[:, RECEIVED_FIXED])
        else:
            crossing = _crossing(values.start, stage_of[values.nodes], values.amounts, stages)
            kinds = np.asarray(request.kinds[1:-1])
            seconds = (kinds == NEAR) * crossing[:, NEAR_LOAD] + (kinds == FAR) * crossing[:, FAR_LOAD]
            crossing *= (kinds != FREE)[:, None]
            loads[:-1] += seconds
            loads[1:] += seconds
            alive[:-1] += crossing[:, SENT]
            alive[1:] += crossing[:, RECEIVED]
            static[:-1] += crossing[:, SENT_FIXED]
            static[1:] += crossing[:, RECEIVED_FIXED]
    if len(ties):
        owner, stage = _holders(ties.start, stage_of[ties.nodes], stages)
        np.add.at(alive, stage, ties.amounts[owner, TIE_LIVE])
        num_ranks = int(ranks.max()) + 1
        keys, firsts = np.unique(owner * num_ranks + ranks[stage], return_index=True)
        holder, first_stage = keys // num_ranks, stage[firsts]
        np.add.at(static, first_stage, ties.amounts[holder, TIE_FIXED])
        several = np.bincount(holder, minlength=len(ties))[holder] > 1
        np.add.at(loads, first_stage[several], ties.amounts[holder[several], TIE_LOAD])
    return Evaluated(loads, _added(ranks, loads, int(ranks.max()) + 1), _rank_memory(request, static, alive))


def has_all_stages(instance: Instance, request: Request, stage_of: Ints) -> bool:
    """Tell whether the partition has the stages asked for: with a fixed number each an anchor, else none left out."""
    if request.exactly:
        return bool((_added(stage_of, instance.anchors, request.stages) > 0).all())
    return bool((np.bincount(stage_of) > 0).all())


def is_partition(instance: Instance, request: Request, stage_of: Ints) -> bool:
    """Tell whether ``stage_of`` keeps every condition: range, order, stages and memory."""
    if int(stage_of.min()) < 0 or int(stage_of.max()) >= request.stages:
        return False
    if not has_all_stages(instance, request, stage_of):
        return False
    stages = stage_of.tolist()
    if any(stages[node] > stages[after] for node, afters in enumerate(instance.successors) for after in afters):
        return False
    limit = request.memory_limit
    return limit is None or evaluate(instance, request, stage_of).memory <= limit


def _rank_memory(request: Request, static: Ints, alive: Ints) -> Ints:
    if request.one_stage_per_rank:
        memory = np.zeros(max(request.ranks) + 1, dtype=np.int64)
        memory[list(request.ranks)] = static + np.asarray(request.live, dtype=np.int64) * alive
        return memory
    found = []
    for stages, sets in zip(request.placement.stages_of_rank, request.placement.live, strict=True):
        own = list(stages)
        counts = np.asarray(sets, dtype=np.int64).reshape(len(sets), len(own))
        found.append(int(static[own].sum()) + int((counts @ alive[own]).max(initial=0)))
    return np.asarray(found, dtype=np.int64)


def _added(index: Ints, amounts: Ints, count: int) -> Ints:
    sums = np.zeros(count, dtype=np.int64)
    np.add.at(sums, index, amounts)
    return sums


def _holders(start: Ints, places: Ints, stages: int) -> tuple[Ints, Ints]:
    """Give each pair of a set and a stage that holds some of it, once, sorted."""
    owner = np.repeat(np.arange(len(start) - 1), np.diff(start))
    keys = np.unique(owner * stages + places)
    return keys // stages, keys % stages


def _crossing(start: Ints, places: Ints, amounts: Ints, stages: int) -> Ints:
    """Give what crosses each boundary between two stages."""
    first = np.minimum.reduceat(places, start[:-1])
    last = np.maximum.reduceat(places, start[:-1])
    steps = np.zeros((stages + 1, amounts.shape[1]), dtype=np.int64)
    np.add.at(steps, first, amounts)
    np.subtract.at(steps, last, amounts)
    crossing: Ints = np.cumsum(steps, axis=0)[: stages - 1]
    return crossing
