"""One small exchange before every step: either all ranks go on with the same thing, or all raise the same error."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

import fxpipe.errors as errors
from fxpipe.errors import FxpipeError, PlanError
from fxpipe.runtime.ranks.groups import Groups


def agree(
    groups: Groups | None, error: FxpipeError | None, subject: str, *parts: object, within: object = None
) -> None:
    """Exchange verdicts with the other ranks, replicas included.

    Args:
        groups: The pipeline's groups; None where one process holds it all.
        error: What is wrong on this rank, None if nothing is.
        subject: What must be the same on all ranks, for the message: ``"the plan"``.
        *parts: It, in parts whose ``repr`` is the same on all ranks.
        within: What must besides be the same along each pipeline, by its ``repr``; replicas may differ.

    Raises:
        FxpipeError: On every rank alike, if any rank has an error or the parts differ: the first failing rank's class
            and message.
    """
    if groups is None:
        if error is not None:
            raise error
        return
    # Two replicas may hold different batches: each rank's second digest counts in the place of its own one.
    num_replicas = len(groups.replicas.ranks) if groups.replicas is not None else 1
    least = -(2**63)
    votes = torch.full((3 + 2 * num_replicas,), least)
    place = 3 + 2 * groups.replica
    votes[:3] = torch.tensor([int(error is not None), *_digest(parts)])
    votes[place : place + 2] = torch.tensor(_digest(within))
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=groups.everyone)
    failed, *pairs = votes.tolist()
    if not failed and all(one == -other for one, other in zip(pairs[::2], pairs[1::2], strict=True)):
        return
    mine = (type(error).__name__, str(error)) if error is not None else None
    gathered = [_Verdict()] * len(groups.members)
    dist.all_gather_object(gathered, _Verdict(mine, repr(parts), repr(within), groups.replica), group=groups.everyone)
    raise _error(groups, subject, gathered)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What one rank says: its error, if it has one, what it holds, and which replica it belongs to."""

    error: tuple[str, str] | None = None
    parts: str = ""
    within: str = ""
    replica: int = 0


def _digest(value: object) -> list[int]:
    """Give a number and its negative: of 63 bits, so that both have a place in 64.

    The largest of the negatives is the least of all: where both maxima agree, so did everybody.
    """
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 1
    return [number, -number]


def _error(groups: Groups, subject: str, verdicts: list[_Verdict]) -> FxpipeError:
    for rank, verdict in zip(groups.members, verdicts, strict=True):
        if verdict.error is not None:
            name, message = verdict.error
            kind: type[FxpipeError] = getattr(errors, name, FxpipeError)
            everywhere = all(other.error == verdict.error for other in verdicts)
            return kind(message if everywhere else f"rank {rank}: {message}")
    first: dict[int, tuple[int, _Verdict]] = {}
    for rank, verdict in zip(groups.members, verdicts, strict=True):
        for key in (-1, verdict.replica):  # of all, and of its own replica
            there, other = first.setdefault(key, (rank, verdict))
            one, two = (other.parts, verdict.parts) if key < 0 else (other.within, verdict.within)
            if one != two:
                return PlanError(
                    f"{subject} differs between ranks: rank {there} has {_short(one)}, rank {rank} has {_short(two)}\n"
                    "  run the same script with the same arguments on every rank"
                )
    return PlanError(f"{subject} differs between ranks\n  run the same script with the same arguments on every rank")


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
