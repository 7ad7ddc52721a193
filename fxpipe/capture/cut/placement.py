"""Which stage runs which layer of a recorded graph, by a plan that may have been made for another variant of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from networkx.utils import UnionFind
from torch import fx

from fxpipe.capture.graph.layers import Key, Layers, find_layers
from fxpipe.capture.graph.structure import Structure
from fxpipe.capture.record.node import info, is_own, sources
from fxpipe.errors import CaptureError
from fxpipe.ir.spec import layer_name

Holders = Mapping[str, Collection[int]]
"""The stages that hold each tensor of the model, by any of its names."""


def place_layers(
    structure: Structure,
    stage_of_layer: Mapping[str, int],
    num_stages: int,
    holders: Holders,
) -> dict[Key, int]:
    """Give the stage of every layer that is not derived.

    A module with tensors of the model runs where the plan has them, and so does an operation that writes to one; one
    that reads a tensor runs there or later, for the tensor can be sent along. Any other one follows the plan where it
    can, but another mask or another mode may make other calls than the plan knows, or the same under other names: it
    runs between the stages that make what it reads and those that read what it makes.

    Args:
        structure: The recorded graph.
        stage_of_layer: Stage of each layer of the plan, by name.
        num_stages: Number of stages.
        holders: Stages that hold each tensor of the model, by any of its names; without an entry it is where the layer
            is that reads it.

    Raises:
        CaptureError: A layer with tensors reads what a later stage makes.
    """
    return _Placement(structure, stage_of_layer, num_stages, holders).place()


class _Placement:
    def __init__(
        self,
        structure: Structure,
        stage_of_layer: Mapping[str, int],
        num_stages: int,
        holders: Holders,
    ) -> None:
        self.holders = holders
        self.layers: Layers = find_layers(structure)
        self.structure = structure
        self.whole = _held_whole(holders)
        self.planned = [
            self._planned(layer_name(*key), nodes, stage_of_layer)
            for key, nodes in zip(self.layers.keys, self.layers.nodes, strict=True)
        ]
        self.last = num_stages - 1
        self.unit = self._units()
        self.edges = self._edges()

    def _planned(self, name: str, nodes: tuple[fx.Node, ...], stage_of_layer: Mapping[str, int]) -> int | None:
        """Give the plan's stage of a layer, of one that it does not know that of the tensors of the model it reads."""
        stage = _planned(name, stage_of_layer)
        own = (read for node in nodes for read in node.all_input_nodes if stage is None and is_own(read))
        return next((found for read in own if (found := _planned(str(read.target), stage_of_layer)) is not None), stage)

    def _units(self) -> list[int]:
        """Give a common number to layers that must share a stage."""
        together = UnionFind(range(len(self.layers.keys)))
        for group in self.structure.groups:
            together.union(*(self.layers.index_of[node] for node in group))
        first = {index: min(unit) for unit in together.to_sets() for index in unit}
        return [first[index] for index in range(len(first))]

    def _edges(self) -> list[tuple[int, int]]:
        """List the pairs of layers whose stages are ordered, by the order of their readers."""
        index_of, derived = self.layers.index_of, self.structure.derived
        return list(
            dict.fromkeys(
                (index_of[source], index)
                for node, index in index_of.items()
                if node not in derived
                for source in (*sources(node), *info(node).before)
                if source in index_of and source not in derived and index_of[source] != index
            )
        )

    def place(self) -> dict[Key, int]:
        """Give the stages."""
        low, high = self._bounds()
        allowed = {self.unit[index]: stages for index, stages in self._choices().items()}
        wanted = dict(low)
        for unit, stage in zip(reversed(self.unit), reversed(self.planned), strict=True):
            wanted[unit] = wanted[unit] if stage is None else stage
        stages = {unit: min(max(stage, low[unit]), high[unit]) for unit, stage in wanted.items()}
        changed = True
        while changed:  # nothing runs before what it reads; never above ``high``, which grows along edges
            changed = False
            for unit, choice in allowed.items():
                stage = next((stage for stage in choice if stage >= stages[unit]), stages[unit])
                changed, stages[unit] = changed or stage != stages[unit], stage
            for source, reader in self.edges:
                if stages[self.unit[reader]] < stages[self.unit[source]]:
                    stages[self.unit[reader]] = stages[self.unit[source]]
                    changed = True
        return {
            key: stages[self.unit[index]]
            for index, key in enumerate(self.layers.keys)
            if not all(node in self.structure.derived for node in self.layers.nodes[index])
        }

    def _bounds(self) -> tuple[dict[int, int], dict[int, int]]:
        """Give the first and the last stage each unit may run on."""
        low = dict.fromkeys(self.unit, 0)
        high = dict.fromkeys(self.unit, self.last)
        cause: dict[int, int] = {}  # by unit: the layer whose stage is its lowest
        choices = self._choices()
        for index, stage in enumerate(self.planned):
            unit, first = self.unit[index], self._first_holder(self.layers.nodes[index])
            if first is not None:
                if first > low[unit]:
                    low[unit], cause[unit] = first, index
            elif index in choices:
                low[unit], high[unit] = max(low[unit], choices[index][0]), min(high[unit], choices[index][-1])
                cause.setdefault(unit, index)
            elif stage is not None and any(map(_holds_tensors, self.layers.nodes[index])):
                if stage > low[unit]:
                    low[unit], cause[unit] = stage, index
                high[unit] = min(high[unit], stage)
        changed = True
        while changed:
            changed = False
            for source, reader in self.edges:
                first, second = self.unit[source], self.unit[reader]
                if low[second] < low[first]:
                    low[second], cause[second] = low[first], cause[first]
                    changed = True
                    if low[second] > high[second]:
                        self._refuse(reader, high[second], cause[second], low[second])
            for source, reader in reversed(self.edges):
                first, second = self.unit[source], self.unit[reader]
                if high[first] > high[second]:
                    high[first] = high[second]
                    changed = True
        for unit, stage in low.items():
            if stage > high[unit]:
                self._refuse(unit, high[unit], cause[unit], stage)
        return low, high

    def _choices(self) -> dict[int, tuple[int, ...]]:
        """Give the stages of calls of modules that several stages hold whole, or others than the plan has a call on.

        A plan may not have one at all: a block that was one of its layers is opened, and calls a module of another.
        """
        found = {}
        for index, nodes in enumerate(self.layers.nodes):
            fqns = {str(node.target) for node in nodes if node.op == "call_module"}
            stages = self.whole.get(fqns.pop(), frozenset()) if len(fqns) == 1 else ()
            if len(stages) > 1 or (stages and self.planned[index] not in stages):
                found[index] = tuple(sorted(stages))
        return found

    def _first_holder(self, nodes: Sequence[fx.Node]) -> int | None:
        """Give the first stage that operations may run on which read tensors of the model; None for anything else."""
        own = list(dict.fromkeys(read for node in nodes for read in node.all_input_nodes if is_own(read)))
        stages = [self.holders.get(str(read.target), ()) for read in own]
        if not own or not all(stages) or any(node.op == "call_module" or info(node).shared_object for node in nodes):
            return None
        if any(info(read).shared_object for read in own) or _written(nodes, own):
            return None
        return max(min(each) for each in stages)

    def _refuse(self, index: int, stage: int, cause: int, late: int) -> None:
        name, other = (layer_name(*self.layers.keys[i]) for i in (index, cause))
        raise CaptureError(
            f"the model no longer follows its plan: {name} of stage {stage} reads what {other} of stage {late} makes\n"
            "  compile with an example (or in the mode) that takes this path: that plan serves the other one too"
        )


def _held_whole(holders: Holders) -> dict[str, frozenset[int]]:
    """Give the stages that hold every tensor of a module, by its name."""
    found: dict[str, frozenset[int]] = {}
    for name, stages in holders.items():
        for fqn in (name[:place] for place, letter in enumerate(name) if letter == "."):
            found[fqn] = found.get(fqn, frozenset(stages)).intersection(stages)
    return found


def _written(nodes: Sequence[fx.Node], own: Sequence[fx.Node]) -> bool:
    """Whether calls write to what some attributes read."""
    written = {storage for node in nodes for storage in info(node).writes}
    return any(info(read).storage in written for read in own)


def _holds_tensors(node: fx.Node) -> bool:
    """Whether a call needs tensors of the model, which lie on one stage."""
    if node.op == "call_module":
        return True
    return any(map(is_own, node.all_input_nodes))


def _planned(name: str, stage_of_layer: Mapping[str, int]) -> int | None:
    """Give the plan's stage of a layer: its own, else that of the block around it, else that of what lies inside it."""
    if name in stage_of_layer:
        return stage_of_layer[name]
    fqn, _, call = name.partition("@")
    parts = fqn.split(".")
    for length in range(len(parts) - 1, 0, -1):
        around = ".".join(parts[:length])
        for candidate in (layer_name(around, int(call or 0)), around):
            if candidate in stage_of_layer:
                return stage_of_layer[candidate]
    inside = {stage for other, stage in stage_of_layer.items() if other.startswith(f"{fqn}.")}
    return min(inside) if len(inside) == 1 else None
