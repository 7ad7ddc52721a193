"""Weights under which the losses of microbatches add up to the batch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from fxpipe.batch.split import Microbatch
from fxpipe.errors import ScheduleError
from fxpipe.program import LossTerm


def loss_weights(loss_weight: Callable[..., float], microbatches: Sequence[Microbatch]) -> tuple[float, ...]:
    """Ask a user's ``loss_weight`` for the weight of each microbatch.

    Args:
        loss_weight: Called as ``loss_weight(*args, **kwargs)``, with ``target=`` where there is one.
        microbatches: What it is called on, one at a time.

    Returns:
        One weight per microbatch, not yet normalised.

    Raises:
        ScheduleError: A weight is not a finite number of at least 0, or all are 0.

    >>> batches = [((torch.zeros(rows, 2),), {}, None) for rows in (3, 1)]
    >>> loss_weights(lambda x: float(len(x)), batches)
    (3.0, 1.0)
    """
    weights = []
    for index, (args, kwargs, target) in enumerate(microbatches):
        given = loss_weight(*args, **kwargs) if target is None else loss_weight(*args, target=target, **kwargs)
        try:
            weight = float(given)
        except (TypeError, ValueError) as error:
            raise ScheduleError(
                f"loss_weight gave {given!r} for microbatch {index}, which is no number\n"
                f"  return a float: the weight of this microbatch's loss in the batch's"
            ) from error
        if not math.isfinite(weight) or weight < 0:
            raise ScheduleError(
                f"loss_weight gave {weight} for microbatch {index}\n  return a finite number of at least 0"
            )
        weights.append(weight)
    if weights and sum(weights) == 0:
        raise ScheduleError(
            f"loss_weight gave 0 for all {len(weights)} microbatches\n  give at least one a positive weight"
        )
    return tuple(weights)


def loss_shares(
    terms: Sequence[Sequence[LossTerm]], inputs: Sequence[Mapping[str, torch.Tensor]], sizes: Sequence[int]
) -> tuple[tuple[float, ...], ...]:
    """Give the share of each loss term of each microbatch in the batch's loss.

    Args:
        terms: The summands of each microbatch's loss; variants of one model may have more or fewer.
        inputs: The named tensors of each microbatch.
        sizes: Samples of each.

    Returns:
        For each microbatch, a share for each of its terms.
    """
    columns = []
    for position in range(max(len(each) for each in terms)):
        column = [each[position] if position < len(each) else None for each in terms]
        weights = [
            _weight(term, tensors, size) if term is not None else 0.0
            for term, tensors, size in zip(column, inputs, sizes, strict=True)
        ]
        total = sum(weights)
        columns.append(
            [
                1.0 if term is not None and term.kind == "sum" else (weight / total if total else 0.0)
                for term, weight in zip(column, weights, strict=True)
            ]
        )
    return tuple(tuple(columns[position][index] for position in range(len(each))) for index, each in enumerate(terms))


def _weight(term: LossTerm, tensors: Mapping[str, torch.Tensor], size: int) -> float:
    if term.kind == "tokens" and term.count is not None:
        return term.count(tensors)
    return float(size)
