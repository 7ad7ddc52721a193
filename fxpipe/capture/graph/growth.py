"""Where the samples of a batch lie in what a model returns: seen in a second recording with twice the samples."""

from __future__ import annotations

from typing import Any

import torch

from fxpipe.errors import ScheduleError
from fxpipe.ir.tree import tree_leaves


def output_dims(one: Any, two: Any, samples: int) -> dict[str, int | None]:
    """Find the dimension of samples of each tensor that a model returns, by path: ``"output['logits']"``.

    Args:
        one: What it returned for some samples.
        two: For twice as many.
        samples: How many in ``one``.

    Returns:
        The one dimension that has twice the size, None where there is not just one.

    Raises:
        ScheduleError: A number beside the tensors is another one for other numbers of samples.

    >>> output_dims((torch.zeros(4, 2), torch.zeros(3)), (torch.zeros(4, 4), torch.zeros(3)), 2)
    {'output[0]': 1, 'output[1]': None}
    """
    pairs = list(zip(tree_leaves(one, "output"), tree_leaves(two, "output"), strict=False))
    for (path, left), (_, right) in pairs:
        if isinstance(left, int | float | str) and left != right:
            raise ScheduleError(
                f"{path} is {left!r} for {samples} samples and {right!r} for {2 * samples}: those of microbatches do "
                "not tell the batch's\n  call infer with one microbatch, or leave it out of what the model returns"
            )
    return {
        path: _grown(left, right, samples)
        for (path, left), (_, right) in pairs
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    }


def _grown(one: torch.Tensor, two: torch.Tensor, samples: int) -> int | None:
    if one.dim() != two.dim():
        return None
    grown = [at for at in range(one.dim()) if one.shape[at] != two.shape[at]]
    fits = len(grown) == 1 and two.shape[grown[0]] == 2 * one.shape[grown[0]]
    return grown[0] if fits and one.shape[grown[0]] % samples == 0 else None
