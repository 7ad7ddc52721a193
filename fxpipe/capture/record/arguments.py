"""Arguments of calls as a graph can hold them: tensors become nodes, odd objects constants, containers calls."""

from __future__ import annotations

import copy
import enum
import functools
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxpipe.capture.calls.blocked import Blocked
from fxpipe.capture.calls.scalars import Scalar, holds_scalar
from fxpipe.capture.calls.symbols import Sized
from fxpipe.capture.calls.values import describe, filled, has_tensor, without_tensors
from fxpipe.capture.model.held import held_by
from fxpipe.capture.record.frames import Frame
from fxpipe.capture.record.node import NodeInfo, info, set_info


class Arguments:
    """Turns arguments into what nodes hold.

    Args:
        graph: Gets the calls that put containers together.
        generators: ``id`` of the random generators that the model keeps.
        node_of: Gives the node that owns a tensor.
        constant: Gives the node of an object.
        size: Gives the node of a number that was computed of sizes.
    """

    def __init__(
        self,
        graph: fx.Graph,
        generators: Collection[int],
        node_of: Callable[[torch.Tensor, Frame], fx.Node],
        constant: Callable[[Any], fx.Node],
        size: Callable[[Sized], fx.Node],
    ) -> None:
        self._graph = graph
        self._generators = generators
        self._node_of = node_of
        self._constant = constant
        self._size = size
        self._copies: dict[int, tuple[Any, Any, Any]] = {}  # of objects: the object, what it held, a copy of it

    def lift(self, value: Any, frame: Frame, reads: list[fx.Node]) -> Any:
        """Turn an argument into what a node can hold: tensors into nodes, odd objects into constants."""
        if type(value) is Scalar:
            reads.append(value.node)
            return value.node
        if isinstance(value, torch.Tensor):
            node = self._node_of(value, frame)
            reads.append(node)
            return node
        if isinstance(value, torch.SymInt):
            value = Sized.of(value)
        if isinstance(value, Sized):
            node = self._size(value)
            reads.append(node)
            return node
        if isinstance(value, LITERALS) or value is Ellipsis:
            return value
        if type(value) in (tuple, list, torch.Size):
            items = [self.lift(item, frame, reads) for item in value]
            return items if type(value) is list else tuple(items)
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {key: self.lift(item, frame, reads) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self.lift(part, frame, reads) for part in (value.start, value.stop, value.step)))
        if has_tensor(value) or holds_scalar(value):
            return self._rebuilt(value, frame, reads)
        node = self._constant(self._checked(value, frame))
        reads.append(node)
        if isinstance(value, torch.Generator):
            info(node).shared_object = True  # whose state all that draw from it share
        return node

    def _checked(self, value: Any, frame: Frame) -> Any:
        """Give what may stand for an object in the graph: itself, or a copy of it as it is now.

        Raises:
            Blocked: It cannot be shared by all microbatches and stages.
        """
        if isinstance(value, torch.Generator):
            if id(value) not in self._generators:
                raise Blocked("it makes a random generator of its own", frame.fqn)
            return value
        if isinstance(value, nn.Module):
            raise Blocked(f"a {type(value).__qualname__} is passed on: modules cannot be recorded", frame.fqn)
        held = held_by(value)
        if held is not None:
            what = f"a tensor {describe(held)}" if isinstance(held, torch.Tensor) else f"a {type(held).__qualname__}"
            kind = "function" if callable(value) else type(value).__qualname__
            raise Blocked(f"a {kind} is passed on that holds {what}", frame.fqn)
        if is_harmless(value):
            return value
        known = self._copies.get(id(value))
        now = repr(sorted(vars(value).items(), key=str)) if hasattr(value, "__dict__") else repr(value)
        if known is None or known[1] != now:
            try:
                known = self._copies[id(value)] = (value, now, copy.deepcopy(value))
            except Exception as error:  # whatever a foreign __deepcopy__ raises
                raise Blocked(f"a {type(value).__qualname__} is passed on that cannot be copied", frame.fqn) from error
        return known[2]

    def _rebuilt(self, value: Any, frame: Frame, reads: list[fx.Node]) -> fx.Node:
        """Add a call that puts a container of the user's own kind (a dataclass, a ``ModelOutput``) together."""
        template, tensors = without_tensors(value, also=Scalar)
        if not tensors:
            raise Blocked(
                f"a {type(value).__qualname__} that holds tensors is passed on: Python objects cannot be recorded",
                frame.fqn,
            )
        nodes = [self.lift(tensor, frame, reads) for tensor in tensors]
        node = self._graph.create_node("call_function", _rebuilder(template), tuple(nodes))
        from_input = any(info(part).from_input for part in nodes)
        set_info(node, NodeInfo(call=frame.call, container=True, from_input=from_input))
        reads.append(node)
        return node


def _rebuilder(template: Any) -> Callable[..., Any]:
    """Make a function that puts tensors into the places of a template."""

    def rebuild(*tensors: Any) -> Any:
        return filled(template, tensors)

    return rebuild


LITERALS = (
    *(type(None), bool, int, float, complex, str, bytes),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def is_harmless(value: Any) -> bool:
    """Whether an object argument can be shared by all stages: nothing in it changes from call to call."""
    kinds = (enum.Enum, type, range, frozenset, np.generic, np.ndarray, functools.partial)
    return isinstance(value, kinds) or callable(value) or type(value).__module__ in ("torch", "torch.torch_version")
