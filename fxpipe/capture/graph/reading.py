"""Part of a recorded graph as one function of the inputs: what guards and weights of microbatches are read with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import fx

from fxpipe.capture.record.forward import Guard
from fxpipe.capture.record.node import reached
from fxpipe.capture.record.recorder import Recorder

Read: TypeAlias = Callable[[Mapping[str, Any]], Sequence[Any]]
"""Gives what Python read, from inputs by name."""


def reader_of(
    graph: fx.Graph, nodes: Sequence[fx.Node], constants: Mapping[str, Any], *, also: Sequence[fx.Node] = ()
) -> Callable[..., Any]:
    """Compile the calls that compute ``nodes`` from inputs and constants into one function of the named inputs.

    Args:
        graph: A recorded graph.
        nodes: What is asked for.
        constants: The graph's constants.
        also: Calls that are made for what they write.

    Returns:
        ``function(tensors) -> tuple`` of the nodes' values; ``tensors`` holds the inputs by name.
    """
    needed = reached([*nodes, *also])
    small = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    names = []
    ordered = [node for node in graph.nodes if node in needed]
    for node in sorted(ordered, key=lambda node: node.op != "placeholder"):
        if node.op == "placeholder":
            names.append(str(node.target))
            copies[node] = small.create_node("placeholder", str(node.target), name=node.name)
        else:
            copies[node] = small.node_copy(node, copies.__getitem__)
    small.output(tuple(copies[node] for node in nodes))
    module = fx.GraphModule(dict(constants), small)
    forward = module.forward

    def read(tensors: Mapping[str, Any]) -> Any:
        return forward(*(tensors[name] for name in names))

    return read


def read_again(recorder: Recorder, guards: Sequence[Guard]) -> Read | None:
    """Give what reads again what some guards read; None for none."""
    return reader_of(recorder.graph, [guard.node for guard in guards], recorder.constants) if guards else None
