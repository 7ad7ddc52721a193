"""What single aten operations do: their FLOPs and bytes, counted as they run.

FLOPs are those of ``torch.utils.flop_counter`` wherever it has a formula; other operations count by their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fxpipe._torch import TorchDispatchMode, device_asked, is_higher_order
from fxpipe.capture.calls.values import tensors_in
from fxpipe.capture.calls.watch import grouped_shape
from fxpipe.ir.cost import OpCount, Phase


class CountMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts aten operations while a phase is on.

    Attributes:
        kept: Tensors whose storages are told apart by identity.
        largest: Bytes of the largest tensor that was made in the phase.
    """

    supports_higher_order_operators = True
    kept: list[torch.Tensor]
    largest: int

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = []
        self.largest = 0
        self._ops: list[OpCount] = []
        self._phase: Phase = "forward"

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Count what runs inside."""
        self._phase, self.largest = phase, 0
        with self:
            yield

    def take(self) -> list[OpCount]:
        """Give what was counted since the last call."""
        ops, self._ops = self._ops, []
        return ops

    def add(self, name: str, flops: int, size: int, dtype: torch.dtype) -> None:
        """Count one operation by hand."""
        self._ops.append(OpCount(name, self._phase, flops, size, str(dtype).removeprefix("torch.")))

    def _higher_order(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Count an operation that takes functions; attention by the whole matrix of scores, whatever is masked."""
        result = func(*args, **kwargs)
        query, key, value, *_ = tensors = tensors_in(args, kwargs)
        made, name = tensors_in(result), str(func.name() if callable(func.name) else func.name)
        shapes = attention_shapes(query, key, value) if "attention" in name and query.dim() == 4 else ()
        count = attention_backward_flops if name.endswith("backward") else attention_flops
        flops = 0
        if shapes:
            grown = shapes[0][:-1] + shapes[2][-1:]
            flops = count(grown, *shapes) if name.endswith("backward") else count(*shapes)
        self.add(name, flops, sum(map(size_of, (*tensors, *made))), query.dtype)
        return result

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count the operation and let it pass."""
        device = device_asked(func, args)
        if device is not None:
            return device
        kwargs = kwargs or {}
        if is_higher_order(func):
            return self._higher_order(func, args, kwargs)
        shape = grouped_shape(func, args, kwargs)
        result = args[0].new_empty(shape) if shape is not None else func(*args, **kwargs)
        name = func._schema.name.rpartition("::")[2]
        if name == "mkldnn_rnn_layer":
            result = (*result[:3], _workspace(result[3], *args))
        if name in _FREE or func.namespace == "prim" or _is_view(func):
            return result
        read = tensors_in(args, kwargs)
        made = tensors_in(result)
        self.largest = max([self.largest, *map(size_of, made)])
        dtype = next((t.dtype for t in (*read, *made) if t.is_floating_point() or t.is_complex()), torch.float32)
        self.add(name, _flops(func, name, args, kwargs, result), _bytes(name, read, made), dtype)
        return result


def attention_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """Give four-dimensional shapes, grouped heads repeated."""
    batch, heads = prod(query.shape[:-3]), query.shape[-3] if query.dim() > 2 else 1
    return tuple((batch, heads, *tensor.shape[-2:]) for tensor in (query, key, value))


def attention_flops(*shapes: tuple[int, ...]) -> int:
    """Count attention's forward, of four-dimensional shapes."""
    return int(sdpa_flop_count(*shapes))  # type: ignore[no-untyped-call]


def attention_backward_flops(*shapes: tuple[int, ...]) -> int:
    """Count attention's backward, of four-dimensional shapes."""
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


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
        return attention_flops(*attention_shapes(*args[:3]))
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return attention_backward_flops(attention_shapes(*args[:1] * 3)[0], *attention_shapes(*args[1:4]))
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


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of the elements that are there: an expanded tensor has one of many."""
    if tensor.layout != torch.strided:
        return tensor.numel() * tensor.element_size()
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _bytes(name: str, read: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> int:
    out = sum(map(size_of, made))
    if name in _GATHERS:  # rows of a table, not the table
        return 2 * out + sum(size_of(tensor) for tensor in read[1:])
    if name in _SCATTERS:
        return 3 * sum(size_of(tensor) for tensor in read[1:])
    return out + sum(map(size_of, read))


def is_counted(op: OpCount) -> bool:
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
