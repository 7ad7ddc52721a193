"""How others cut a chain of modules, from their published rules: what a plan is compared with.

All of them cut a list of modules in the order of calling. Written anew from:

- DeepSpeed, ``deepspeed/runtime/utils.py``: ``partition_uniform`` and ``partition_balanced``;
- torchtitan, ``torchtitan/distributed/pipeline_parallel.py``: ``generate_llm_fqn_per_model_part``;
- Megatron-LM, ``megatron/core/transformer/transformer_block.py``: ``get_num_layers_to_build``;
- torchgpipe, ``torchgpipe/balance/blockpartition.py``, after Bárány and Grinberg, Block partitions of sequences,
  arXiv 1308.2452.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

from fxpipe.ir.plan import Baseline
from fxpipe.planning.layout import Layout
from fxpipe.planning.search.problem import measure


@dataclass(frozen=True, slots=True)
class PeerModule:
    """One module of the list that peers cut.

    Attributes:
        name: FQN.
        nodes: Nodes of the layout's problem.
        parameters: Number of parameters.
        seconds: Forward and backward.
        is_repeated: Whether it is one of the model's repeated blocks.
    """

    name: str
    nodes: tuple[int, ...]
    parameters: int
    seconds: float
    is_repeated: bool


def modules_of(layout: Layout) -> tuple[PeerModule, ...]:
    """Give the modules of a model in the order of calling; what runs between them goes with the one before."""
    graph = layout.graph
    block_of = {node: block for block in layout.blocks for node in block.layers}
    members: dict[str, list[int]] = {}
    waiting: list[int] = []
    last = ""
    for node, layer in enumerate(layout.layers):
        block = block_of.get(node)
        if block is None and not graph.specs[layer].parameters:
            (members[last] if last else waiting).append(node)
            continue
        last = graph.layer_names[layer] if block is None else block.name
        members.setdefault(last, []).extend([*waiting, node])
        waiting = []
    if not members:
        members[graph.name] = waiting
    repeated = {block.name for block in layout.blocks if block.is_repeated}
    return tuple(
        PeerModule(
            name,
            tuple(nodes),
            sum(math.prod(info.shape) for node in nodes for info in graph.specs[layout.layers[node]].parameters),
            math.fsum(layout.problem.seconds[node] for node in nodes),
            name in repeated,
        )
        for name, nodes in members.items()
    )


def peer_baselines(layout: Layout) -> tuple[Baseline, ...]:
    """Cut the same model as DeepSpeed, torchtitan, Megatron and torchgpipe would, at the same costs and links.

    Args:
        layout: The layers, laid out (``make_layout``).

    Returns:
        One row for each rule, with the largest load of a rank, transfers included.
    """
    units = modules_of(layout)
    return tuple(_row(layout, units, name, source, _cuts(rule)) for name, source, rule in _rules(layout, units))


def partitions(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """Give the stage of each node by each rule that makes a cut: what a search's shortlist should not be behind.

    Rules that take long where there are many modules are left out there.
    """
    units, stages = modules_of(layout), layout.settings.stages
    rules = _rules(layout, units)
    if len(units) ** 2 * stages > MANY:
        rules = tuple(entry for entry in rules if entry[0] not in SLOW)
    cuts = (_cuts(rule) for _, _, rule in rules)
    return tuple(dict.fromkeys(_stages(layout, units, each) for each in cuts if not isinstance(each, str)))


Rule = Callable[[], list[int]]
SLOW = ("DeepSpeed parameters", "torchgpipe")
MANY = 200_000  # modules squared times stages


def _rules(layout: Layout, units: Sequence[PeerModule]) -> tuple[tuple[str, str, Rule], ...]:
    stages, repeated = layout.settings.stages, [unit.is_repeated for unit in units]
    return (
        ("DeepSpeed parameters", "partition_balanced", lambda: balanced([u.parameters for u in units], stages)),
        ("DeepSpeed uniform", "partition_uniform", lambda: uniform(len(units), stages)),
        ("torchtitan", "generate_llm_fqn_per_model_part", lambda: counted(repeated, stages)),
        ("Megatron", "get_num_layers_to_build", lambda: divided(repeated, stages)),
        ("torchgpipe", "balance_by_time", lambda: block_partition([unit.seconds for unit in units], stages)),
    )


class NoCutError(ValueError):
    """The rule makes no cut of this model into so many stages."""


def _cuts(rule: Rule) -> list[int] | str:
    try:
        return rule()
    except NoCutError as error:
        return str(error)


def _row(layout: Layout, units: Sequence[PeerModule], name: str, source: str, cuts: list[int] | str) -> Baseline:
    if isinstance(cuts, str):
        return Baseline(name, source, remark=cuts)
    stage_of = _stages(layout, units, cuts)
    if any(stage_of[before] > stage_of[after] for before, after in layout.problem.edges):
        return Baseline(name, source, remark="its order of modules is not one of calling")
    measured = measure(layout.problem, stage_of, placement=layout.placement)
    bottleneck = max(measured.rank_loads)
    mean = math.fsum(measured.rank_loads) / len(measured.rank_loads)
    stages = tuple(tuple(unit.name for unit in units[a:b]) for a, b in pairwise(cuts))
    return Baseline(
        name,
        source,
        bottleneck,
        bottleneck / mean if mean else 1.0,
        math.ceil(max(measured.rank_memory)),
        "a stage is empty" if any(low == high for low, high in pairwise(cuts)) else "",
        stages,
    )


def _stages(layout: Layout, units: Sequence[PeerModule], cuts: Sequence[int]) -> tuple[int, ...]:
    stage_of = [0] * len(layout.layers)
    for stage, (low, high) in enumerate(pairwise(cuts)):
        for unit in units[low:high]:
            for node in unit.nodes:
                stage_of[node] = stage
    return tuple(stage_of)


def uniform(count: int, stages: int) -> list[int]:
    """Give equal numbers of modules, the first stages one more: DeepSpeed's ``uniform``.

    >>> uniform(7, 3)
    [0, 3, 5, 7]
    """
    if count <= stages:
        return [min(stage, count) for stage in range(stages + 1)]
    size, more = divmod(count, stages)
    return [0, *accumulate(size + (stage < more) for stage in range(stages))]


def balanced(weights: Sequence[float], stages: int) -> list[int]:
    """Make the difference between the heaviest and the lightest stage small: DeepSpeed's ``parameters``.

    A dynamic programme over prefixes that keeps, for each, one partition of least difference, the last of equals.

    >>> balanced([4, 1, 1, 1, 1], 2)
    [0, 1, 5]
    """
    count = len(weights)
    if count <= stages:
        return uniform(count, stages)
    sums = [0.0, *accumulate(map(float, weights))]
    heaviest, lightest, cut = {(0, 0): 0.0}, {(0, 0): math.inf}, {}
    for end in range(1, count + 1):
        for parts in range(1, min(end, stages) + 1):
            for start in range(end):
                if (start, parts - 1) not in heaviest:
                    continue
                size = sums[end] - sums[start]
                high, low = max(heaviest[start, parts - 1], size), min(lightest[start, parts - 1], size)
                key = end, parts
                if key not in heaviest or high - low <= heaviest[key] - lightest[key]:
                    heaviest[key], lightest[key], cut[key] = high, low, start
    cuts = [count]
    for parts in range(stages, 0, -1):
        cuts.append(cut[cuts[-1], parts])
    return cuts[::-1]


def counted(repeated: Sequence[bool], stages: int) -> list[int]:
    """Give equal numbers of blocks, where what comes before and behind them counts as one each: torchtitan.

    Args:
        repeated: For each module whether it is a block.
        stages: Number of stages.

    >>> counted([False, True, True, True, True, False], 3)
    [0, 2, 4, 6]
    """
    blocks = [index for index, is_block in enumerate(repeated) if is_block]
    if not blocks:
        raise NoCutError("counts repeated blocks, and the model has none")
    size, more = divmod(len(blocks) + 2, stages)
    if stages > 1 and size < 1:
        raise NoCutError(f"needs {stages - 2} blocks or more")
    sizes = [size + (stage < more) for stage in range(stages)]
    sizes[0] -= 1
    sizes[-1] -= 1
    return _at_blocks(blocks, sizes, len(repeated))


def divided(repeated: Sequence[bool], stages: int) -> list[int]:
    """Give equal numbers of blocks, the rest to the ends: Megatron, which wants them to divide evenly.

    >>> divided([False, True, True, True, True, False], 2)
    [0, 3, 6]
    """
    blocks = [index for index, is_block in enumerate(repeated) if is_block]
    if not blocks or len(blocks) % stages:
        raise NoCutError(f"needs a multiple of {stages} blocks, not {len(blocks)}")
    return _at_blocks(blocks, [len(blocks) // stages] * stages, len(repeated))


def _at_blocks(blocks: Sequence[int], sizes: Sequence[int], count: int) -> list[int]:
    """Cut before the first block of each stage but the first; a last stage without blocks begins behind the last."""
    firsts = accumulate(sizes[:-1])
    return [0, *(blocks[first] if first < len(blocks) else blocks[-1] + 1 for first in firsts), count]


def block_partition(sizes: Sequence[float], stages: int) -> list[int]:
    """Move ends of stages until the largest exceeds the smallest by no more than one module: torchgpipe.

    Sizes are scaled to [0, 1]. While the largest stage is more than 1 above the smallest, the smallest stage nearest to
    it takes one module from its neighbour on that side.

    >>> block_partition([1, 2, 3, 4, 5, 6], 2)
    [0, 4, 6]
    """
    count = len(sizes)
    if count < stages:
        raise NoCutError(f"needs {stages} modules, there are {count}")
    # Exact, and not divided by the range: a difference of one module that rounds to more would be moved for ever.
    low = Fraction(min(sizes))
    above = [Fraction(size) - low for size in sizes]
    found = _moved(above, stages, closest=False)
    return found if found is not None else _moved(above, stages, closest=True) or uniform(count, stages)


def _moved(above: Sequence[Fraction], stages: int, *, closest: bool) -> list[int] | None:
    """Move ends until the stages are even enough; None where that would never end.

    Args:
        above: Size of each module above the smallest.
        stages: Number of stages.
        closest: Whether the closest of equally small stages grows, as in the paper, or the first, as in torchgpipe,
            which may go round in circles.
    """
    count, one = len(above), max(above)
    ends = [count // stages * (stage + 1) for stage in range(stages - 1)] + [count]
    seen: set[tuple[int, ...]] = set()
    while True:
        own = _totals(above, ends)
        largest = max(range(stages), key=lambda stage: (own[stage], stage))
        while True:
            own = _totals(above, ends)
            smallest = min(range(stages), key=lambda stage: (own[stage], abs(stage - largest) if closest else stage))
            if own[largest] <= own[smallest] + one:
                return [0, *ends] if ends == sorted(ends) else None
            if (*ends, largest) in seen or not 0 <= min(ends) <= max(ends) <= count:
                return None
            seen.add((*ends, largest))
            if largest < smallest:
                giver = smallest - 1
                ends[giver] -= 1
            else:
                giver = smallest + 1
                ends[smallest] += 1
            if giver == largest:
                break


def _totals(above: Sequence[Fraction], ends: Sequence[int]) -> list[Fraction]:
    return [sum(above[start:end], Fraction()) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
