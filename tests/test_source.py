"""What a reader of the source relies on: one style, one format, types that hold, and CI that does what README says."""

import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
CONSTRAINTS = (ROOT / "constraints.txt").read_text().split()


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_the_source_passes(command):
    if command == "mypy" and f"torch=={torch.__version__.partition('+')[0]}" not in CONSTRAINTS:
        pytest.skip("each torch annotates itself in another way: types hold for the one of constraints.txt")
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_runs_the_test_command_of_the_readme():
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command.endswith("-m pytest")
    assert command in (ROOT / "README.md").read_text()
