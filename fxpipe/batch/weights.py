"""What each microbatch's loss weighs in the batch's: counts first, numbers that add up, then shares of their totals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from fxpipe.batch.dims import Microbatch
from fxpipe.errors import ScheduleError
from fxpipe.program import LossTerm

Counts: TypeAlias = tuple[tuple[float, ...], ...]
"""By microbatch, then by loss term: what it counts (valid targets, samples); 0 for a sum, which is not weighed."""
LossWeight: TypeAlias = Callable[..., float] | str | None
"""What a user says of the weights: a function, ``"microbatch"``, or nothing."""


def check_loss_weight(loss_weight: object) -> None:
    """Refuse what is no way to weigh microbatches.

    Raises:
        ScheduleError: It is neither a function nor ``"microbatch"`` nor None.
    """
    if not (loss_weight is None or loss_weight == "microbatch" or callable(loss_weight)):
        raise ScheduleError(
            f"loss_weight is {loss_weight!r}\n  pass a function of a microbatch's arguments, 'microbatch' (each weighs "
            "the same), or None (found in the loss)"
        )


def count_terms(
    terms: Sequence[Sequence[LossTerm]], tensors: Sequence[Mapping[str, Any]], sizes: Sequence[int]
) -> Counts:
    """Count what each microbatch's loss terms are means over.

    These are plain numbers of this process; replicas of a pipeline add up their totals before ``make_shares``.

    Args:
        terms: The loss terms of each microbatch.
        tensors: Its named inputs.
        sizes: Its samples.

    >>> count_terms([[LossTerm("a", "samples"), LossTerm("b", "sum")]] * 2, [{}, {}], (3, 1))
    ((3.0, 0.0), (1.0, 0.0))
    """
    return tuple(
        tuple(_count(term, named, size) for term in each)
        for each, named, size in zip(terms, tensors, sizes, strict=True)
    )


def add_counts(counts: Counts) -> tuple[float, ...]:
    """Add up counts over microbatches: one total for each loss term.

    >>> add_counts(((3.0, 0.0), (1.0, 0.0)))
    (4.0, 0.0)
    """
    most = max((len(row) for row in counts), default=0)
    return tuple(math.fsum(row[place] for row in counts if place < len(row)) for place in range(most))


def make_shares(
    terms: Sequence[Sequence[LossTerm]], counts: Counts, totals: Sequence[float]
) -> tuple[tuple[float, ...], ...]:
    """Turn counts into the weights under which the microbatches' losses add up to the batch's.

    Where nothing at all is counted, each microbatch gives what the batch does (NaN for a mean over no targets, 0 where
    the divisor is kept from 0), and all weigh the same.

    Args:
        terms: The loss terms of each microbatch.
        counts: Of ``count_terms``.
        totals: Of ``add_counts``, over all replicas.

    >>> make_shares([[LossTerm("a", "samples"), LossTerm("b", "sum")]] * 2, ((3.0, 0.0), (1.0, 0.0)), (4.0, 0.0))
    ((0.75, 1.0), (0.25, 1.0))
    """
    return tuple(
        tuple(_share(*each, len(terms)) for each in zip(own, row, totals, strict=False))
        for own, row in zip(terms, counts, strict=True)
    )


def _count(term: LossTerm, tensors: Mapping[str, Any], size: int) -> float:
    if term.kind == "sum":
        return 0.0
    return term.count(tensors) if term.kind == "tokens" and term.count is not None else float(size)


def _share(term: LossTerm, count: float, total: float, num_microbatches: int) -> float:
    if term.kind == "sum":
        return 1.0
    if not total:
        return 1 / num_microbatches
    divisor = term.finish(count) if term.finish is not None else count
    if not (divisor and math.isfinite(divisor)):
        return 0.0
    return divisor / (term.finish(total) if term.finish is not None else total)


def given_counts(
    loss_weight: Callable[..., float] | str, microbatches: Sequence[Microbatch], terms: Sequence[Sequence[LossTerm]]
) -> Counts:
    """Give the user's weights the form of counts."""
    weights = loss_weights(loss_weight, microbatches) if callable(loss_weight) else (1.0,) * len(microbatches)
    return tuple((weight,) * len(each) for weight, each in zip(weights, terms, strict=True))


def loss_weights(loss_weight: Callable[..., float], microbatches: Sequence[Microbatch]) -> tuple[float, ...]:
    """Ask a user's ``loss_weight`` for the weight of each microbatch.

    Args:
        loss_weight: Called as ``loss_weight(*args, **kwargs)``, with ``target=`` where there is one.
        microbatches: What it is called on, one at a time.

    Returns:
        One weight per microbatch, not yet normalised.

    Raises:
        ScheduleError: A weight is not a finite number of at least 0, or all are 0.

    >>> batches = [(("x" * rows,), {}, None) for rows in (3, 1)]
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
