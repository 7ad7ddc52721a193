"""What a layer does: its operations forward and backward, their FLOPs and bytes, and what is kept between.

FLOPs are those of ``torch.utils.flop_counter`` wherever it has a formula; other operations count by their bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fxpipe._torch import TorchDispatchMode, device_asked, replaced
from fxpipe.capture.model.skeleton import Skeleton, named_tensors
from fxpipe.capture.record.calls import tensors_in
from fxpipe.capture.record.recorder import storage_of
from fxpipe.capture.record.watch import grouped_shape, spelled
from fxpipe.ir.cost import LayerCounts, OpCount, Phase
from fxpipe.ir.tree import map_tree, tree_leaves

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
    ) -> LayerCounts:
        """Count one call.

        Args:
            function: A module or a function.
            args: Its arguments, with fake (or small real) tensors.
            kwargs: Its keyword arguments.
            trace: What the call did below Python; calls that did the same count the same.
            attention: Forms of the attention calls inside.
        """
        key = self.key(function, args, kwargs, trace, attention)
        known = self.known.get(key)
        if known is None:
            known = self.known[key] = replace(self._measure(function, args, kwargs), attention=attention)
        return known

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
        # What runs for real, on integers, leaves no trace: its shapes tell it apart.
        shapes = () if trace else (getattr(function, "__name__", ""), *map(spelled, tensors))
        return trace, shapes, flags, torch.is_grad_enabled(), attention

    def _measure(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> LayerCounts:
        inputs: list[torch.Tensor] = []
        own = [tensor for _, tensor in named_tensors(function)] if isinstance(function, nn.Module) else []

        def given(_: str, leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if id(leaf) in self._skeleton.fqn_of:
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

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), self.mode.phase("forward"):
            result = function(*args, **kwargs)
        outputs = [leaf for _, leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        forward = self.mode.take()
        input_grad, weight_grad = self._backward(inputs, own, outputs)
        saved_bytes, saved_values = _sort_saved(saved, inputs, own, outputs)
        self.mode.kept.clear()
        ops = (*forward, *input_grad, *weight_grad)
        return LayerCounts(
            ops, saved_bytes, saved_values, tuple(sorted({op.name for op in ops if not _is_counted(op)}))
        )

    def _backward(
        self, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> tuple[list[OpCount], list[OpCount]]:
        """Count the gradients of the inputs alone, and what those of the weights add."""
        roots = [tensor for tensor in outputs if tensor.requires_grad and tensor.grad_fn is not None]
        if not roots:
            return [], []
        grads = [torch.ones_like(tensor) for tensor in roots]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        unique = list({id(tensor): tensor for tensor in weights if tensor.requires_grad}.values())
        for_inputs: list[OpCount] = []
        if wanted:
            with self.mode.phase("input_grad"):
                torch.autograd.grad(roots, wanted, grads, retain_graph=True, allow_unused=True)
            for_inputs = self.mode.take()
        if not unique:
            return for_inputs, []
        with self.mode.phase("weight_grad"):
            torch.autograd.grad(roots, [*wanted, *unique], grads, allow_unused=True)
        return for_inputs, _added(self.mode.take(), for_inputs)


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


class CountMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts aten operations while a phase is on."""

    kept: list[torch.Tensor]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = []  # tensors whose storages are told apart by identity
        self._ops: list[OpCount] = []
        self._phase: Phase = "forward"

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Count what runs inside."""
        self._phase = phase
        with self:
            yield

    def take(self) -> list[OpCount]:
        """Give what was counted since the last call."""
        ops, self._ops = self._ops, []
        return ops

    def add(self, name: str, flops: int, size: int, dtype: torch.dtype) -> None:
        """Count one operation by hand."""
        self._ops.append(OpCount(name, self._phase, flops, size, str(dtype).removeprefix("torch.")))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count the operation and let it pass."""
        device = device_asked(func, args)
        if device is not None:
            return device
        kwargs = kwargs or {}
        shape = grouped_shape(func, args, kwargs)
        result = args[0].new_empty(shape) if shape is not None else func(*args, **kwargs)
        name = func._schema.name.rpartition("::")[2]
        if name == "mkldnn_rnn_layer":
            result = (*result[:3], _workspace(result[3], *args))
        if name in _FREE or func.namespace == "prim" or _is_view(func):
            return result
        read = [leaf for leaf in _flat((*args, *kwargs.values())) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in _flat((result,)) if isinstance(leaf, torch.Tensor)]
        dtype = next((t.dtype for t in (*read, *made) if t.is_floating_point() or t.is_complex()), torch.float32)
        self.add(name, _flops(func, name, args, kwargs, result), _bytes(name, read, made), dtype)
        return result


class FusedAttention(torch.autograd.Function):
    """Attention as one kernel: keeps its operands, its result and one number per row of scores."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, mode: CountMode, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        """Make an empty result and count the kernel."""
        shapes = _attention_shapes(query, key, value)
        result = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        kept = (query, key, value, result, sums, *([mask] if mask is not None else []))
        ctx.save_for_backward(*kept)
        ctx.mode, ctx.shapes = mode, shapes  # type: ignore[attr-defined]
        mode.add("scaled_dot_product_attention", _attention_flops(*shapes), sum(map(_size, kept)), query.dtype)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Make empty gradients and count the kernel."""
        query, key, value, *_ = kept = ctx.saved_tensors
        made = [torch.empty_like(tensor) for tensor in (query, key, value)]
        flops = _attention_backward_flops(ctx.shapes[0][:-1] + ctx.shapes[2][-1:], *ctx.shapes)
        size = sum(map(_size, (*kept, *made, *grads)))
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


def _attention_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """Give four-dimensional shapes, grouped heads repeated."""
    batch, heads = prod(query.shape[:-3]), query.shape[-3] if query.dim() > 2 else 1
    return tuple((batch, heads, *tensor.shape[-2:]) for tensor in (query, key, value))


def _attention_flops(*shapes: tuple[int, ...]) -> int:
    return int(sdpa_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _attention_backward_flops(*shapes: tuple[int, ...]) -> int:
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


def _is_view(func: Any) -> bool:
    return any(part.alias_info is not None and not part.alias_info.is_write for part in func._schema.returns)


def _flops(func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    packet = func._overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    if name == "_grouped_mm":
        left, right = args[0], args[1]
        groups = 1 if left.dim() == 2 or right.dim() == 2 else left.shape[0]
        return int(2 * groups * left.shape[-2] * left.shape[-1] * right.shape[-1])
    if name in ("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"):
        # A layer of an LSTM: per row and step a product with either weight; backward as much for each side of it.
        products = 2 if name.endswith("backward") else 1
        return int(2 * products * args[0].numel() // args[0].shape[-1] * (args[1].numel() + args[2].numel()))
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return _attention_flops(*_attention_shapes(*args[:3]))
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return _attention_backward_flops(_attention_shapes(*args[:1] * 3)[0], *_attention_shapes(*args[1:4]))
    return 0


def _workspace(
    empty: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, recurrent: torch.Tensor, *rest: Any
) -> Any:
    """Give an LSTM layer's workspace, which the backward needs and the fake kernel leaves empty.

    Source: measured with oneDNN. Per row and step four gates, ten states and gradients, and scratch of about 1.25;
    ten states of before the first step. Within 4 % where it is more than a few pages.
    """
    if not rest[-1]:  # no training
        return empty
    count, width = rows.numel() // rows.shape[-1], recurrent.shape[-1]
    first = 10 * rest[2].numel()
    return empty.new_empty(int(15.25 * count * width + first) * rows.element_size())


def _size(tensor: torch.Tensor) -> int:
    """Bytes of the elements that are there: an expanded tensor has one of many."""
    if tensor.layout != torch.strided:
        return tensor.numel() * tensor.element_size()
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _bytes(name: str, read: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> int:
    out = sum(map(_size, made))
    if name in _GATHERS:  # rows of a table, not the table
        return 2 * out + sum(_size(tensor) for tensor in read[1:])
    if name in _SCATTERS:
        return 3 * sum(_size(tensor) for tensor in read[1:])
    return out + sum(map(_size, read))


def _is_counted(op: OpCount) -> bool:
    """Whether an operation's FLOPs are known, or its bytes say what it costs."""
    if op.flops or not op.bytes or op.name in _BY_BYTES:
        return True
    packet = getattr(torch.ops.aten, op.name, None)
    if packet is None:
        return False
    return any(torch.Tag.pointwise in getattr(packet, name).tags for name in packet.overloads())


_FREE = frozenset(
    {
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view"),
        *("_reshape_alias", "_local_scalar_dense", "item", "is_same_size", "sym_size", "lift_fresh", "set_", "resize_"),
        "as_strided_",
    }
)
_GATHERS = frozenset({"embedding", "index", "gather", "index_select", "take", "_embedding_bag", "embedding_bag"})
_SCATTERS = frozenset({"index_put_", "index_add_", "scatter_add_", "scatter_", "_index_put_impl_", "index_copy_"})
_BY_BYTES = frozenset(
    {
        *_GATHERS,
        *_SCATTERS,
        *("clone", "copy_", "_to_copy", "cat", "stack", "fill_", "zero_", "full", "zeros", "ones", "full_like"),
        *("arange", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full", "scalar_tensor", "eye", "linspace"),
        *("repeat", "sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "prod", "logsumexp"),
        *("std", "var", "var_mean", "norm", "linalg_vector_norm", "cumsum", "cumprod", "flip", "roll", "tril", "triu"),
        *("_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "_safe_softmax"),
        *("native_layer_norm", "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward"),
        *("native_batch_norm", "native_batch_norm_backward", "_native_batch_norm_legit", "cudnn_batch_norm"),
        *("batch_norm_backward", "_native_batch_norm_legit_no_training", "_batch_norm_with_update"),
        *("_fused_rms_norm", "_fused_rms_norm_backward", "native_dropout", "native_dropout_backward", "bernoulli_"),
        *("bernoulli", "uniform_", "normal_", "rand", "randn", "rand_like", "randn_like", "embedding_dense_backward"),
        *("slice_backward", "select_backward", "slice_scatter", "select_scatter", "diagonal_backward"),
        *("unfold_backward", "index_put", "scatter", "scatter_add", "gather_backward", "masked_fill", "topk", "sort"),
        *("constant_pad_nd", "nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward"),
        *("mse_loss_backward", "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "avg_pool2d"),
        *("avg_pool2d_backward", "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "mean_backward"),
        *("upsample_nearest2d", "upsample_nearest2d_backward", "upsample_bilinear2d", "upsample_bilinear2d_backward"),
        *("native_channel_shuffle", "reflection_pad1d", "reflection_pad2d", "replication_pad2d", "one_hot", "nonzero"),
        *("masked_select", "split_with_sizes_copy", "unbind_copy", "im2col", "col2im", "bucketize", "searchsorted"),
        *("unique_dim", "floor_divide", "softplus_backward", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell"),
        *("_foreach_add_", "count_nonzero", "histc", "bincount"),
    }
)
