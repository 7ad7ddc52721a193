"""Counts (what a layer does) and costs (how long that takes), per layer and microbatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "input_grad", "weight_grad"]
PHASES: tuple[Phase, ...] = ("forward", "input_grad", "weight_grad")


@dataclass(frozen=True, slots=True)
class OpCount:
    """One aten operation of a layer: floating-point operations, bytes read and written, dtype it computes in."""

    name: str
    phase: Phase
    flops: int
    bytes: int
    dtype: str


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """What one layer does for one microbatch; equal layers share one value.

    Attributes:
        ops: Every operation of forward and backward.
        saved_bytes: Bytes kept from forward to backward that only this layer holds (parameters, and tensors that are
            inputs or outputs of layers, not included).
        saved_values: Which of the layer's inputs and outputs autograd keeps, as ``("input", i)`` or ``("output", i)``
            by flat position; the stage counts each such tensor once.
        uncounted: Names of operations without a FLOP formula, which count by their bytes.
        attention: Form of each attention call inside: ``"causal"``, ``"mask"``, ``"full"``.
        gradient_bytes: Bytes of the largest tensor that its backward makes on the way to the gradients of its inputs.
    """

    ops: tuple[OpCount, ...] = ()
    saved_bytes: int = 0
    saved_values: tuple[tuple[str, int], ...] = ()
    uncounted: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    gradient_bytes: int = 0

    def flops(self, phase: Phase | None = None) -> int:
        """Sum the FLOPs of one phase, or of all.

        >>> ops = OpCount("mm", "forward", 8, 4, "float32"), OpCount("mm", "input_grad", 8, 4, "float32")
        >>> counts = LayerCounts(ops)
        >>> counts.flops("forward"), counts.flops()
        (8, 16)
        """
        return sum(op.flops for op in self.ops if phase is None or op.phase == phase)

    def bytes(self, phase: Phase | None = None) -> int:
        """Sum the bytes moved in one phase, or in all."""
        return sum(op.bytes for op in self.ops if phase is None or op.phase == phase)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Seconds of one layer for one microbatch."""

    forward_s: float
    input_grad_s: float = 0.0
    weight_grad_s: float = 0.0

    @property
    def backward_s(self) -> float:
        """Both halves of the backward."""
        return self.input_grad_s + self.weight_grad_s

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.input_grad_s + self.weight_grad_s
