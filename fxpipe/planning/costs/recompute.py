"""Which modules are recomputed in the backward, and which layers lie in them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence

from fxpipe.errors import PlanError
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.hardware import Training
from fxpipe.planning.costs.blocks import find_blocks


def recomputed_modules(graph: LayerGraph, training: Training) -> tuple[str, ...]:
    """Give the FQNs of the modules that ``training.recompute`` names, none inside another, in the model's order.

    Raises:
        PlanError: A pattern matches no module.
    """
    if training.recompute is None:
        return ()
    if training.recompute == "block":
        return tuple(dict.fromkeys(block.fqn for block in find_blocks(graph) if block.is_repeated))
    known = tuple(dict.fromkeys(_modules(graph)))
    found: set[str] = set()
    for pattern in training.recompute:
        matching = [fqn for fqn in known if fnmatch.fnmatchcase(fqn, pattern)]
        if not matching:
            raise PlanError(
                f"recompute= names {pattern!r}, which no module of {graph.name} matches\n"
                "  give patterns of FQNs such as 'model.layers.*' or 'model.layers.*.mlp'"
            )
        found.update(matching)
    return outermost(fqn for fqn in known if fqn in found)


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


def recomputed_layers(graph: LayerGraph, training: Training) -> dict[int, str]:
    """Give for each layer that lies in a recomputed module that module, call by call where it is a block."""
    if training.recompute == "block":
        return {layer: block.name for block in find_blocks(graph) if block.is_repeated for layer in block.layers}
    modules = set(recomputed_modules(graph, training))
    found: dict[int, str] = {}
    for layer, spec in enumerate(graph.specs):
        owner = next((fqn for fqn in _owners(spec.fqn) if fqn in modules), None)
        if owner is not None and layer not in graph.recomputed:
            found[layer] = owner
    return found


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
