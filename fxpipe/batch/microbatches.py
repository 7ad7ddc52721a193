"""How many microbatches a batch is cut into: whole numbers in, a whole number or a ``ScheduleError`` out."""

from __future__ import annotations

from fxpipe.errors import ScheduleError
from fxpipe.ir.schedule import fits_microbatches, least_microbatches, schedule_named

# More microbatches per stage than this shrink the bubble by less than they cost in smaller kernels.
MICROBATCHES_PER_STAGE = 4


def choose_microbatches(
    batch_size: int, stages: int, ranks: int, schedule: str, microbatches: int | None = None
) -> int:
    """Choose into how many microbatches a batch is cut.

    Args:
        batch_size: Samples of the global batch.
        stages: Stages of the pipeline.
        ranks: Ranks that hold them.
        schedule: One of torch's schedule names, for example ``"1F1B"``.
        microbatches: The number asked for; None chooses the largest divisor of the batch size up to 4 × stages that
            the schedule runs with.

    Returns:
        A divisor of ``batch_size``.

    Raises:
        ScheduleError: The number asked for does not divide the batch or does not suit the schedule, or no number does.

    >>> choose_microbatches(64, stages=4, ranks=4, schedule="1F1B")
    16
    >>> choose_microbatches(12, stages=2, ranks=2, schedule="GPipe", microbatches=3)
    3
    """
    schedule_named(schedule)
    if batch_size < 1:
        raise ScheduleError(
            f"a batch of {batch_size} samples cannot be cut into microbatches\n  pass at least one sample"
        )
    if microbatches is not None:
        return _checked(batch_size, stages, ranks, schedule, microbatches)
    most = MICROBATCHES_PER_STAGE * stages
    fitting = _fitting(batch_size, stages, ranks, schedule)
    chosen = [number for number in fitting if number <= most]
    if chosen:
        return chosen[-1]
    least = least_microbatches(schedule, stages)
    if fitting:
        way_out = f"pass microbatches={fitting[0]}, or a batch size that a number from {least} to {most} divides"
    else:
        way_out = f"use a batch size of at least {least}, fewer stages, or schedule='GPipe'"
    raise ScheduleError(
        f"a batch of {batch_size} cannot be cut into microbatches for {stages} stages with {schedule}, "
        f"which needs at least {least}\n  {way_out}"
    )


def fit_microbatches(batch_size: int, stages: int, ranks: int, schedule: str, microbatches: int) -> int:
    """Choose the number of microbatches of a batch that differs in size from the planned one, as the last often does.

    Args:
        batch_size: Samples of this batch.
        stages: Stages of the pipeline.
        ranks: Ranks that hold them.
        schedule: One of torch's schedule names.
        microbatches: The plan's number.

    Returns:
        The largest divisor of ``batch_size`` up to ``microbatches`` that the schedule runs with; where there is none
        (a prime batch size, say), the smallest above.

    Raises:
        ScheduleError: The batch is too small for the schedule; the message names the least size.

    >>> [fit_microbatches(size, 4, 4, "1F1B", 8) for size in (16, 6, 4, 11)]
    [8, 6, 4, 11]
    """
    fitting = _fitting(batch_size, stages, ranks, schedule)
    if fitting:
        return max((number for number in fitting if number <= microbatches), default=fitting[0])
    least = next(size for size in range(1, batch_size + stages + ranks + 2) if _fitting(size, stages, ranks, schedule))
    if batch_size < least:
        raise ScheduleError(
            f"a batch of {batch_size} is too small for {schedule} on {stages} stages: the least size is {least}\n"
            f"  leave the smaller last batch out (drop_last=True in the DataLoader), or use schedule='GPipe'"
        )
    raise ScheduleError(
        f"a batch of {batch_size} cannot be cut into equal microbatches for {schedule} on {ranks} ranks\n"
        f"  use another batch size, pass step(microbatches=[...]), or leave it out (drop_last=True in the DataLoader)"
    )


def _fitting(batch_size: int, stages: int, ranks: int, schedule: str) -> list[int]:
    """List the divisors of ``batch_size`` that ``schedule`` runs with, ascending."""
    return [
        number
        for number in range(1, batch_size + 1)
        if batch_size % number == 0 and fits_microbatches(schedule, stages, ranks, number)
    ]


def _checked(batch_size: int, stages: int, ranks: int, schedule: str, microbatches: int) -> int:
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        raise ScheduleError(f"microbatches={microbatches!r} is not a positive whole number\n  pass one, or None")
    if batch_size % microbatches:
        divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        raise ScheduleError(
            f"a batch of {batch_size} is not divisible into {microbatches} microbatches\n"
            f"  use one of {', '.join(map(str, divisors))}, or another batch size"
        )
    if not fits_microbatches(schedule, stages, ranks, microbatches):
        least = least_microbatches(schedule, stages)
        if microbatches < least:
            needs = f"needs at least {least} microbatches for {stages} stages"
        else:
            needs = f"needs equal rounds of about {ranks} microbatches"
        fitting = ", ".join(map(str, _fitting(batch_size, stages, ranks, schedule)))
        way = f"use one of {fitting} for a batch of {batch_size}" if fitting else "use a larger batch, fewer stages"
        raise ScheduleError(
            f"{microbatches} microbatches do not suit {schedule}, which {needs}\n  {way}, or schedule='GPipe'"
        )
    return microbatches
