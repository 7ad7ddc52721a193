"""Blocks of a layer graph: which layers belong together, call by call."""

from __future__ import annotations

from dataclasses import dataclass

from fxpipe.ir.graph import LayerGraph


@dataclass(frozen=True, slots=True)
class Block:
    """One call of one block.

    Attributes:
        name: FQN, with ``@1``, ``@2`` … for later calls.
        layers: Indices of its layers, ascending; recomputed ones are not among them.
    """

    name: str
    layers: tuple[int, ...]

    @property
    def fqn(self) -> str:
        """The block's FQN, whichever call it is."""
        return self.name.partition("@")[0]

    @property
    def is_repeated(self) -> bool:
        """Whether it is one of several of a kind, by its name: an entry of a list."""
        return self.fqn.rpartition(".")[2].isdigit()


def find_blocks(graph: LayerGraph) -> tuple[Block, ...]:
    """Group the layers of each call of each block, in the order of their first layers.

    A block whose calls have one name is told apart by what runs between them. Layers that nothing orders (of modules
    that are never called) go with the first call.
    """
    if not graph.blocks:
        return ()
    free = frozenset(graph.recomputed)
    ordered = {layer for edge in (*graph.edges, *graph.free_edges) for layer in edge}
    members: dict[str, list[int]] = {}
    calls: dict[str, int] = {}
    last_name, current = "", ""
    for layer, name in enumerate(graph.blocks):
        if layer in free or (layer not in ordered and len(graph.specs) > 1):
            continue
        is_whole = bool(name) and graph.specs[layer].fqn == name.partition("@")[0]
        if name and (name != last_name or is_whole):
            call = calls.get(name, 0)
            calls[name] = call + 1
            current = f"{name}@{call}" if call else name
        if name:
            members.setdefault(current, []).append(layer)
        last_name = name
    for layer, name in enumerate(graph.blocks):
        if name and layer not in free and layer not in ordered and len(graph.specs) > 1:
            members.setdefault(name, []).append(layer)
    return tuple(Block(name, tuple(sorted(layers))) for name, layers in members.items())


def block_names(graph: LayerGraph) -> tuple[str, ...]:
    """Give for each layer the name of its block's call, or ``""``."""
    names = [""] * len(graph.specs)
    for block in find_blocks(graph):
        for layer in block.layers:
            names[layer] = block.name
    return tuple(names)
