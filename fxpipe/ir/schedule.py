"""The seven schedules by name: where they place stages, what they need, how many microbatches they keep alive.

Pure arithmetic on torch's orders of work (``torch.distributed.pipelining.schedules``); torch itself is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fxpipe.errors import ScheduleError


@dataclass(frozen=True, slots=True)
class Schedule:
    """What is fixed about a schedule.

    Attributes:
        name: torch's name.
        stages_per_rank: Exactly how many stages each rank runs, or None for any number.
        placement: ``"loop"``: stage ``i`` on rank ``i mod R``; ``"v"``: down the ranks and up again.
        splits_backward: Whether input gradients and weight gradients are computed apart.
    """

    name: str
    stages_per_rank: int | None
    placement: Literal["loop", "v"] = "loop"
    splits_backward: bool = False


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("GPipe", 1),
        Schedule("1F1B", 1),
        Schedule("Interleaved1F1B", None),
        Schedule("LoopedBFS", None),
        Schedule("InterleavedZeroBubble", None, splits_backward=True),
        Schedule("ZBVZeroBubble", 2, "v", splits_backward=True),
        Schedule("DualPipeV", 2, "v", splits_backward=True),
    )
}


def schedule_named(name: str) -> Schedule:
    """Look a schedule up by name.

    Raises:
        ScheduleError: There is no such schedule; the known ones are listed.

    >>> schedule_named("DualPipeV").placement
    'v'
    """
    if name not in SCHEDULES:
        raise ScheduleError(f"unknown schedule {name!r}\n  the schedules are {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def default_ranks(name: str, num_stages: int) -> int:
    """Give the number of ranks taken when none is asked for: one stage per rank, two where the schedule takes more.

    >>> default_ranks("1F1B", 4), default_ranks("ZBVZeroBubble", 8), default_ranks("LoopedBFS", 3)
    (4, 4, 3)
    """
    if schedule_named(name).stages_per_rank == 1 or num_stages % 2:
        return num_stages
    return num_stages // 2


def placement(name: str, num_stages: int, num_ranks: int) -> tuple[int, ...]:
    """Give each stage's rank.

    Raises:
        ScheduleError: The schedule cannot run so many stages on so many ranks.

    >>> placement("ZBVZeroBubble", 4, 2), placement("Interleaved1F1B", 4, 2)
    ((0, 1, 1, 0), (0, 1, 0, 1))
    """
    schedule = schedule_named(name)
    if num_stages < 1 or num_ranks < 1:
        raise ScheduleError(f"{num_stages} stages on {num_ranks} ranks\n  give at least one of each")
    if schedule.stages_per_rank is not None and num_stages != schedule.stages_per_rank * num_ranks:
        needed = f"{schedule.stages_per_rank} stage{'s' if schedule.stages_per_rank > 1 else ''} per rank"
        raise ScheduleError(
            f"{name} runs exactly {needed}, but {num_stages} stages were asked for on {num_ranks} ranks\n"
            f"  use stages={schedule.stages_per_rank * num_ranks}, or {_others(num_stages, num_ranks)}"
        )
    if num_stages % num_ranks:
        raise ScheduleError(
            f"{name} runs equally many stages on every rank, but {num_stages} stages were asked for on {num_ranks} "
            f"ranks\n  use stages={num_stages // num_ranks * num_ranks + num_ranks}, or as many ranks as divide them"
        )
    if schedule.placement == "loop":
        return tuple(stage % num_ranks for stage in range(num_stages))
    return tuple(min(stage, num_stages - 1 - stage) for stage in range(num_stages))


def _others(num_stages: int, num_ranks: int) -> str:
    fitting = [
        schedule.name
        for schedule in SCHEDULES.values()
        if (schedule.stages_per_rank is None and num_stages % num_ranks == 0)
        or num_stages == (schedule.stages_per_rank or 0) * num_ranks
    ]
    return f"a schedule for these: {', '.join(fitting)}" if fitting else f"ranks={num_stages}"


def fits_microbatches(name: str, num_stages: int, num_ranks: int, num_microbatches: int) -> bool:
    """Tell whether the schedule can run so many microbatches.

    >>> [m for m in range(1, 10) if fits_microbatches("Interleaved1F1B", 8, 4, m)]
    [1, 2, 3, 4, 5, 6, 7, 8]
    """
    if num_microbatches < least_microbatches(name, num_stages):
        return False
    if schedule_named(name).name in ("Interleaved1F1B", "InterleavedZeroBubble"):
        return num_microbatches % max(1, num_microbatches // num_ranks) == 0
    return num_microbatches >= 1


def least_microbatches(name: str, num_stages: int) -> int:
    """Give the smallest number of microbatches the schedule can run.

    >>> least_microbatches("1F1B", 4), least_microbatches("GPipe", 4)
    (4, 1)
    """
    return num_stages if schedule_named(name).name in ("1F1B", "DualPipeV") else 1


def check_microbatches(name: str, num_stages: int, num_ranks: int, num_microbatches: int) -> None:
    """Raise unless the schedule can run so many microbatches.

    Raises:
        ScheduleError: It cannot; the nearest numbers that work are named.
    """
    if fits_microbatches(name, num_stages, num_ranks, num_microbatches):
        return
    least = least_microbatches(name, num_stages)
    if num_microbatches < least:
        raise ScheduleError(
            f"{name} on {num_stages} stages needs at least {least} microbatches, got {num_microbatches}\n"
            f"  give a batch of at least {least} samples (drop_last=True on the data loader), or use GPipe"
        )
    below = next(m for m in range(num_microbatches, 0, -1) if fits_microbatches(name, num_stages, num_ranks, m))
    above = next(
        m for m in range(num_microbatches, 2 * num_microbatches + num_ranks + 1) if m % num_ranks == 0 and m > below
    )
    raise ScheduleError(
        f"{name} on {num_ranks} ranks cannot run {num_microbatches} microbatches: they must divide evenly into rounds "
        f"of {num_ranks} or more\n  use microbatches={below} or {above}"
    )


def live_microbatches(name: str, num_stages: int, num_ranks: int, num_microbatches: int) -> tuple[int, ...]:
    """Give for each stage the most microbatches whose activations are alive at once.

    A microbatch lives from its forward to the end of its backward; where the schedule splits the backward, to its
    weight gradients, since torch keeps nearly all activations until then.

    >>> live_microbatches("1F1B", 4, 4, 8), live_microbatches("GPipe", 2, 2, 8)
    ((4, 3, 2, 1), (8, 8))
    >>> live_microbatches("InterleavedZeroBubble", 8, 4, 8)
    (8, 8, 8, 8, 4, 4, 4, 4)
    """
    ranks = placement(name, num_stages, num_ranks)
    peaks = [0] * num_stages
    for rank, sets in enumerate(live_sets(name, num_stages, num_ranks, num_microbatches)):
        own = [stage for stage in range(num_stages) if ranks[stage] == rank]
        for stage, counts in zip(own, zip(*sets, strict=True), strict=True):
            peaks[stage] = max(counts)
    return tuple(peaks)


def live_sets(
    name: str, num_stages: int, num_ranks: int, num_microbatches: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Give for each rank the combinations of live microbatches of its stages, in order, that no other one contains.

    The stages of a rank do not all keep most at the same time, so what the rank needs is the most over these.

    >>> live_sets("ZBVZeroBubble", 4, 2, 8)
    (((3, 1), (4, 0)), ((2, 2), (3, 1)))
    >>> live_sets("LoopedBFS", 4, 2, 8)
    (((8, 8),), ((8, 8),))
    """
    schedule = schedule_named(name)
    local_stages = num_stages // num_ranks
    found: list[set[tuple[int, ...]]] = []
    for rank in range(num_ranks):
        down, up = num_stages - rank, rank + 1  # microbatches that fit between a stage and the end of the pipeline
        if name in ("GPipe", "LoopedBFS"):
            found.append({(num_microbatches,) * local_stages})
        elif name == "1F1B":
            found.append({(min(num_microbatches, down),)})
        elif name == "DualPipeV":
            found.append({(min(num_microbatches, down), up)})
        elif name == "ZBVZeroBubble":
            # The last warm-up forward of the first stage takes the place of one of the second, if there is one left.
            last = up - 1 if num_microbatches >= down else up
            found.append({_clipped((down, last), num_microbatches), _clipped((down - 1, up), num_microbatches)})
        else:
            found.append(_live_interleaved(schedule, local_stages, num_ranks, rank, num_microbatches))
    return tuple(map(_largest, found))


def _clipped(counts: tuple[int, ...], most: int) -> tuple[int, ...]:
    return tuple(min(count, most) for count in counts)


def _largest(sets: set[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Leave out what another one contains."""
    return tuple(
        entry
        for entry in sorted(sets)
        if not any(
            other != entry and all(more >= less for more, less in zip(other, entry, strict=True)) for other in sets
        )
    )


def _live_interleaved(
    schedule: Schedule, local_stages: int, num_ranks: int, rank: int, num_microbatches: int
) -> set[tuple[int, ...]]:
    """Follow one rank's order of work: warm-up forwards, then forward and backward by turns, then backwards.

    With a split backward the weight gradients trail the input gradients by ``rank`` backwards.
    """
    round_size = num_microbatches // max(1, num_microbatches // num_ranks)
    total = local_stages * num_microbatches
    ahead = (1 if schedule.splits_backward else 2) * (num_ranks - 1 - rank)
    warm_up = min((local_stages - 1) * round_size + ahead, total)
    delay = rank if schedule.splits_backward else 0
    alive = [0] * local_stages
    found = set()
    released = 0
    for step in range(total + warm_up):
        if step < total:
            alive[step // round_size % local_stages] += 1
            if step == total - 1 or step - warm_up >= delay:  # before, more is yet to come
                found.add(tuple(alive))
        if step - warm_up >= delay:
            alive[local_stages - 1 - released // round_size % local_stages] -= 1
            released += 1
    return found
