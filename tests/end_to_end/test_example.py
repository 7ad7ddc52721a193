"""The example: the same losses and weights in one process and on several ranks, and what a newcomer sees."""

import json
import os
import pathlib
import re
import subprocess
import sys

import launch
import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples" / "train_gpt.py")
STEPS = 6


def run(command):
    """Run a command, one thread per process; gives what it printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=launch.LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def torchrun(ranks):
    return [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"),
        *("--master-addr=127.0.0.1", f"--master-port={launch.free_port()}"),
        "--",  # or torchrun takes the script's --log for an abbreviation of its own options
    ]


def ranked(ranks, script, *arguments):
    """Run a script of this folder as a newcomer does: in one process, or under torchrun; two ranks are forked."""
    path = str(launch.HERE / "end_to_end" / script)
    if ranks != 2:
        return run([*([sys.executable] if ranks == 1 else torchrun(ranks)), path, *arguments])
    results = launch.launch(path, ranks, *arguments)
    launch.check(results)
    return results[0].stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Losses of the first steps, what was printed, and the weights at the end, by number of ranks."""
    found = {}
    for ranks in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        files = ("--log", str(folder / "log.jsonl"), "--save", str(folder / "gpt.pt"))
        printed = ranked(ranks, "in_float64.py", EXAMPLE, "--steps", str(STEPS), "--sample", "20", *files)
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        found[ranks] = records, printed, torch.load(folder / "gpt.pt")
    return found


def test_every_number_of_ranks_trains_with_the_same_losses(runs):
    """In float64, where every processor gives the same ones."""
    alone = [record["loss"] for record in runs[1][0]]
    assert len(alone) == STEPS
    assert alone[-1] < alone[0]
    for ranks in (2, 4):
        losses = [record["loss"] for record in runs[ranks][0]]
        assert losses[0] == pytest.approx(alone[0], rel=1e-12)
        assert losses == pytest.approx(alone, rel=1e-10)


def test_the_log_has_one_line_per_step(runs):
    for records, _, _ in runs.values():
        assert [record["step"] for record in records] == list(range(STEPS))
        assert all(record["tokens"] == 32 * 128 and record["seconds"] > 0 for record in records)


def test_one_rank_prints_report_loss_and_sample(runs):
    for ranks, (_, printed, _) in runs.items():
        assert printed.count("GPT · 4 stages" if ranks != 2 else "GPT · 2 stages") == 1
        assert len(re.findall(r"held-out loss \d\.\d+ nats per byte", printed)) == 1
        assert printed.count("sample: The ") == 1


def test_the_saved_weights_are_the_plain_models(runs):
    sys.path.insert(0, str(ROOT / "examples"))
    import train_gpt

    for _, _, weights in runs.values():
        model = train_gpt.GPT()
        model.load_state_dict(weights)
        assert model.head.weight is model.token.weight


def test_initial_weights_are_the_same_bits_for_every_number_of_ranks(tmp_path):
    weights = []
    for ranks in (1, 2, 4):
        ranked(ranks, "initial_worker.py", str(tmp_path / f"{ranks}.pt"))
        weights.append(torch.load(tmp_path / f"{ranks}.pt"))
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(torch.equal(other[fqn], tensor) for fqn, tensor in weights[0].items())


def test_plan_only_prints_the_report_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = run([sys.executable, EXAMPLE, "--plan-only", "--stages", "4"])
    assert printed.strip() in (ROOT / "README.md").read_text()
    assert printed.startswith("GPT · 4 stages")
    assert "tied  token.weight = head.weight" in printed
    assert "held-out" not in printed
    assert list(tmp_path.iterdir()) == []
