"""How many numbers an operation takes from torch's CPU generator, without running it.

The formulas were read from torch's kernels (``aten/src/ATen/native/cpu/DistributionTemplates.h``) and are tried against
the installed torch before the first use of each: where one is not true there, it is not used, and the operation is run
once while it is recorded to see where the generator stands after it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from fxpipe._torch import without_functions, without_modes
from fxpipe.recipes.mersenne import advance, has_cached_normal

aten = torch.ops.aten
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_VECTOR = 16
"""Normal samples are made 16 at a time, from 16 uniform ones, in contiguous tensors of at least so many elements."""

_UNIFORM: frozenset[Any] = frozenset(
    {aten.uniform_.default, aten.rand.default, aten.rand.generator, aten.rand_like.default}
)
_NORMAL: frozenset[Any] = frozenset(
    {aten.normal_.default, aten.randn.default, aten.randn.generator, aten.randn_like.default}
)


def count_draws(func: Any, filled: torch.Tensor, state_has_cached: Callable[[], bool]) -> int | None:
    """Give the number of 32-bit words that an operation draws.

    Args:
        func: The operation.
        filled: The tensor it fills; only its shape, strides and dtype count, so it may be fake.
        state_has_cached: Tells whether the generator keeps a normal sample (``has_cached_normal``); rarely asked.

    Returns:
        The number; None where it has to be found by running the operation.

    >>> count_draws(torch.ops.aten.normal_.default, torch.empty(17, device="meta"), lambda: False)
    33
    """
    family = "uniform" if func in _UNIFORM else "normal" if func in _NORMAL else ""
    if not family or filled.dtype not in _FLOATS:
        return None
    redraws = _redraws(family, filled.dtype)
    if redraws is None:
        return None
    number = _formula(family, filled.dtype, filled.numel(), filled.is_contiguous(), redraws)
    if number is None:
        return None
    if family == "normal" and not _in_vectors(filled.numel(), filled.is_contiguous()) and state_has_cached():
        return None
    return number


def _in_vectors(numel: int, contiguous: bool) -> bool:
    return numel >= _VECTOR and contiguous


def _formula(family: str, dtype: torch.dtype, numel: int, contiguous: bool, redraws: bool) -> int | None:
    words = 2 if dtype == torch.float64 else 1
    if family == "uniform":
        return numel * words
    if not _in_vectors(numel, contiguous):
        # Pairs of samples, from two doubles each; an odd one out stays in the generator.
        return 2 * numel if numel % 2 == 0 else None
    rest = numel % _VECTOR
    if not redraws:
        return (numel + (_VECTOR - rest if rest else 0)) * words
    return (numel + (_VECTOR if rest else 0)) * words  # the last 16 samples are drawn again


@functools.cache
def _redraws(family: str, dtype: torch.dtype) -> bool | None:
    """Tell whether this torch draws the last 16 samples again, or fills them up: in 16 bits 2.11 does, 2.13 does not.

    Tried on small tensors; None, with a warning, where neither formula holds.
    """
    with without_modes(), without_functions(), torch.no_grad():
        for redraws in (True, False):
            if all(_holds(family, dtype, sizes, transposed, redraws) for sizes, transposed in _trials()):
                return redraws
    warnings.warn(
        f"this torch ({torch.__version__}) draws other amounts of {family} {str(dtype).removeprefix('torch.')} numbers "
        "than fxpipe knows: recording runs such operations once, which is slower and as exact; "
        "for speed take a torch that fxpipe was tested with",
        stacklevel=2,
    )
    return None


def _trials() -> list[tuple[tuple[int, ...], bool]]:
    lengths = [0, 1, 2, 3, 14, 15, 16, 17, 24, 31, 32, 33, 47, 48, 64, 100, 1000, 1023]
    return [((length,), False) for length in lengths] + [((4, 6), True), ((5, 5), True), ((3, 2), True)]


def _holds(family: str, dtype: torch.dtype, sizes: tuple[int, ...], transposed: bool, redraws: bool) -> bool:
    tensor = torch.empty(sizes, dtype=dtype, device="cpu")
    tensor = tensor.t() if transposed else tensor
    number = _formula(family, dtype, tensor.numel(), tensor.is_contiguous(), redraws)
    generator = torch.Generator("cpu").manual_seed(9 + tensor.numel())
    before = generator.get_state()
    if family == "uniform":
        tensor.uniform_(generator=generator)
    else:
        tensor.normal_(generator=generator)
    after = generator.get_state()
    if number is None:
        return has_cached_normal(after)
    return torch.equal(advance(before, number), after)
