"""Values as a trained model has them, which random ones are not: means that lie on either side of a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fxpipe.capture.graph.given import Given, Kind, Values


@dataclass(frozen=True, slots=True)
class _Drive:
    """How random values are moved along the gradients of a number.

    Attributes:
        trial: Which of the random ones they are at first.
        steps: How often they are moved, by less each time.
        length: By how much at first, as a share of the longest.
        pulls: Which way, by microbatch: the mean of the batch lies between those of its microbatches.
    """

    trial: int
    steps: int
    length: float
    pulls: tuple[float, float, float]


_DRIVES = (_Drive(0, 12, 1.0, (-1.0, 1.0, -0.25)), _Drive(2, 6, 0.2, (0.0, -1.0, 1.0)))
"""Far, so that a cross entropy gets below 1e-5; and near to 0, where nothing is so large that it hides the rest."""
DRIVEN = len(_DRIVES)
_STEP = {"normal": (1.25, -math.inf, math.inf), "unit": (0.1, 0.01, 0.99), "positive": (0.5, 0.05, 8.0)}
"""How far they are moved at most, and between what they stay, by what values look like."""


def driven(
    given: Given, kind: Kind, which: int, slope: Callable[[Values], Mapping[fx.Node, torch.Tensor]]
) -> tuple[Values, list[Values]]:
    """Give values for the whole batch and for each microbatch, moved along the gradients of a number.

    Where a mean is kept above a bound, or below one (flooding, free bits, a clamp), the batch's and its microbatches'
    then lie on either side of it.

    Args:
        given: Makes values.
        kind: What they look like.
        which: Up to ``DRIVEN``.
        slope: Gives the gradients of the number, by source, for values of the batch.
    """
    drive = _DRIVES[which]
    whole, parts = given.make(kind, drive.trial)
    step, least, most = _STEP[kind.floats]
    for done in range(drive.steps):
        length = step * drive.length * (1 - done / drive.steps)
        for node, gradient in slope(whole).items():
            pieces = []
            for pull, part, own in zip(drive.pulls, parts, given.parted(node, gradient.sign()), strict=True):
                part[node] = (part[node].detach() + pull * length * own).clamp(least, most).requires_grad_()
                pieces.append(part[node])
            whole[node] = given.joined(node, pieces).detach().requires_grad_()
    return whole, parts
