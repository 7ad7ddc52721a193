"""The memory of a step against its plan, on two and on four ranks."""

import functools

import launch
import pytest
import step_memory_worker


@functools.cache
def said(ranks):
    return launch.launch_cases("end_to_end/step_memory_worker.py", ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", step_memory_worker.CASES)
def test_of_twelve_blocks_a_rank(case, ranks):
    launch.passed(said(ranks), case, ranks)
