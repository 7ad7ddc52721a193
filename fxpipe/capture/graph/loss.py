"""How the losses of microbatches add up to the batch's, found in the recorded graph.

A mean over valid targets weighs each microbatch by its share of them, a sum by 1, any other mean by its share of
samples; a loss that is a sum of such is taken apart into its summands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxpipe._torch import is_loss_module
from fxpipe.capture.graph.reading import reader_of
from fxpipe.capture.graph.structure import Structure
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.node import info, is_constant, reached, set_info
from fxpipe.capture.record.observe import Observation
from fxpipe.errors import CaptureError
from fxpipe.program import LossKind, LossTerm

Count = Callable[[Mapping[str, Any]], float]


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One summand: the node of its value, and how microbatches weigh it.

    Attributes:
        node: The value.
        kind: As in ``LossTerm``.
        count: As in ``LossTerm``.
        what: In words, for the report.
    """

    node: fx.Node
    kind: LossKind
    count: Count | None = None
    what: str = ""


def find_terms(
    skeleton: Skeleton, observation: Observation, structure: Structure, grows: Callable[[fx.Node], bool]
) -> tuple[Term, ...]:
    """Take the loss of a structure apart.

    Args:
        skeleton: The copy of the model.
        observation: What the forward did; scaled copies of summands may be added to its graph.
        structure: A structure whose only result is the loss.
        grows: Tells whether the shape of a node's value grows with the batch: a sum over it is a sum over samples.

    Returns:
        The summands.

    Raises:
        CaptureError: The loss weighs classes by a tensor without values.
    """
    return tuple(_Analysis(skeleton, observation, structure, grows).terms(structure.results[0]))


def loss_terms(terms: tuple[Term, ...]) -> tuple[LossTerm, ...]:
    """Give the summands the form that programs have."""
    return tuple(LossTerm(term.node.name, term.kind, term.count) for term in terms)


def describe_terms(terms: tuple[Term, ...]) -> str:
    """Say in words how microbatches are weighed."""
    return "loss: " + " + ".join(dict.fromkeys(term.what for term in terms))


class _Analysis:
    def __init__(
        self, skeleton: Skeleton, observation: Observation, structure: Structure, grows: Callable[[fx.Node], bool]
    ) -> None:
        self.skeleton = skeleton
        self.recorder = observation.recorder
        self.structure = structure
        self.grows = grows

    def terms(self, node: fx.Node) -> list[Term]:
        """Give the summands of a scalar."""
        name = _name(node)
        if name in ("add", "iadd", "add_") and "alpha" not in node.kwargs and len(node.args) == 2:
            parts = [part for part in node.args if isinstance(part, fx.Node)]
            if len(parts) == 2:
                return [*self.terms(parts[0]), *self.terms(parts[1])]
        inner = self._scaled(node, name)
        if inner is not None:
            return [self._outer(node, inner, term) for term in self.terms(inner)]
        return [self._reduction(node, name)]

    def _scaled(self, node: fx.Node, name: str) -> fx.Node | None:
        """Give the scalar that a node only scales, casts or moves; None if it does more."""
        if not node.args or not isinstance(node.args[0], fx.Node | list | tuple):
            others = [arg for arg in node.args if isinstance(arg, fx.Node)]
            return others[0] if name in ("add", "mul") and len(others) == 1 else None
        first = node.args[0]
        if name in ("sum", "mean") and isinstance(first, fx.Node) and _numel(first) == 1:
            return first
        if not isinstance(first, fx.Node) or _numel(first) != 1:
            return None
        if name in _UNARY:
            return first
        if name not in ("mul", "div", "truediv", "imul", "itruediv", "mul_", "div_", "add", "sub", "neg"):
            return None
        other = node.args[1] if len(node.args) > 1 else None
        if not isinstance(other, fx.Node) or self._is_same_everywhere(other):
            return first
        if name == "mul" and self._is_same_everywhere(first):
            return other
        return None

    def _outer(self, node: fx.Node, inner: fx.Node, term: Term) -> Term:
        """Apply what ``node`` does to ``inner`` to one summand of it."""
        if term.node is inner:
            return Term(node, term.kind, term.count, term.what)
        graph = self.recorder.graph
        with graph.inserting_after(max((node, term.node), key=list(graph.nodes).index)):
            copy = graph.node_copy(node, lambda arg: term.node if arg is inner else arg)
        set_info(copy, replace(info(node)))
        return Term(copy, term.kind, term.count, term.what)

    def _is_same_everywhere(self, node: fx.Node) -> bool:
        """Whether a factor is the same for every microbatch: it depends on nothing that is split."""
        if node not in self.structure.derived:
            return node.op == "get_attr"
        inputs = (each for each in reached([node], lambda each: each.all_input_nodes) if each.op == "placeholder")
        metas = (info(each).tensor for each in inputs)
        return not any(meta is not None and meta.shape and meta.shape[0] != 1 for meta in metas)

    def _reduction(self, node: fx.Node, name: str) -> Term:
        if node.op == "call_module":
            return self._criterion(node)
        if name in ("cross_entropy", "nll_loss"):
            given = _bound(F.cross_entropy if name == "cross_entropy" else F.nll_loss, node)
            return self._classes(node, given)
        if name in _LOSSES:
            reduction = node.kwargs.get("reduction", "mean")
            return Term(node, "sum", None, f"{name}, a sum") if reduction == "sum" else self._samples(node, name)
        if name == "sum" and node.args and isinstance(node.args[0], fx.Node):
            if self.grows(node.args[0]):
                return Term(node, "sum", None, "a sum over samples")
            return self._samples(node, "a sum of the microbatch's own")
        if name in ("div", "truediv") and len(node.args) == 2:
            return self._ratio(node)
        return self._samples(node, "mean over samples" if name == "mean" else f"{name or node.op}, as a mean")

    def _samples(self, node: fx.Node, what: str) -> Term:
        return Term(node, "samples", None, f"{what} (microbatches weigh by samples)")

    def _criterion(self, node: fx.Node) -> Term:
        """A loss module of torch that is called as a whole."""
        module = self.skeleton.module.get_submodule(str(node.target))
        reduction = getattr(module, "reduction", "mean")
        if isinstance(module, nn.CrossEntropyLoss | nn.NLLLoss) and len(node.args) == 2:
            weight = module.weight
            given = {
                "target": node.args[1],
                "ignore_index": module.ignore_index,
                "reduction": reduction,
                "weight": None if weight is None else self._values_of(weight),
            }
            return self._classes(node, given)
        if is_loss_module(module) and reduction == "sum":
            return Term(node, "sum", None, f"{type(module).__name__}, a sum")
        return self._samples(node, type(module).__name__)

    def _classes(self, node: fx.Node, given: Mapping[str, Any]) -> Term:
        """A mean over valid targets, class weights included."""
        if given.get("reduction", "mean") == "sum":
            return Term(node, "sum", None, "a sum over valid targets")
        target = given["target"]
        exact = isinstance(target, fx.Node) and "float" not in _dtype(target)
        if given.get("reduction", "mean") != "mean" or not exact or target not in self.structure.derived:
            return self._samples(node, "mean over targets")
        weight, ignored = given.get("weight"), given.get("ignore_index", -100)
        if isinstance(weight, fx.Node):
            weight = self._values_of_node(weight)
        read = reader_of(self.recorder.graph, [target], self.recorder.constants)

        def count(inputs: Mapping[str, Any]) -> float:
            targets = read(inputs)[0]
            valid = targets[targets != ignored]
            return float(valid.numel() if weight is None else weight.to(valid.device, torch.float64)[valid].sum())

        return Term(node, "tokens", count, "mean over valid targets")

    def _ratio(self, node: fx.Node) -> Term:
        """A sum over a count: microbatches weigh by their count."""
        above, below = node.args
        if isinstance(above, fx.Node) and isinstance(below, fx.Node) and below in self.structure.derived:
            while _name(below) in ("clamp", "clamp_min", "clamp_", "to", "float", "max", "maximum") and below.args:
                below = below.args[0]  # a guard against dividing by nothing
                if not isinstance(below, fx.Node):
                    return self._samples(node, "a ratio")
            read = reader_of(self.recorder.graph, [below], self.recorder.constants)
            return Term(node, "tokens", lambda inputs: float(read(inputs)[0]), "a sum over a count")
        return self._samples(node, "a ratio")

    def _values_of_node(self, node: fx.Node) -> torch.Tensor:
        if is_constant(node):
            constant: torch.Tensor = self.recorder.constants[str(node.target)]
            return constant
        fqn = self.skeleton.aliases.get(str(node.target), "") if node.op == "get_attr" else ""
        return self._checked(self.skeleton.value_of(fqn), str(node.target))

    def _values_of(self, fake: torch.Tensor) -> torch.Tensor:
        fqn = self.skeleton.fqn_of.get(id(fake), "")
        return self._checked(self.skeleton.value_of(fqn), fqn)

    def _checked(self, tensor: torch.Tensor | None, name: str) -> torch.Tensor:
        if tensor is None:
            raise CaptureError(
                f"the loss weighs classes by {name}, which has no values when the model is compiled\n"
                "  pass loss_weight= to say how microbatches weigh, or build that tensor on a real device"
            )
        return tensor


_UNARY = frozenset(
    {"to", "float", "double", "half", "bfloat16", "clone", "squeeze", "view", "reshape", "neg", "type_as"}
)
_LOSSES = frozenset(
    {
        *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "kl_div", "ctc_loss"),
        *("binary_cross_entropy_with_logits", "poisson_nll_loss", "gaussian_nll_loss", "soft_margin_loss"),
        *("margin_ranking_loss", "hinge_embedding_loss", "cosine_embedding_loss", "triplet_margin_loss"),
        *("multi_margin_loss", "multilabel_margin_loss", "multilabel_soft_margin_loss"),
    }
)


def _name(node: Any) -> str:
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    if node.target is operator.getitem:
        return "getitem"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name)


def _numel(node: fx.Node) -> int:
    meta = info(node).tensor
    return int(meta.numel) if meta is not None else 0


def _dtype(node: fx.Node) -> str:
    meta = info(node).tensor
    return meta.dtype if meta is not None else ""


_POSITIONS = {
    F.cross_entropy: ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
    F.nll_loss: ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
}


def _bound(function: Callable[..., Any], node: fx.Node) -> dict[str, Any]:
    return {**dict(zip(_POSITIONS[function], node.args, strict=False)), **node.kwargs}
