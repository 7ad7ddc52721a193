"""Four ranks that read and write together; a save that is killed; a quarter that is read."""

import json
import os
import pathlib
import subprocess
import sys

import checkpoint_worker
import launch
import memory_worker
import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    ranks = checkpoint_worker.RANKS
    return launch.launch_cases("weights/checkpoint_worker.py", ranks, str(folder))


@pytest.mark.parametrize("case", checkpoint_worker.cases())
def test_four_ranks_read_and_write(said, case):
    launch.passed(said, case, checkpoint_worker.RANKS)


def test_the_last_whole_checkpoint_loads_wherever_a_save_is_killed(tmp_path):
    paths = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_worker.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_rank_reads_its_quarter_and_holds_no_more(tmp_path):
    memory_worker.write(tmp_path)
    results = launch.launch("weights/memory_worker.py", 4, str(tmp_path), fresh=True)
    launch.check(results)
    largest = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    for result in results:
        found = json.loads(result.stdout)
        assert found["asked"] <= 1.05 * found["own"], found
        assert 0.5 * found["own"] <= found["peak"], found  # else nothing was measured
        assert found["peak"] <= 1.15 * found["own"] + largest, found
