"""One small exchange before every step: either all ranks go on with the same thing, or all raise the same error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

import fxpipe.errors as errors
from fxpipe.errors import FxpipeError, PlanError, RankError
from fxpipe.runtime.ranks.failures import mark_agreed
from fxpipe.runtime.ranks.groups import Groups


def agree(
    groups: Groups | None,
    error: Exception | None,
    subject: str,
    *parts: object,
    within: Mapping[str, object] | None = None,
    tensors: int | None = None,
    trained: bool | None = None,
    shown: Callable[[], Mapping[str, object]] | None = None,
) -> None:
    """Exchange verdicts with the other ranks, replicas included.

    Args:
        groups: The pipeline's groups; None where one process holds it all.
        error: What is wrong on this rank, None if nothing is.
        subject: What must be the same on all ranks, for the message: ``"the plan"``.
        *parts: It, in parts whose ``repr`` is the same on all ranks.
        within: What must besides be the same along each pipeline, by what it is and its ``repr``; replicas may differ.
        tensors: A checksum that must be the same along each pipeline, on the ranks that know it; None on others.
        trained: Whether an optimiser has changed the weights: the same on all ranks that know it; None on others.
        shown: Gives what says in plainer words what ``within`` compares; asked for where something differs.

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
    groups.check_open()
    # As many numbers whatever is called: two calls that differ can be told apart. Two replicas may hold different
    # batches: what each rank holds counts in the place of its own one.
    num_replicas = len(groups.replicas.ranks) if groups.replicas is not None else 1
    own = [*_digest(within), *_vote(tensors)]
    of_replicas = [own if replica == groups.replica else [_NO_VOTE] * len(own) for replica in range(num_replicas)]
    votes = torch.tensor([int(error is not None), *_digest(parts), *_vote(trained), *chain.from_iterable(of_replicas)])
    with groups.waiting():
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=groups.everyone)
    failed, *pairs = votes.tolist()
    if not failed and all(one == -other or one == _NO_VOTE for one, other in zip(pairs[::2], pairs[1::2], strict=True)):
        return
    told = {**(shown() if shown is not None else {}), **(within or {})}
    held = tuple((name, repr(value)) for name, value in told.items())
    verdict = _Verdict(_spelled(error), repr(parts), held, tensors, trained, groups.replica)
    raised: Exception = _error(groups.members, subject, groups.gather(verdict))
    if error is not None and not isinstance(error, FxpipeError):
        raised = error
    mark_agreed(raised)
    raise raised


def agree_first(
    error: Exception | None,
    plan: Mapping[str, object],
    same: Mapping[str, object],
    compare: Callable[[str], list[str] | None],
) -> None:
    """Exchange verdicts before there are groups.

    Args:
        error: What is wrong on this rank, None if nothing is.
        plan: What is planned, part by part, and ``repr``.
        same: What else must be the same on all ranks, by what it is and its ``repr``.
        compare: Gives what each rank has, or None where all have the same.

    Raises:
        FxpipeError: As ``agree``.
    """
    verdicts = {
        subject: _Verdict(_spelled(error), "", tuple((name, _told(value)) for name, value in within.items()))
        for subject, within in (("the plan", plan), ("", same))
    }
    own = json.dumps({subject: asdict(verdict) for subject, verdict in verdicts.items()})
    gathered = compare(own) or ([own] if error is not None else [])
    if error is not None and not isinstance(error, FxpipeError):
        raise error
    for subject, verdict in verdicts.items():
        others = [_Verdict.from_json(json.loads(each)[subject]) for each in gathered]
        if any(each.error is not None or each.within != verdict.within for each in others):
            raise _error(range(len(others)), subject, others)


def _told(value: object) -> str:
    """Spell a value; of a long one the beginning, and a digest that no message shows: one store keeps all ranks'."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}{_digest(text)[0]}"


def _spelled(error: Exception | None) -> tuple[str, str] | None:
    return (type(error).__name__, str(error)) if error is not None else None


_NO_VOTE = -(2**63)
_LONGEST = 200
"""Characters of a value that a message shows."""


class ModesChanged(FxpipeError):
    """A module's training flag was changed on some rank: told to all, who record anew; no user sees it."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What one rank says: its error, if it has one, what it holds, and which replica it belongs to."""

    error: tuple[str, str] | None = None
    parts: str = ""
    within: tuple[tuple[str, str], ...] = ()
    tensors: int | None = None
    trained: bool | None = None
    replica: int = 0

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> _Verdict:
        """Read what ``asdict`` gave, of the first exchange."""
        error = found["error"]
        pairs = tuple((str(name), str(text)) for name, text in found["within"])
        return cls(None if error is None else (str(error[0]), str(error[1])), str(found["parts"]), pairs)


def _digest(value: object) -> list[int]:
    """Give a number and its negative: of 63 bits, so that both have a place in 64.

    The largest of the negatives is the least of all: where both maxima agree, so did everybody.
    """
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 1
    return [number, -number]


def _vote(value: object) -> list[int]:
    return _digest(value) if value is not None else [_NO_VOTE] * 2


def _error(members: Sequence[int], subject: str, verdicts: Sequence[_Verdict]) -> FxpipeError:
    for rank, verdict in zip(members, verdicts, strict=True):
        if verdict.error is not None:
            name, message = verdict.error
            kind: type[FxpipeError] | None = ModesChanged if name == "ModesChanged" else getattr(errors, name, None)
            if kind is None:
                return RankError(
                    f"rank {rank} failed while it prepared {subject or 'materialize'}: {name}: {message}\n"
                    "  see the output of that rank"
                )
            everywhere = all(other.error == verdict.error for other in verdicts)
            return kind(message if everywhere else f"rank {rank}: {message}")
    return _difference(members, subject, verdicts) or PlanError(f"{subject} differs between ranks\n  {_SAME_SCRIPT}")


def _difference(members: Sequence[int], subject: str, verdicts: Sequence[_Verdict]) -> PlanError | None:
    """Name the first two ranks that differ; another call first, for what else differs follows from it."""
    ranks = list(zip(members, verdicts, strict=True))
    calls = [(rank, call) for rank, verdict in ranks for call in _of(verdict.within, CALL)]
    for rank, call in calls[1:]:
        if call != calls[0][1]:
            return _differs("what is called", *calls[0], rank, call, way_out=_SAME_ORDER)
    (first, mine) = ranks[0]
    for rank, verdict in ranks[1:]:
        if verdict.parts != mine.parts:
            return _differs(subject, first, mine.parts, rank, verdict.parts)
    of_replica: dict[int, tuple[int, _Verdict]] = {}
    for rank, verdict in ranks:
        there, other = of_replica.setdefault(verdict.replica, (rank, verdict))
        for (name, one), (_, two) in zip(other.within, verdict.within, strict=False):
            if one != two:
                return _differs(subject, there, one, rank, two, f" in {name}", _WAYS_OUT.get(name, _SAME_SCRIPT))
    for replica in of_replica:
        sums = [(rank, v.tensors) for rank, v in ranks if v.replica == replica and v.tensors is not None]
        if found := _unequal(subject, TENSORS, sums):
            return found
    return _unequal(subject, TRAINED, [(rank, v.trained) for rank, v in ranks if v.trained is not None])


def _unequal(subject: str, name: str, known: Sequence[tuple[int, object]]) -> PlanError | None:
    for rank, value in known[1:]:
        if value != known[0][1]:
            first, one = known[0]
            return _differs(subject, first, repr(one), rank, repr(value), f" in {name}", _WAYS_OUT[name])
    return None


def _of(pairs: tuple[tuple[str, str], ...], name: str) -> list[str]:
    return [value for found, value in pairs if found == name]


_SAME_SCRIPT = "run the same script with the same arguments on every rank"
_SAME_ORDER = "make the same calls in the same order on every rank"
CALL = "the call"
"""What ``within`` calls the method that was called."""
TENSORS = "the values of its tensors"
"""What a checksum of a batch is of."""
TRAINED = "whether an optimiser has changed the weights since the last step"
_WAYS_OUT = {
    TRAINED: "call the optimiser's step on every rank, or on none: once per step that it follows",
    TENSORS: "every rank of a pipeline gets the same whole batch: give loaders the same seed, and leave "
    "DistributedSampler, which hands each rank a shard of its own, to data-parallel replicas",
}


def _differs(
    subject: str, rank: int, one: str, other: int, two: str, where: str = "", way_out: str = _SAME_SCRIPT
) -> PlanError:
    if not subject:
        subject, where = where.removeprefix(" in "), ""
    return PlanError(
        f"{subject} differs between ranks{where}: rank {rank} has {_short(one)}, rank {other} has {_short(two)}\n"
        f"  {way_out}"
    )


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
