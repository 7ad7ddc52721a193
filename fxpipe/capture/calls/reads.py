"""Which calls hand a tensor's values to Python, or shape their result by them, and how answers are compared."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

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
            return bool(args[1] == -1)  # the classes are counted
        return not (name == "where" and len(args) > 1)
    if name != "__getitem__":
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8) for part in index)
