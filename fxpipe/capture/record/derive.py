"""What a recorded call is: whether it can be made again at any stage, whether it is made for its effect."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx


def is_derived(nodes: Sequence[fx.Node]) -> bool:
    """Whether nodes depend on inputs, buffers and constants alone, and take no gradient."""
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if not derives(node):
            return False
        todo += [*node.all_input_nodes, *node.meta.get("after", ())]
    return True


def derives(node: fx.Node) -> bool:
    """Whether one call can be made again at any stage that has its arguments."""
    meta = node.meta.get("tensor")
    if node.op == "get_attr":
        return not (meta is not None and meta.requires_grad) and "object" not in node.meta and not _is_parameter(node)
    plain = "position" not in node.meta and "random" not in node.meta and "guard" not in node.meta
    return node.op == "placeholder" or (
        node.op in ("call_function", "call_method") and plain and not (meta is not None and meta.requires_grad)
    )


def is_setting(node: fx.Node) -> bool:
    """Whether a call sets something on a tensor, so that what it returns is not what it is for."""
    sets = (node.op == "call_method" and node.target == "register_hook") or node.target is setattr
    return sets and "removed" not in node.meta


def _is_parameter(node: fx.Node) -> bool:
    module = node.graph.owning_module
    owner, _, leaf = str(node.target).rpartition(".")
    try:
        return module is not None and leaf in module.get_submodule(owner)._parameters
    except AttributeError:
        return False
