"""Stages on four ranks: every case of ``engine_worker``, all in one launch."""

import engine_worker
import launch
import pytest


@pytest.fixture(scope="module")
def said():
    return launch.launch_cases("runtime/engine_worker.py", engine_worker.RANKS)


@pytest.mark.parametrize("case", engine_worker.cases())
def test_on_four_ranks(case, said):
    launch.passed(said, case, engine_worker.RANKS)
