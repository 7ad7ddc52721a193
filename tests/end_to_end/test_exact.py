"""Loss, gradients and trained weights on four ranks equal the unpartitioned model's: one launch for the matrix."""

import exact_worker
import launch
import pytest


@pytest.fixture(scope="module")
def said():
    return launch.launch_cases("end_to_end/exact_worker.py", exact_worker.RANKS, timeout_s=900)


@pytest.mark.timeout(960)
@pytest.mark.parametrize("case", [name for name, _ in exact_worker.cases()])
def test_on_four_ranks(case, said):
    launch.passed(said, case, exact_worker.RANKS)
