"""Reads of values that depend on inputs: each becomes a guard, or is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

ASKING = frozenset({"numel", "nelement", "__len__", "size", "stride"})
"""Calls that tell Python how large a tensor is."""
TAKING_APART = frozenset(
    {"unbind", "chunk", "split", "tensor_split", "split_with_sizes", "__iter__", "hsplit", "vsplit", "dsplit"}
)
"""Calls that give as many tensors as another has along a dimension."""


class WatchedShape(tuple[int, ...]):
    """A shape that says when Python looks at one of its sizes that values decide about."""

    varying: frozenset[int]
    ask: Callable[[], None]

    @classmethod
    def of(cls, shape: Iterable[int], varying: Iterable[int], ask: Callable[[], None]) -> WatchedShape:
        """Give a shape, the places of sizes that vary, and whom to tell."""
        found = cls(shape)
        found.varying, found.ask = frozenset(varying), ask
        return found

    def __getitem__(self, place: Any) -> Any:
        """Give one size, or some."""
        found = super().__getitem__(place)
        if isinstance(place, slice):
            kept = range(len(self))[place]
            return WatchedShape.of(found, (at for at, old in enumerate(kept) if old in self.varying), self.ask)
        if place % max(len(self), 1) in self.varying:
            self.ask()
        return found

    def __iter__(self) -> Iterator[int]:
        """Give all sizes."""
        for place, size in enumerate(super().__iter__()):
            if place in self.varying:
                self.ask()
            yield size

    def numel(self) -> int:
        """Give the product, as ``torch.Size`` does."""
        return torch.Size(self).numel()

    def __eq__(self, other: object) -> bool:
        """Compare all sizes."""
        self._all()
        return tuple.__eq__(self, other) if isinstance(other, tuple) else NotImplemented

    def __ne__(self, other: object) -> bool:
        """Compare all sizes."""
        return not self == other

    def __hash__(self) -> int:
        """Look at all sizes."""
        self._all()
        return tuple.__hash__(self)

    def __add__(self, other: Any) -> Any:
        """Give a plain shape."""
        return torch.Size((*self, *other))

    def __radd__(self, other: Any) -> Any:
        """Give a plain shape."""
        return torch.Size((*other, *self))

    def _all(self) -> None:
        if self.varying:
            self.ask()


def asked_shape(forward: Forward, tensor: torch.Tensor, shape: torch.Size) -> Any:
    """Give a tensor's shape, so that Python is noticed when it looks at a size that values decide about."""
    if forward.passes or not forward.recorder.made_here(tensor):
        return shape
    varying = forward.selections.varying(forward.recorder.node_of(tensor, forward.frames.top))
    return WatchedShape.of(shape, varying, lambda: guard_selected(forward, tensor)) if varying else shape


def looked_into(value: Any) -> Any:
    """Give arguments with plain shapes; those that were not looked into are now."""
    if isinstance(value, WatchedShape):
        return torch.Size(tuple(value))
    if type(value) in (tuple, list):
        return type(value)(looked_into(part) for part in value)
    if type(value) is dict:
        return {key: looked_into(part) for key, part in value.items()}
    return value


def note_selection(forward: Forward, node: fx.Node, args: Any, kwargs: Any, result: Any) -> None:
    """Note a call the shape of whose result values of inputs decide about: a later question for it is a guard."""
    if info(node).from_input:
        own = [part for part in tensors_in(result) if not isinstance(part, FakeTensor)]
        forward.selections.made[node] = own or [
            each
            for each in tensors_in(args, kwargs)
            if not isinstance(each, FakeTensor) and forward.recorder.made_here(each)
        ]
        if own:
            forward.selections.known.add(node)


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
            _add(forward, _reading(forward, "call_function", getattr, (source, "shape")), tuple(part.shape))


def guard_selected(forward: Forward, tensor: Any, dim: int | None = None) -> None:
    """Make a guard of the sizes that values decide about, where Python is told one of them.

    Args:
        forward: The forward.
        tensor: What Python asks for the size of.
        dim: The dimension it asks for; None: all of them.

    Raises:
        Blocked: What selects is computed in a module called as a whole.
    """
    selections, recorder = forward.selections, forward.recorder
    if not selections.made or forward.passes or not recorder.made_here(tensor):
        return
    node = recorder.node_of(tensor, forward.frames.top)
    varying = selections.varying(node)
    if not varying or (dim is not None and dim % tensor.dim() not in varying):
        return
    for each in selections.above(node):
        if each in selections.asked:
            continue
        selections.asked.add(each)
        for tensor in selections.made[each]:
            source = recorder.node_of(tensor, forward.frames.top)
            if not info(source).from_input:
                continue
            _refuse_unread([source])
            with without_modes(), without_functions():
                if each in selections.known:
                    _add(forward, _reading(forward, "call_method", "size", (source, 0)), tensor.shape[0])
                elif tensor.dtype == torch.bool:
                    total = _reading(forward, "call_method", "sum", (source,))
                    _add(forward, _reading(forward, "call_method", "item", (total,)), int(tensor.sum()))
                else:
                    _add(forward, _reading(forward, "call_method", "tolist", (source,)), answer_of(tensor.tolist()))


def _reading(forward: Forward, op: str, target: Any, args: tuple[Any, ...]) -> fx.Node:
    node = forward.recorder.graph.create_node(op, target, args)
    set_info(node, NodeInfo(from_input=True))
    return node


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
