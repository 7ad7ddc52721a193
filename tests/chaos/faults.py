"""Faults that are injected into one rank of a pipeline, and what every rank must then say."""

from __future__ import annotations

import dataclasses
import itertools
import random

RANKS = 3
STALL_S = 1.0  # materialize(timeout=) where a rank is made to stand still
ENDED = 70  # the exit code of a rank that was kept by an exchange which never ends
WITHIN_S = 5.0  # after it failed, or was given up

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
PLACES = (
    *("materialize", "initialiser", "batch", "forward", "backward", "tied gradients", "clipping", "infer", "evaluate"),
    *("verify", "state_dict", "load", "save", "profiling", "between calls"),
)
KINDS = ("exception", "SystemExit", "KeyboardInterrupt", "out of memory", "SIGKILL", "SIGSTOP", "endless loop")
RAISED = {
    "exception": "ValueError: chaos",
    "SystemExit": "SystemExit: chaos",
    "KeyboardInterrupt": "KeyboardInterrupt: chaos",
    "out of memory": "OutOfMemoryError: chaos",
}
"""What a rank raises, by kind, as others name it."""
DIFFERENT = {
    "wrong batch": "in the values of its tensors",
    "wrong order of calls": "what is called differs",
    "another mode": "differs between ranks",
    "optimiser left out": "whether an optimiser has changed the weights",
}
"""What all ranks raise where one does another thing than the others."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that goes wrong on one rank."""

    place: str
    kind: str
    schedule: str
    rank: int

    @property
    def name(self) -> str:
        return f"{self.place}, {self.kind}, {self.schedule}, rank {self.rank}"

    @property
    def stands_still(self) -> bool:
        return self.kind in ("SIGSTOP", "endless loop")

    @property
    def is_heard(self) -> bool:
        """Whether the rank itself still says something."""
        return self.kind not in ("SIGKILL", "SIGSTOP", "endless loop")


def possible() -> list[Fault]:
    """List all faults."""
    found = [Fault(*each) for each in itertools.product(PLACES, KINDS, SCHEDULES, range(RANKS)) if _can_be(*each)]
    orders = itertools.product(DIFFERENT, SCHEDULES, range(RANKS))
    return found + [Fault("step", kind, schedule, rank) for kind, schedule, rank in orders]


def _can_be(place: str, kind: str, schedule: str, rank: int) -> bool:
    still = ("SIGSTOP", "endless loop")
    if place == "profiling" and (rank != 0 or kind in still):  # only that rank measures; it is waited for
        return False
    if kind == "endless loop" and place in ("materialize", "initialiser", "batch", "load"):  # it has said it is busy
        return False
    if place == "tied gradients" and (rank == 1 or schedule in ("ZBVZeroBubble", "DualPipeV")):  # no tie between ranks
        return False
    return not (place == "between calls" and kind == "out of memory")


def chosen(number: int, seed: int = 0) -> list[Fault]:
    """Choose faults so that every pair of a place and a kind is there before any comes again with another schedule."""
    order = random.Random(seed)
    everything = possible()
    order.shuffle(everything)
    by_pair: dict[tuple[str, str], list[Fault]] = {}
    for fault in everything:
        by_pair.setdefault((fault.place, fault.kind), []).append(fault)
    pairs = sorted(by_pair)
    order.shuffle(pairs)
    rounds = itertools.zip_longest(*(by_pair[pair] for pair in pairs))
    return [fault for each in rounds for fault in each if fault is not None][:number]


@dataclasses.dataclass(frozen=True)
class Said:
    """What one rank said of a fault: the error of the call, and of another call afterwards."""

    kind: str
    text: str
    at: float
    again: str


def faults_of(
    fault: Fault,
    is_reached: bool,
    said: dict[int, Said | None],
    after: dict[int, float],
    codes: dict[int, int | None],
    ended: dict[int, str],
) -> list[str]:
    """Say what is wrong with how the ranks took a fault; nothing where all is as it should be.

    ``after`` is how many seconds after the fault each rank spoke; ``ended`` is what ranks printed that were kept by an
    exchange which never ends, and so ended themselves.
    """
    if not is_reached:
        return [f"not reached: {[what and what.text for what in said.values()]}"]
    wrong = []
    for rank in range(RANKS):
        what = said.get(rank)
        if rank == fault.rank and not fault.is_heard:
            continue
        if what is None and codes.get(rank) == ENDED and f"rank {fault.rank}" in ended.get(rank, ""):
            continue
        if what is None:
            wrong.append(f"hang: rank {rank} said nothing (ended with {codes.get(rank)})")
            continue
        limit = WITHIN_S + (STALL_S if fault.stands_still else 0.0)
        if after[rank] > limit:
            wrong.append(f"late: rank {rank} after {after[rank]:.1f} s")
        cause = _wrong_cause(fault, rank, what)
        if cause:
            wrong.append(f"wrong cause: rank {rank} {cause}: {what.kind}: {what.text}; then {what.again}")
    return wrong


def _wrong_cause(fault: Fault, rank: int, what: Said) -> str:
    if fault.kind in DIFFERENT:
        return "" if what.kind == "PlanError" and DIFFERENT[fault.kind] in what.text else "does not say what differs"
    if rank == fault.rank:
        expected = RAISED[fault.kind].split(":")[0]
        wrapped = fault.place == "initialiser" and expected in what.text  # names the module
        return "" if what.kind == expected or wrapped else "does not raise its own error"
    if f"rank {fault.rank}" not in what.text.partition("; last actions")[0]:
        return "does not name the rank"
    if fault.kind in RAISED and fault.place != "between calls":
        expected = RAISED[fault.kind]
    elif fault.stands_still:
        expected = "has not answered"
    else:
        expected = "ended without a word"
    if expected not in what.text:
        return f"does not say {expected!r}"
    if what.kind != "RankError" and fault.place != "initialiser":
        return "is no RankError"
    return (
        "" if what.again.startswith(("the pipeline ended earlier", "nothing", "not made")) else "forgets why it ended"
    )
