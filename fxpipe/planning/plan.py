"""From costed layers and their stages to the frozen plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fxpipe.ir.cost import LayerCost
from fxpipe.ir.graph import LayerGraph, Tie, Value
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.plan import PipelinePlan, StagePlan, TieGroup
from fxpipe.ir.spec import TensorInfo
from fxpipe.ir.tensor import TensorMeta


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user asked for, checked: everything a plan depends on besides the graph and its costs."""

    stages: int
    ranks: int
    schedule: str
    rank_of_stage: tuple[int, ...]
    live_microbatches: tuple[int, ...]
    num_microbatches: int
    hardware: Hardware
    training: Training
    cost: str
    grain: str
    opened: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    memory_limit: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of one stage: the most alive at once, and the activations kept per live microbatch."""

    peak_bytes: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class Search:
    """How a partition was found: the method in words, and a bottleneck (seconds) proven to be unbeatable."""

    method: str
    lower_bound: float


def transfer_s(meta: TensorMeta, hardware: Hardware) -> float:
    """Give the seconds one link is busy with a tensor in one microbatch: forward, and its gradient back.

    >>> link = Hardware({"float32": 1e12}, 1e9, 1e9, link_bandwidth=1e9)
    >>> transfer_s(TensorMeta((1000,), "float32", requires_grad=True), link)
    8e-06
    """
    once = meta.nbytes / hardware.link_bandwidth + hardware.link_latency
    return once * (2 if meta.requires_grad else 1)


def tie_s(nbytes: int, holders: int, hardware: Hardware) -> float:
    """Give the seconds of a ring all-reduce of ``nbytes`` over ``holders`` ranks, once per step.

    Source: Thakur, Rabenseifner, Gropp 2005, Int. J. High Perform. Comput. Appl. 19(1), 49-66.
    """
    if holders < 2:
        return 0.0
    share = (holders - 1) / holders
    return 2 * share * nbytes / hardware.link_bandwidth + 2 * (holders - 1) * hardware.link_latency


def crossing(graph: LayerGraph, stage_of: Sequence[int], boundary: int) -> tuple[Value, ...]:
    """Give the values that cross from stage ``boundary`` to ``boundary + 1``, passed on ones included."""
    return tuple(
        value
        for value in graph.values
        if stage_of[value.producer] <= boundary < max((stage_of[r] for r in value.readers), default=-1)
    )


def recomputed_by_stage(graph: LayerGraph, stage_of: Sequence[int], num_stages: int) -> tuple[tuple[int, ...], ...]:
    """Give for each stage the recomputed layers its own layers need, directly or through others of them."""
    free = frozenset(graph.recomputed)
    sources: dict[int, list[int]] = {}
    for earlier, later in graph.free_edges:
        sources.setdefault(later, []).append(earlier)
    found = []
    for stage in range(num_stages):
        needed: set[int] = set()
        todo = [layer for layer in range(len(graph.specs)) if layer not in free and stage_of[layer] == stage]
        while todo:
            for source in sources.get(todo.pop(), ()):
                if source not in needed:
                    needed.add(source)
                    todo.append(source)
        found.append(tuple(sorted(needed)))
    return tuple(found)


def make_plan(
    graph: LayerGraph,
    costs: Sequence[LayerCost],
    stage_of: Sequence[int],
    settings: Settings,
    memory: Sequence[StageMemory],
    search: Search,
) -> PipelinePlan:
    """Put a partition into the plan's form.

    Args:
        graph: The layers.
        costs: Seconds of each layer for one microbatch.
        stage_of: Stage of each layer; what it says of recomputed layers is not looked at.
        settings: What the user asked for.
        memory: Bytes of each stage.
        search: How the partition was found and how good it is.

    Returns:
        The plan. Every layer stands in exactly one stage's ``layers``; a recomputed one in the first that needs it.
    """
    repeats = recomputed_by_stage(graph, stage_of, settings.stages)
    home = _homes(graph, stage_of, repeats, settings.stages)
    stages = tuple(
        _stage_plan(index, graph, costs, home, repeats[index], stage_of, settings, memory[index])
        for index in range(settings.stages)
    )
    ties = tuple(_tie_group(graph, tie, home, settings) for tie in graph.ties)
    slowest = max(stages, key=lambda stage: stage.seconds)
    return PipelinePlan(
        model=graph.name,
        model_fingerprint=graph.fingerprint,
        stages=stages,
        ties=tuple(tie for tie in ties if len(tie.fqns) > 1 or len(tie.stages) > 1),
        num_ranks=settings.ranks,
        schedule=settings.schedule,
        num_microbatches=settings.num_microbatches,
        microbatch_size=graph.batch_size,
        grain=settings.grain,
        opened=settings.opened,
        leaves=settings.leaves,
        cost=settings.cost,
        hardware=settings.hardware,
        training=settings.training,
        seed=settings.seed,
        bottleneck=slowest.seconds,
        lower_bound=min(search.lower_bound, slowest.seconds),
        method=search.method,
        limited_by=_limit(graph, costs, slowest, settings),
        inputs=graph.inputs,
        notes=graph.notes,
    )


def _homes(
    graph: LayerGraph, stage_of: Sequence[int], repeats: Sequence[tuple[int, ...]], num_stages: int
) -> tuple[int, ...]:
    """Give the one stage in whose ``layers`` each layer stands."""
    home = list(stage_of)
    for layer in graph.recomputed:
        home[layer] = next((stage for stage, needed in enumerate(repeats) if layer in needed), num_stages - 1)
    return tuple(home)


def _stage_plan(
    index: int,
    graph: LayerGraph,
    costs: Sequence[LayerCost],
    home: Sequence[int],
    needed: tuple[int, ...],
    stage_of: Sequence[int],
    settings: Settings,
    memory: StageMemory,
) -> StagePlan:
    names = graph.layer_names
    own = [layer for layer in range(len(names)) if home[layer] == index]
    tensors = _weights(graph, (*own, *needed))
    forward_s = sum(costs[layer].forward_s for layer in own)
    backward_s = sum(costs[layer].backward_s for layer in own)
    sends = crossing(graph, stage_of, index) if index < settings.stages - 1 else ()
    receives = crossing(graph, stage_of, index - 1) if index else ()
    moved_s = sum(transfer_s(value.meta, settings.hardware) for value in (*sends, *receives))
    return StagePlan(
        index=index,
        rank=settings.rank_of_stage[index],
        layers=tuple(names[layer] for layer in own),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
        seconds=forward_s + backward_s + moved_s,
        forward_s=forward_s,
        backward_s=backward_s,
        transfer_s=moved_s,
        peak_bytes=memory.peak_bytes,
        activation_bytes=memory.activation_bytes,
        live_microbatches=settings.live_microbatches[index],
        sends=tuple(value.meta for value in sends),
        recomputed=tuple(names[layer] for layer in needed if home[layer] != index),
    )


def _weights(graph: LayerGraph, layers: Iterable[int]) -> list[TensorInfo]:
    """Give the parameters of ``layers``, each tied one once."""
    keys = {fqn: tie.key for tie in graph.ties for fqn in tie.fqns}
    found: dict[str, TensorInfo] = {}
    for layer in layers:
        for tensor in graph.specs[layer].parameters:
            found.setdefault(keys.get(tensor.fqn, tensor.fqn), tensor)
    return list(found.values())


def _tie_group(graph: LayerGraph, tie: Tie, home: Sequence[int], settings: Settings) -> TieGroup:
    stages = tuple(sorted({home[layer] for layer in tie.layers}))
    ranks = {settings.rank_of_stage[stage] for stage in stages}
    seconds = tie_s(tie.nbytes, len(ranks), settings.hardware) if tie.trainable else 0.0
    return TieGroup(tie.key, tie.fqns, stages, tie.nbytes, seconds, tie.trainable)


def _limit(graph: LayerGraph, costs: Sequence[LayerCost], slowest: StagePlan, settings: Settings) -> str:
    """Say what keeps the slowest stage from being faster: one layer, a link, or the mean load."""
    names = graph.layer_names
    seconds = {names[i]: costs[i].seconds for i in range(len(names)) if names[i] in slowest.layers}
    largest = max(seconds, key=lambda name: seconds[name], default="")
    if slowest.transfer_s > 0.5 * slowest.seconds:
        return f"links of stage {slowest.index}"
    if largest and seconds[largest] > 0.5 * slowest.seconds:
        return f"layer {largest} of stage {slowest.index}, which is not split"
    return f"stage {slowest.index}"
