"""Loss, gradients and trained weights on four ranks equal the unpartitioned model's: one launch for the matrix."""

import exact_worker
import launch
import pytest


@pytest.fixture(scope="module")
def said():
    return launch.launch_cases("end_to_end/exact_worker.py", exact_worker.RANKS, prepares=True)


@pytest.mark.parametrize("case", [name for name, _ in exact_worker.cases()])
def test_on_four_ranks(case, said):
    launch.passed(said, case, exact_worker.RANKS)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_on_fewer_ranks(ranks):
    said = launch.launch_cases("end_to_end/exact_worker.py", ranks, prepares=True)
    for case in exact_worker.street_cases(ranks):
        launch.passed(said, case, ranks)
