"""What is known of a tensor before it has memory: shape, dtype, bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

_ITEM_BITS = {
    "bool": 8,
    "uint8": 8,
    "int8": 8,
    "uint16": 16,
    "int16": 16,
    "uint32": 32,
    "int32": 32,
    "uint64": 64,
    "int64": 64,
    "bfloat16": 16,
    "float16": 16,
    "float32": 32,
    "float64": 64,
    "complex32": 32,
    "complex64": 64,
    "complex128": 128,
}


def dtype_bytes(dtype: str) -> int:
    """Give the bytes one element of ``dtype`` takes; torch's names without the ``torch.`` prefix.

    >>> dtype_bytes("bfloat16"), dtype_bytes("float8_e4m3fn")
    (2, 1)
    """
    if dtype.startswith("float8"):
        return 1
    return _ITEM_BITS[dtype] // 8


def dtype_name(dtype: object) -> str:
    """Give the name of a dtype: torch's own or its text, without the ``torch.`` prefix.

    Raises:
        ValueError: No dtype has that name.

    >>> dtype_name("torch.bfloat16")
    'bfloat16'
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _ITEM_BITS and not name.startswith("float8_"):
        raise ValueError(f"unknown dtype {dtype!r}\n  known: {', '.join(sorted(_ITEM_BITS))}, float8_…")
    return name


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """What a tensor is, without the tensor.

    Attributes:
        shape: Its sizes.
        dtype: torch's name without the prefix.
        requires_grad: Whether a gradient flows through it.

    >>> TensorMeta((4, 1024, 768), "bfloat16").nbytes
    6291456
    """

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of a contiguous copy."""
        return self.numel * dtype_bytes(self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"
