"""How many microbatches a batch is cut into."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxpipe.batch.microbatches import choose_microbatches, fit_microbatches
from fxpipe.errors import ScheduleError
from fxpipe.ir.schedule import fits_microbatches

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
pipelines = st.tuples(st.integers(1, 6), st.integers(1, 2), st.sampled_from(SCHEDULES)).map(
    lambda drawn: (drawn[0] * drawn[1], drawn[0], drawn[2])
)


@given(st.integers(1, 200), pipelines)
def test_no_larger_divisor_up_to_four_per_stage_suits_the_schedule(
    batch_size: int, pipeline: tuple[int, int, str]
) -> None:
    stages, ranks, schedule = pipeline
    good = [
        m for m in range(1, 4 * stages + 1) if batch_size % m == 0 and fits_microbatches(schedule, stages, ranks, m)
    ]
    if good:
        assert choose_microbatches(batch_size, stages, ranks, schedule) == max(good)
    else:
        with pytest.raises(ScheduleError, match=f"batch of {batch_size} .*{schedule}"):
            choose_microbatches(batch_size, stages, ranks, schedule)


@given(st.integers(1, 100), st.integers(1, 24), pipelines)
def test_a_last_batch_is_fitted_whenever_any_divisor_suits(
    batch: int, planned: int, pipeline: tuple[int, int, str]
) -> None:
    stages, ranks, schedule = pipeline
    good = [m for m in range(1, batch + 1) if batch % m == 0 and fits_microbatches(schedule, stages, ranks, m)]
    if not good:
        with pytest.raises(ScheduleError, match="drop_last=True"):
            fit_microbatches(batch, stages, ranks, schedule, planned)
        return
    chosen = fit_microbatches(batch, stages, ranks, schedule, planned)
    assert chosen in good
    below = [m for m in good if m <= planned]
    assert chosen == (max(below) if below else min(good))


def test_a_batch_smaller_than_the_schedule_needs_names_the_least_size() -> None:
    with pytest.raises(
        ScheduleError, match=r"batch of 3 is too small for 1F1B on 4 stages: the least size is 4\n.*drop_last=True"
    ):
        fit_microbatches(3, 4, 4, "1F1B", 8)


def test_an_explicit_number_must_divide_the_batch() -> None:
    with pytest.raises(
        ScheduleError, match=r"batch of 10 is not divisible into 4 microbatches\n  use one of 1, 2, 5, 10"
    ):
        choose_microbatches(10, 2, 2, "GPipe", 4)


def test_an_explicit_number_must_suit_the_schedule() -> None:
    with pytest.raises(
        ScheduleError, match=r"2 microbatches do not suit 1F1B, which needs at least 4 .*\n  use one of 4, 8"
    ):
        choose_microbatches(8, 4, 4, "1F1B", 2)
    with pytest.raises(ScheduleError, match="equal rounds of about 4"):
        choose_microbatches(26, 8, 4, "Interleaved1F1B", 13)


@pytest.mark.parametrize("number", [0, -2, True, 2.0])
def test_an_explicit_number_must_be_a_positive_whole_number(number: object) -> None:
    with pytest.raises(ScheduleError, match="not a positive whole number"):
        choose_microbatches(8, 2, 2, "GPipe", number)  # type: ignore[arg-type]


def test_an_unknown_schedule_lists_the_known_ones() -> None:
    with pytest.raises(ScheduleError, match=r"unknown schedule 'gpipe'\n.*GPipe, 1F1B"):
        choose_microbatches(8, 2, 2, "gpipe")
