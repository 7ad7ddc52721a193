"""The fine-tuning example: two stages by two replicas train adapters with the losses of one process."""

import json
import os
import pathlib
import subprocess
import sys

import launch
import pytest

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 4


def test_replicas_train_adapters_with_the_losses_of_one_process(tmp_path):
    logs = [tmp_path / "one.jsonl", tmp_path / "four.jsonl"]
    arguments = [["--lora", "--steps", str(STEPS), "--log", str(log)] for log in logs]
    alone = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "finetune_llama.py"), *arguments[0]],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    assert "PeftModel · 2 stages" in alone.stdout
    launch.check(launch.launch("../examples/finetune_llama.py", 4, *arguments[1]))
    one, four = ([json.loads(line)["loss"] for line in log.read_text().splitlines()] for log in logs)
    assert len(one) == STEPS
    assert one[-1] < one[0]
    assert four == pytest.approx(one, rel=1e-5)
