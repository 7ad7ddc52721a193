"""``verify`` finds what is wrong with a split, says what the model itself couples, and leaves everything as it was."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from losses import Chain, compiled, entropy, inputs, sequence
from torch import nn

import fxpipe
from fxpipe.runtime.run.local import LocalEngine


def running(model: nn.Module, *args: Any, target: Any = None, **options: Any) -> fxpipe.Pipeline:
    options = {"loss_fn": F.mse_loss, "microbatches": 4, "schedule": "GPipe", **options}
    kwargs = {} if target is None else {"target": target}
    return fxpipe.compile(model, 2, args, kwargs, **options).materialize(device="cpu")


class Looked(nn.Module):
    """A block that looks a table up."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, table: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return self.linear(x).tanh() + table[row]


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Looked() for _ in range(4))

    def forward(self, x: torch.Tensor, table: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, table, row)
        return x


class Mixed(nn.Module):
    """A block that mixes what lies along dimension 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).tanh().cumsum(0)


class TimeMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixed() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(6, 6), nn.BatchNorm1d(6))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Dropped(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(6, 6), nn.Dropout(0.5))))


def test_a_table_that_was_split_is_found() -> None:
    x, table, row = torch.randn(8, 6), torch.randn(8, 6), torch.arange(8) % 2
    pipe = running(Tables(), x, table, row, target=x)
    with pytest.raises(fxpipe.MismatchError, match=r"batch as a whole gives another loss.*\n.*batch_dims="):
        pipe.verify(x, table, row, target=x)
    pipe = running(Tables(), x, table, row, target=x, batch_dims={"table": None})
    assert pipe.verify(x, table, row, target=x).note == ""


def test_a_time_major_input_that_was_split_along_time_is_found() -> None:
    x = torch.randn(8, 4, 6)
    pipe = running(TimeMajor(), x, target=x)
    with pytest.raises(fxpipe.MismatchError, match="batch as a whole"):
        pipe.verify(x, target=x)
    pipe = running(TimeMajor(), x, target=x, batch_dims={"x": 1, "target": 1})
    assert pipe.verify(x, target=x).note == ""


def test_what_the_model_couples_in_training_is_said() -> None:
    x = torch.randn(16, 6)
    pipe = running(Normed(), x, target=x)
    said = pipe.verify(x, target=x)
    assert said.note.startswith("the batch at once gives other numbers in training mode")
    assert "layers.1" in said.note
    pipe.eval()
    assert pipe.verify(x, target=x).note == ""


def test_random_draws_are_left_out_of_the_whole_batch() -> None:
    x = torch.randn(8, 6)
    said = running(Dropped(), x, target=x).verify(x, target=x)
    assert said.note == "the batch at once was compared without its random draws"


def test_a_loss_that_the_user_weighs_is_not_held_against_the_whole_batch() -> None:
    x = torch.randn(8, 6)
    pipe = running(Normed(), x, target=x, loss_weight="microbatch", loss_fn=lambda o, t: F.mse_loss(o, t).sqrt())
    assert "loss_weight= says" in pipe.verify(x, target=x).note


def test_weights_found_in_the_loss_hold_for_the_whole_batch() -> None:
    pipe = compiled(Chain(), entropy, inputs(), sequence()).materialize(device="cpu")
    assert pipe.verify(inputs(), target=sequence()).note == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_small_gradient_that_is_wrong_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))).to(dtype)
    x = torch.randn(8, 6, dtype=dtype)
    with torch.no_grad():
        model[0].weight.mul_(1e-3)  # gradients of what comes before a small weight are small
        model[1].weight.mul_(1e-3)
    pipe = running(model, x, target=x)
    pipe.verify(x, target=x)
    real = LocalEngine.train

    def wrong(engine: LocalEngine, jobs: Any) -> torch.Tensor:
        loss = real(engine, jobs)
        for stage in engine._stages:
            for name, parameter in stage.named_parameters():
                if name == "0.bias" and parameter.grad is not None:
                    parameter.grad *= 1.5
        return loss

    monkeypatch.setattr(LocalEngine, "train", wrong)
    with pytest.raises(fxpipe.MismatchError, match=r"the gradient of 0\.bias"):
        pipe.verify(x, target=x)


def test_a_buffer_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(16, 6)
    pipe = running(Normed(), x, target=x)
    real = LocalEngine.train

    def wrong(engine: LocalEngine, jobs: Any) -> torch.Tensor:
        loss = real(engine, jobs)
        for stage in engine._stages:
            for name, buffer in stage.named_buffers():
                if name == "layers.3.running_var":
                    buffer += 0.1
        return loss

    monkeypatch.setattr(LocalEngine, "train", wrong)
    with pytest.raises(fxpipe.MismatchError, match=r"buffer layers\.3\.running_var"):
        pipe.verify(x, target=x)


def test_verify_between_steps_leaves_the_accumulation_as_it_was() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = (nn.Linear(6, 6, bias=False) for _ in range(3))
            self.last.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.inner(self.first(x)).tanh())

    torch.manual_seed(0)
    model = Tied()
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    found = []
    for verified in (False, True):
        pipe = running(copy.deepcopy(model), x, target=x)
        pipe.step(x, target=x, last=False)
        if verified:
            pipe.verify(y, target=y)
        pipe.step(y, target=y)
        found.append({name: parameter.grad for name, parameter in pipe.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])


class Counting(nn.Linear):
    """Counts its calls beside its tensors."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.calls = 0

    def get_extra_state(self) -> int:
        return self.calls

    def set_extra_state(self, state: int) -> None:
        self.calls = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


def counting() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Counting() for _ in range(3)))


def test_what_modules_save_beside_tensors_is_compared_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 6)
    pipe = running(counting(), x, target=x)
    pipe.step(x, target=x)
    parts = [part for stage in pipe.stage_modules for part in stage.modules() if isinstance(part, Counting)]
    assert [part.calls for part in parts] == [4, 4, 4]
    pipe.verify(x, target=x)
    assert [part.calls for part in parts] == [4, 4, 4]
    real = LocalEngine.train

    def wrong(engine: LocalEngine, jobs: Any) -> torch.Tensor:
        loss = real(engine, jobs)
        for stage in engine._stages:
            for name, part in stage.named_modules():
                part.calls = 9 if name == "1" else getattr(part, "calls", 0)
        return loss

    monkeypatch.setattr(LocalEngine, "train", wrong)
    with pytest.raises(fxpipe.MismatchError, match=r"state 1\._extra_state"):
        pipe.verify(x, target=x)


def valid_and_square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Two terms: a mean over valid targets, of which microbatches have unequally many, and one over samples."""
    valid = target[:, 0] > 0
    return (output - target).pow(2).mean(1).mul(valid).sum() / valid.sum() + output.pow(2).mean()


def uneven() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(8, 6)
    target = torch.randn(8, 6).abs()
    target[:3, 0] = -1.0
    return x, target


def test_a_loss_of_several_terms_is_that_of_the_batch() -> None:
    torch.manual_seed(0)
    x, target = uneven()
    said = running(
        nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), x, target=target, loss_fn=valid_and_square
    ).verify(x, target=target)
    assert (said.note, said.reference) == ("", "the recorded model on one rank")
    table, row = torch.randn(8, 6), torch.arange(8) % 2
    pipe = running(Tables(), x, table, row, target=target, loss_fn=valid_and_square)
    with pytest.raises(fxpipe.MismatchError, match="batch as a whole"):
        pipe.verify(x, table, row, target=target)


@pytest.mark.parametrize(("model", "why"), [(Dropped, "random numbers"), (Normed, r"couples samples \(layers\.1")])
def test_several_terms_of_what_differs_in_training_are_not_compared_at_once(model: Any, why: str) -> None:
    torch.manual_seed(0)
    x, target = uneven()
    said = running(model(), x, target=target, loss_fn=valid_and_square).verify(x, target=target)
    assert re.search(f"the batch at once was not compared: .*{why}", said.note)
