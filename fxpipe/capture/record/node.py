"""What is known of each node of a recorded graph, what it depends on, and what kind of call it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxpipe.capture.record.frames import Frame
from fxpipe.ir.cost import LayerCounts
from fxpipe.ir.tensor import TensorMeta
from fxpipe.program import CallContext

CONSTANT = "_constant_"
"""Names of ``get_attr`` targets that are no parameter or buffer begin so; no FQN of a user's does."""


@dataclass(slots=True, eq=False)
class NodeInfo:
    """What is known of one node: a placeholder, an attribute, or a call.

    The recorder writes the fields, where nothing else is said, and the floors above (``graph``, ``cut``) read them.

    Attributes:
        layer: FQN of the module, or the name ``Frame.name`` gave the call; empty for what belongs to no layer. A
            container takes the layer of the call it is made for. ``graph.trace`` writes it too.
        call: Which call of the layer's module it is, from 0.
        block: Block around the call, ``"h.0"`` or ``"h.0@1"``; read for the layers' blocks.
        tensor: Shape, dtype and gradient flag of the value, None where that is no tensor; refreshed at the end.
        sizes: Shape and strides as expressions, where sizes are followed as symbols and the call made the tensor.
        strides: Strides of a value that is dense and not contiguous, else empty; read for boundaries.
        storage: Storage of the value, a key of ``Recorder.storages``; None where it has none.
        from_input: Whether the value depends on an input; read by the guards.
        context: What surrounds the call, None where it is what surrounds the forward.
        region: Activation-checkpointing region the call was made in; read by the cut.
        reads: The activations among a call's arguments, in order; read for what a layer saves (``counts``).
        made: Node of each tensor in the call's result, in order; read likewise.
        flows: By node of ``made``: the nodes whose values get its gradient; None: all that the call takes values of.
        after: Writes that must run before the call: it sees them in what it reads.
        before: Readers that must run before the call: they must not see what it writes.
        writes: Storages that the call writes to.
        where: File and line in the user's code, of calls that write; read by messages.
        part_of: The call whose result this node takes a part out of.
        container: Whether the call only puts tensors into a container of the user's.
        shared_object: Whether the value carries what a stage of its own would not have: attributes of the user's on a
            tensor, a generator's state. All that read it share a stage.
        random: Whether the value holds random numbers; ``calls`` and the guards read it.
        frame: The module call that the node is (or in which the function was called); for the draws' identities.
        position: Place of a drawing function in ``frame.functions``, None for what does not draw.
        counts: What the call does; ``counts`` writes it when the forward is over.
        attention: Forms of the attention calls in it; ``counts`` writes it, the notes read it.
        size: What the node computes of the inputs' sizes, as an expression; None for any other node.
        is_guard: Whether the node only reads a value for Python; no layer.
        removed: Whether a hook was taken away before the backward; ``outcome`` writes it.
        number: What a node is in this forward that is a Python number among the inputs, or is computed of one.
    """

    layer: str = ""
    call: int = 0
    block: str = ""
    tensor: TensorMeta | None = None
    sizes: tuple[tuple[Any, ...], tuple[Any, ...]] | None = None
    strides: tuple[int, ...] = ()
    storage: int | None = None
    from_input: bool = False
    context: CallContext | None = None
    region: int | None = None
    reads: tuple[fx.Node, ...] = ()
    made: tuple[fx.Node, ...] = ()
    flows: Mapping[fx.Node, Collection[fx.Node]] | None = None
    after: tuple[fx.Node, ...] = ()
    before: tuple[fx.Node, ...] = ()
    writes: tuple[int, ...] = ()
    where: str = ""
    part_of: fx.Node | None = None
    container: bool = False
    shared_object: bool = False
    random: bool = False
    frame: Frame | None = None
    position: int | None = None
    counts: LayerCounts | None = None
    attention: tuple[str, ...] = ()
    size: Any = None
    is_guard: bool = False
    removed: bool = False
    number: float | None = None


_KEY = "fxpipe"


def info(node: fx.Node) -> NodeInfo:
    """Give what is known of a node of a recorded graph."""
    found: NodeInfo = node.meta[_KEY]
    return found


def set_info(node: fx.Node, value: NodeInfo) -> None:
    """Say what is known of a node that was just made."""
    node.meta[_KEY] = value


def sources(node: fx.Node) -> tuple[fx.Node, ...]:
    """Give the nodes that must have run before a node: those it takes values of, and the writes it sees."""
    return (*node.all_input_nodes, *info(node).after)


def going_back(start: Iterable[fx.Node], follow: Callable[[fx.Node], Iterable[fx.Node]] = sources) -> Iterator[fx.Node]:
    """Yield all nodes that can be reached backwards, the first ones included, each once.

    Args:
        start: Where to begin.
        follow: Gives the nodes to go to from a node.
    """
    seen: set[fx.Node] = set()
    todo = list(start)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo += follow(node)


def reached(start: Iterable[fx.Node], follow: Callable[[fx.Node], Iterable[fx.Node]] = sources) -> dict[fx.Node, None]:
    """Give all nodes that can be reached backwards; arguments as of ``going_back``."""
    return dict.fromkeys(going_back(start, follow))


def function_of(node: fx.Node, root: nn.Module | None = None) -> Callable[..., Any]:
    """Give what a recorded call calls; ``root`` has the modules, where one may be called."""
    if node.op == "call_module":
        assert root is not None
        return root.get_submodule(str(node.target))
    if node.op == "call_method":
        name = str(node.target)
        return lambda first, *rest, **named: getattr(first, name)(*rest, **named)
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    return function


def made_by(node: fx.Node) -> fx.Node:
    """Give the call in whose result a node's value was found."""
    while (whole := info(node).part_of) is not None:
        node = whole
    return node


def is_constant(node: fx.Node) -> bool:
    """Whether a node reads what is no parameter or buffer."""
    return node.op == "get_attr" and str(node.target).startswith(CONSTANT)


def is_own(node: fx.Node) -> bool:
    """Whether a node reads a parameter or buffer of the model."""
    return node.op == "get_attr" and not is_constant(node)


def is_activation(node: fx.Node) -> bool:
    """Whether a node's value is a tensor that is no parameter or buffer."""
    return info(node).tensor is not None and not is_own(node)


def is_derived(nodes: Sequence[fx.Node]) -> bool:
    """Whether nodes depend on inputs, buffers and constants alone, and take no gradient."""
    return all(map(derives, going_back(nodes)))


def derives(node: fx.Node) -> bool:
    """Whether one call can be made again at any stage that has its arguments."""
    known = info(node)
    takes_gradient = known.tensor is not None and known.tensor.requires_grad
    if node.op == "get_attr":
        return not (takes_gradient or known.shared_object or _is_parameter(node))
    if node.op == "placeholder":
        return True
    repeatable = known.position is None and not known.random and not known.is_guard
    return node.op in ("call_function", "call_method") and repeatable and not takes_gradient


def is_setting(node: fx.Node) -> bool:
    """Whether a call sets something on a tensor, so that what it returns is not what it is for."""
    sets = (node.op == "call_method" and node.target == "register_hook") or node.target is setattr
    return sets and not info(node).removed


def _is_parameter(node: fx.Node) -> bool:
    module = node.graph.owning_module
    owner, _, leaf = str(node.target).rpartition(".")
    try:
        return module is not None and leaf in module.get_submodule(owner)._parameters
    except AttributeError:
        return False


@dataclass(slots=True, eq=False)
class Selections:
    """The calls of a forward whose result has a shape that values of inputs decide about.

    Attributes:
        made: Those calls, each with nodes and values that are known: of the result, else of what selects.
        known: Those of which they are the result's.
        asked: Those whose size Python knows.
        dims: By node: the dimensions of its value whose size values decide about.
        tried: What nodes give where another number is selected, one mapping for each number that is tried.
    """

    made: dict[fx.Node, list[tuple[fx.Node, torch.Tensor]]] = field(default_factory=dict)
    known: set[fx.Node] = field(default_factory=set)
    asked: set[fx.Node] = field(default_factory=set)
    dims: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    tried: tuple[dict[fx.Node, Any], ...] = ()
    _above: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)

    def above(self, node: fx.Node) -> frozenset[fx.Node]:
        """Give the selections that a node's value depends on."""
        waiting = [node]
        while waiting:
            each = waiting[-1]
            missing = [before for before in sources(each) if before not in self._above]
            if missing and each not in self._above:
                waiting += missing
                continue
            waiting.pop()
            if each not in self._above:
                own = frozenset([each] if each in self.made else ())
                self._above[each] = own.union(*(self._above[before] for before in sources(each)))
        return self._above[node]
