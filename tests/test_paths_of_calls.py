"""How many modules a call visits on its way, seen on the stack: the drawings in docs/design.md say no less."""

import pathlib
import sys

import pytest
import torch
from torch import nn

import fxpipe

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "design.md"

MADE = "fxpipe.planning.plan", "make_plan"
CUT = "fxpipe.planning.search.chains", "fast_cuts"
FORWARD = "fxpipe.runtime.build.stage", "StageModule.forward"
FIND = "fxpipe.training", "Variants.find"
PROGRAM = "fxpipe.capture.cut.stage_graphs", "make_program"


def paths(call, start, end):
    """The modules on the stack from one function to another, outermost first, as often as a call enters them."""
    found = []

    def look(frame, event, _):
        if event == "call" and name(frame) == end:
            stack = []
            while frame is not None and name(frame) != start:
                stack.append(name(frame)[0])
                frame = frame.f_back
            if frame is None:  # somebody else called it
                return
            inside = [start[0], *(module for module in reversed(stack) if module.split(".")[0] == "fxpipe")]
            found.append([m for index, m in enumerate(inside) if index == 0 or inside[index - 1] != m])

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def name(frame):
    return frame.f_globals.get("__name__", ""), frame.f_code.co_qualname


def each_once(path, most):
    return len(path) == len(set(path)) <= most


def drawn(path):
    """Whether the page draws a path, one module below the other."""
    lines = [line.split("#")[0].strip(" └─") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    short = [module.removeprefix("fxpipe.").replace(".", "/") for module in path]
    return any(lines[index : index + len(short)] == short for index in range(len(lines)))


def compiled(batch):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    return fxpipe.compile(
        model, 2, (batch,), {"target": batch}, loss_fn=nn.functional.mse_loss, microbatches=2, cost="flops"
    )


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
    found = paths(lambda: pipe.step(batch, target=batch), ("fxpipe.pipeline", "Pipeline.step"), FORWARD)
    assert len(found) == 4  # two stages, two microbatches
    assert all(each_once(path, 5) for path in found), found
    assert drawn(found[0]), found[0]


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
