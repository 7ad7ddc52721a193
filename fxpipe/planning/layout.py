"""From a costed layer graph to the problem that is partitioned."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fxpipe.ir.cost import LayerCost
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.tensor import TensorMeta
from fxpipe.planning.costs.blocks import Block, find_blocks
from fxpipe.planning.costs.estimate import Estimate
from fxpipe.planning.costs.memory import LayerMemory, Shared, layer_memory
from fxpipe.planning.costs.precision import Precision, precision_of
from fxpipe.planning.costs.recompute import recomputed_modules
from fxpipe.planning.search.learned import Learned
from fxpipe.planning.search.problem import PartitionProblem, Placement, TiedNodes, TransferValue
from fxpipe.planning.settings import Settings


@dataclass(frozen=True, slots=True)
class Layout:
    """A graph laid out for the search.

    Attributes:
        graph: The layers.
        costs: Seconds of each layer.
        settings: What was asked for.
        precision: Dtypes in training.
        memory: Bytes of each part.
        layers: Layer of each node of the problem; recomputed layers have none.
        blocks: Calls of blocks, as nodes of the problem.
        problem: Everything but the blocks' cohesion.
        placement: Ranks, live microbatches, links.
        anchors: Nodes that have parameters.
        recomputed: FQNs of the modules that are recomputed, in the model's order.
        learned: What searches of this graph learn for one another.
    """

    graph: LayerGraph
    costs: tuple[LayerCost, ...]
    settings: Settings
    precision: Precision
    memory: LayerMemory
    layers: tuple[int, ...]
    blocks: tuple[Block, ...]
    problem: PartitionProblem
    placement: Placement
    anchors: tuple[int, ...]
    recomputed: tuple[str, ...] = ()
    learned: Learned = field(default_factory=Learned, compare=False, repr=False)

    def grouped(self, opened: Collection[str] = ()) -> PartitionProblem:
        """Give the problem with every block whole but those named (by call, or by FQN)."""
        groups = [
            block.layers for block in self.blocks if not {block.name, block.fqn} & set(opened) and len(block.layers) > 1
        ]
        return replace(self.problem, groups=(*self.problem.groups, *groups))

    def stages(self, stage_of_node: Sequence[int]) -> tuple[int, ...]:
        """Give the stage of each layer; recomputed ones, which run wherever they are needed, get -1."""
        stages = [-1] * len(self.graph.specs)
        for node, layer in enumerate(self.layers):
            stages[layer] = stage_of_node[node]
        return tuple(stages)

    def cut_blocks(self, stage_of_node: Sequence[int]) -> tuple[Block, ...]:
        """Give the blocks that lie in several stages."""
        return tuple(block for block in self.blocks if len({stage_of_node[node] for node in block.layers}) > 1)


def make_layout(graph: LayerGraph, estimate: Estimate, settings: Settings) -> Layout:
    """Lay out nodes, values, groups and ties with their seconds and bytes.

    Recomputed layers are free and travel with their readers. A value costs latency and bytes on the link, and its
    gradient the same where one flows. A tie costs its share of one all-reduce per step.

    Args:
        graph: The layers.
        estimate: Seconds of each layer.
        settings: Schedule, hardware, training.
    """
    precision = precision_of(graph, settings.training)
    memory = layer_memory(graph, settings.training, precision)
    free = frozenset(graph.recomputed)
    layers = tuple(layer for layer in range(len(graph.specs)) if layer not in free)
    node_of = {layer: node for node, layer in enumerate(layers)}
    names = graph.layer_names
    activation = [memory.activation[layer] for layer in layers]
    edges = dict.fromkeys((node_of[a], node_of[b]) for a, b in graph.edges if a in node_of and b in node_of and a != b)
    for value, kept in zip(graph.values, memory.values, strict=True):
        if value.producer in node_of:
            activation[node_of[value.producer]] += kept.by_producer
    values = _moved(graph, node_of, memory, precision, (settings.near_link, settings.far_link), timed=estimate.is_time)
    edges.update(dict.fromkeys((value.nodes[0], reader) for value in values for reader in value.nodes[1:]))
    edges.update(_edges_to_last(graph, node_of, edges))
    groups = [tuple(node_of[layer] for layer in group if layer in node_of) for group in graph.groups]
    problem = PartitionProblem(
        seconds=tuple(estimate.costs[layer].seconds for layer in layers),
        edges=tuple(edges),
        values=values,
        memory=tuple(memory.static[layer] for layer in layers),
        activation=tuple(activation),
        groups=tuple(group for group in groups if len(group) > 1),
        ties=tuple(_tie(shared, node_of, estimate, settings) for shared in memory.shared),
        names=tuple(names[layer] for layer in layers),
    )
    blocks = tuple(
        Block(block.name, tuple(node_of[layer] for layer in block.layers if layer in node_of))
        for block in find_blocks(graph)
    )
    anchors = tuple(node for node, layer in enumerate(layers) if graph.specs[layer].parameters)
    recomputed = recomputed_modules(graph, settings.training.recompute)
    return Layout(
        graph, estimate.costs, settings, precision, memory, layers, blocks, problem, settings.placement, anchors,
        recomputed,
    )  # fmt: skip


def _moved(
    graph: LayerGraph,
    node_of: Mapping[int, int],
    memory: LayerMemory,
    precision: Precision,
    links: tuple[tuple[float, float], tuple[float, float]],
    *,
    timed: bool,
) -> tuple[TransferValue, ...]:
    """Give what may move between stages, its producer first: seconds over a near and a far link, and bytes kept."""
    found = []
    for value, kept in zip(graph.values, memory.values, strict=True):
        readers = [node_of[layer] for layer in value.readers if layer in node_of and layer != value.producer]
        if value.producer not in node_of or not readers:
            continue
        meta = precision.meta(value.meta)
        near_s, far_s = (transfer_s(meta, link) if timed else 0.0 for link in links)
        nodes = node_of[value.producer], *dict.fromkeys(readers)
        found.append(
            TransferValue(near_s, nodes, far_s, kept.sent, kept.received, kept.sent_buffer, kept.received_buffer)
        )
    return tuple(found)


def _edges_to_last(
    graph: LayerGraph, node_of: Mapping[int, int], edges: Collection[tuple[int, int]]
) -> dict[tuple[int, int], None]:
    """Order everything before the last layer that is called: results leave the model in the last stage."""
    called = {layer for value in graph.values for layer in (value.producer, *value.readers)}
    called |= {layer for edge in (*graph.edges, *graph.free_edges) for layer in edge}
    last = max((node_of[layer] for layer in called if layer in node_of), default=None)
    sources = {before for before, _ in edges}
    sinks = [node for layer, node in node_of.items() if layer in called and node not in sources and node != last]
    return {} if last is None else {(sink, last): None for sink in sinks if sink < last}


def transfer_s(meta: TensorMeta, link: tuple[float, float]) -> float:
    """Give the seconds a link is busy with a tensor in one microbatch: forward, and its gradient back.

    Args:
        meta: The tensor.
        link: Bytes per second and latency in seconds.

    >>> transfer_s(TensorMeta((1000,), "float32", requires_grad=True), (1e9, 0.0))
    8e-06
    """
    bandwidth, latency = link
    if not meta.nbytes:
        return 0.0
    return (latency + meta.nbytes / bandwidth) * (2 if meta.requires_grad else 1)


def tie_seconds(gradient_bytes: int, ranks: Sequence[int], settings: Settings) -> float:
    """Give the seconds of adding up a tied tensor's gradient over the ranks that hold it, once per step.

    A ring all-reduce. Source: Thakur, Rabenseifner, Gropp 2005, Int. J. High Perform. Comput. Appl. 19(1), 49-66.
    """
    training = settings.training
    share = training.data_parallel if training.fsdp else 1  # a sharded gradient is added up shard by shard
    return settings.hardware.all_reduce_s(gradient_bytes / share, tuple(settings.global_rank(rank) for rank in ranks))


def _tie(shared: Shared, node_of: dict[int, int], estimate: Estimate, settings: Settings) -> TiedNodes:
    """Price a tie for two holders at the two ends of the pipeline: the usual ones, and the farthest."""
    seconds = 0.0
    if estimate.is_time and shared.gradient_bytes and len(shared.layers) > 1:
        seconds = tie_seconds(shared.gradient_bytes, (0, settings.ranks - 1), settings) / settings.num_microbatches
    nodes = tuple(node_of[layer] for layer in shared.layers if layer in node_of)
    return TiedNodes(nodes, shared.bytes, seconds, shared.live_bytes)
