"""Buffers that a forward writes to in place and whose value its backward needs are known before anything runs."""

import pytest
import torch
from torch import nn

from fxpipe.capture.capture import Capture
from fxpipe.errors import ScheduleError
from fxpipe.runtime.run.refusals import refuse_overlap


class Averaging(nn.Module):
    def __init__(self, read, write):
        super().__init__()
        self.linear, self.functions = nn.Linear(6, 6), (read, write)
        self.register_buffer("mean", torch.ones(6))

    def forward(self, x):
        x = self.linear(x)
        self.functions[1](self, x.detach().abs().mean(0))
        return self.functions[0](self, x)


def in_place(module, value):
    module.mean.mul_(0.9).add_(value, alpha=0.1)


def by_index(module, value):
    module.mean[0] = value[0]


def anew(module, value):
    module.mean = module.mean * 0.9 + value * 0.1


def never(module, value):
    return None


CASES = {
    "product": (lambda module, x: x * module.mean, in_place, True),
    "quotient": (lambda module, x: x / module.mean, by_index, True),
    "view": (lambda module, x: x * module.mean.view(1, 6), in_place, True),
    "a sum needs no value": (lambda module, x: x + module.mean, in_place, False),
    "a copy": (lambda module, x: x * module.mean.clone(), in_place, False),
    "assigned anew": (lambda module, x: x * module.mean, anew, False),
    "not written": (lambda module, x: x * module.mean, never, False),
}


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize("case", CASES)
def test_buffers_that_the_next_forward_would_change_are_named(case, grain):
    read, write, expected = CASES[case]
    capture = Capture(nn.Sequential(*(Averaging(read, write) for _ in range(3))))
    captured = capture.capture(capture.inputs((torch.ones(4, 6),), {}), grain=grain, with_loss=False)
    program = captured.program({}, 1)
    assert program.overwritten == (("0.mean", "1.mean", "2.mean") if expected else ())
    if expected:
        with pytest.raises(ScheduleError, match=r"writes in place to 0\.mean, 1\.mean, 2\.mean"):
            refuse_overlap(program)
    else:
        refuse_overlap(program)


def test_batch_norm_is_no_such_module():
    capture = Capture(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)))
    captured = capture.capture(capture.inputs((torch.ones(4, 6),), {}), with_loss=False)
    assert captured.program({}, 1).overwritten == ()
