"""Recomputation (activation checkpointing): which modules it is of, and what it adds to the backward.

What it saves is told by ``costs.memory``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from fxpipe.errors import PartitionError
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
    - patterns: every module, and every layer, whose FQN matches one of them.
    - ``None`` and ``"auto"`` (chosen by the planner): none.

    Raises:
        PartitionError: A pattern matches nothing.
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
    free = frozenset(graph.recomputed)
    modules: dict[str, None] = {}
    for layer, spec in enumerate(graph.specs):
        if layer not in free:
            parts = spec.fqn.split(".")
            modules.update(dict.fromkeys(".".join(parts[: length + 1]) for length in range(len(parts))))
    chosen: dict[str, None] = {}
    for pattern in choice:
        matching = [pattern] if pattern in modules else [name for name in modules if fnmatchcase(name, pattern)]
        if not matching:
            raise PartitionError(
                f"recompute names {pattern!r}, and {graph.name} has no such module at this grain\n"
                f"  give FQNs of its modules, such as {', '.join(map(repr, list(modules)[:4]))}, or patterns of them"
            )
        chosen.update(dict.fromkeys(matching))
    return tuple(name for name in modules if name in chosen and not _within(name, chosen))


def _within(name: str, others: Collection[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in others for length in range(1, len(parts)))


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
