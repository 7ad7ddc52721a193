"""Microbatches whose loss takes another path than the batch's: what they add to it, where that can be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fxpipe.errors import CaptureError
from fxpipe.program import LossTerm


def check_paths(
    terms: Sequence[Sequence[LossTerm]], on_path: Sequence[bool], tensors: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse microbatches that take another path through the loss than their batch does.

    One in which nothing counts may: ``loss = loss + (each[mask].mean() if mask.any() else 0 * each.sum())``.

    Args:
        terms: The loss terms of each microbatch.
        on_path: Whether its path is the batch's.
        tensors: Its named inputs.

    Raises:
        CaptureError: The batch's loss has terms of which it cannot be told what they are in a microbatch.

    >>> mean, zero = LossTerm("a", "samples", spelling="mean"), LossTerm("b", "sum", nothing=True)
    >>> check_paths([[mean], [mean, zero]], [True, False], [{}, {}])
    """
    wanted = next((own for own, on in zip(terms, on_path, strict=True) if on), None)
    for index, (own, on, named) in enumerate(zip(terms, on_path, tensors, strict=True)):
        if not on and (wanted is None or not _adds_alike(own, wanted, named)):
            raise CaptureError(
                f"the loss of microbatch {index} takes another path than that of the whole batch: what Python asks of "
                "the targets couples samples\n  write one loss for both paths (sums over a count kept from 0), pass "
                "loss_weight='microbatch' (the batch's loss is then the plain mean of its microbatches' losses), or "
                "microbatches=1"
            )


def check_kinds(terms: Sequence[Sequence[LossTerm]]) -> None:
    """Refuse microbatches of which some weigh by their samples and others by what counts in them.

    Args:
        terms: The loss terms of each microbatch.

    Raises:
        CaptureError: Some do: another path was proved of another loss.

    >>> check_kinds([[LossTerm("a", "samples")], [LossTerm("b", "sum")]])
    """
    places = zip(*([term.kind for term in own] for own in terms), strict=False)
    if any({"samples", "tokens"} <= set(kinds) for kinds in places):
        raise CaptureError(
            "the microbatches of this batch take different paths, whose losses weigh in different ways: some by their "
            "samples, others by what counts in them\n  write one loss for both (sums over a count kept from 0), "
            "or pass loss_weight="
        )


def _adds_alike(own: Sequence[LossTerm], wanted: Sequence[LossTerm], tensors: Mapping[str, Any]) -> bool:
    """Whether the terms on one path are those on another, but for some in which nothing counts."""
    mine, theirs = ({term.spelling for term in each} for each in (own, wanted))
    return all(term.nothing or (term.spelling and term.spelling in theirs) for term in own) and all(
        term.nothing or (term.spelling and term.spelling in mine) or _counts_nothing(term, tensors) for term in wanted
    )


def _counts_nothing(term: LossTerm, tensors: Mapping[str, Any]) -> bool:
    return term.kind == "tokens" and term.count is not None and not term.count(tensors)
