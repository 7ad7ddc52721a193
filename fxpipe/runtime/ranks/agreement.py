"""One small exchange before every step: either all ranks go on with the same thing, or all raise the same error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

import fxpipe.errors as errors
from fxpipe.errors import FxpipeError, MaterializeError, PlanError, RankError
from fxpipe.runtime.ranks.groups import Groups


def agree(
    groups: Groups | None,
    error: Exception | None,
    subject: str,
    *parts: object,
    within: Mapping[str, object] | None = None,
) -> None:
    """Exchange verdicts with the other ranks, replicas included.

    Args:
        groups: The pipeline's groups; None where one process holds it all.
        error: What is wrong on this rank, None if nothing is.
        subject: What must be the same on all ranks, for the message: ``"the plan"``.
        *parts: It, in parts whose ``repr`` is the same on all ranks.
        within: What must besides be the same along each pipeline, by what it is and its ``repr``; replicas may differ.

    Raises:
        FxpipeError: On every rank alike, if any rank has an error of fxpipe's or the parts differ: the first failing
            rank's class and message.
        RankError: Another rank has an error of another kind, or failed earlier. This rank's own passes as it is.
        MaterializeError: The pipeline was closed.
    """
    if groups is None:
        if error is not None:
            raise error
        return
    if groups.cause is not None:
        raise RankError(f"the pipeline ended earlier: {groups.cause}\n  start the script again")
    if not hasattr(groups, "everyone"):
        raise MaterializeError("this pipeline was closed\n  compile again to go on")
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
    held = tuple((name, repr(value)) for name, value in (within or {}).items())
    dist.all_gather_object(gathered, _Verdict(mine, repr(parts), held, groups.replica), group=groups.everyone)
    if error is not None and not isinstance(error, FxpipeError):
        raise error
    raise _error(groups, subject, gathered)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What one rank says: its error, if it has one, what it holds, and which replica it belongs to."""

    error: tuple[str, str] | None = None
    parts: str = ""
    within: tuple[tuple[str, str], ...] = ()
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
            kind: type[FxpipeError] | None = getattr(errors, name, None)
            if kind is None:
                return RankError(
                    f"rank {rank} failed while it prepared {subject}: {name}: {message}\n  see the output of that rank"
                )
            everywhere = all(other.error == verdict.error for other in verdicts)
            return kind(message if everywhere else f"rank {rank}: {message}")
    first: dict[int, tuple[int, _Verdict]] = {}
    for rank, verdict in zip(groups.members, verdicts, strict=True):
        for key in (-1, verdict.replica):  # of all, and of its own replica
            there, other = first.setdefault(key, (rank, verdict))
            if key < 0 and other.parts != verdict.parts:
                for (name, one), (_, two) in zip(other.within, verdict.within, strict=False):
                    if one != two:
                        return _differs(subject, there, one, rank, two, f" in {name}")
                return _differs(subject, there, other.parts, rank, verdict.parts)
            for (name, one), (_, two) in zip(other.within, verdict.within, strict=False) if key >= 0 else ():
                if one != two:
                    return _differs(subject, there, one, rank, two, f" in {name}", _WAYS_OUT.get(name, _SAME_SCRIPT))
    return PlanError(f"{subject} differs between ranks\n  {_SAME_SCRIPT}")


_SAME_SCRIPT = "run the same script with the same arguments on every rank"
TENSORS = "the values of its tensors"
"""What ``within`` calls the checksum of a batch."""
_WAYS_OUT = {
    TENSORS: "every rank of a pipeline gets the same whole batch: give loaders the same seed, and leave "
    "DistributedSampler, which hands each rank a shard of its own, to data-parallel replicas"
}


def _differs(
    subject: str, rank: int, one: str, other: int, two: str, where: str = "", way_out: str = _SAME_SCRIPT
) -> PlanError:
    return PlanError(
        f"{subject} differs between ranks{where}: rank {rank} has {_short(one)}, rank {other} has {_short(two)}\n"
        f"  {way_out}"
    )


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
