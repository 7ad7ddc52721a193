"""What a partition of the merged graph costs, in whole numbers: ``problem.measure`` in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxpipe.planning.instance import Instance, Ints
from fxpipe.planning.request import Request


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


def evaluate(instance: Instance, request: Request, stage_of: Ints) -> Evaluated:
    """Evaluate ``stage_of`` (stage of each merged node)."""
    stages = request.stages
    ranks = np.asarray(request.ranks)
    live = np.asarray(request.live, dtype=np.int64)
    loads = _added(stage_of, instance.load, stages)
    static = _added(stage_of, instance.static, stages)
    alive = _added(stage_of, instance.activation, stages)
    if len(instance.values):
        if request.routing == "direct":
            owner, stage = _holders(instance.values.start, stage_of[instance.values.nodes], stages)
            several = np.bincount(owner, minlength=len(instance.values))[owner] > 1
            np.add.at(loads, stage[several], instance.values.load[owner[several]])
            np.add.at(alive, stage[several], instance.values.bytes[owner[several]])
        else:
            places = stage_of[instance.values.nodes]
            first = np.minimum.reduceat(places, instance.values.start[:-1])
            last = np.maximum.reduceat(places, instance.values.start[:-1])
            paid = np.asarray(request.paid, dtype=np.int64)
            loads += _boundaries(first, last, instance.values.load, paid)
            alive += _boundaries(first, last, instance.values.bytes, paid)
    memory = _added(ranks, static + live * alive, int(ranks.max()) + 1)
    if len(instance.ties):
        owner, stage = _holders(instance.ties.start, stage_of[instance.ties.nodes], stages)
        keys, firsts = np.unique(owner * len(memory) + ranks[stage], return_index=True)
        holder, rank = keys // len(memory), keys % len(memory)
        np.add.at(memory, rank, instance.ties.bytes[holder])
        several = np.bincount(holder, minlength=len(instance.ties))[holder] > 1
        np.add.at(loads, stage[firsts][several], instance.ties.load[holder[several]])
    return Evaluated(loads, _added(ranks, loads, int(ranks.max()) + 1), memory)


def _added(index: Ints, amounts: Ints, count: int) -> Ints:
    sums = np.zeros(count, dtype=np.int64)
    np.add.at(sums, index, amounts)
    return sums


def _holders(start: Ints, places: Ints, stages: int) -> tuple[Ints, Ints]:
    """Give each pair of a set and a stage that holds some of it, once, sorted."""
    owner = np.repeat(np.arange(len(start) - 1), np.diff(start))
    keys = np.unique(owner * stages + places)
    return keys // stages, keys % stages


def _boundaries(first: Ints, last: Ints, amounts: Ints, paid: Ints) -> Ints:
    stages = len(paid) - 1
    steps = np.zeros(stages + 2, dtype=np.int64)
    np.add.at(steps, first + 1, amounts)
    np.subtract.at(steps, last + 1, amounts)
    crossing = np.cumsum(steps)[: stages + 1] * paid
    return crossing[:-1] + crossing[1:]
