"""Ranks that differ, fail or come back: each is told what is wrong, before anything is exchanged where that can be."""

from __future__ import annotations

import launch


def run(way: str) -> list[list[str]]:
    results = launch.launch("runtime/ranks_worker.py", 2, way, timeout_s=100)
    assert [result.returncode for result in results] == [0, 0], [result.stderr[-2000:] for result in results]
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
    assert len(same) == len(first) - 1


def test_another_seed_on_one_rank_is_refused():
    assert all("the seed differs between ranks: rank 0 has 0, rank 1 has 1" in rows[0] for rows in run("seeds"))


def test_an_initialiser_that_fails_on_one_rank_is_told_to_the_others():
    first, second = run("building")
    assert "rank 1: init= on 2 (Linear) fails: ZeroDivisionError: no values" in first[0]
    assert "init= on 2 (Linear) fails: ZeroDivisionError: no values" in second[0]


def test_a_rank_that_ends_in_the_middle_of_a_step_is_a_failure_like_others():
    first, second = run("leaving")
    cause = "rank 1 (stage 1, microbatch 0, layer 2) failed: SystemExit: enough"
    assert first[0].startswith(f"RankError: {cause}")
    assert second[0] == "SystemExit: enough"
    for rows in (first, second):
        assert rows[1].startswith(f"RankError: the pipeline ended earlier: {cause}")
