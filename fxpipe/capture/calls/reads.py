"""Which calls hand a tensor's values to Python, or shape their result by them, and how answers are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fxpipe._torch import FakeTensor, functorch_is_active, without_functions, without_modes
from fxpipe.capture.calls.values import tensors_in
from fxpipe.capture.calls.watch import Watch

READS = frozenset(
    {
        *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__bool__", "__int__", "__float__"),
        *("__complex__", "__index__", "__contains__", "__array__"),
    }
)
"""Names of functions that hand values of a tensor to Python."""

_SHAPED_BY_VALUES = frozenset(
    {
        *("nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "repeat_interleave", "bincount"),
        *("where", "split", "tensor_split", "one_hot", "histc", "_unique2", "unique_dim", "arange", "zeros", "ones"),
    }
)

SHAPED_BY_SIZES = frozenset({"ctc_loss"})
"""Their results have one shape for all values: only tensors inside them have not, for which the fake kernel refuses."""
SHAPED_BY_LENGTHS = frozenset({"_pack_padded_sequence", "_pad_packed_sequence"})
"""The shapes of their results depend on integer inputs alone, which guards can ask again."""


def answer_of(value: Any) -> Any:
    """Turn what was read into something small that can be compared.

    >>> answer_of([1, [2.0]]), answer_of(True)
    ((1, (2.0,)), True)
    """
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return ("array", value.dtype.str, value.shape, digest)
    if isinstance(value, list | tuple):
        return tuple(answer_of(item) for item in value)
    if isinstance(value, torch.Tensor):
        return ("shape", *value.shape)
    return value


def is_plain(value: Any) -> bool:
    """Tell whether what a call gave to Python says nothing of a tensor's values: a shape, a dtype, a flag.

    >>> is_plain(torch.Size([2])), is_plain(iter([1]))
    (True, False)
    """
    if isinstance(value, tuple | list):
        return all(is_plain(item) for item in value)
    kinds = (bool, int, float, complex, str, bytes, type(None), type)
    return isinstance(value, kinds) or type(value).__module__.split(".")[0] == "torch" or callable(value)


def shape_depends_on_values(name: str, args: tuple[Any, ...], result: Any) -> bool:
    """Tell whether the shape of a call's result depends on the values of its arguments."""
    if name in _SHAPED_BY_VALUES:
        if name == "one_hot" and len(args) > 1:
            return isinstance(args[1], int) and args[1] == -1  # the classes are counted
        if name == "repeat_interleave" and len(args) > 1:
            return isinstance(args[1], torch.Tensor)
        return not (name == "where" and len(args) > 1)
    if name != "__getitem__":
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8) for part in index)


def shaping_numbers(
    watch: Watch,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensors: Sequence[torch.Tensor],
    result: Any,
) -> Iterator[torch.Tensor]:
    """Yield the tensors that a call takes for numbers which decide about the shape of its result: ``x[:, :length]``.

    The call is made again with each of them said to hold another number: of no function it is known what it does with
    one. It must not write to its arguments.

    Args:
        watch: Sees that a number is read.
        func: What was called.
        args: Its arguments.
        kwargs: Its keyword arguments.
        tensors: The tensors among them.
        result: What it gave.
    """
    single = [] if functorch_is_active() else [each for each in tensors if _may_be_number(each)]
    shapes = [part.shape for part in tensors_in(result)] if single else []
    kept = watch.drew, watch.trace, watch.looked
    try:
        for tensor in single if shapes else ():
            watch.trace, watch.looked = None, False
            with without_modes():
                own = int(tensor)
            others = [not own] if tensor.dtype == torch.bool else [own + 1, own - 1]
            found = [_shapes_with(watch, (id(tensor), other), func, args, kwargs, tensors) for other in others]
            told = [each for each in found if each is not None]
            if watch.looked and (not told or any(each != shapes for each in told)):
                yield tensor
    finally:
        watch.drew, watch.trace, watch.looked = kept


def _may_be_number(tensor: torch.Tensor) -> bool:
    real = not isinstance(tensor, FakeTensor) and not tensor.is_meta and tensor.layout == torch.strided
    return real and tensor.numel() == 1 and not (tensor.is_floating_point() or tensor.is_complex())


def _shapes_with(
    watch: Watch,
    instead: tuple[int, int],
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensors: Sequence[torch.Tensor],
) -> list[torch.Size] | None:
    """Give the shapes that a call gives where a tensor holds another number; None where it refuses that."""
    real = not any(isinstance(each, FakeTensor) for each in tensors)
    watch.instead = instead
    try:
        with without_functions():
            if not real:
                return [part.shape for part in tensors_in(func(*args, **kwargs))]
            with without_modes(), watch:
                return [part.shape for part in tensors_in(func(*args, **kwargs))]
    except Exception:  # whatever a call raises for a number that does not suit it
        return None
    finally:
        watch.instead = None
