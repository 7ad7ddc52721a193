"""How many modules a call visits on its way, seen on the stack: the drawings in docs/design.md say no less."""

import launch
import paths_worker
import pytest
import torch
from paths_worker import FORWARD, STEP, compiled, drawn, each_once, paths

MADE = "fxpipe.planning.plan", "make_plan"
CUT = "fxpipe.planning.search.chains", "fast_cuts"
FIND = "fxpipe.variants", "Variants.find"
PROGRAM = "fxpipe.capture.cut.stage_graphs", "make_program"


@pytest.fixture(scope="module")
def pipe():
    with compiled(torch.zeros(8, 8)) as pipe:
        yield pipe.materialize(device="cpu", init="reset")


def test_compile_reaches_the_plan_and_its_cuts_in_seven_modules_each_once():
    for end in (MADE, CUT):
        found = paths(lambda: compiled(torch.zeros(8, 8)), ("fxpipe.compiler", "compile"), end)
        assert found
        assert all(each_once(path, 7) for path in found), found
        assert drawn(found[0]), found[0]


def test_a_step_reaches_the_stage_in_five_modules_each_once(pipe):
    batch = torch.ones(8, 8)
    found = paths(lambda: pipe.step(batch, target=batch), STEP, FORWARD)
    assert len(found) == 4  # two stages, two microbatches
    assert all(each_once(path, 5) for path in found), found
    assert drawn(found[0]), found[0]


@pytest.fixture(scope="module")
def said():
    return launch.launch_cases("paths_worker.py", 2)


@pytest.mark.parametrize("schedule", paths_worker.SCHEDULES)
def test_a_step_reaches_the_stage_in_five_modules_on_two_ranks_too(schedule, said):
    launch.passed(said, schedule, 2)


def test_a_new_batch_gets_its_program_in_three_modules_each_once(pipe):
    batch = torch.ones(12, 8)
    found = paths(lambda: pipe.step(batch, target=batch), FIND, PROGRAM)
    assert len(found) == 1  # both microbatches have one shape
    assert each_once(found[0], 3), found
    assert drawn(found[0]), found[0]
    assert paths(lambda: pipe.step(batch, target=batch), FIND, PROGRAM) == []  # it is known now


def test_the_tracer_sees_who_comes_back():
    assert not each_once(["a", "b", "a"], 7)
    assert not each_once(["a", "b"], 1)
    assert each_once(["a", "b"], 2)
