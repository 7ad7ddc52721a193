"""The dtype a model is trained in, where it is not the one it was captured in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.hardware import Training
from fxpipe.ir.spec import TensorInfo
from fxpipe.ir.tensor import TensorMeta, dtype_bytes


@dataclass(frozen=True, slots=True)
class Precision:
    """Weights, values and operations of the model's dtype take another one; what the model itself casts stays.

    Attributes:
        captured: Floating dtype that most of the weights have.
        trained: Dtype they are trained in.

    >>> Precision("float32", "bfloat16").nbytes(1000, "float32"), Precision("float32", "bfloat16").dtype("int64")
    (500, 'int64')
    """

    captured: str
    trained: str

    def dtype(self, dtype: str) -> str:
        """Give the dtype that takes the place of ``dtype``."""
        return self.trained if dtype == self.captured else dtype

    def nbytes(self, nbytes: int, dtype: str) -> int:
        """Give the bytes of what took ``nbytes`` in ``dtype``, rounded up."""
        if dtype != self.captured or self.trained == self.captured:
            return nbytes
        return -(-nbytes * dtype_bytes(self.trained) // dtype_bytes(self.captured))

    def meta(self, meta: TensorMeta) -> TensorMeta:
        """Give a value as it is in training."""
        return replace(meta, dtype=self.dtype(meta.dtype))

    def parameter(self, info: TensorInfo) -> str:
        """Give the dtype of a parameter or buffer in training; every floating one is cast."""
        return self.trained if is_floating(info.dtype) and self.trained != self.captured else info.dtype


def is_floating(dtype: str) -> bool:
    """Tell whether a dtype is a real floating one.

    >>> is_floating("bfloat16"), is_floating("int64")
    (True, False)
    """
    return dtype.startswith(("float", "bfloat"))


def precision_of(graph: LayerGraph, training: Training) -> Precision:
    """Find the dtype most of the model's weights have, and the one they are trained in."""
    sizes: dict[str, int] = {}
    seen: set[str] = set()
    for spec in graph.specs:
        for info in spec.parameters:
            if info.fqn not in seen and is_floating(info.dtype):
                seen.add(info.fqn)
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    captured = max(sizes, key=lambda dtype: (sizes[dtype], dtype), default="float32")
    return Precision(captured, training.param_dtype or captured)
