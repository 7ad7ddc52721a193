"""What a layer does: its operations forward and backward, their FLOPs and bytes, and what is kept between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx

from fxpipe._torch import replaced
from fxpipe.capture.calls.operations import (
    CountMode,
    attention_backward_flops,
    attention_flops,
    attention_shapes,
    is_counted,
    size_of,
)
from fxpipe.capture.calls.values import storage_of, tensors_in
from fxpipe.capture.calls.watch import work_of
from fxpipe.capture.model.skeleton import Skeleton, named_tensors
from fxpipe.ir.cost import LayerCounts, OpCount
from fxpipe.ir.tree import map_tree

Key = tuple[Any, ...]


class LayerCounter:
    """Counts each distinct layer once, by running it alone on fake tensors.

    Args:
        skeleton: The copy of the model.
        fused_attention: Whether attention runs as one kernel that keeps no matrix of scores (accelerators), whatever
            the CPU would do.

    Attributes:
        known: Counts of the calls seen so far.
    """

    known: dict[Key, LayerCounts]

    def __init__(self, skeleton: Skeleton, *, fused_attention: bool) -> None:
        self.fused_attention = fused_attention
        self.mode = CountMode()
        self._skeleton = skeleton
        self.known: dict[Key, LayerCounts] = {}

    def counts(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        trace: tuple[Any, ...],
        attention: tuple[str, ...],
        *,
        own: Collection[int] = (),
    ) -> LayerCounts:
        """Count one call.

        Args:
            function: A module or a function.
            args: Its arguments, with fake (or small real) tensors.
            kwargs: Its keyword arguments.
            trace: What the call did below Python; calls that did the same count the same.
            attention: Forms of the attention calls inside.
            own: ``id`` of arguments that stand for the model's own tensors.
        """
        key = self.key(function, args, kwargs, trace, attention)
        known = self.known.get(key)
        if known is None:
            known = self.known[key] = replace(self._measure(function, args, kwargs, own), attention=attention)
        return known

    def is_own(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter or buffer of the model."""
        return id(tensor) in self._skeleton.fqn_of

    def key(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        trace: tuple[Any, ...],
        attention: tuple[str, ...],
    ) -> Key:
        """Give what is equal for two calls that count the same; arguments as of ``counts``."""
        tensors = tensors_in(args, kwargs)
        weights = [tensor for _, tensor in named_tensors(function)] if isinstance(function, nn.Module) else []
        flags = tuple(tensor.requires_grad for tensor in (*tensors, *weights))
        own = tuple(id(tensor) in self._skeleton.fqn_of for tensor in tensors)  # what is kept of them is kept anyway
        # What runs for real, on integers, leaves no trace: its shapes tell it apart.
        shapes = () if trace else (getattr(function, "__name__", ""), *map(work_of, tensors))
        return trace, shapes, flags, own, torch.is_grad_enabled(), attention

    def _measure(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        standing: Collection[int],
    ) -> LayerCounts:
        inputs: list[torch.Tensor] = []
        own = [tensor for _, tensor in named_tensors(function)] if isinstance(function, nn.Module) else []

        def given(_: str, leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if id(leaf) in self._skeleton.fqn_of or id(leaf) in standing:
                own.append(leaf)
                return leaf
            fresh = leaf.detach().clone()  # a call may write to what it is given
            inputs.append(fresh.requires_grad_().clone() if leaf.requires_grad else fresh)
            return inputs[-1]

        args, kwargs = (map_tree(given, part) for part in (args, dict(kwargs)))
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = storage_of(tensor)
            if storage is not None:
                saved[storage] = max(saved.get(storage, 0), tensor.untyped_storage().nbytes())
                self.mode.kept.append(tensor)
            return tensor

        with self.mode.phase("forward"):
            result = self._called(function, args, kwargs, pack)
        outputs = tensors_in(result)
        forward = self.mode.take()
        input_grad, weight_grad, largest = self._backward(inputs, own, outputs)
        saved_bytes, saved_values = _sort_saved(saved, inputs, own, outputs)
        self.mode.kept.clear()
        ops = (*forward, *input_grad, *weight_grad)
        uncounted = tuple(sorted({op.name for op in ops if not is_counted(op)}))
        return LayerCounts(ops, saved_bytes, saved_values, uncounted, gradient_bytes=largest)

    def _called(self, function: Callable[..., Any], args: Any, kwargs: Any, pack: Callable[..., Any]) -> Any:
        """Make a call and hear what it keeps for its backward, where nothing inside of it refuses to be heard."""
        with suppress(RuntimeError), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return function(*args, **kwargs)
        self.mode.take()  # torch.func.grad and its like refuse; what fails for another reason fails again
        return function(*args, **kwargs)

    def _backward(
        self, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> tuple[list[OpCount], list[OpCount], int]:
        """Count the gradients of the inputs alone, what those of the weights add, and the largest on the way."""
        roots = [tensor for tensor in outputs if tensor.requires_grad and tensor.grad_fn is not None]
        if not roots:
            return [], [], 0
        grads = [torch.ones_like(tensor) for tensor in roots]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        unique = list({id(tensor): tensor for tensor in weights if tensor.requires_grad}.values())
        for_inputs: list[OpCount] = []
        largest = 0
        if wanted:
            with self.mode.phase("input_grad"):
                torch.autograd.grad(roots, wanted, grads, retain_graph=True, allow_unused=True)
            for_inputs, largest = self.mode.take(), self.mode.largest
        if not unique:
            return for_inputs, [], largest
        with self.mode.phase("weight_grad"):
            torch.autograd.grad(roots, [*wanted, *unique], grads, allow_unused=True)
        return for_inputs, _added(self.mode.take(), for_inputs), largest


def _added(both: Sequence[OpCount], for_inputs: Sequence[OpCount]) -> list[OpCount]:
    """Give what computing all gradients does beyond computing those of the inputs.

    One kernel may compute both (a convolution's backward): then what it does beyond its part for the inputs.
    """
    alone = Counter(replace(op, phase="weight_grad") for op in for_inputs)
    added = list((Counter(both) - alone).elements())
    for op in (alone - Counter(both)).elements():
        place = next((i for i, other in enumerate(added) if other.name == op.name and other.flops >= op.flops), None)
        if place is not None:
            other = added[place]
            added[place] = replace(other, flops=other.flops - op.flops, bytes=max(other.bytes - op.bytes, 0))
    return added


def _sort_saved(
    saved: Mapping[int, int],
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
) -> tuple[int, tuple[tuple[str, int], ...]]:
    """Tell what is the layer's own of what is kept from what are its inputs and outputs; weights are kept anyway."""
    rest = dict(saved)
    for tensor in weights:
        rest.pop(storage_of(tensor) or 0, None)
    values = []
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for index, tensor in enumerate(tensors):
            if rest.pop(storage_of(tensor) or 0, None) is not None:
                values.append((kind, index))
    return sum(rest.values()), tuple(values)


class FusedAttention(torch.autograd.Function):
    """Attention as one kernel: keeps its operands, its result and one number per row of scores."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, mode: CountMode, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        """Make an empty result and count the kernel."""
        shapes = attention_shapes(query, key, value)
        result = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        kept = (query, key, value, result, sums, *([mask] if mask is not None else []))
        ctx.save_for_backward(*kept)
        ctx.mode, ctx.shapes = mode, shapes  # type: ignore[attr-defined]
        mode.add("scaled_dot_product_attention", attention_flops(*shapes), sum(map(size_of, kept)), query.dtype)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Make empty gradients and count the kernel."""
        query, key, value, *_ = kept = ctx.saved_tensors
        made = [torch.empty_like(tensor) for tensor in (query, key, value)]
        ctx.mode.largest = max([ctx.mode.largest, *map(size_of, made)])
        flops = attention_backward_flops(ctx.shapes[0][:-1] + ctx.shapes[2][-1:], *ctx.shapes)
        size = sum(map(size_of, (*kept, *made, *grads)))
        ctx.mode.add("scaled_dot_product_attention_backward", flops, size, query.dtype)
        return None, *made, None


@contextmanager
def fused_attention_calls(counter: LayerCounter) -> Iterator[Callable[..., Any] | None]:
    """Let attention calls count as one kernel, where the counter is to; gives what stands in for them."""
    if not counter.fused_attention:
        yield None
        return

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> Any:
        return FusedAttention.apply(counter.mode, query, key, value, attn_mask)  # type: ignore[no-untyped-call]

    with replaced(F, "scaled_dot_product_attention", attention):
        yield attention
