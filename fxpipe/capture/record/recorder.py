"""The graph as it grows: tensors and the nodes that own them, constants, writes, and the state around each call."""

from __future__ import annotations

import copy
import enum
import functools
import operator
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import fx, nn

from fxpipe._torch import FakeTensor, storage_key
from fxpipe.capture.model.held import held_by
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.frames import Frame
from fxpipe.ir.tensor import TensorMeta
from fxpipe.ir.tree import map_tree, tree_leaves
from fxpipe.program import AutocastState, CallContext

CONSTANT = "_constant_"
Role = Literal["aliases", "readers", "writers"]


class Blocked(BaseException):
    """The forward does something here that cannot be recorded.

    Not an ``Exception``: the user's own ``except Exception`` must not turn it into another path through the model.

    Args:
        reason: What it is, as a clause.
        fqn: The module it happens in.
        opens: Modules, recorded as one call, to be opened; empty where one that is opened should be closed.
        way_out: What the user can do about it, where neither helps.
    """

    def __init__(self, reason: str, fqn: str, *, opens: Sequence[str] = (), way_out: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.fqn = fqn
        self.opens = tuple(opens)
        self.way_out = way_out
        self.where = ""


@dataclass(frozen=True, slots=True)
class Ambient:
    """Gradient, inference and autocast state around the forward."""

    grad_enabled: bool
    inference: bool
    autocast: tuple[AutocastState, ...]

    @classmethod
    def now(cls) -> Ambient:
        """Read the current state."""
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _autocast())

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make the gradient mode, and the CPU's autocast, as they were."""
        cpu = self.autocast[0]
        with (
            torch.set_grad_enabled(self.grad_enabled),
            torch.autocast("cpu", getattr(torch, cpu.dtype), cpu.enabled, cpu.cache_enabled),
        ):
            yield

    def difference(self) -> CallContext | None:
        """Give what is different now, None for nothing."""
        now = Ambient.now()
        if now == self:
            return None
        changed = tuple(state for state in now.autocast if state not in self.autocast)
        grad = None if now.grad_enabled == self.grad_enabled else now.grad_enabled
        return CallContext(grad, now.inference and not self.inference, changed)


def _autocast() -> tuple[AutocastState, ...]:
    states = []
    for device_type, name in (("cpu", ""), ("cuda", "cuda")):
        dtype = str(torch.get_autocast_dtype(device_type)).removeprefix("torch.")
        enabled = torch.is_autocast_enabled(device_type)
        states.append(AutocastState(name, enabled, dtype, torch.is_autocast_cache_enabled()))
    return tuple(states)


@dataclass(slots=True)
class Storage:
    """What is known of one storage: which nodes alias it, read it and wrote to it."""

    aliases: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)


class Recorder:
    """An fx graph under construction.

    Node ``meta``: ``"layer"`` and ``"call"`` name the layer, ``"tensor"`` describes its value (and ``"strides"``,
    where not contiguous), ``"storage"`` that value's storage, ``"after"`` the writes it sees in what it reads,
    ``"before"`` the readers that must not see its own write, ``"writes"`` the storages written (``"where"`` in the
    user's code), ``"tainted"`` whether it depends on an input, ``"context"`` the ``CallContext``, ``"frame"`` and
    ``"position"`` where random numbers are drawn.
    """

    def __init__(self, skeleton: Skeleton, ambient: Ambient) -> None:
        self.skeleton = skeleton
        self.ambient = ambient
        self.graph = fx.Graph(owning_module=skeleton.module)  # type: ignore[arg-type]
        self.constants: dict[str, Any] = {}
        self.constant_places: dict[str, str] = {}
        self.storages: dict[int, Storage] = {}
        self.region: int | None = None
        self.left: dict[int, tuple[torch.Tensor, str]] = {}  # what calls recorded whole left behind, and their FQN
        self._node_of: dict[int, fx.Node] = {}
        self._kept: list[Any] = []  # an id names a tensor only while the tensor lives
        self._attributes: dict[str, fx.Node] = {}
        self._constant_of: dict[int, str] = {}
        self._copies: dict[int, tuple[Any, Any, Any]] = {}  # of objects: the object, what it held, a copy of it
        self._trial: _Trial | None = None
        with skeleton.mode:
            self._usual_attributes = vars(torch.empty(0)).keys()

    # --- tensors and nodes ----------------------------------------------------------------------------------------

    def placeholder(self, name: str, tensor: torch.Tensor) -> None:
        """Add an input."""
        node = self.graph.create_node("placeholder", name)
        node.meta.update(tainted=True, layer="")
        self.bind(tensor, node)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Tell whether a node owns the tensor, or it is the model's own."""
        return id(tensor) in self._node_of or id(tensor) in self.skeleton.fqn_of

    def made_here(self, tensor: torch.Tensor) -> bool:
        """Tell whether the forward made a tensor (or was given it), in a call that was recorded."""
        return id(tensor) in self._node_of

    def is_written_after(self, node: fx.Node) -> bool:
        """Tell whether some call writes to a node's value that is not the node itself."""
        storage = self.storages.get(node.meta.get("storage", -1))
        return storage is not None and bool(storage.writers) and storage.writers[-1] is not node

    def name_of(self, tensor: torch.Tensor) -> str:
        """Say in words which tensor it is that a node owns, or the model."""
        node = self._node_of.get(id(tensor))
        if node is None:
            return self.skeleton.fqn_of[id(tensor)]
        if node.op == "placeholder":
            return f"the input {node.target!r}"
        return f"{describe(tensor)} of {node.meta.get('layer') or node.target}"

    def node_of(self, tensor: torch.Tensor, frame: Frame) -> fx.Node:
        """Give the node that owns a tensor; a parameter, buffer or constant gets one at its first use.

        Raises:
            Blocked: Nothing says where the tensor comes from.
        """
        node = self._node_of.get(id(tensor))
        if node is not None:
            return node
        fqn = self.skeleton.fqn_of.get(id(tensor))
        if fqn is not None:
            return self._attribute(fqn, tensor)
        if id(tensor) in self.left:
            maker = self.left[id(tensor)][1]
            what = f"a tensor {describe(tensor)} is read that module {maker} left behind"
            raise Blocked(what, frame.fqn, opens=[maker])
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            self.refuse_unfilled(tensor, frame.fqn)
        if tensor.requires_grad:
            self.refuse_hidden(tensor, frame.fqn)
        return self.constant(tensor)

    def refuse_unfilled(self, tensor: torch.Tensor, fqn: str) -> NoReturn:
        """Refuse a tensor without values that no call has made and that is none of the model's.

        Raises:
            Blocked: Always.
        """
        place = self.skeleton.plain.get(id(tensor), ("", tensor))[0]
        where = f"the plain attribute {place}" if place else f"a tensor {describe(tensor)}"
        raise Blocked(
            f"{where} has no values and no node that makes it",
            fqn,
            way_out="register it with register_buffer, or make it on a real device (device='cpu')" if place else "",
        )

    def refuse_hidden(self, tensor: torch.Tensor, fqn: str) -> NoReturn:
        """Refuse a tensor that takes a gradient and is none of the model's.

        Raises:
            Blocked: Always.
        """
        place = self.skeleton.plain.get(id(tensor), ("a closure or a global", tensor))[0]
        raise Blocked(
            f"a tensor {describe(tensor)} that takes a gradient is hidden in {place}",
            fqn,
            way_out="register it as a parameter of the module that reads it",
        )

    def _attribute(self, fqn: str, tensor: torch.Tensor) -> fx.Node:
        node = self._attributes.get(fqn)
        if node is None:
            node = self.graph.create_node("get_attr", fqn)
            node.meta.update(tainted=False, layer="")
            self._attributes[fqn] = node
            if self._trial is not None:
                self._trial.attributes.append(fqn)
            self.describe(node, tensor)
        return node

    def constant(self, value: Any) -> fx.Node:
        """Give the node of something that the graph reads and that is no parameter, buffer or literal."""
        name = self._constant_of.get(id(value))
        if name is None:
            name = f"{CONSTANT}{len(self.constants)}"
            self._constant_of[id(value)] = name
            self.constants[name] = value
            self.constant_places[name] = self.skeleton.plain.get(id(value), ("", None))[0]
        node = self._attributes.get(name)
        if node is None:
            node = self.graph.create_node("get_attr", name)
            node.meta.update(tainted=False, layer="")
            self._attributes[name] = node
            if self._trial is not None:
                self._trial.attributes.append(name)
            if isinstance(value, torch.Tensor):
                self.describe(node, value)
            self._kept.append(value)
        return node

    def bind(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """Make ``node`` the owner of a tensor: later readers read it."""
        if self._trial is not None:
            self._trial.owners.append((id(tensor), self._node_of.get(id(tensor))))
        self._node_of[id(tensor)] = node
        self._kept.append(tensor)
        self.describe(node, tensor)

    def describe(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """Note shape, dtype, strides and storage of a node's value."""
        node.meta["tensor"] = tensor_meta(tensor)
        if not tensor.is_contiguous() and is_dense(tensor):
            node.meta["strides"] = tuple(tensor.stride())
        storage = storage_of(tensor)
        if storage is not None:
            node.meta["storage"] = storage
            self._append(storage, "aliases", node)

    def _append(self, key: int, role: Role, node: fx.Node) -> None:
        nodes = getattr(self.storages.setdefault(key, Storage()), role)
        nodes.append(node)
        if self._trial is not None:
            self._trial.grown.append(nodes)

    def refresh(self) -> None:
        """Describe every tensor as it is at the end: a write may have made it, or its base, take a gradient."""
        for tensor in self._kept:
            if isinstance(tensor, torch.Tensor) and id(tensor) in self._node_of:
                node = self._node_of[id(tensor)]
                node.meta["tensor"] = tensor_meta(tensor)
                if vars(tensor).keys() - self._usual_attributes:
                    node.meta["object"] = True  # an attribute of the user's own is lost where it is sent

    # --- calls ----------------------------------------------------------------------------------------------------

    def call(
        self,
        op: str,
        target: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        frame: Frame,
        *,
        layer: str,
        call: int = 0,
        written: Iterable[torch.Tensor] = (),
    ) -> fx.Node:
        """Add a call; ``args`` and ``kwargs`` hold the tensors themselves."""
        reads: list[fx.Node] = []
        node_args = tuple(self.lift(value, frame, reads) for value in args)
        node_kwargs = {name: self.lift(value, frame, reads) for name, value in kwargs.items()}
        node = self.graph.create_node(op, target, node_args, node_kwargs)
        node.meta.update(layer=layer, call=call, tainted=any(read.meta.get("tainted") for read in reads))
        context = self.ambient.difference()
        if context is not None:
            node.meta["context"] = context
        if self.region is not None:
            node.meta["checkpoint"] = self.region
        node.meta["block"] = f"{frame.block}@{frame.block_call}" if frame.block_call else frame.block
        node.meta["reads"] = tuple(read for read in reads if is_activation(read))
        for read in reads:
            if read.meta.get("container"):
                read.meta.update(layer=layer, call=call)
        self._order(node, reads, written)
        return node

    def _order(self, node: fx.Node, reads: Sequence[fx.Node], written: Iterable[torch.Tensor]) -> None:
        """Note what must run before this call besides those whose values it takes: writes to what it reads."""
        after: dict[fx.Node, None] = {}
        for read in reads:
            storage = self.storages.get(read.meta.get("storage", -1))
            if storage is not None:
                after.update(dict.fromkeys(storage.writers[-1:]))
                self._append(read.meta["storage"], "readers", node)
        keys = sorted({key for key in map(storage_of, written) if key is not None})
        before: dict[fx.Node, None] = {}
        for key in keys:
            storage = self.storages.setdefault(key, Storage())
            after.update(dict.fromkeys(storage.writers[-1:]))
            before.update(dict.fromkeys(storage.readers))
            self._append(key, "writers", node)
        if after:
            node.meta["after"] = tuple(after)
        if keys:
            before.pop(node, None)
            node.meta.update(writes=tuple(keys), before=tuple(before), where=user_line())

    def emit(self, value: Any, node: fx.Node) -> None:
        """Bind every tensor in a call's result to the call, or to nodes that take them out (``meta["made"]``)."""
        self._emit(value, node)
        tensors = [leaf for _, leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        node.meta["made"] = tuple(self._node_of.get(id(tensor), node) for tensor in tensors)

    def _emit(self, value: Any, node: fx.Node) -> None:
        if isinstance(value, torch.Tensor):
            self._emit_tensor(value, node)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self._emit_item(item, node, operator.getitem, key)
        elif isinstance(value, tuple | list):
            for index, item in enumerate(value):
                self._emit_item(item, node, operator.getitem, index)
        elif is_dataclass(value) or has_attributes(value):
            for name, item in vars(value).items():
                self._emit_item(item, node, getattr, name)

    def _emit_item(self, item: Any, node: fx.Node, take: Callable[..., Any], key: Any) -> None:
        if has_tensor(item):
            part = self.graph.create_node("call_function", take, (node, key))
            part.meta.update(
                {
                    name: node.meta[name]
                    for name in ("layer", "call", "tainted", "checkpoint", "block")
                    if name in node.meta
                }
            )
            part.meta["part_of"] = node
            self._emit(item, part)

    def _emit_tensor(self, tensor: torch.Tensor, node: fx.Node) -> None:
        known = self._node_of.get(id(tensor))
        own = known.op in ("placeholder", "get_attr") if known is not None else id(tensor) in self.skeleton.fqn_of
        if known is not None and not isinstance(tensor, FakeTensor) and _maker(node).op == "call_module":
            own = True  # integers that pass through a module: Python may look at them
        if own and not node.meta.get("writes"):
            self.describe(node, tensor)
            return  # handed back unchanged: it stays the model's own, readable at every stage
        self.bind(tensor, node)

    # --- arguments ------------------------------------------------------------------------------------------------

    def lift(self, value: Any, frame: Frame, reads: list[fx.Node]) -> Any:
        """Turn an argument into what a node can hold: tensors into nodes, odd objects into constants."""
        if isinstance(value, torch.Tensor):
            node = self.node_of(value, frame)
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
        if has_tensor(value):
            return self._rebuilt(value, frame, reads)
        node = self.constant(self._checked(value, frame))
        reads.append(node)
        if isinstance(value, torch.Generator):
            node.meta["object"] = True  # whose state all that draw from it share
        return node

    def _checked(self, value: Any, frame: Frame) -> Any:
        """Give what may stand for an object in the graph: itself, or a copy of it as it is now.

        Raises:
            Blocked: It cannot be shared by all microbatches and stages.
        """
        if isinstance(value, torch.Generator):
            if id(value) not in self.skeleton.generators:
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
        tensors: list[torch.Tensor] = []

        def take(_: str, leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                tensors.append(leaf)
                return Slot(len(tensors) - 1)
            return leaf

        template = map_tree(take, value)
        if not tensors:
            raise Blocked(
                f"a {type(value).__qualname__} that holds tensors is passed on: Python objects cannot be recorded",
                frame.fqn,
            )
        nodes = [self.lift(tensor, frame, reads) for tensor in tensors]
        node = self.graph.create_node("call_function", rebuilder(template), tuple(nodes))
        node.meta.update(layer="", call=frame.call, container=True)
        node.meta["tainted"] = any(part.meta.get("tainted") for part in nodes)
        reads.append(node)
        return node

    # --- undoing --------------------------------------------------------------------------------------------------

    def begin_trial(self) -> None:
        """Remember this point; ``undo_trial`` goes back to it."""
        self._trial = _Trial(next(iter(reversed(self.graph.nodes)), None))

    def end_trial(self) -> None:
        """Keep what was recorded since ``begin_trial``."""
        self._trial = None

    def undo_trial(self) -> None:
        """Forget everything recorded since ``begin_trial``."""
        trial, self._trial = self._trial, None
        assert trial is not None
        for key, node in reversed(trial.owners):
            if node is None:
                self._node_of.pop(key, None)
            else:
                self._node_of[key] = node
        for name in trial.attributes:
            del self._attributes[name]
        for nodes in trial.grown:
            nodes.pop()
        for node in reversed(self.graph.nodes):
            if node is trial.last:
                break
            self.graph.erase_node(node)


@dataclass(slots=True)
class _Trial:
    """What was added since a point that may be gone back to."""

    last: fx.Node | None
    owners: list[tuple[int, fx.Node | None]] = field(default_factory=list)
    attributes: list[str] = field(default_factory=list)
    grown: list[list[fx.Node]] = field(default_factory=list)


def _maker(node: fx.Node) -> fx.Node:
    """Give the call in whose result a node's value was found."""
    while "part_of" in node.meta:
        node = node.meta["part_of"]
    return node


def is_activation(node: fx.Node) -> bool:
    """Whether a node's value is a tensor that is no parameter or buffer."""
    return "tensor" in node.meta and (node.op != "get_attr" or str(node.target).startswith(CONSTANT))


class Slot:
    """The place of a tensor in a template: a leaf, so no dataclass."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


def rebuilder(template: Any) -> Callable[..., Any]:
    """Make a function that puts tensors into the places of a template."""

    def rebuild(*tensors: Any) -> Any:
        return map_tree(lambda _, leaf: tensors[leaf.index] if isinstance(leaf, Slot) else leaf, template)

    return rebuild


LITERALS = (
    *(type(None), bool, int, float, complex, str, bytes),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def is_harmless(value: Any) -> bool:
    """Whether an object argument can be shared by all stages: nothing in it changes from call to call."""
    kinds = (enum.Enum, type, range, frozenset, np.generic, np.ndarray, functools.partial)
    return isinstance(value, kinds) or callable(value) or type(value).__module__ in ("torch", "torch.torch_version")


def has_tensor(value: Any) -> bool:
    """Tell whether a nested value holds a tensor."""
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, Mapping):
        return any(has_tensor(item) for item in value.values())
    if isinstance(value, tuple | list | set):
        return any(has_tensor(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return any(has_tensor(item) for item in vars(value).values())
    return False


def has_attributes(value: Any) -> bool:
    """Whether an object of the user's own keeps its parts in attributes."""
    return hasattr(value, "__dict__") and not isinstance(value, type | nn.Module | types.FunctionType)


def tensor_meta(tensor: torch.Tensor) -> TensorMeta:
    """Give shape, dtype and gradient flag."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorMeta(tuple(tensor.shape), dtype, tensor.requires_grad)


def describe(tensor: torch.Tensor) -> str:
    """Give shape and dtype for a message."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their storage without holes or overlap, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def user_line() -> str:
    """Give file and line of the user's code that is running: the innermost frame outside of torch and fxpipe."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("torch", "fxpipe", "contextlib", "functools"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def storage_of(tensor: torch.Tensor) -> int | None:
    """Give the identity of a tensor's storage; None for one without (sparse)."""
    return storage_key(tensor) if tensor.layout == torch.strided else None
