"""Recomputation (activation checkpointing): which modules it is of, and what it adds to the backward.

What it saves is told by ``costs.memory``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from fxpipe.errors import PlanError
from fxpipe.ir.cost import LayerCost, LayerCounts
from fxpipe.ir.graph import LayerGraph
from fxpipe.planning.costs.blocks import find_blocks

Choice = str | tuple[str, ...] | None
"""As ``Training.recompute``."""


def recomputed_modules(graph: LayerGraph, choice: Choice) -> tuple[str, ...]:
    """Give the FQNs of the modules that a choice recomputes, in the model's order; none lies within another.

    - ``"block"``: every repeated block.
    - ``"attention"``: in each block the innermost modules that call attention or softmax; a block without one whole,
      as is one that is a layer by itself, since what lies in it is not known.
    - patterns: every module whose FQN matches one of them. Of one that lies inside of a layer nothing is known, and
      the layer counts as if it kept everything.
    - ``None`` and ``"auto"`` (chosen by the planner): none.

    Raises:
        PlanError: A pattern matches no module.
    """
    if choice is None or choice == "auto":
        return ()
    repeated = [block for block in find_blocks(graph) if block.is_repeated]
    if choice == "block":
        return tuple(dict.fromkeys(block.fqn for block in repeated))
    if choice == "attention":
        found: dict[str, None] = {}
        for block in repeated:
            inside = (_attention_module(graph, layer, block.fqn) for layer in block.layers)
            found.update(dict.fromkeys(name for name in inside if name) or {block.fqn: None})
        return tuple(found)
    modules = dict.fromkeys(_modules(graph))
    chosen: set[str] = set()
    for pattern in choice:
        matching = [pattern] if pattern in modules else [name for name in modules if fnmatchcase(name, pattern)]
        if not matching:
            raise PlanError(
                f"recompute= names {pattern!r}, which no module of {graph.name} matches\n"
                "  give patterns of FQNs such as 'model.layers.*' or 'model.layers.*.mlp'"
            )
        chosen.update(matching)
    return outermost(name for name in modules if name in chosen)


def outermost(fqns: Iterable[str]) -> tuple[str, ...]:
    """Leave out what lies inside another one.

    >>> outermost(["h.0", "h.0.mlp", "h.1.mlp"])
    ('h.0', 'h.1.mlp')
    """
    ordered = tuple(dict.fromkeys(fqns))
    every = set(ordered)
    return tuple(fqn for fqn in ordered if every.isdisjoint(list(_owners(fqn))[1:]))


def modules_of_layers(names: Sequence[str], modules: Iterable[str]) -> tuple[str, ...]:
    """Give those modules that hold one of some layers, or lie in one.

    Args:
        names: Names of layers, or of blocks.
        modules: FQNs.

    >>> modules_of_layers(["h.0", "h.1.attn@1"], ["h.0.mlp", "h.1", "h.2"])
    ('h.0.mlp', 'h.1')
    """
    layers = {name.partition("@")[0] for name in names}
    around = {owner for layer in layers for owner in _owners(layer)}
    return tuple(fqn for fqn in modules if fqn in around or not layers.isdisjoint(_owners(fqn)))


def _owners(fqn: str) -> Iterator[str]:
    """Yield a module and all that it lies in."""
    while fqn:
        yield fqn
        fqn = fqn.rpartition(".")[0]


def _modules(graph: LayerGraph) -> Iterator[str]:
    """Yield every module that is a layer or has tensors, and all that these lie in."""
    for spec in graph.specs:
        yield from reversed(list(_owners(spec.fqn)))
        for info in (*spec.parameters, *spec.buffers):
            yield from reversed(list(_owners(info.fqn.rpartition(".")[0])))


def _attention_module(graph: LayerGraph, layer: int, block: str) -> str:
    """Give the module inside a block that a layer's attention is called in, or ``""``."""
    if not graph.counts or not _attends(graph.counts[layer]):
        return ""
    spec = graph.specs[layer]
    is_module = spec.type_path.rpartition(":")[2].rpartition(".")[2][:1].isupper()
    name = spec.fqn if is_module else spec.fqn.rpartition(".")[0]
    return name if name.startswith(f"{block}.") else ""


def _attends(counts: LayerCounts) -> bool:
    return bool(counts.attention) or any("softmax" in op.name and op.phase == "forward" for op in counts.ops)


def checkpoints(graph: LayerGraph, modules: Collection[str]) -> dict[int, str]:
    """Give for each layer of a recomputed module what it is recomputed with: one call of that module.

    Args:
        graph: The layers.
        modules: FQNs (``recomputed_modules``).
    """
    if not modules:
        return {}
    chosen = frozenset(modules)
    free = frozenset(graph.recomputed)
    found: dict[int, str] = {}
    blocks = {layer: block for block in find_blocks(graph) for layer in block.layers}
    named = {block.fqn for block in blocks.values()}
    for layer, spec in enumerate(graph.specs):
        if layer in free:
            continue
        block = blocks.get(layer)
        parts = spec.fqn.split(".")
        around = [".".join(parts[: i + 1]) for i in range(len(parts))]
        # What lies in a block is told by the graph, and what else lies in a module by its name.
        own = [block.fqn] if block is not None else []
        name = next((n for n in own + [n for n in around if n not in named] if n in chosen), None)
        if name is not None:
            call = block.name.partition("@")[2] if block is not None else str(spec.call or "")
            found[layer] = f"{name}@{call}" if call else name
    return found


def with_recompute(graph: LayerGraph, costs: Sequence[LayerCost], modules: Collection[str]) -> tuple[LayerCost, ...]:
    """Add the forward of every layer in a recomputed module to its backward, before the gradients of its inputs."""
    inside = checkpoints(graph, modules)
    return tuple(
        replace(cost, input_grad_s=cost.input_grad_s + cost.forward_s) if layer in inside else cost
        for layer, cost in enumerate(costs)
    )
