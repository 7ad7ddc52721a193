"""What depends on the device, on a machine without another one: notes, autocast around a step, casts at a boundary."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpipe
from fxpipe.ir.tensor import TensorMeta
from fxpipe.program import BoundaryTensor, StageProgram
from fxpipe.runtime.run.work import check_sent

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
ASKING = {
    "is_cuda": (lambda x: x * 2 if x.is_cuda else x, "is_cuda"),
    "compared": (lambda x: x * 2 if x.device.type == "cuda" else x, "device"),
    "among": (lambda x: x * 2 if x.device.type in ("cuda", "xpu") else x, "device"),
    "not the cpu": (lambda x: x * 2 if x.device.type != "cpu" else x, "device"),
    "get_device": (lambda x: x * 2 if x.get_device() >= 0 else x, "get_device"),
}
PASSING = {
    "made there": lambda x: x + torch.ones(6, device=x.device),
    "autocast": lambda x: x + 1 if torch.is_autocast_enabled(x.device.type) else x,
    "not mps": lambda x: x + 1 if x.device.type != "mps" else x,
    "none": lambda x: x + 1 if x.device is not None else x,
}


class Asking(nn.Module):
    def __init__(self, ask, *, inside):
        super().__init__()
        self.blocks = nn.ModuleList(Block(ask if inside else lambda x: x) for _ in range(3))
        self.ask = (lambda x: x) if inside else ask

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.ask(x)


class Block(nn.Module):
    def __init__(self, ask):
        super().__init__()
        self.one, self.two, self.ask = nn.Linear(6, 24), nn.Linear(24, 6), ask

    def forward(self, x):
        return self.two(self.one(self.ask(x)).tanh())


def report(model, **options):
    options = {"loss_fn": F.mse_loss, "microbatches": 2, "schedule": "GPipe", **options}
    return str(fxpipe.compile(model, 3, (X,), {"target": X}, **options).report())


@pytest.mark.parametrize("name", ASKING)
def test_opened_code_that_asks_for_the_device_is_named(name):
    ask, what = ASKING[name]
    said = report(Asking(ask, inside=False), grain="block")
    assert f"the model asks for a tensor's {what}" in " ".join(said.split())
    assert "test_devices.py" in said


@pytest.mark.parametrize("name", ASKING)
def test_a_block_that_stays_whole_asks_where_it_runs(name):
    assert "asks for a tensor's" not in report(Asking(ASKING[name][0], inside=True), grain="block")


@pytest.mark.parametrize("name", PASSING)
def test_passing_a_device_on_is_no_question(name):
    assert "asks for a tensor's" not in report(Asking(PASSING[name], inside=False), grain="op")


class Wide(torch.autograd.Function):
    """A backward that multiplies matrices: autocast would cast them."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        seen.append(torch.is_autocast_enabled("cpu"))
        return gradient.float() @ weight.T, x.T @ gradient.float()


seen = []


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        return Wide.apply(x.float(), self.weight).tanh()


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
@pytest.mark.parametrize("device_type", ["cpu"])
def test_the_backward_is_outside_of_the_user_s_autocast(schedule, device_type):
    model = nn.Sequential(*(Custom() for _ in range(3)))
    with torch.autocast(device_type, torch.bfloat16):
        loss = F.mse_loss(model(X).float(), X)
    loss.backward()
    wanted = {fqn: parameter.grad for fqn, parameter in model.named_parameters()}
    with torch.autocast(device_type, torch.bfloat16):
        pipe = fxpipe.compile(
            model, 2, (X,), {"target": X}, loss_fn=lambda o, t: F.mse_loss(o.float(), t), microbatches=2,
            schedule=schedule,
        )  # fmt: skip
        with pipe.materialize(device="cpu"):
            seen.clear()
            torch.testing.assert_close(pipe.step(X, target=X), loss.detach(), rtol=1e-2, atol=1e-3)
            found = {fqn: parameter.grad for fqn, parameter in pipe.named_parameters()}
        assert torch.is_autocast_enabled(device_type)
    assert seen
    assert not any(seen)
    for fqn, gradient in wanted.items():
        torch.testing.assert_close(found[fqn], gradient, rtol=1e-4, atol=1e-6)


def test_a_cast_that_the_capture_did_not_see_is_an_error_with_a_way_out():
    sent = (BoundaryTensor("mul_3", TensorMeta((2, 6), "float32", True)),)
    program = StageProgram(1, torch.fx.Graph(), (), sent, (), (), (), (), False)
    tensor = torch.zeros(2, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(fxpipe.ScheduleError) as error:
        check_sent(program, (tensor,))
    assert "stage 1 computed mul_3 as torch.bfloat16" in str(error.value)
    assert "autocast on cpu casts other operations than where the model was captured: cast mul_3" in str(error.value)
    with pytest.raises(fxpipe.ScheduleError, match="under the same autocast"):
        check_sent(program, (tensor,))
