"""Values that decide what counts: floats that mark what is missing, rows that a mask selects, counts of repeats."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpipe

SAMPLES, WIDTH = 8, 6


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def marked(mark: float) -> Any:
    """Targets of which many are missing, more in some samples than in others."""
    hidden = drawn(3, SAMPLES, WIDTH) > torch.linspace(-1, 1.5, SAMPLES, dtype=torch.float64)[:, None]
    return lambda seed: drawn(seed, SAMPLES, WIDTH).abs().masked_fill(hidden.roll(seed, 0), mark)


def check(model: nn.Module, batch: Any, loss: Any, steps: int = 2, **options: Any) -> None:
    """The loss and the gradients of several batches are those of the plain model on all samples at once."""
    torch.manual_seed(0)
    model = model.double()
    plain = copy.deepcopy(model)
    args, target = batch(0)
    given = {} if target is None else {"target": target}
    with fxpipe.compile(model, 2, args, given, loss_fn=loss, microbatches=4, **options) as pipe:
        pipe.materialize(device="cpu")
        for seed in range(steps):
            args, target = batch(seed)
            found = pipe.step(*args, **({} if target is None else {"target": target}))
            output = plain(*args)
            wanted = output if loss is None else loss(output, target)
            wanted.backward()
            torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-14)
            for name, parameter in pipe.named_parameters():
                torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-10, atol=1e-13)


LOSSES = {
    "a number that stands for what is missing": (marked(-999.0), lambda o, t: F.mse_loss(o[t != -999], t[t != -999])),
    "depth": (marked(0.0), lambda o, t: ((o - t).abs() * (t > 0)).sum() / (t > 0).sum()),
    "truth of a float": (marked(0.0), lambda o, t: F.l1_loss(o[t.bool()], t[t.bool()])),
    "NaN": (marked(torch.nan), lambda o, t: F.mse_loss(o[~t.isnan()], t[~t.isnan()])),
    "NaN is not itself": (marked(torch.nan), lambda o, t: F.mse_loss(o[t == t], t[t == t])),
    "mean of what is a number": (
        marked(torch.nan),
        lambda o, t: torch.where(t.isnan(), torch.nan, (o - t.nan_to_num()) ** 2).nanmean(),
    ),
    "samples of which something is there": (
        lambda seed: marked(0.0)(seed) * (drawn(seed + 9, SAMPLES, 1) > 0),
        lambda o, t: ((o - t)[(t != 0).any(1)] ** 2).mean(),
    ),
    "a threshold beyond what is drawn": (
        lambda seed: drawn(seed, SAMPLES, WIDTH).sigmoid() * 100,
        lambda o, t: ((o - t) * (t / 100 > 0.7)).abs().sum() / (t / 100 > 0.7).sum(),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_floats_that_decide_what_counts_weigh_microbatches(name: str) -> None:
    targets, loss = LOSSES[name]
    check(Tower(), lambda seed: ((drawn(seed + 50, SAMPLES, WIDTH),), targets(seed)), loss)


def test_an_example_of_which_nothing_counts_at_first_tells_what_does() -> None:
    def batch(seed: int) -> Any:
        labels = torch.randint(WIDTH, (SAMPLES,), generator=torch.Generator().manual_seed(seed))
        return (drawn(seed, SAMPLES, WIDTH),), labels.masked_fill(torch.arange(SAMPLES) < 4 - seed, -100)

    check(Tower(), batch, lambda o, t: F.cross_entropy(o, t).nan_to_num())


def two_masks(seed: int) -> Any:
    """The second mask is nowhere set in the first two samples."""
    bits = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(2, (SAMPLES,), generator=bits).double() for _ in range(2))
    second[:2] = 0
    second[2:] = 1
    first[:] = 1
    return (drawn(seed, SAMPLES, WIDTH),), (drawn(seed + 1, SAMPLES), first, second)


def test_a_microbatch_whose_divisor_is_kept_from_0_adds_what_its_sum_is() -> None:
    check(Tower(), two_masks, lambda o, t: ((o[:, 0] - t[0]) ** 2 * t[1]).sum() / t[2].sum().clamp(min=1))


def test_a_microbatch_that_is_divided_by_0_is_refused_where_it_adds_something() -> None:
    with pytest.raises(fxpipe.ScheduleError, match=r"loss of a microbatch is inf though nothing in it counts.*\n  div"):
        check(Tower(), two_masks, lambda o, t: ((o[:, 0] - t[0]) ** 2 * t[1]).sum() / t[2].sum())


class Selects(nn.Module):
    """Goes on with the rows that a mask selects."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.blocks[0](x))
        if self.how == "mask":
            x = x[mask]
        elif self.how == "places":
            x = x.flatten(0, 1)[mask.flatten().nonzero().squeeze(1)]
        else:
            x = x.repeat_interleave(mask, 0)
        return self.head(self.blocks[1](x))


def rows(seed: int) -> Any:
    mask = (drawn(seed + 7, SAMPLES, 4) > 0.3).index_fill(1, torch.tensor([0]), True)
    labels = torch.randint(5, (SAMPLES, 4), generator=torch.Generator().manual_seed(seed))
    return (drawn(seed, SAMPLES, 4, WIDTH), mask), (labels, mask)


@pytest.mark.parametrize("how", ["mask", "places"])
def test_layers_after_a_selection_are_weighed_by_what_is_selected(how: str) -> None:
    check(Selects(how), rows, lambda o, t: F.cross_entropy(o, t[0][t[1]]))


def test_rows_that_are_repeated_by_counts_weigh_as_many() -> None:
    def batch(seed: int) -> Any:
        (x, mask), (labels, _) = rows(seed)
        return (x[:, 0], mask.sum(1)), (labels[:, 0], mask.sum(1))

    check(Selects("repeats"), batch, lambda o, t: F.cross_entropy(o, t[0].repeat_interleave(t[1])))


def test_a_loss_that_couples_the_rows_of_a_selection_is_refused() -> None:
    with pytest.raises(fxpipe.CaptureError, match="couples the samples of a batch"):
        check(Selects("mask"), rows, lambda o, t: F.cross_entropy(o - o.mean(0), t[0][t[1]]))


def classes(seed: int) -> Any:
    labels = torch.randint(5, (SAMPLES,), generator=torch.Generator().manual_seed(seed))
    return (drawn(seed, SAMPLES, WIDTH),), labels


def by_class(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(o, t, reduction="none")


COUPLED_BY_LABELS = {
    "over how often each stands": lambda o, t: (by_class(o, t) / torch.bincount(t, minlength=5)[t]).sum(),
    "over how many there are": lambda o, t: by_class(o, t).sum() / (torch.bincount(t, minlength=5) > 0).sum(),
    "pairs of unlike ones": lambda o, t: ((1 - torch.cdist(o, o)).relu() * (t[:, None] != t)).sum() / len(o),
    "a gate for the largest": lambda o, t: o.square().mean() * torch.where(t.max() > 40, 2.0, 1.0),
}


@pytest.mark.parametrize("name", COUPLED_BY_LABELS)
def test_a_loss_that_labels_couple_is_refused_for_single_samples(name: str) -> None:
    """Of one sample alone there is one label: others stand beside it."""
    args, labels = classes(0)
    with pytest.raises(fxpipe.CaptureError, match="couples the samples of a batch"):
        fxpipe.compile(
            Tower().double(), 2, args, {"target": labels}, loss_fn=COUPLED_BY_LABELS[name], microbatches=SAMPLES
        )


def test_a_guarded_count_that_is_small_for_most_values_is_no_sum() -> None:
    def confident(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sure = (t.softmax(-1).max(-1)[0] > 0.95).double()
        return (F.cross_entropy(o, t.argmax(-1), reduction="none") * sure).sum() / sure.sum().clamp(min=1)

    check(Tower(), lambda seed: ((drawn(seed, SAMPLES, WIDTH),), (1 + 3 * seed) * drawn(5, SAMPLES, WIDTH)), confident)


def test_microbatches_that_weigh_in_different_ways_are_refused() -> None:
    """What share a mean over samples and a mean over a mask have in one batch is not told by either."""

    def loss_fn(output: torch.Tensor, target: dict[str, torch.Tensor]) -> torch.Tensor:
        error = (output - target["y"]).square().mean(-1)
        return (error * target["mask"]).sum() / target["mask"].sum() if "mask" in target else error.mean()

    x, y, mask = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([1.0, 0.0])
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    plain, masked = ({"input": x[:2], "target": {"y": y[:2], **own}} for own in ({}, {"mask": mask}))
    with fxpipe.compile(model, 2, (x,), {"target": {"y": y}}, loss_fn=loss_fn, microbatches=2).materialize() as pipe:
        with pytest.raises(fxpipe.CaptureError, match="whose losses weigh in different ways"):
            pipe.step(microbatches=[plain, masked])
        pipe.step(microbatches=[masked, masked])
