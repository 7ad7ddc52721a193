"""One small exchange before every step: either all ranks go on with the same thing, or all raise the same error."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

import fxpipe.errors as errors
from fxpipe.errors import FxpipeError, PlanError
from fxpipe.runtime.ranks.groups import Groups


def agree(groups: Groups | None, error: FxpipeError | None, subject: str, *parts: object) -> None:
    """Exchange verdicts with the other ranks.

    Args:
        groups: The pipeline's groups; None where one process holds it all.
        error: What is wrong on this rank, None if nothing is.
        subject: What must be the same on all ranks, for the message: ``"the plan"``.
        *parts: It, in parts whose ``repr`` is the same on all ranks.

    Raises:
        FxpipeError: On every rank alike, if any rank has an error or the parts differ: the first failing rank's class
            and message.
    """
    if groups is None:
        if error is not None:
            raise error
        return
    text = repr(parts)
    # Of 63 bits, so that its negative has a place in 64; the largest of the negatives is the least of all.
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    votes = torch.tensor([int(error is not None), digest, -digest])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=groups.control)
    if votes.tolist() == [0, digest, -digest]:
        return
    mine = (type(error).__name__, str(error)) if error is not None else None
    gathered: list[tuple[tuple[str, str] | None, str]] = [(None, "")] * len(groups.ranks)
    dist.all_gather_object(gathered, (mine, text), group=groups.control)
    raise _error(groups, subject, [verdict for verdict, _ in gathered], [text for _, text in gathered])


def _error(groups: Groups, subject: str, verdicts: list[tuple[str, str] | None], texts: list[str]) -> FxpipeError:
    for position, verdict in enumerate(verdicts):
        if verdict is not None:
            name, message = verdict
            kind: type[FxpipeError] = getattr(errors, name, FxpipeError)
            everywhere = all(other == verdict for other in verdicts)
            return kind(message if everywhere else f"rank {groups.ranks[position]}: {message}")
    position = next(index for index, text in enumerate(texts) if text != texts[0])
    return PlanError(
        f"{subject} differs between ranks: rank {groups.ranks[0]} has {_short(texts[0])}, rank "
        f"{groups.ranks[position]} has {_short(texts[position])}\n"
        "  run the same script with the same arguments on every rank"
    )


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
