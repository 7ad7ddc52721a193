"""What a training script does with a pipeline on four ranks: one launch for all cases."""

import launch
import pytest
import training_worker


@pytest.fixture(scope="module")
def said():
    return launch.launch_cases("end_to_end/training_worker.py", training_worker.RANKS)


@pytest.mark.parametrize("case", training_worker.cases())
def test_on_four_ranks(case, said):
    launch.passed(said, case, training_worker.RANKS)
