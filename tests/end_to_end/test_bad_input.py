"""Mistakes are errors with a name, an expectation and a way out, on every rank, without a hang."""

from launch import check, launch


def test_every_mistake_is_one_error_on_every_rank_and_the_next_step_works():
    results = launch("end_to_end/bad_input_worker.py", 2)
    check(results)
    assert [result.stdout.strip() for result in results] == ["ok", "ok"]
