"""What a partition is asked for, as frozen numbers, and the written-down formula of what a partition costs.

Nodes are numbered from 0. ``measure`` is the one place where the cost of a finished partition is defined; every search
works on a faster form of the same formula and is checked against this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import NamedTuple

ROUTINGS = ("adjacent", "direct")


class TransferValue(NamedTuple):
    """One value that may have to move: its producer and all its readers, and what moving it over one link costs.

    A tuple, since graphs have a hundred thousand of them, and a data class takes five times as long to make.

    Attributes:
        seconds: Seconds on one link, forward and backward together.
        nodes: Producer and readers, in any order.
        far_seconds: The same on a far link; None: as ``seconds``.
        sent_bytes: Bytes a stage that sends it on keeps for it, per live microbatch.
        received_bytes: Bytes a stage that received it keeps for it, per live microbatch.
        sent_buffer_bytes: Bytes of fixed buffers at a stage that sends it on (its gradient comes back into them).
        received_buffer_bytes: Bytes of fixed buffers at a stage that receives it.
    """

    seconds: float
    nodes: tuple[int, ...]
    far_seconds: float | None = None
    sent_bytes: float = 0
    received_bytes: float = 0
    sent_buffer_bytes: float = 0
    received_buffer_bytes: float = 0

    def link_s(self, far: bool) -> float:
        """Give the seconds on a near or a far link."""
        return self.far_seconds if far and self.far_seconds is not None else self.seconds


def transfer_values(seconds: Sequence[float], nodes: Sequence[tuple[int, ...]]) -> tuple[TransferValue, ...]:
    """Give one value for each entry, with nothing but seconds and nodes; many at once, three times as fast.

    >>> transfer_values([0.5], [(0, 1)]) == (TransferValue(0.5, (0, 1)),)
    True
    """
    rest = map(repeat, TransferValue._field_defaults.values())
    return tuple(map(partial(tuple.__new__, TransferValue), zip(seconds, nodes, *rest, strict=False)))


@dataclass(frozen=True, slots=True)
class TiedNodes:
    """Nodes that share one tensor: a tied weight, or what each stage that uses it must hold once.

    Attributes:
        nodes: The nodes that use the tensor.
        bytes: Static bytes of one copy (weights, gradient, optimiser state), one per rank that uses it; not part of
            the nodes' own ``memory``.
        seconds: What summing its gradient over the holders adds to each of them, as a share of one microbatch.
        live_bytes: Bytes per live microbatch of each stage that uses it.
    """

    nodes: tuple[int, ...]
    bytes: float = 0
    seconds: float = 0.0
    live_bytes: float = 0


@dataclass(frozen=True, slots=True)
class PartitionProblem:
    """A graph to cut into stages: costs, order, and what has to move or stay together.

    Attributes:
        seconds: Seconds of each node, forward and backward of one microbatch.
        edges: ``(before, after)`` pairs; they only order: stage(before) <= stage(after).
        values: What moves between stages.
        memory: Static bytes of each node; empty means none.
        activation: Bytes of each node per live microbatch; empty means none.
        groups: Nodes of one group share a stage.
        ties: Tensors shared by several nodes, one copy per rank that uses them.
        names: Names for messages; empty means the numbers.
        anchors: With a fixed number of stages, each stage holds at least one of these nodes; empty means any node.
    """

    seconds: tuple[float, ...]
    edges: tuple[tuple[int, int], ...] = ()
    values: tuple[TransferValue, ...] = ()
    memory: tuple[float, ...] = ()
    activation: tuple[float, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    ties: tuple[TiedNodes, ...] = ()
    names: tuple[str, ...] = ()
    anchors: tuple[int, ...] = ()

    def name(self, node: int) -> str:
        """Give the name of a node for a message."""
        return self.names[node] if self.names else str(node)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where stages run and what they keep alive.

    Attributes:
        rank_of_stage: Rank of each stage.
        live: For each rank, the numbers of live microbatches its stages (in order) can have at the same time; only
            the largest combinations matter.
        far: For each boundary between two stages, whether it is a far link.

    >>> Placement.simple(2).live
    (((1,),), ((1,),))
    """

    rank_of_stage: tuple[int, ...]
    live: tuple[tuple[tuple[int, ...], ...], ...]
    far: tuple[bool, ...]

    @classmethod
    def simple(
        cls,
        stages: int,
        *,
        live: Sequence[int] = (),
        rank_of_stage: Sequence[int] = (),
        live_sets: Sequence[Sequence[Sequence[int]]] = (),
        far: Sequence[bool] = (),
    ) -> Placement:
        """Fill in what is left out: one stage per rank, one live microbatch, near links.

        Args:
            stages: Number of stages.
            live: Live microbatches of each stage, all at the same time.
            rank_of_stage: Rank of each stage.
            live_sets: As the attribute ``live``; takes the place of the argument ``live``.
            far: As the attribute ``far``.
        """
        ranks = tuple(rank_of_stage) or tuple(range(stages))
        sets = tuple(tuple(tuple(entry) for entry in entries) for entries in live_sets)
        if not sets:
            alive: list[list[int]] = [[] for _ in range(max(ranks) + 1)]
            for rank, count in zip(ranks, tuple(live) or (1,) * stages, strict=True):
                alive[rank].append(count)
            sets = tuple((tuple(entry),) for entry in alive)
        return cls(ranks, sets, tuple(far) or (False,) * (stages - 1))

    @property
    def stages_of_rank(self) -> tuple[tuple[int, ...], ...]:
        """Stages of each rank, ascending."""
        found: list[list[int]] = [[] for _ in self.live]
        for stage, rank in enumerate(self.rank_of_stage):
            found[rank].append(stage)
        return tuple(map(tuple, found))

    @property
    def most_live(self) -> tuple[int, ...]:
        """Most live microbatches of each stage."""
        most = [0] * len(self.rank_of_stage)
        for stages, sets in zip(self.stages_of_rank, self.live, strict=True):
            for place, stage in enumerate(stages):
                most[stage] = max(entry[place] for entry in sets)
        return tuple(most)

    def first(self, stages: int) -> Placement:
        """Give the placement of the first ``stages`` stages."""
        kept = [sum(stage < stages for stage in own) for own in self.stages_of_rank]
        sets = tuple(
            tuple(dict.fromkeys(entry[:count] for entry in entries))
            for entries, count in zip(self.live, kept, strict=True)
        )
        return Placement(self.rank_of_stage[:stages], sets, self.far[: stages - 1])


@dataclass(frozen=True, slots=True)
class Measured:
    """What a partition costs.

    Attributes:
        loads: Seconds of each stage, transfers and ties included.
        rank_loads: Sum of the loads of each rank's stages.
        rank_memory: Bytes of each rank.
        static: Bytes of each stage that do not depend on microbatches; what ranks hold once counts with their first
            stage that uses it.
        per_live: Bytes of each stage per live microbatch.
        stage_memory: Bytes of each stage at the moment its rank needs most; they add up to ``rank_memory``.
    """

    loads: tuple[float, ...]
    rank_loads: tuple[float, ...]
    rank_memory: tuple[float, ...]
    static: tuple[float, ...]
    per_live: tuple[float, ...]
    stage_memory: tuple[float, ...]


def measure(
    problem: PartitionProblem,
    stage_of: Sequence[int],
    *,
    routing: str = "adjacent",
    placement: Placement | None = None,
) -> Measured:
    """Give the loads and memory of a partition: the definition that every search follows.

    A value is paid by stages as follows:

    - ``routing="direct"``: once by every stage that holds some but not all of its nodes; each such stage keeps its
      sent and received bytes and buffers;
    - ``routing="adjacent"``: it passes every boundary between its first and its last stage, and each boundary is paid
      once on either side, at the price of its link. The stage before keeps the sent, the one behind the received
      bytes and buffers. A boundary between two stages of one rank is free and keeps nothing.

    ``load(s) = Σ seconds + values paid + ties``. A tie whose nodes lie on one rank costs no time; on several, its
    seconds are added to the first stage of each rank that holds it. ``memory(r) = Σ static bytes of its stages + the
    most, over what can be alive at once, of Σ live(s) · bytes per live microbatch of s``; a rank holds each tie's
    bytes once.

    Args:
        problem: Costs and structure.
        stage_of: Stage of each node.
        routing: ``"adjacent"`` or ``"direct"``.
        placement: Ranks, live microbatches and links; None for one stage per rank and one live microbatch.

    Returns:
        Seconds of each stage and rank, bytes of each stage and rank.

    >>> chain = PartitionProblem(seconds=(1.0, 2.0), edges=((0, 1),), values=(TransferValue(0.5, (0, 1)),))
    >>> measure(chain, (0, 1)).loads
    (1.5, 2.5)
    """
    placement = placement or Placement.simple(max(stage_of) + 1)
    ranks = placement.rank_of_stage
    stages = len(ranks)
    loads: list[list[float]] = [[] for _ in range(stages)]
    static: list[list[float]] = [[] for _ in range(stages)]
    alive: list[list[float]] = [[] for _ in range(stages)]
    for node, stage in enumerate(stage_of):
        loads[stage].append(problem.seconds[node])
        if problem.memory:
            static[stage].append(problem.memory[node])
        if problem.activation:
            alive[stage].append(problem.activation[node])
    for value in problem.values:
        places = sorted({stage_of[node] for node in value.nodes})
        if len(places) > 1:
            _pay(value, places, routing, placement, (loads, static, alive))
    for tie in problem.ties:
        _hold(tie, sorted({stage_of[node] for node in tie.nodes}), ranks, (loads, static, alive))
    return _totals(
        placement, [math.fsum(t) for t in loads], [math.fsum(t) for t in static], [math.fsum(t) for t in alive]
    )


def _pay(
    value: TransferValue,
    places: Sequence[int],
    routing: str,
    placement: Placement,
    sums: tuple[list[list[float]], list[list[float]], list[list[float]]],
) -> None:
    """Add what a value costs the stages it passes to their loads, static and live bytes."""
    loads, static, alive = sums
    ranks = placement.rank_of_stage
    if routing == "direct":
        for stage in places:
            loads[stage].append(value.seconds)
            static[stage] += (value.sent_buffer_bytes, value.received_buffer_bytes)
            alive[stage] += (value.sent_bytes, value.received_bytes)
        return
    for stage in range(places[0], places[-1]):
        if ranks[stage] != ranks[stage + 1]:
            seconds = value.link_s(placement.far[stage])
            loads[stage].append(seconds)
            loads[stage + 1].append(seconds)
            static[stage].append(value.sent_buffer_bytes)
            static[stage + 1].append(value.received_buffer_bytes)
            alive[stage].append(value.sent_bytes)
            alive[stage + 1].append(value.received_bytes)


def _hold(
    tie: TiedNodes,
    places: Sequence[int],
    ranks: Sequence[int],
    sums: tuple[list[list[float]], list[list[float]], list[list[float]]],
) -> None:
    """Add what a tie costs the stages that use it to their loads, static and live bytes."""
    loads, static, alive = sums
    first_stage: dict[int, int] = {}
    for stage in places:
        alive[stage].append(tie.live_bytes)
        first_stage.setdefault(ranks[stage], stage)
    for stage in first_stage.values():
        static[stage].append(tie.bytes)
        if len(first_stage) > 1:
            loads[stage].append(tie.seconds)


def _totals(placement: Placement, loads: list[float], static: list[float], alive: list[float]) -> Measured:
    rank_loads, rank_memory = [], []
    stage_memory = [0.0] * len(loads)
    for stages, sets in zip(placement.stages_of_rank, placement.live, strict=True):
        rank_loads.append(math.fsum(loads[stage] for stage in stages))
        fixed = math.fsum(static[stage] for stage in stages)
        totals = [fixed + math.fsum(n * alive[s] for n, s in zip(entry, stages, strict=True)) for entry in sets]
        most = max(totals, default=0.0)
        rank_memory.append(most)
        if stages:
            entry = sets[totals.index(most)]
            for count, stage in zip(entry, stages, strict=True):
                stage_memory[stage] = static[stage] + count * alive[stage]
    return Measured(
        tuple(loads), tuple(rank_loads), tuple(rank_memory), tuple(static), tuple(alive), tuple(stage_memory)
    )
