"""What the others see when a rank fails, and what nobody sees when a script simply ends."""

import launch
import pytest

CAUSE = "rank 1 (stage 1) failed: ValueError: the weights are gone"


@pytest.mark.parametrize(("way", "schedule"), [("forward", "1F1B"), ("backward", "ZBVZeroBubble")])
def test_the_others_raise_the_cause_at_once(way, schedule):
    results = launch.launch("runtime/failure_worker.py", 4, way, schedule, timeout_s=60)
    assert [result.returncode for result in results] == [3, 4, 3, 3], [result.stderr for result in results]
    for rank, result in enumerate(results):
        seconds, _, message = result.stdout.partition(" ")
        assert float(seconds) < 3.5  # before the failed rank ends
        if rank == 1:
            assert message == "the weights are gone\n"
        else:
            assert message.startswith(f"{CAUSE}\n  see the output of that rank")
            assert f"the pipeline ended earlier: {CAUSE}\n  start the script again" in message


def test_a_killed_rank_is_reported_as_a_lost_connection():
    results = launch.launch("runtime/failure_worker.py", 4, "kill", "1F1B", timeout_s=60)
    assert [result.returncode for result in results] == [3, 9, 3, 3]
    for rank in (0, 2, 3):
        seconds, _, message = results[rank].stdout.partition(" ")
        assert float(seconds) < 10
        assert "lost the connection to another rank, which left no word" in message


@pytest.mark.parametrize("way", ["ours", "user", "closed"])
def test_a_script_may_simply_end(way):
    results = launch.launch("runtime/exit_worker.py", 4, way, timeout_s=60)
    assert [(result.returncode, result.stdout, result.stderr) for result in results] == [(0, "", "")] * 4
