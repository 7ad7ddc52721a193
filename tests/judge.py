"""Whether numbers are those that were wanted: in float64, on every processor, and far enough from a mistake.

Which sums run in which order is the processor's matter. Bits are compared only where the very same kernels run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

CLOSE = 1e-12  # of the tensor's largest element, in float64
ROUNDING = 1e-13  # of the largest of all tensors: such a one is zero but for rounding, as of an attention key's bias


def largest(tensors: Iterable[Any]) -> float:
    """The largest element of all tensors of numbers with a point."""
    numbers = [t for t in tensors if isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex())]
    return max((float(tensor.abs().max()) for tensor in numbers if tensor.numel()), default=0.0)


def distance(one: Any, other: Any, nothing: float = 0.0) -> float:
    """The largest difference, as a part of the larger tensor's largest element; infinite where nothing compares.

    None where both tensors are no larger than ``nothing``.
    """
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return 0.0 if type(one) is type(other) and one == other else float("inf")
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    if torch.equal(one, other):
        return 0.0
    if not (one.is_floating_point() or one.is_complex()):
        return float("inf")
    scale = largest((one, other))
    off = 0.0 if scale <= nothing else float((one - other).abs().max()) / scale
    return off if math.isfinite(off) else float("inf")


def distances(found: Mapping[Any, Any], wanted: Mapping[Any, Any], *, bits: bool = False) -> dict[Any, float]:
    """By name of everything that is not equal: how far it is off; infinite where it is missing."""
    nothing = 0.0 if bits else ROUNDING * largest(wanted.values())
    off = {}
    for name in {**wanted, **found}:
        both = name in wanted and name in found
        far = distance(found[name], wanted[name], nothing) if both else float("inf")
        if far:
            off[name] = far
    return off


def assert_close(found: Any, wanted: Any, what: str = "") -> None:
    """Fail with the furthest unless a tensor, or all of a mapping by name, is within 1e-12 in float64."""
    if not isinstance(wanted, Mapping):
        found, wanted = {what: found}, {what: wanted}
    kinds = {tensor.dtype for tensor in wanted.values() if tensor.is_floating_point() or tensor.is_complex()}
    assert kinds <= {torch.float64, torch.complex128}, f"judge in float64, not in {kinds}"
    off = distances(found, wanted)
    worst = sorted(off.items(), key=lambda item: -item[1])[:3]
    assert all(far <= CLOSE for _, far in worst), f"{what}: {worst}"


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Make what is made for a while in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
