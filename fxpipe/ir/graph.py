"""The model as an ordered graph of layers: who makes which tensor, who reads it, what each layer costs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import networkx as nx

from fxpipe.ir.cost import LayerCounts
from fxpipe.ir.spec import LayerSpec, TensorInfo
from fxpipe.ir.tensor import TensorMeta


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor that a layer makes and others read; it travels where a boundary lies between them.

    Attributes:
        name: FX node that makes it.
        producer: Index of the layer that makes it.
        readers: Indices of the layers that read it, ascending; for a model output the last layer counts as a reader.
        meta: Shape and dtype for one microbatch.
    """

    name: str
    producer: int
    readers: tuple[int, ...]
    meta: TensorMeta


@dataclass(frozen=True, slots=True)
class Tie:
    """One tensor under several FQNs, or called at several places.

    Attributes:
        key: The first FQN.
        fqns: All FQNs of the tensor, in the model's order; one FQN when a module is called several times.
        layers: Indices of the layers that use it.
        nbytes: Bytes of the tensor.
        trainable: Whether gradients are summed over its holders.
    """

    key: str
    fqns: tuple[str, ...]
    layers: tuple[int, ...]
    nbytes: int
    trainable: bool = True


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor between layers, or one that enters the model, that layers keep for their backward.

    A stage keeps it once, however many of its layers do.

    Attributes:
        name: FX node that makes it: of a ``Value``, of a recomputed layer, or of a model input. Views of one tensor
            are that tensor.
        meta: Shape and dtype for one microbatch.
        layers: Indices of the layers whose backward needs it, ascending.
    """

    name: str
    meta: TensorMeta
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerGraph:
    """An ordered graph of layers.

    Attributes:
        name: The model's class name.
        specs: One spec per layer, in the order the model calls them; layers that are never called come last.
        values: Tensors between layers.
        edges: ``(earlier, later)`` pairs of layers, those of ``values`` and those that only order.
        free_edges: ``(earlier, later)`` pairs whose earlier layer is recomputed; nothing travels along them.
        recomputed: Layers (masks, position ids, rotary tables) that every stage which reads them runs for itself.
        groups: Layers that must share a stage (an in-place write and its target).
        blocks: For each layer the FQN of the block it lies in (its own where it is one), or ``""``; ``@1``, ``@2`` …
            for later calls of one block, as layer names have it.
        ties: Shared tensors.
        counts: For each layer what it does for one microbatch; empty until counted.
        operations: Layers that are no modules: operations between modules, and tensors of the model's own.
        saved: Tensors that layers keep for their backward besides their own; empty where ``counts`` alone tell.
        inputs: Name, shape and dtype of each input tensor of one microbatch, as text.
        batch_size: Samples per microbatch, None without an example.
        notes: What the report should say about the capture.
    """

    name: str
    specs: tuple[LayerSpec, ...]
    values: tuple[Value, ...] = ()
    edges: tuple[tuple[int, int], ...] = ()
    free_edges: tuple[tuple[int, int], ...] = ()
    recomputed: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    blocks: tuple[str, ...] = ()
    ties: tuple[Tie, ...] = ()
    counts: tuple[LayerCounts, ...] = ()
    inputs: tuple[str, ...] = ()
    batch_size: int | None = None
    notes: tuple[str, ...] = field(default=())
    saved: tuple[SavedTensor, ...] = ()
    operations: tuple[int, ...] = ()

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Give each layer's name: its FQN, with ``@1``, ``@2`` … for later calls of one module."""
        return tuple(spec.layer_name for spec in self.specs)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Give every parameter and buffer once per FQN, by FQN."""
        found = {info.fqn: info for spec in self.specs for info in (*spec.parameters, *spec.buffers)}
        return tuple(found[fqn] for fqn in sorted(found))

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the model's class name and tensors: the same at every grain and in every process."""
        text = repr([self.name, *((t.fqn, t.shape, t.dtype) for t in self.tensors)])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def digraph(self) -> nx.DiGraph[int]:
        """Give the graph to networkx: nodes are spec indices with ``layer``, edges carry the ``values`` that cross."""
        graph: nx.DiGraph[int] = nx.DiGraph(name=self.name)
        for index, layer_name in enumerate(self.layer_names):
            graph.add_node(index, layer=layer_name)
        for earlier, later in (*self.edges, *self.free_edges):
            graph.add_edge(earlier, later, values=())
        for value in self.values:
            for reader in value.readers:
                if reader != value.producer:
                    crossing = (
                        graph.edges[value.producer, reader]["values"] if graph.has_edge(value.producer, reader) else ()
                    )
                    graph.add_edge(value.producer, reader, values=(*crossing, value))
        return graph
