"""Each layer by itself: what to call and with what, for measuring how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxpipe.capture.graph.layers import find_layers
from fxpipe.capture.graph.structure import Structure
from fxpipe.capture.record.node import function_of, info, is_constant
from fxpipe.capture.record.observe import Observation
from fxpipe.ir.cost import LayerCounts
from fxpipe.ir.spec import layer_name
from fxpipe.ir.tensor import TensorMeta


class Weight:
    """Stands for a parameter or buffer among the arguments of a layer; a leaf, so no dataclass."""

    __slots__ = ("meta",)

    def __init__(self, meta: TensorMeta) -> None:
        self.meta = meta


class Activation:
    """Stands for a tensor that a layer is given; a leaf, so no dataclass."""

    __slots__ = ("meta", "strides")

    def __init__(self, meta: TensorMeta, strides: tuple[int, ...] = ()) -> None:
        self.meta = meta
        self.strides = strides


@dataclass(frozen=True, slots=True, eq=False)
class LayerAlone:
    """One layer, ready to be called.

    Attributes:
        name: The layer's name in plans.
        counts: What it does; layers that do the same take the same time.
        call: The user's module (with fake tensors), or a function.
        args: Its arguments; ``Weight`` and ``Activation`` stand for tensors.
        kwargs: Its keyword arguments, likewise.
    """

    name: str
    counts: LayerCounts
    call: nn.Module | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def layers_alone(observation: Observation, structure: Structure) -> list[LayerAlone]:
    """Give every layer of a capture that is not recomputed."""
    layers = find_layers(structure)
    root = observation.recorder.skeleton.module
    constants = observation.recorder.constants
    found = []
    for key, nodes in zip(layers.keys, layers.nodes, strict=True):
        node = next((node for node in nodes if info(node).counts is not None), None)
        counts = info(node).counts if node is not None else None
        if node is None or counts is None or node in structure.derived:
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda arg: _stand_in(arg, constants))
        found.append(LayerAlone(layer_name(*key), counts, function_of(node, root), args, kwargs))
    return found


def _stand_in(node: fx.Node, constants: Mapping[str, Any]) -> Any:
    known = info(node)
    if is_constant(node):
        return constants[str(node.target)]
    if known.container:
        parts = [_stand_in(part, constants) for part in node.args if isinstance(part, fx.Node)]
        return node.target(*parts)  # type: ignore[operator]
    if known.tensor is None:
        return None
    return Weight(known.tensor) if node.op == "get_attr" else Activation(known.tensor, known.strides)
