"""Where numbers stop being numbers: the first layer is named, forward or backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxpipe


class Chain(nn.Module):
    """Linear layers of which one divides by zero, forward or in its gradient alone."""

    def __init__(self, broken: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        if broken is not None:
            self.layers.insert(2, broken)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class Divides(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x - x)


class RootOfZero(nn.Module):
    """Zero forward; the root's gradient at zero is infinite."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (x * 0).abs().sqrt()


def made(broken: nn.Module | None, grain: str = "block", **options: object) -> fxpipe.Pipeline:
    torch.manual_seed(0)
    pipe = fxpipe.compile(Chain(broken), 2, (torch.randn(8, 4),), grain=grain)
    return pipe.materialize(device="cpu", debug=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("grain", ["block", "op"])
def test_the_first_layer_with_a_value_that_is_no_number_is_named(grain):
    with pytest.raises(fxpipe.NonFiniteError, match=r"(?s)layers\.2.*forward\).*values that are \w+.*\n  look at"):
        made(Divides(), grain).step(torch.randn(8, 4))


def test_the_first_gradient_that_is_no_number_is_named():
    with pytest.raises(fxpipe.NonFiniteError, match=r"the gradient of .*layers\.1.*backward"):
        made(RootOfZero()).step(torch.randn(8, 4))


def test_a_weight_that_is_no_number_is_found_where_it_is_used():
    pipe = made(None)
    weights = dict(pipe.named_parameters())
    with torch.no_grad():
        weights["layers.3.weight"].fill_(float("inf"))
    with pytest.raises(fxpipe.NonFiniteError, match=r"the output of layers\.3 \(stage 1, forward"):
        pipe.step(torch.randn(8, 4))


def test_a_run_of_numbers_is_left_as_it_is():
    x = torch.randn(8, 4)
    plain = fxpipe.compile(Chain(None), 2, (x,))
    torch.manual_seed(0)
    plain = fxpipe.compile(Chain(None), 2, (x,)).materialize(device="cpu")
    watched = made(None)
    watched.load_state_dict(plain.state_dict())
    assert watched.step(x) == plain.step(x)
    for (name, one), (_, two) in zip(plain.named_parameters(), watched.named_parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), "soon", True])
def test_a_time_out_that_is_none_is_refused(timeout):
    pipe = fxpipe.compile(Chain(None), 2, (torch.randn(8, 4),))
    with pytest.raises(fxpipe.MaterializeError, match="positive number of seconds"):
        pipe.materialize(device="cpu", timeout=timeout)
    with pytest.raises(fxpipe.ScheduleError, match=r"timeout is .*\n  pass a positive number of seconds"):
        fxpipe.compile(Chain(None), 2, (torch.randn(8, 4),), timeout=timeout)
