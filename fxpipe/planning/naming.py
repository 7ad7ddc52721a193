"""What a person calls the layers of a stage: the model's own modules, a whole one in place of all that lies in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fxpipe.ir.graph import LayerGraph


def part_names(
    graph: LayerGraph, stage_of: Sequence[int], seconds: Sequence[float], num_stages: int
) -> tuple[tuple[str, ...], ...]:
    """Name what lies in each stage as a person would.

    Args:
        graph: The layers.
        stage_of: The stage of each.
        seconds: What each takes.
        num_stages: How many there are.

    Returns:
        For each stage, in the model's order, the FQNs of modules: the outermost that lie in it whole. Operations
        between modules, and what stages compute for themselves (masks, tables), are left out; a stage of nothing but
        operations goes by the one that takes longest.

    >>> from fxpipe.ir.spec import LayerSpec
    >>> names = ["wte", "h.0.attn", "h.0.add", "h.1", "add"]
    >>> graph = LayerGraph("Net", tuple(LayerSpec.captured(name, name) for name in names), operations=(2, 4))
    >>> part_names(graph, [0, 0, 0, 1, 2], [1.0] * 5, 3)
    (('wte', 'h.0'), ('h.1',), ('add',))
    """
    free, operations = frozenset(graph.recomputed), frozenset(graph.operations)
    fqns = [spec.fqn for spec in graph.specs]
    called = {layer for edge in (*graph.edges, *graph.free_edges) for layer in edge} or set(range(len(fqns)))
    named = [layer for layer in range(len(fqns)) if layer not in free and (layer in called or layer not in operations)]
    stages: dict[str, set[int]] = {}  # where what lies in a module is
    for layer in named:
        for owner in owners(fqns[layer]):
            stages.setdefault(owner, set()).add(stage_of[layer])
    found: list[dict[str, None]] = [{} for _ in range(num_stages)]
    longest: dict[int, int] = {}
    for layer in named:
        fqn, stage = fqns[layer], stage_of[layer]
        inside = list(owners(fqn))[1:] if layer in operations else list(owners(fqn))
        whole = [owner for owner in inside if len(stages[owner]) == 1]
        if whole or layer not in operations:
            found[stage][whole[-1] if whole else fqn] = None
        elif stage not in longest or seconds[layer] > seconds[longest[stage]]:
            longest[stage] = layer
    return tuple(
        tuple(names) or ((fqns[longest[stage]],) if stage in longest else ()) for stage, names in enumerate(found)
    )


def owners(fqn: str) -> Iterator[str]:
    """Yield a name and the names of all modules around it, the innermost first.

    >>> list(owners("h.0.attn"))
    ['h.0.attn', 'h.0', 'h']
    """
    while fqn:
        yield fqn
        fqn = fqn.rpartition(".")[0]
