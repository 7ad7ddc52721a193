"""Reads of values that depend on inputs: each becomes a guard, or is refused."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn

from fxpipe._torch import FakeTensor, without_functions, without_modes
from fxpipe.capture.calls.blocked import Blocked, user_line
from fxpipe.capture.calls.forms import canonical
from fxpipe.capture.calls.reads import READS, answer_of, is_plain
from fxpipe.capture.calls.values import has_tensor, tensors_in
from fxpipe.capture.model.held import has_hooks
from fxpipe.capture.record.forward import Forward, Guard, Selected
from fxpipe.capture.record.frames import Frame
from fxpipe.capture.record.node import NodeInfo, function_of, info, made_by, reached, set_info

_ASKING = frozenset({"numel", "nelement", "__len__", "size", "stride"})
"""Calls that tell Python how large a tensor is."""
_TAKING_APART = frozenset(
    {"unbind", "chunk", "split", "tensor_split", "split_with_sizes", "__iter__", "hsplit", "vsplit", "dsplit"}
)
"""Calls that give as many tensors as another has along a dimension."""

_WITHOUT_SIZES = frozenset(
    {
        *("dim", "ndimension", "is_floating_point", "is_complex", "is_signed", "is_inference", "is_conj", "is_neg"),
        *("element_size", "get_device", "register_hook", "requires_grad_", "__setitem__", "__set__", "__hash__"),
    }
)
"""Calls that give Python no tensor and say nothing of sizes."""


class _WatchedSize:
    """A size that says when it is read. It is no ``int``: C would read one without a word."""

    __slots__ = ("ask", "value")

    def __init__(self, value: int, ask: Callable[[], None]) -> None:
        self.value, self.ask = value, ask

    def read(self) -> int:
        """Give the size."""
        self.ask()
        return self.value


def _heard(function: Callable[..., Any], *, turned: bool = False) -> Callable[..., Any]:
    def method(size: _WatchedSize, *others: Any) -> Any:
        numbers = (size.read(), *map(_read, others))
        return function(*(reversed(numbers) if turned else numbers))

    return method


def _read(size: Any) -> Any:
    return size.read() if type(size) is _WatchedSize else size


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and_", "or_", "xor"):
    setattr(_WatchedSize, f"__{_name.strip('_')}__", _heard(getattr(operator, _name)))
    setattr(_WatchedSize, f"__r{_name.strip('_')}__", _heard(getattr(operator, _name), turned=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "invert", "index"):
    setattr(_WatchedSize, f"__{_name}__", _heard(getattr(operator, _name)))
for _function in (hash, repr, str, format, int, float, bool, complex, abs, round, divmod):
    setattr(_WatchedSize, f"__{_function.__name__}__", _heard(_function))


class WatchedShape(tuple[Any, ...]):
    """A shape that says when Python looks at one of its sizes that values decide about.

    Where C compares, searches, hashes or formats the tuple, it finds objects in it that say so themselves.
    """

    @classmethod
    def of(cls, shape: Iterable[int], varying: Iterable[int], ask: Callable[[], None]) -> WatchedShape:
        """Give a shape, the places of sizes that vary, and whom to tell."""
        places = frozenset(varying)
        return cls(_WatchedSize(size, ask) if place in places else size for place, size in enumerate(shape))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """It passes for a ``torch.Size``."""
        return torch.Size

    def __getitem__(self, place: Any) -> Any:
        """Give one size, or some."""
        found = super().__getitem__(place)
        return WatchedShape(found) if isinstance(place, slice) else _read(found)

    def __iter__(self) -> Iterator[int]:
        """Give all sizes."""
        return map(_read, super().__iter__())

    def numel(self) -> int:
        """Give the product, as ``torch.Size`` does."""
        return torch.Size(self).numel()

    def __repr__(self) -> str:
        """Give what a ``torch.Size`` gives."""
        return repr(torch.Size(self))

    __str__ = __repr__

    def __format__(self, how: str) -> str:
        """Give what a ``torch.Size`` gives."""
        return format(torch.Size(self), how)

    def __add__(self, other: Any) -> Any:
        """Give a plain shape."""
        return torch.Size(self) + other if isinstance(other, tuple) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        """Give a plain shape."""
        return other + torch.Size(self) if isinstance(other, tuple) else NotImplemented

    def __mul__(self, times: Any) -> Any:
        """Give a plain shape."""
        return torch.Size(self) * times

    __rmul__ = __mul__

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as a plain shape."""
        return torch.Size, (tuple(self),)


def asked_shape(forward: Forward, tensor: torch.Tensor, shape: torch.Size) -> Any:
    """Give a tensor's shape, so that Python is noticed when it looks at a size that values decide about."""
    if forward.passes or not forward.recorder.made_here(tensor):
        return shape
    varying = _varying(forward, forward.recorder.node_of(tensor, forward.frames.top))
    return WatchedShape.of(shape, varying, lambda: guard_selected(forward, tensor)) if varying else shape


def looked_into(value: Any) -> Any:
    """Give arguments with plain shapes; those that were not looked into are now."""
    if type(value) is WatchedShape:
        return torch.Size(value)
    if type(value) is _WatchedSize:
        return value.read()
    if type(value) in (tuple, list):
        return type(value)(looked_into(part) for part in value)
    if type(value) is dict:
        return {key: looked_into(part) for key, part in value.items()}
    return value


def note_selection(forward: Forward, node: fx.Node, args: Any, kwargs: Any, result: Any) -> None:
    """Note a call the shape of whose result values of inputs decide about: a later question for it is a guard."""
    if not info(node).from_input:
        return
    recorder, frame = forward.recorder, forward.frames.top
    own = [part for part in tensors_in(result) if not isinstance(part, FakeTensor)]
    given = [each for each in tensors_in(args, kwargs) if not isinstance(each, FakeTensor) and recorder.made_here(each)]
    with without_modes(), without_functions():  # as they are now: a mask may be written to later
        forward.selections.made[node] = [(recorder.node_of(each, frame), each.clone()) for each in own or given]
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
    varying = _varying(forward, node)
    if not varying or (dim is not None and dim % tensor.dim() not in varying):
        return
    above = selections.above(node)
    for each in [each for each in selections.made if each in above and each not in selections.asked]:
        selections.asked.add(each)
        for node, answer in _sizes_read(forward, each):
            _add(forward, node, answer)


def guards_of_sizes(forward: Forward) -> dict[fx.Node, Selected]:
    """Give the values whose size values of inputs decide about unknown to Python, with the guards of that size.

    They are needed where it passes from one stage to the next.
    """
    selections = forward.selections
    if not selections.made.keys() - selections.asked:
        return {}
    made: dict[fx.Node, tuple[Guard, ...]] = {}
    for each in [each for each in selections.made if each not in selections.asked]:
        with suppress(Blocked):  # computed in a module called as a whole: nothing tells its size before it runs
            made[each] = tuple(Guard(node, answer) for node, answer in _sizes_read(forward, each))
    for guard in (guard for guards in made.values() for guard in guards):
        info(guard.node).is_guard = True
    found = {}
    for node in [node for node in forward.recorder.graph.nodes if not info(node).is_guard]:
        above = selections.above(node)
        dims = _varying(forward, node) if any(each in above for each in made) else ()
        if dims:
            guards = tuple(guard for each, guards in made.items() if each in above for guard in guards)
            if guards:
                found[node] = Selected(dims, guards)
    return found


def _sizes_read(forward: Forward, selection: fx.Node) -> Iterator[tuple[fx.Node, Any]]:
    """Yield reads that tell how much a call selects, with the answers: of what selects, as the selection saw it."""
    graph, is_result = forward.recorder.graph, selection in forward.selections.known
    for source, selecting in forward.selections.made[selection]:
        if not info(source).from_input:
            continue
        _refuse_unread([source])
        is_count = selecting.dtype == torch.bool or _is_repeat(selection)
        with without_modes(), without_functions():
            with graph.inserting_after(source if is_result else selection):  # before what is written later
                if is_result:
                    node, answer = _reading(forward, "call_method", "size", (source, 0), selection), selecting.shape[0]
                elif is_count:
                    node = _reading(forward, "call_method", "sum", (source,), selection)
                    answer = int(selecting.sum())
                else:
                    node = _reading(forward, "call_method", "tolist", (source,), selection)
                    answer = answer_of(selecting.tolist())
            if not is_result and is_count:
                with graph.inserting_after(node):
                    node = _reading(forward, "call_method", "item", (node,))
        yield node, answer


def guard_sizes(
    forward: Forward,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: Sequence[torch.Tensor],
    result: Any,
) -> None:
    """Make guards of the sizes that a call tells Python, where values decide about them.

    Args:
        forward: The forward.
        name: Name of the call.
        args: Its arguments.
        kwargs: Its keyword arguments.
        tensors: The tensors among those.
        result: What it gave.
    """
    if name in _ASKING or name in _TAKING_APART:
        guard_selected(forward, tensors[0], _dimension(name, args, kwargs))
    elif not has_tensor(result) and name not in _WITHOUT_SIZES:
        for tensor in tensors:
            guard_selected(forward, tensor)


def _dimension(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Give the dimension whose size Python is told; None where it is told all, or will ask."""
    if name == "__len__" or name == "__iter__":
        return 0
    found = kwargs.get("dim", args[-1] if len(args) > 1 and name == "size" else None)
    return found if isinstance(found, int) else None


def varies(forward: Forward, tensor: torch.Tensor) -> bool:
    """Whether values decide about a size of a tensor, and no guard holds it yet."""
    known = forward.selections.made and not forward.passes and forward.recorder.made_here(tensor)
    return bool(known and _varying(forward, forward.recorder.node_of(tensor, forward.frames.top)))


_TRIED: tuple[Callable[[int], int], ...] = (lambda n: n + 1, lambda n: 2 * n + 3, lambda n: 1, lambda n: 0)
"""Other numbers of selected elements: one more, many, one (where at most some are kept), and none."""


def _varying(forward: Forward, node: fx.Node) -> tuple[int, ...]:
    """Give the dimensions of a node's value whose size values decide about, and no guard holds yet.

    The calls between the selection and the node are made again with other numbers of selected elements.
    """
    selections, meta = forward.selections, info(node).tensor
    if meta is None or selections.above(node) <= selections.asked:
        return ()
    selections.tried = selections.tried or tuple({} for _ in _TRIED)
    if node not in selections.dims:
        found: set[int] = set()
        for size, values in zip(_TRIED, selections.tried, strict=True):
            shape = _tried_shape(forward, node, values, size)
            if shape is not None:
                found.update(place for place, extent in enumerate(meta.shape) if shape[place] != extent)
            elif size is not _TRIED[-1]:  # much that is right refuses to work on nothing
                found.update(range(len(meta.shape)))
        selections.dims[node] = tuple(sorted(found))
    return selections.dims[node]


def _tried_shape(
    forward: Forward, node: fx.Node, values: dict[fx.Node, Any], size: Callable[[int], int]
) -> tuple[int, ...] | None:
    """Give the shape of a node's value for another number of selected elements; None where it cannot be told."""
    counting, forward.counting = forward.counting, True
    try:
        with without_functions(), forward.skeleton.mode, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that are not the user's own
            missing = reached([node], lambda each: [read for read in each.all_input_nodes if read not in values])
            for each in forward.recorder.graph.nodes:
                if each in missing and each not in values:
                    values[each] = _tried_value(forward, each, values, size)
            shape = tuple(values[node].shape)
    except Exception:  # whatever calls raise that are given what they never get
        return None
    finally:
        forward.counting = counting
    meta = info(node).tensor
    return shape if meta is not None and len(shape) == len(meta.shape) else None


def _tried_value(forward: Forward, node: fx.Node, values: dict[fx.Node, Any], size: Callable[[int], int]) -> Any:
    """Give what stands for a node's value: of a shape of its own only, or made of others that stand for theirs."""
    selections, known = forward.selections, info(node)
    if not selections.above(node) or made_by(node) in selections.made:
        if known.tensor is None:
            return known.number if known.number is not None else forward.recorder.constants.get(str(node.target))
        one = node in selections.made and (len(node.args) < 2 or isinstance(node.args[1], fx.Node))
        dims = (_repeated_dim(node, len(known.tensor.shape)),) if one else range(len(known.tensor.shape))
        places = dims if selections.above(node) else ()
        shape = [size(extent) if place in places else extent for place, extent in enumerate(known.tensor.shape)]
        return torch.empty(shape, dtype=getattr(torch, known.tensor.dtype))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    function = function_of(node, forward.skeleton.module)
    if isinstance(function, nn.Module) and (
        next(function.buffers(), None) is not None or any(map(has_hooks, function.modules()))
    ):
        raise LookupError(f"{node.target} may write to its buffers, and its hooks may keep what it gives")
    return function(*args, **kwargs)


def _is_repeat(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", node.target) == "repeat_interleave" and len(node.args) > 1


def _repeated_dim(node: fx.Node, dims: int) -> int:
    """Give the dimension along which a call selects: the first, or that in which it repeats."""
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None) if _is_repeat(node) else None
    return dim % dims if isinstance(dim, int) else 0


def _reading(
    forward: Forward, op: str, target: Any, args: tuple[Any, ...], selection: fx.Node | None = None
) -> fx.Node:
    """Add a call that reads what a selection was given or gave, as the selection saw it."""
    node = forward.recorder.graph.create_node(op, target, args)
    set_info(node, NodeInfo(from_input=True, after=info(selection).after if selection is not None else ()))
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
