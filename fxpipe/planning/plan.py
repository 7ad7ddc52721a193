"""From layers and their stages to the frozen plan."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from fxpipe.ir.graph import LayerGraph, Tie, Value
from fxpipe.ir.plan import PipelinePlan, StagePlan, TieGroup
from fxpipe.ir.spec import TensorInfo
from fxpipe.ir.tensor import dtype_bytes
from fxpipe.planning.costs.blocks import block_names
from fxpipe.planning.costs.memory import gradient_bytes, parameter_bytes
from fxpipe.planning.costs.precision import Precision
from fxpipe.planning.costs.recompute import checkpoints, modules_of_layers
from fxpipe.planning.layout import Layout, tie_seconds
from fxpipe.planning.naming import part_names
from fxpipe.planning.search.problem import Measured, measure


def crossing(graph: LayerGraph, stage_of: Sequence[int], boundary: int) -> tuple[Value, ...]:
    """Give the values that cross from stage ``boundary`` to ``boundary + 1``, passed on ones included.

    Recomputed layers send nothing; what ``stage_of`` says of them is not looked at.
    """
    free = frozenset(graph.recomputed)
    return tuple(
        value
        for value in graph.values
        if value.producer not in free
        and stage_of[value.producer]
        <= boundary
        < max((stage_of[reader] for reader in value.readers if reader not in free), default=-1)
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
    layout: Layout,
    stage_of_node: Sequence[int],
    *,
    method: str = "",
    proven: bool = False,
    lower_bound: float = 0.0,
    limited_by: str = "",
    notes: Sequence[str] = (),
) -> PipelinePlan:
    """Put a partition into the plan's form; seconds and bytes are those of ``problem.measure``.

    Args:
        layout: The layers, laid out.
        stage_of_node: Stage of each node of the layout's problem.
        method: How the partition was searched, in words.
        proven: Whether no partition is better.
        lower_bound: Seconds no partition can beat.
        limited_by: What keeps the plan from being faster.
        notes: What the report should say besides the graph's own notes.

    Returns:
        The plan. A stage's ``layers`` names every block that lies in it whole by its FQN, and the layers of blocks that
        a cut crosses one by one; each stands in exactly one stage, a recomputed one in the first that needs it.
    """
    # Long: a plan has many fields, each of which is said once, here.
    graph, settings = layout.graph, layout.settings
    stage_of = layout.stages(stage_of_node)
    measured = measure(layout.problem, stage_of_node, placement=layout.placement)
    moved_s = _moved_s(layout, stage_of_node)
    repeats = recomputed_by_stage(graph, stage_of, settings.stages)
    opened = tuple(dict.fromkeys(block.fqn for block in layout.cut_blocks(stage_of_node)))
    units = _unit_names(layout, opened)
    whole = {block for block in block_names(graph) if block and block.partition("@")[0] not in opened}
    home = _homes(graph, stage_of, repeats, units, whole)
    stages = tuple(
        _stage_plan(index, layout, home, repeats[index], units, whole, stage_of, measured, moved_s[index])
        for index in range(settings.stages)
    )
    stages = _with_parts(layout, stages, stage_of)
    parts = part_names(graph, home, [cost.seconds for cost in layout.costs], settings.stages)
    stages = tuple(replace(stage, parts=names) for stage, names in zip(stages, parts, strict=True))
    ties = tuple(_tie_group(layout, tie, home, repeats) for tie in graph.ties)
    bottleneck = max(measured.rank_loads)
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
        opened=opened,
        leaves=settings.leaves,
        cost=settings.cost,
        hardware=settings.hardware,
        training=settings.training,
        seed=settings.seed,
        memory_limit=settings.memory_limit,
        bottleneck=bottleneck,
        lower_bound=min(lower_bound, bottleneck),
        proven=proven,
        method=method,
        limited_by=limited_by,
        inputs=graph.inputs,
        notes=(*graph.notes, *notes),
    )


def _with_parts(layout: Layout, stages: tuple[StagePlan, ...], stage_of: Sequence[int]) -> tuple[StagePlan, ...]:
    """Add what part of the backwards recomputes, and what lies behind the last block."""
    again: list[list[float]] = [[] for _ in stages]
    for layer in checkpoints(layout.graph, layout.recomputed):
        again[stage_of[layer]].append(layout.costs[layer].forward_s)
    made = [replace(stage, recompute_s=math.fsum(more)) for stage, more in zip(stages, again, strict=True)]
    blocks = [
        layer for node in layout.blocks if node.is_repeated for layer in map(layout.layers.__getitem__, node.layers)
    ]
    behind = [layer for layer in layout.layers if blocks and layer > max(blocks) and stage_of[layer] == len(stages) - 1]
    if behind:
        largest = max(behind, key=lambda layer: layout.costs[layer].seconds)
        forward_s, backward_s = (
            math.fsum(getattr(layout.costs[layer], part) for layer in behind) for part in ("forward_s", "backward_s")
        )
        made[-1] = replace(made[-1], head=layout.graph.layer_names[largest], head_s=(forward_s, backward_s))
    return tuple(made)


def _moved_s(layout: Layout, stage_of_node: Sequence[int]) -> tuple[float, ...]:
    """Give what each stage's load has of transfers and ties."""
    idle = replace(layout.problem, seconds=(0.0,) * len(layout.layers))
    return measure(idle, stage_of_node, placement=layout.placement).loads


def _homes(
    graph: LayerGraph,
    stage_of: Sequence[int],
    repeats: Sequence[tuple[int, ...]],
    units: Sequence[str],
    whole: Collection[str],
) -> tuple[int, ...]:
    """Give the one stage in whose ``layers`` each layer stands; what stands under one name stands there together."""
    free = frozenset(graph.recomputed)
    working = (layer for layer in range(len(units)) if layer not in free and units[layer] in whole)
    stage_of_unit = {units[layer]: stage_of[layer] for layer in working}
    for stage, needed in enumerate(repeats):
        for layer in needed:
            stage_of_unit.setdefault(units[layer], stage)
    for layer in free:
        stage_of_unit.setdefault(units[layer], len(repeats) - 1)
    return tuple(stage_of_unit.get(unit, stage) for unit, stage in zip(units, stage_of, strict=True))


def _unit_names(layout: Layout, opened: Sequence[str]) -> tuple[str, ...]:
    """Give for each layer the name it stands under in the plan: its block's where that is not opened."""
    graph = layout.graph
    free = frozenset(graph.recomputed)
    names = []
    for layer, (name, block) in enumerate(zip(graph.layer_names, block_names(graph), strict=True)):
        if layer in free and graph.blocks:  # a whole block runs its own masks and tables
            block = graph.blocks[layer]
        names.append(block if block and block.partition("@")[0] not in opened else name)
    return tuple(names)


def _stage_plan(
    index: int,
    layout: Layout,
    home: Sequence[int],
    needed: tuple[int, ...],
    units: Sequence[str],
    whole: Collection[str],
    stage_of: Sequence[int],
    measured: Measured,
    moved_s: float,
) -> StagePlan:
    graph, settings = layout.graph, layout.settings
    free = frozenset(graph.recomputed)
    own = [layer for layer in range(len(units)) if home[layer] == index]
    working = [layer for layer in own if layer not in free]
    tensors = _weights(graph, (*own, *needed))
    weights = sum(weight_bytes(tensor, layout.precision) for tensor in tensors)
    gradients = sum(gradient_bytes(tensor, settings.training, layout.precision) for tensor in tensors)
    trained = sum(parameter_bytes(tensor, settings.training, layout.precision) for tensor in tensors)
    forward_s = math.fsum(layout.costs[layer].forward_s for layer in working)
    backward_s = math.fsum(layout.costs[layer].backward_s for layer in working)
    weight_grad_s = min(math.fsum(layout.costs[layer].weight_grad_s for layer in working), backward_s)
    sends = crossing(graph, stage_of, index) if index < settings.stages - 1 else ()
    # A whole block runs what is free in it; a block that is all free runs wherever it is needed.
    elsewhere = [units[layer] for layer in needed if home[layer] != index and units[layer] not in whole]
    return StagePlan(
        index=index,
        rank=settings.rank_of_stage[index],
        layers=tuple(dict.fromkeys(units[layer] for layer in own)),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        bytes=weights,
        seconds=measured.loads[index],
        forward_s=forward_s,
        backward_s=backward_s,
        weight_grad_s=weight_grad_s,
        transfer_s=moved_s,
        peak_bytes=math.ceil(measured.stage_memory[index]),
        gradient_bytes=gradients,
        optimizer_bytes=trained - weights - gradients,
        activation_bytes=math.ceil(measured.per_live[index]),
        live_microbatches=settings.live_microbatches[index],
        sends=tuple(layout.precision.meta(value.meta) for value in sends),
        duplicated=tuple(dict.fromkeys(elsewhere)),
        recompute=modules_of_layers([units[layer] for layer in own], layout.recomputed),
    )


def weight_bytes(info: TensorInfo, precision: Precision) -> int:
    """Give the bytes of a weight in the dtype it is trained in."""
    return math.prod(info.shape) * dtype_bytes(precision.parameter(info))


def _weights(graph: LayerGraph, layers: Iterable[int]) -> list[TensorInfo]:
    """Give the parameters of ``layers``, each tied one once."""
    keys = {fqn: tie.key for tie in graph.ties for fqn in tie.fqns}
    found: dict[str, TensorInfo] = {}
    for layer in layers:
        for tensor in graph.specs[layer].parameters:
            found.setdefault(keys.get(tensor.fqn, tensor.fqn), tensor)
    return list(found.values())


def _tie_group(layout: Layout, tie: Tie, home: Sequence[int], repeats: Sequence[tuple[int, ...]]) -> TieGroup:
    graph, settings = layout.graph, layout.settings
    holders = {home[layer] for layer in tie.layers}
    holders |= {stage for stage, needed in enumerate(repeats) if not set(tie.layers).isdisjoint(needed)}
    ranks = sorted({settings.rank_of_stage[stage] for stage in holders})
    infos = {info.fqn: info for layer in tie.layers for info in graph.specs[layer].parameters}
    info = next((infos[fqn] for fqn in tie.fqns if fqn in infos), None)
    nbytes = tie.nbytes if info is None else weight_bytes(info, layout.precision)
    gradient = 0
    if tie.trainable:
        gradient = tie.nbytes if info is None else gradient_bytes(info, settings.training, layout.precision)
    seconds = tie_seconds(gradient, ranks, settings)
    return TieGroup(tie.key, tie.fqns, tuple(sorted(holders)), nbytes, seconds, tie.trainable)
