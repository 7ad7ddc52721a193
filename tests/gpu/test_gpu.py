"""The checks for a machine with an accelerator: all of them where there is one, else what a CPU can show of them.

A report without an accelerator says how many checks did not run.
"""

import pathlib
import subprocess
import sys

import check
import pytest
import torch

HERE = pathlib.Path(__file__).parent
ON_A_CPU = ["numbers of moe in float32", "autocast", "recompute", "one rank of a process group"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=f"no accelerator: {len(check.CHECKS)} checks did not run")
def test_every_check_passes_on_an_accelerator():
    done = subprocess.run([sys.executable, str(HERE / "check.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_checks_hold_on_a_cpu_as_far_as_it_goes(capsys):
    found = check.run(torch.device("cpu"), [*ON_A_CPU, "no synchronisation in a step", "2 x 2 devices, pp x dp"])
    assert [what for what, _ in found.values()] == ["ok"] * len(ON_A_CPU) + ["not run"] * 2
    assert "not run  no synchronisation in a step" in capsys.readouterr().out
