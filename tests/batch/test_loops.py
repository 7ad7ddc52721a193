"""Losses and models that take the samples of a batch one after the other, in Python."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_deciding_values import SAMPLES, WIDTH, Tower, check, drawn
from torch import nn

import fxpipe


class Each(nn.Module):
    """Goes on with each sample alone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.front, self.each, self.back = Tower(), nn.Linear(WIDTH, WIDTH), Tower()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(x)
        if self.how == "stack":
            x = torch.stack([torch.tanh(self.each(row)) * row.norm() for row in x])
        else:
            x = torch.cat(
                [
                    torch.linalg.solve(torch.eye(WIDTH, dtype=x.dtype) * 9 + part.T @ part, self.each(part).T).T
                    for part in x.split(1)
                ]
            )
        return self.back(x)


def batch(seed: int) -> Any:
    return (drawn(seed, SAMPLES, WIDTH),), drawn(seed + 20, SAMPLES, WIDTH)


def labelled(seed: int) -> Any:
    """Classes of the samples' tokens, some of them ignored."""
    labels = torch.randint(WIDTH, (SAMPLES, 4), generator=torch.Generator().manual_seed(seed))
    return (drawn(seed, SAMPLES, 4, WIDTH),), labels.masked_fill(drawn(seed + 1, SAMPLES, 4) > 0.5, -100)


SEPARATE = {
    "stacked": (batch, lambda o, t: torch.stack([F.mse_loss(a, b) for a, b in zip(o, t, strict=True)]).mean()),
    "added up": (batch, lambda o, t: sum((o[i] - t[i]).norm() for i in range(len(o))) / len(o)),
    "in place": (
        batch,
        lambda o, t: functools.reduce(
            lambda total, i: total.add_((o[i] - t[i]).abs().sum()), range(len(o)), o.new_zeros(())
        ),
    ),
    "over valid tokens": (
        labelled,
        lambda o, t: sum(F.cross_entropy(o[i], t[i], reduction="sum") for i in range(len(o))) / (t != -100).sum(),
    ),
}
COUPLED = {
    "neighbours": lambda o, t: sum((o[i] - o[i + 1]).norm() + t[i].sum() for i in range(len(o) - 1)) / len(o),
    "pairs": lambda o, t: sum((o[i] - t[j]).norm() for i in range(len(o)) for j in range(i)) / len(o) ** 2,
    "a running mean": lambda o, t: functools.reduce(
        lambda m, i: 0.9 * m + 0.1 * (o[i] - t[i]).norm(), range(len(o)), 0.0
    ),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_a_loss_that_goes_over_the_samples_is_weighed(name: str) -> None:
    batches, loss = SEPARATE[name]
    check(Tower(), batches, loss)


@pytest.mark.parametrize("name", COUPLED)
def test_a_loop_that_couples_samples_is_refused(name: str) -> None:
    with pytest.raises(fxpipe.CaptureError, match="couples the samples of a batch"):
        check(Tower(), batch, COUPLED[name])


@pytest.mark.parametrize("how", ["stack", "split"])
def test_a_model_goes_over_the_samples_between_its_layers(how: str) -> None:
    check(Each(how), batch, F.mse_loss)
