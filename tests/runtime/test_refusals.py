"""What would go wrong silently is refused by name; across ranks: the cases of ``holes_worker``."""

import copy

import handmade
import judge
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxpipe.errors import ScheduleError
from fxpipe.runtime.run.local import LocalEngine
from fxpipe.runtime.run.work import Job


class Wrapped(nn.Module):
    """Checkpoints in the way it is told."""

    way = "none"

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        if self.way == "none":
            return self.inner(x)
        function = {"module": self.inner, "lambda": lambda x: self.inner(x), "method": self.inner.forward}[self.way]
        return checkpoint(function, x, use_reentrant=True)


def prepared(num_stages=2, kind=Wrapped):
    model = nn.Module()
    model.layers = nn.ModuleList(kind() for _ in range(2))
    made = handmade.Draft(model, num_stages, x=torch.ones(2, 4), target=torch.ones(2, 4))
    x = made.x
    for index in range(2):
        x = made.module(index * num_stages // 2, f"layers.{index}", x)
    program = made.program(loss=[(made.call(num_stages - 1, F.mse_loss, x, made.target), "samples")])
    stages = handmade.stages_of(model, program)
    for stage in stages:
        stage.add_program("a", program)
    return stages, Job("a", program, {"x": torch.ones(2, 4), "target": torch.ones(2, 4)}, (1.0,))


@pytest.mark.parametrize(
    ("way", "name"), [("module", "layers.1.inner"), ("method", "layers.1.inner"), ("lambda", "layers.1")]
)
def test_reentrant_checkpointing_is_refused_by_name(way, name):
    stages, job = prepared()
    stages[1].layers[1].way = way
    with pytest.raises(
        ScheduleError, match=rf"^module {name} uses reentrant activation checkpointing.*\n  pass use_re"
    ):
        LocalEngine(stages).train([job])
    stages[1].layers[1].way = "none"
    LocalEngine(stages).train([job])


def test_checkpointing_outside_of_a_stage_is_left_alone():
    stages, job = prepared()
    LocalEngine(stages).train([job])
    x = torch.ones(1, 4, requires_grad=True)
    checkpoint(nn.Linear(4, 4), x, use_reentrant=True).sum().backward()
    assert x.grad is not None


def test_what_becomes_trainable_after_compiling_is_refused():
    case = handmade.image()
    program = case.draft(copy.deepcopy(case.model), 4, case.batch)
    stages = handmade.stages_of(case.model, program)
    jobs = handmade.jobs_of(case, stages, 4, 1)
    stages[0].requires_grad_(True)
    with pytest.raises(
        ScheduleError, match="which stage 0 sends, needs a gradient, and needed none when the model was"
    ):
        LocalEngine(stages).train(jobs)


def test_what_is_frozen_after_compiling_gets_no_gradient():
    with judge.float64():
        case = handmade.chain()
        program = case.draft(copy.deepcopy(case.model), 4, case.batch)
        stages = handmade.stages_of(case.model, program)
        jobs = handmade.jobs_of(case, stages, 4, 2)
        for stage in stages[:2]:
            stage.requires_grad_(False)
        LocalEngine(stages).train(jobs)
        _, wanted = handmade.reference(case, 2)
    wanted = {fqn: gradient for fqn, gradient in wanted.items() if int(fqn.split(".")[1]) >= 4}
    judge.assert_close(handmade.gradients_of(stages), wanted, "gradients")


def test_a_tensor_of_another_shape_than_planned_is_refused():
    stages, job = prepared()
    wrong = Job("a", job.program, {"x": torch.ones(3, 4), "target": torch.ones(3, 4)}, (1.0,))
    with pytest.raises(
        ScheduleError, match=r"stage 0 computed layers_0 as torch.float32 of shape \[3, 4\], but the plan"
    ):
        LocalEngine(stages).train([wrong])


class Keeping(nn.Module):
    """Keeps a table made of its weight, with its graph, as many a model for images does in evaluation."""

    keeps = False

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 4)
        self.last = None
        self.tables = {}

    def forward(self, x):
        y = self.inner(x).exp()
        if not self.keeps:
            return y * self.weight
        self.last = y  # kept for whoever looks, and read by nobody
        table = self.weight * 2.0
        return y * (table if self.training else self.tables.setdefault("cpu", [table])[0])


def test_a_module_that_keeps_a_graph_from_one_forward_to_the_next_is_named():
    stages, job = prepared(kind=Keeping)
    stages[1].layers[1].keeps = True
    LocalEngine(stages).train([job, job])
    stages[1].eval()
    where = r"layers\.1\.last, layers\.1\.tables\['cpu'\]\[0\] holds a tensor with its graph"
    with pytest.raises(ScheduleError, match=rf"^stage 1 went back .* a later one read: {where}\n  the model alone"):
        LocalEngine(stages).train([job, job])
