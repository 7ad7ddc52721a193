"""What a partition is asked for, as frozen numbers, and the written-down formula of what a partition costs.

Nodes are numbered from 0. ``measure`` is the one place where the cost of a finished partition is defined; every search
works on a faster form of the same formula and is checked against this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ROUTINGS = ("adjacent", "direct")


@dataclass(frozen=True, slots=True)
class TransferValue:
    """One value that may have to move: its producer and all its readers, and what moving it over one link costs.

    Attributes:
        seconds: Seconds on one link, forward and backward together.
        nodes: Producer and readers, in any order.
        bytes: Bytes of the buffer a stage holds for it, per live microbatch and per link it pays.
    """

    seconds: float
    nodes: tuple[int, ...]
    bytes: float = 0


@dataclass(frozen=True, slots=True)
class TiedNodes:
    """Nodes that share one tensor.

    Attributes:
        nodes: The nodes that use the tensor.
        bytes: Static bytes of one copy (weights, gradient, optimiser state); not part of the nodes' own ``memory``.
        seconds: What summing its gradient over the holders adds to each of them, as a share of one microbatch.
    """

    nodes: tuple[int, ...]
    bytes: float = 0
    seconds: float = 0.0


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
    """

    seconds: tuple[float, ...]
    edges: tuple[tuple[int, int], ...] = ()
    values: tuple[TransferValue, ...] = ()
    memory: tuple[float, ...] = ()
    activation: tuple[float, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    ties: tuple[TiedNodes, ...] = ()
    names: tuple[str, ...] = ()

    def name(self, node: int) -> str:
        """Give the name of a node for a message."""
        return self.names[node] if self.names else str(node)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a partition costs.

    Attributes:
        loads: Seconds of each stage, transfers and ties included.
        rank_loads: Sum of the loads of each rank's stages.
        rank_memory: Bytes of each rank.
    """

    loads: tuple[float, ...]
    rank_loads: tuple[float, ...]
    rank_memory: tuple[float, ...]


def measure(
    problem: PartitionProblem,
    stage_of: Sequence[int],
    *,
    routing: str = "adjacent",
    live: Sequence[int] = (),
    rank_of_stage: Sequence[int] = (),
    num_stages: int | None = None,
) -> Measured:
    """Give the loads and memory of a partition: the definition that every search follows.

    A value ``v`` is paid ``m(v, s)`` times by stage ``s``:

    - ``routing="direct"``: once if some but not all of its nodes lie in ``s``, else not at all;
    - ``routing="adjacent"``: it passes every boundary between its first and its last stage, and each boundary is paid
      once on either side. A boundary between two stages of one rank is free.

    ``load(s) = Σ seconds + Σ v.seconds · m(v, s) + ties``. A tie whose nodes lie on one rank costs no time; on several,
    its seconds are added to the first stage of each rank that holds it. ``memory(r) = Σ over its stages of
    (Σ memory + live[s] · (Σ activation + Σ v.bytes · m(v, s))) + Σ bytes of the ties it holds``, each once.

    Args:
        problem: Costs and structure.
        stage_of: Stage of each node.
        routing: ``"adjacent"`` or ``"direct"``.
        live: Live microbatches of each stage; empty means 1.
        rank_of_stage: Rank of each stage; empty means one stage per rank.
        num_stages: Number of stages; None means up to the last one used.

    Returns:
        Seconds of each stage and rank, bytes of each rank.

    >>> chain = PartitionProblem(seconds=(1.0, 2.0), edges=((0, 1),), values=(TransferValue(0.5, (0, 1)),))
    >>> measure(chain, (0, 1)).loads
    (1.5, 2.5)
    """
    stages = max(stage_of) + 1 if num_stages is None else num_stages
    ranks = list(rank_of_stage) or list(range(stages))
    live = list(live) or [1] * stages
    load_terms: list[list[float]] = [[] for _ in range(stages)]
    memory_terms: list[list[float]] = [[] for _ in range(max(ranks) + 1)]
    for node, stage in enumerate(stage_of):
        load_terms[stage].append(problem.seconds[node])
        if problem.memory:
            memory_terms[ranks[stage]].append(problem.memory[node])
        if problem.activation:
            memory_terms[ranks[stage]].append(live[stage] * problem.activation[node])
    for value in problem.values:
        for stage in payers(sorted({stage_of[node] for node in value.nodes}), ranks, routing):
            load_terms[stage].append(value.seconds)
            memory_terms[ranks[stage]].append(live[stage] * value.bytes)
    for tie in problem.ties:
        first_stage: dict[int, int] = {}
        for stage in sorted({stage_of[node] for node in tie.nodes}):
            first_stage.setdefault(ranks[stage], stage)
        for rank, stage in first_stage.items():
            memory_terms[rank].append(tie.bytes)
            if len(first_stage) > 1:
                load_terms[stage].append(tie.seconds)
    loads = [math.fsum(terms) for terms in load_terms]
    rank_terms: list[list[float]] = [[] for _ in memory_terms]
    for stage, load in enumerate(loads):
        rank_terms[ranks[stage]].append(load)
    return Measured(
        tuple(loads),
        tuple(math.fsum(terms) for terms in rank_terms),
        tuple(math.fsum(terms) for terms in memory_terms),
    )


def payers(stages: Sequence[int], ranks: Sequence[int], routing: str) -> list[int]:
    """List the stages that pay for a value with nodes in ``stages`` (ascending), one entry per payment.

    >>> payers([0, 2], [0, 1, 2], "adjacent")
    [0, 1, 1, 2]
    >>> payers([0, 2], [0, 1, 2], "direct")
    [0, 2]
    """
    if len(stages) < 2:
        return []
    if routing == "direct":
        return list(stages)
    crossed = [stage for stage in range(stages[0], stages[-1]) if ranks[stage] != ranks[stage + 1]]
    return [side for stage in crossed for side in (stage, stage + 1)]
