"""A graph of layers without example inputs: torch's symbolic trace, with the blocks as leaves."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxpipe.capture.calls.forms import writes_by_name
from fxpipe.capture.graph.layers import make_layer_graph
from fxpipe.capture.graph.structure import Structure
from fxpipe.capture.model.blocks import Leaves
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.node import NodeInfo, info, reached, set_info
from fxpipe.errors import CaptureError
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.spec import layer_name
from fxpipe.ir.tensor import TensorMeta

UNKNOWN = TensorMeta((0,), "float32", requires_grad=True)
"""Stands for every tensor: without an example, no shape is known."""
NOTE = "no example inputs: traced symbolically, and layers are costed by their parameters"


def trace_layers(skeleton: Skeleton, leaves: Leaves, *, notes: Sequence[str] = ()) -> LayerGraph:
    """Trace a forward symbolically and sort its calls into layers.

    Args:
        skeleton: The copy of the model; not run on any tensor.
        leaves: What is taken as one call.
        notes: What the report should say besides that no example was given.

    Returns:
        The graph; its values have no size, and nothing is counted.

    Raises:
        CaptureError: Control flow depends on values, a call writes in place, or the trace fails otherwise.
    """
    graph = _traced(skeleton, leaves)
    results = _results(graph)
    live = reached(results, lambda node: node.all_input_nodes)  # not what only asserts something
    namer = _Namer(leaves)
    nodes = [node for node in graph.nodes if node in live]
    for node in nodes:
        set_info(node, NodeInfo(tensor=UNKNOWN))
        if node.op.startswith("call_"):
            namer.name(node)
    structure = Structure(
        nodes=tuple(nodes),
        derived=frozenset(),
        groups=tuple(_in_place(node, live) for node in nodes if _writes(skeleton.module, node)),
        before=(),
        results=tuple(results),
        rebuild=tuple,
        is_loss=False,
    )
    return make_layer_graph(skeleton, structure, blocks=leaves.blocks, storages={}, notes=(NOTE, *notes))


def _traced(skeleton: Skeleton, leaves: Leaves) -> fx.Graph:
    name = type(skeleton.module).__name__
    try:
        graph: fx.Graph = _Tracer(leaves).trace(skeleton.module, concrete_args=_defaults(skeleton.module))
    except Exception as error:  # whatever the forward does to a proxy
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CaptureError(
            f"{name} cannot be traced without an example: {type(error).__name__}: {reason}\n"
            "  pass one batch in example_args or example_kwargs; tensors on the meta device will do"
        ) from error
    for node in graph.nodes:
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op in ("call_function", "call_method") and writes_by_name(_operator_name(target)):
            raise CaptureError(
                f"{name} writes in place ({target}), which cannot be traced without an example\n"
                "  pass one batch in example_args or example_kwargs; tensors on the meta device will do"
            )
    return graph


def _results(graph: fx.Graph) -> list[fx.Node]:
    """Give the nodes that are returned; the making of a container of the user's own is no layer."""
    todo = [node for node in graph.nodes if node.op == "output"]
    found: dict[fx.Node, None] = {}
    while todo:
        for source in todo.pop().all_input_nodes:
            if isinstance(source.target, type):
                todo.append(source)
            else:
                found[source] = None
    return list(found)


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Leaves) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Take as one call what block grain keeps whole."""
        return module_qualified_name in self._leaves.closed or not any(True for _ in m.children())


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Give the arguments that have defaults: a proxy for None would be taken for a tensor."""
    parameters = inspect.signature(module.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    empty = inspect.Parameter.empty
    return {each.name: each.default for each in parameters if each.kind in plain and each.default is not empty}


def _operator_name(name: str) -> str:
    """Give the method's name of a function of ``operator``: ``iadd`` is ``__iadd__``, ``setitem`` ``__setitem__``."""
    return f"__{name}__" if name in ("setitem", "iadd", "isub", "imul", "itruediv", "ipow", "imatmul") else name


class _Namer:
    """Gives each call its layer, by the names that an observed forward would have."""

    def __init__(self, leaves: Leaves) -> None:
        self._blocks = leaves.blocks
        self._calls: dict[str, int] = {}

    def name(self, node: fx.Node) -> None:
        """Say layer, call and block."""
        source = node.args[0] if node.args else None
        if getattr(node.target, "__name__", "") == "getitem" and isinstance(source, fx.Node) and info(source).layer:
            known = info(source)  # it takes a part out
            set_info(node, NodeInfo(known.layer, known.call, known.block, UNKNOWN))
            return
        if node.op == "call_module":
            layer = str(node.target)
        else:
            stack = list(node.meta.get("nn_module_stack", {}).values())
            around = stack[-1][0] if stack else ""
            short = str(getattr(node.target, "__name__", node.target)).strip("_")
            layer = f"{around}.{short}" if around else short
        call = self._calls.get(layer, 0)
        self._calls[layer] = call + 1
        if node.op != "call_module" and call:
            layer, call = f"{layer}_{call}", 0
        block = next((fqn for fqn in self._blocks if layer == fqn or layer.startswith(f"{fqn}.")), "")
        set_info(node, NodeInfo(layer, call, layer_name(block, call) if block else "", UNKNOWN))


def _writes(root: nn.Module, node: fx.Node) -> bool:
    """Whether a call is an activation that writes to its input: tried, on a tensor that has no memory."""
    call: Any = node.target
    if node.op == "call_module":
        call = root.get_submodule(str(node.target))
        if next(itertools.chain(call.parameters(), call.buffers()), None) is not None:
            return False  # no activation; and nobody knows the shape that it takes
    elif node.op != "call_function" or not any(each is True for each in (*node.args, *node.kwargs.values())):
        return False  # a function writes only where it is told to: the others, by name, were refused
    given = torch.empty(2, 2, 2, 2, device="meta")
    try:
        call(*fx.map_arg(node.args, lambda _: given), **fx.map_arg(node.kwargs, lambda _: given))
    except Exception:  # whatever a call raises that takes no such tensor: it is no activation
        return False
    return bool(given._version)


def _in_place(node: fx.Node, live: Mapping[fx.Node, None]) -> tuple[fx.Node, ...]:
    """Give the calls that must share a stage with one that writes to its input: the maker and all other readers."""
    touching = {node}
    for source in node.all_input_nodes:
        touching.update((source, *source.users))
    order = list(node.graph.nodes)
    return tuple(sorted((each for each in touching & live.keys() if each.op.startswith("call_")), key=order.index))
