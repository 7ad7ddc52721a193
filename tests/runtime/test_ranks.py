"""Ranks that differ, fail or come back: each is told what is wrong, before anything is exchanged where that can be."""

from __future__ import annotations

import os
import subprocess
import sys

import launch
import pytest


def run(way: str, *arguments: str, dies: bool = False) -> list[list[str]]:
    results = launch.launch("runtime/ranks_worker.py", 2, way, *arguments, timeout_s=300)
    assert dies or [result.returncode for result in results] == [0, 0], [result.stderr[-2000:] for result in results]
    return [result.stdout.splitlines() for result in results]


def test_pipelines_come_and_go_in_one_script():
    closed = "MaterializeError: this pipeline was closed | compile again: the plan and its report are still here"
    assert run("again") == [[closed] * 6] * 2


def test_what_differs_between_ranks_is_named_and_the_pipeline_goes_on():
    first, second = run("differing")
    same = [line for line, other in zip(first, second, strict=True) if line == other]
    assert "the batch differs between ranks in the values of its tensors" in first[0]
    assert "DistributedSampler" in first[0]
    assert "what is called differs between ranks: rank 0 has 'evaluate', rank 1 has 'step'" in first[1]
    assert "step got a batch and microbatches=[...]" in first[2]
    assert "differs between ranks" in first[3]
    assert "step got no target for loss_fn" in first[4]
    assert first[5].startswith("RankError: rank 1 failed while it prepared the batch: KeyError: ")
    assert second[5] == "KeyError: 'the loader is broken'"
    assert "differs between ranks" in first[6]
    assert first[7] == second[7] == "nothing raised"
    assert "rank 0 has ({'microbatches': 4, 'last': True, 'scaler': False},), rank 1 has (" in first[8]
    assert "rank 0 has ({'gather': False},), rank 1 has ({'gather': True},)" in first[9]
    assert "clip_grad_norm_ differs between ranks: rank 0 has ({'max_norm': 1.0, 'norm_type': 2.0},)" in first[10]
    assert "dtype differs between ranks: rank 0 has None, rank 1 has torch.float64" in first[11]
    assert len(same) == len(first) - 1 == 11


def test_what_fails_between_two_calls_is_told_to_the_others():
    (first, killed), (second, _) = run("outside", dies=True)[0], [*run("ending", dies=True)[0], ""]
    assert first.startswith("RankError: rank 1 failed between two calls: BufferError: the loader is broken | ")
    assert killed.startswith("RankError: rank 1 ended without a word in step; last actions: ")
    assert second.startswith("RankError: rank 1 failed between two calls: BufferError: the loader is broken | ")


def test_another_seed_on_one_rank_is_refused():
    assert all("the seed differs between ranks: rank 0 has 0, rank 1 has 1" in rows[0] for rows in run("seeds"))


def test_an_initialiser_that_fails_on_one_rank_is_told_to_the_others():
    first, second = run("building")
    assert "rank 1: init= on 2 (Linear) fails: ZeroDivisionError: no values" in first[0]
    assert "init= on 2 (Linear) fails: ZeroDivisionError: no values" in second[0]
    assert first[3] == second[3] == "True"  # what fails leaves nothing behind, and the script may go on


def test_a_rank_that_is_killed_while_groups_are_made_is_named():
    rank, killed = launch.launch("runtime/ranks_worker.py", 2, "gone", timeout_s=300)
    assert killed.returncode == -9
    cause = "rank 1 ended without a word in materialize"
    assert f"fxpipe: rank 0 ends: {cause}" in rank.stderr or rank.stdout.startswith(f"RankError: {cause}")
    assert rank.returncode in (0, 70)


def test_a_rank_that_ends_before_it_meets_the_others_is_named():
    first, _ = run("absent")
    assert first[0].startswith("RankError: rank 1 ended, or left the others, before it came to materialize | ")


def test_a_rank_that_ends_in_the_middle_of_a_step_is_a_failure_like_others():
    first, second = run("leaving")
    cause = "rank 1 (stage 1, microbatch 0, layer 2) failed: SystemExit: enough"
    assert first[0].startswith(f"RankError: {cause}")
    assert second[0] == "SystemExit: enough"
    for rows in (first, second):
        assert rows[1].startswith(f"RankError: the pipeline ended earlier: {cause}")


def test_another_version_of_a_library_on_one_rank_is_refused():
    for rows in run("versions"):
        assert rows[0].startswith("PlanError: the versions of libraries differs between ranks: rank 0 has {")
        assert "'torch': '2.0'" in rows[0]
        assert "'torch': '2.1'" in rows[0]


def test_batches_on_accelerators_are_compared_before_their_gradients_are_anybodys():
    for rows in run("late"):
        assert "the batch differs between ranks in the values of its tensors" in rows[0]
        assert rows[1:] == ["True", "nothing raised", "True"]


def test_a_rank_that_is_busy_is_waited_for_and_one_that_stands_still_is_named():
    first, second = run("busy")
    assert first[0] == second[0] == "nothing raised"
    assert first[1].startswith("RankError: rank 1 has not answered for ")
    assert "it is in no call of the pipeline; its last one was step; last actions: rank 0 " in first[1]
    assert second[1].startswith("RankError: rank 1 has not answered for ")  # it hears so when it comes back


def test_a_job_that_was_stopped_as_a_whole_goes_on():
    assert run("paused") == [["nothing raised"]] * 2


def test_what_fails_on_another_machine_is_heard_through_the_store():
    first, second = run("elsewhere")
    cause = "rank 1 (stage 1, microbatch 0, layer 2) failed: IndexError: list index out of range"
    assert first[0].startswith(f"RankError: {cause}")
    assert second[0] == "IndexError: list index out of range"
    for rows in (first, second):
        assert rows[1].startswith(f"RankError: the pipeline ended earlier: {cause}")


def test_pipelines_leave_nothing_behind_and_a_process_group_of_the_users_stays():
    assert run("kept") == [["True", "2.0"]] * 2


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="nothing names a process's threads")
def test_a_script_that_ends_leaves_no_thread_behind_that_could_abort_it(tmp_path):
    ways = [f"{way} 0 []" for way in ("open_", "refused", "stopped", "saving")]
    assert run("ends", str(tmp_path)) == [["True", *ways]] * 2


def test_a_run_that_is_started_again_goes_on_with_the_losses_of_an_undisturbed_one(tmp_path):
    for name in ("disturbed", "undisturbed"):
        (tmp_path / name).mkdir()
    (tmp_path / "undisturbed" / "restarted").touch()
    wanted = run("trains", str(tmp_path / "undisturbed"))[0]
    died = run("trains", str(tmp_path / "disturbed"), dies=True)[0]
    went_on = run("trains", str(tmp_path / "disturbed"))[0]
    assert len(wanted) == 6
    assert died == wanted[:3]
    assert went_on == wanted[2:]  # the last checkpoint is of the second step


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_saves(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "--", str(launch.HERE / "runtime" / "ranks_worker.py"), "trains", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": launch.import_path(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = dict(line.split() for line in done.stdout.splitlines())
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "undisturbed" / "restarted").touch()
    assert losses == dict(line.split() for line in run("trains", str(tmp_path / "undisturbed"))[0])
    assert "the power is gone" in done.stderr
