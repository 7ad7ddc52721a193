"""The modules on the stack from one function to another: the tracer, and a step on two ranks that it looks at."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import launch
import torch
from torch import nn

import fxpipe

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "design.md"

STEP = "fxpipe.pipeline", "Pipeline.step"
FORWARD = "fxpipe.runtime.build.stage", "StageModule.forward"
SCHEDULES = "1F1B", "ZBVZeroBubble"  # a rank with one stage, and one with two


def paths(call: Callable[[], object], start: tuple[str, str], end: tuple[str, str]) -> list[list[str]]:
    """The modules of fxpipe on the stack between two functions, outermost first, as often as a call enters them."""
    found = []

    def look(frame: FrameType | None, event: str, _: Any) -> None:
        if event == "call" and frame is not None and name(frame) == end:
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


def name(frame: FrameType) -> tuple[str, str]:
    return frame.f_globals.get("__name__", ""), frame.f_code.co_qualname


def each_once(path: list[str], most: int) -> bool:
    return len(path) == len(set(path)) <= most


def drawn(path: list[str]) -> bool:
    """Whether the page draws a path, one module below the other."""
    lines = [line.split("#")[0].strip(" └─") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    short = [module.removeprefix("fxpipe.").replace(".", "/") for module in path]
    return any(lines[index : index + len(short)] == short for index in range(len(lines)))


def compiled(batch: torch.Tensor, schedule: str = "1F1B") -> fxpipe.Pipeline:
    stages = 2 if schedule == "1F1B" else 4
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    return fxpipe.compile(
        model,
        stages,
        (batch,),
        {"target": batch},
        loss_fn=nn.functional.mse_loss,
        microbatches=stages,
        schedule=schedule,
        cost="flops",
    )


def a_step(schedule: str) -> None:
    batch = torch.ones(8, 8)
    with compiled(batch, schedule) as pipe:
        pipe.materialize(device="cpu", init="reset")
        found = paths(lambda: pipe.step(batch, target=batch), STEP, FORWARD)
        assert len(found) == len(pipe.stage_modules) * pipe.plan.num_microbatches
        assert all(each_once(path, 5) for path in found), found
        assert drawn(found[0]), found[0]


if __name__ == "__main__":
    launch.run_cases({schedule: lambda schedule=schedule: a_step(schedule) for schedule in SCHEDULES})
