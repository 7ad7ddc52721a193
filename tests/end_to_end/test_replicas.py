"""Two stages by two data-parallel replicas on four ranks: one launch for all cases."""

import launch
import pytest
import replicas_worker


@pytest.fixture(scope="module")
def said():
    return launch.launch_cases("end_to_end/replicas_worker.py", replicas_worker.RANKS)


@pytest.mark.parametrize("case", replicas_worker.cases())
def test_over_replicas(case, said):
    launch.passed(said, case, replicas_worker.RANKS)
