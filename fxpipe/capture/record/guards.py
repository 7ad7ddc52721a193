"""Reads of values that depend on inputs: each becomes a guard, or is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxpipe._torch import FakeTensor, without_functions, without_modes
from fxpipe.capture.calls.blocked import Blocked, user_line
from fxpipe.capture.calls.forms import canonical
from fxpipe.capture.calls.reads import READS, answer_of, is_plain
from fxpipe.capture.calls.scalars import Scalar
from fxpipe.capture.calls.values import tensors_in
from fxpipe.capture.record.forward import Forward, Guard
from fxpipe.capture.record.frames import Frame
from fxpipe.capture.record.node import NodeInfo, info, reached, set_info


def guard_read(
    forward: Forward,
    func: Any,
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    result: Any,
    frame: Frame,
) -> None:
    """Make a read of a value that depends on an input a guard.

    Args:
        forward: The forward.
        func: The call that reads.
        name: Its name.
        args: Its arguments.
        kwargs: Its keyword arguments.
        result: What Python got.
        frame: The module call it is made in.

    Raises:
        Blocked: A random number is read, or memory is handed out, or what a closed module computes.
    """
    if name not in READS and (name != "__format__" or args[0].dim() > 0) and is_plain(result):
        return
    recorder, tensors = forward.recorder, tensors_in(args, kwargs)
    nodes = [recorder.node_of(tensor, frame) for tensor in tensors if recorder.knows(tensor)]
    if name in READS and any(info(node).random for node in nodes):
        raise Blocked(f"{name}() reads a random number: the path changes by chance", frame.fqn)
    real = any(not isinstance(tensor, FakeTensor) for tensor in tensors)
    if not real or not any(info(node).from_input for node in nodes):
        return
    if name not in READS and name != "__format__":
        raise Blocked(f"{name}() hands out the memory of a tensor that depends on an input", frame.fqn)
    _refuse_unread(nodes)
    op, target, given = canonical(func, name, args)
    node = recorder.call(op, target, given, kwargs, frame, layer="")
    _add(forward, node, answer_of(result))


def guard_integers(forward: Forward, args: Sequence[Any], frame: Frame) -> bool:
    """Guard all values of the integers among arguments; False where they are not known."""
    integers = [tensor for tensor in tensors_in(tuple(args)) if not tensor.is_floating_point()]
    if not integers or any(isinstance(tensor, FakeTensor) for tensor in integers):
        return False
    for tensor in integers:
        source = forward.recorder.node_of(tensor, frame)
        if info(source).from_input:
            _refuse_unread([source])
            node = forward.recorder.call("call_method", "tolist", (tensor,), {}, frame, layer="")
            with without_modes(), without_functions():
                _add(forward, node, answer_of(tensor.tolist()))
    return True


def guard_shape(forward: Forward, node: fx.Node, result: Any) -> None:
    """Guard the shapes of what a call gave, where values that depend on an input decided about them."""
    if not info(node).from_input:
        return
    for part in result if isinstance(result, tuple | list) else (result,):
        if isinstance(part, torch.Tensor) and not isinstance(part, FakeTensor):
            source = forward.recorder.node_of(part, forward.frames.top)
            _refuse_unread([source])
            shape = forward.recorder.graph.create_node("call_function", getattr, (source, "shape"))
            set_info(shape, NodeInfo(from_input=True))
            _add(forward, shape, tuple(part.shape))


def _add(forward: Forward, node: fx.Node, answer: Any) -> None:
    info(node).is_guard = True
    forward.guards.append(Guard(node, answer, user_line()))


def _refuse_unread(nodes: Sequence[fx.Node]) -> None:
    """Refuse to guard what a module called as a whole computes: its inside must be known to be read again."""
    for node in reached(nodes):
        if node.op == "call_module":
            fqn = str(node.target)
            raise Blocked("the forward reads a value that it computes", fqn, opens=[fqn])


class Numbers:
    """Writes down what a forward does with the Python numbers among its inputs.

    Args:
        forward: The forward.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def inputs(self, numbers: Mapping[str, float]) -> dict[str, Scalar]:
        """Add an input for each number."""
        graph = self._forward.recorder.graph
        found = {}
        for name, value in numbers.items():
            node = graph.create_node("placeholder", name)
            set_info(node, NodeInfo(from_input=True, number=value))
            found[name] = Scalar(value, node, self)
        return found

    def made(self, function: Callable[..., Any], args: tuple[Any, ...], value: float) -> Any:
        """Note that a number was computed of others."""
        if self._forward.counting:
            return value
        return Scalar(value, self._noted(function, args, value), self)

    def read(self, function: Callable[..., Any], args: tuple[Any, ...], answer: Any) -> None:
        """Make what Python saw of a number a guard."""
        forward = self._forward
        nodes = tuple(arg.node if type(arg) is Scalar else arg for arg in args)
        known = any(guard.node.target is function and guard.node.args == nodes for guard in forward.guards)
        if not forward.counting and not known:
            _add(forward, self._noted(function, args, answer), answer)

    def _noted(self, function: Callable[..., Any], args: tuple[Any, ...], value: float) -> fx.Node:
        nodes = tuple(arg.node if type(arg) is Scalar else arg for arg in args)
        node = self._forward.recorder.graph.create_node("call_function", function, nodes)
        set_info(node, NodeInfo(from_input=True, number=value))
        return node
