"""The graph as it grows: tensors and the nodes that own them, constants, and writes.

Invariants, on which every number rests:

- Each tensor has at most one owner, the node whose value it is; who reads the tensor reads that node.
- An ``id`` names a tensor only while it lives: whatever is bound is kept.
- Nodes stand in the order of the calls. A call comes after all writes it sees (``after``), and a write after all
  readers that must not see it (``before``), whether or not a value passes between them.
- Nothing enters the graph that nobody can give again: each value is an input, the model's own, a constant, or made by
  a call in the graph.
- ``undo_trial`` leaves everything as ``begin_trial`` found it.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import fx

from fxpipe._torch import FakeTensor
from fxpipe.capture.calls.ambient import Ambient
from fxpipe.capture.calls.blocked import Blocked, user_line
from fxpipe.capture.calls.symbols import Sized, Symbols
from fxpipe.capture.calls.values import (
    Reach,
    describe,
    has_attributes,
    has_tensor,
    is_dense,
    storage_of,
    tensor_meta,
    tensors_in,
)
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.arguments import Arguments
from fxpipe.capture.record.frames import Frame
from fxpipe.capture.record.node import CONSTANT, NodeInfo, info, is_activation, made_by, set_info
from fxpipe.ir.spec import layer_name

Role = Literal["aliases", "readers", "writers"]


@dataclass(slots=True)
class Storage:
    """What is known of one storage: which nodes alias it, read it and wrote to it."""

    aliases: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)


def find_storage(storages: Mapping[int, Storage], node: fx.Node) -> Storage | None:
    """Give what is known of the memory that a node's value lies in, None for a value without."""
    key = info(node).storage
    return storages.get(key) if key is not None else None


class Recorder:
    """An fx graph under construction.

    Each node has a ``NodeInfo``.
    """

    def __init__(self, skeleton: Skeleton, ambient: Ambient, known: Collection[int] = ()) -> None:
        self.skeleton = skeleton
        self.ambient = ambient
        self.graph = fx.Graph(owning_module=skeleton.module)  # type: ignore[arg-type]
        self.constants: dict[str, Any] = {}
        self.constant_places: dict[str, str] = {}
        self.storages: dict[int, Storage] = {}
        self.region: int | None = None
        self._left: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}  # what calls recorded whole left behind
        self._known = known  # ids of tensors of an earlier forward's, which stand for themselves
        self._node_of: dict[int, fx.Node] = {}
        self._kept: list[Any] = []  # an id names a tensor only while the tensor lives
        self._attributes: dict[str, fx.Node] = {}
        self._constant_of: dict[int, str] = {}
        self._trial: _Trial | None = None
        self.symbols: Symbols | None = None  # the same forward with symbols for sizes
        self._sizes: dict[Any, fx.Node] = {}
        self._arguments = Arguments(self.graph, skeleton.generators, self.node_of, self.constant, self.size)
        with skeleton.mode:
            self._usual_attributes = vars(torch.empty(0)).keys()

    # --- tensors and nodes ----------------------------------------------------------------------------------------

    def placeholder(self, name: str, tensor: torch.Tensor) -> None:
        """Add an input."""
        self.bind(tensor, self._made("placeholder", name, from_input=True))

    def _made(self, op: str, target: Any, args: Any = (), kwargs: Any = None, **known: Any) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        set_info(node, NodeInfo(**known))
        return node

    def knows(self, tensor: torch.Tensor) -> bool:
        """Tell whether a node owns the tensor, or it is the model's own."""
        return id(tensor) in self._node_of or id(tensor) in self.skeleton.fqn_of

    def made_here(self, tensor: torch.Tensor) -> bool:
        """Tell whether the forward made a tensor (or was given it), in a call that was recorded."""
        return id(tensor) in self._node_of

    def leave(self, reference: weakref.ref[torch.Tensor], fqn: str) -> None:
        """Note that a call recorded whole made a tensor and did not return it: should it be read later, it was kept."""
        tensor = reference()
        if tensor is not None:
            self._left[id(tensor)] = (reference, fqn)

    def left_by(self, tensor: torch.Tensor) -> str | None:
        """Give the FQN of the call recorded whole that left a tensor behind, None for any other tensor."""
        reference, fqn = self._left.get(id(tensor), (None, None))
        return fqn if reference is not None and reference() is tensor else None

    def is_written_after(self, node: fx.Node) -> bool:
        """Tell whether some call writes to a node's value that is not the node itself."""
        storage = self.storage_of(node)
        return storage is not None and bool(storage.writers) and storage.writers[-1] is not node

    def storage_of(self, node: fx.Node) -> Storage | None:
        """Give what is known of the memory that a node's value lies in."""
        return find_storage(self.storages, node)

    def name_of(self, tensor: torch.Tensor) -> str:
        """Say in words which tensor it is that a node owns, or the model."""
        node = self._node_of.get(id(tensor))
        if node is None:
            return self.skeleton.fqn_of[id(tensor)]
        if node.op == "placeholder":
            return f"the input {node.target!r}"
        return f"{describe(tensor)} of {info(node).layer or node.target}"

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
        if id(tensor) in self._known:
            return self.constant(tensor)
        maker = self.left_by(tensor)
        if maker is not None:
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
            node = self._made("get_attr", fqn)
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
            node = self._made("get_attr", name)
            self._attributes[name] = node
            if self._trial is not None:
                self._trial.attributes.append(name)
            if isinstance(value, torch.Tensor):
                self.describe(node, value)
            self._kept.append(value)
        return node

    def size(self, number: Sized) -> fx.Node:
        """Give the node that computes a number of the inputs' sizes."""
        assert self.symbols is not None
        expression = number.expression
        if expression not in self._sizes:
            names, function = self.symbols.function(expression)
            given = {str(node.target): node for node in self.graph.nodes if node.op == "placeholder"}
            args = tuple(given[name] for name in names)
            node = self._made("call_function", function, args, from_input=True, size=expression)
            self._sizes[expression] = node
        return self._sizes[expression]

    def bind(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """Make ``node`` the owner of a tensor: later readers read it."""
        if self._trial is not None:
            self._trial.owners.append((id(tensor), self._node_of.get(id(tensor))))
        self._node_of[id(tensor)] = node
        self._kept.append(tensor)
        self.describe(node, tensor)

    def describe(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """Note shape, dtype, strides and storage of a node's value."""
        known = info(node)
        known.tensor = tensor_meta(tensor)
        if not tensor.is_contiguous() and is_dense(tensor):
            known.strides = tuple(tensor.stride())
        if self.symbols is not None:
            known.sizes = self.symbols.sizes_of(tensor)
        storage = storage_of(tensor)
        if storage is not None:
            known.storage = storage
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
                known = info(self._node_of[id(tensor)])
                known.tensor = tensor_meta(tensor)
                if vars(tensor).keys() - self._usual_attributes:
                    known.shared_object = True  # an attribute of the user's own is lost where it is sent

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
        lift = self._arguments.lift
        node_args = tuple(lift(value, frame, reads) for value in args)
        node_kwargs = {name: lift(value, frame, reads) for name, value in kwargs.items()}
        node = self._made(
            op,
            target,
            node_args,
            node_kwargs,
            layer=layer,
            call=call,
            block=layer_name(frame.block, frame.block_call),
            from_input=any(info(read).from_input for read in reads),
            context=self.ambient.difference(),
            region=self.region,
            reads=tuple(read for read in reads if is_activation(read)),
        )
        for read in reads:
            if info(read).container:
                info(read).layer, info(read).call = layer, call
        self._order(node, reads, written)
        return node

    def _order(self, node: fx.Node, reads: Sequence[fx.Node], written: Iterable[torch.Tensor]) -> None:
        """Note what must run before this call besides those whose values it takes: writes to what it reads."""
        after: dict[fx.Node, None] = {}
        for read in reads:
            key = info(read).storage
            if key is not None and key in self.storages:
                after.update(dict.fromkeys(self.storages[key].writers[-1:]))
                self._append(key, "readers", node)
        keys = sorted({key for key in map(storage_of, written) if key is not None})
        before: dict[fx.Node, None] = {}
        for key in keys:
            storage = self.storages.setdefault(key, Storage())
            after.update(dict.fromkeys(storage.writers[-1:]))
            before.update(dict.fromkeys(storage.readers))
            self._append(key, "writers", node)
        known = info(node)
        known.after = tuple(after)
        if keys:
            before.pop(node, None)
            known.writes, known.before, known.where = tuple(keys), tuple(before), user_line()

    def emit(self, value: Any, node: fx.Node, given: Sequence[torch.Tensor] = (), reach: Reach = None) -> None:
        """Bind every tensor in a call's result to the call, or to nodes that take them out.

        Args:
            value: The result.
            node: The call.
            given: The tensors it was given.
            reach: To which of them the gradients of those in the result go.
        """
        reads = [self._node_of.get(id(tensor)) or self._attribute_of(tensor) for tensor in given]
        self._emit(value, node)
        known = info(node)
        known.made = tuple(self._node_of.get(id(tensor), node) for tensor in tensors_in(value))
        if reach is None:
            return
        flows: dict[fx.Node, dict[fx.Node, None]] = {}
        for made, places in zip(known.made, reach, strict=True):
            found = [reads[place] for place in sorted(places)]
            flows.setdefault(made, {}).update((read, None) for read in found if read is not None)
            if None in found:
                return
        known.flows = flows

    def _attribute_of(self, tensor: torch.Tensor) -> fx.Node | None:
        return self._attributes.get(self.skeleton.fqn_of.get(id(tensor), ""))

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
            whole = info(node)
            part = self._made(
                "call_function",
                take,
                (node, key),
                layer=whole.layer,
                call=whole.call,
                block=whole.block,
                from_input=whole.from_input,
                region=whole.region,
                part_of=node,
            )
            self._emit(item, part)

    def _emit_tensor(self, tensor: torch.Tensor, node: fx.Node) -> None:
        known = self._node_of.get(id(tensor))
        own = known.op in ("placeholder", "get_attr") if known is not None else id(tensor) in self.skeleton.fqn_of
        if known is not None and not isinstance(tensor, FakeTensor) and made_by(node).op == "call_module":
            own = True  # integers that pass through a module: Python may look at them
        if own and not info(node).writes:
            self.describe(node, tensor)
            return  # handed back unchanged: it stays the model's own, readable at every stage
        self.bind(tensor, node)

    # --- the end --------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Let go of the tensors of the forward: its graph is finished."""
        for known in (self._node_of, self._kept, self._left, self._constant_of):
            known.clear()
        if self.symbols is not None:
            self.symbols.forget()

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
        self._sizes.clear()
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
