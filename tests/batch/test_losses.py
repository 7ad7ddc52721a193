"""A step's loss and gradients are the whole batch's, or compile refuses and says which call couples the samples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from losses import (
    COUPLED,
    LENGTH,
    NOT_RECORDED,
    SAMPLES,
    SEPARATE,
    Chain,
    Loss,
    check_equal,
    compiled,
    entropy,
    inputs,
    per_token,
    sequence,
)
from torch import nn
from training_losses import REFUSED, TRAINING

import fxpipe


def check_step(loss: Loss, **options: Any) -> fxpipe.Pipeline:
    torch.manual_seed(0)
    model = Chain()
    plain = copy.deepcopy(model)
    x, target = inputs(), sequence()
    wanted = loss(plain(x), target)
    wanted.backward()
    pipe = compiled(model, loss, x, target, **options)
    pipe.materialize(device="cpu")
    check_equal(pipe, plain, pipe.step(x, target=target), wanted.detach())
    return pipe


@pytest.mark.parametrize("name", [*SEPARATE, *TRAINING])
def test_a_loss_that_separates_is_accepted_and_equals_the_whole_batch(name: str) -> None:
    loss, refused = {**SEPARATE, **TRAINING}[name], {**NOT_RECORDED, **REFUSED}
    if name in refused:
        with pytest.raises(fxpipe.CaptureError, match=refused[name]):
            check_step(loss)
    else:
        check_step(loss)


def test_at_least_95_of_100_losses_that_separate_are_accepted() -> None:
    assert len(NOT_RECORDED) + len(REFUSED) <= 0.05 * (len(SEPARATE) + len(TRAINING))


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_couples_samples_is_refused_by_name(name: str) -> None:
    loss, call = COUPLED[name]
    with pytest.raises(fxpipe.CaptureError) as raised:
        compiled(Chain(), loss, inputs(), sequence())
    if call:
        assert str(raised.value).startswith(f"{call} (loss.")
        assert "couples the samples of a batch" in str(raised.value)
        assert "\n  pass loss_weight='microbatch'" in str(raised.value)


def test_a_coupled_loss_is_fine_in_one_microbatch() -> None:
    check_step(COUPLED["rmse"][0], microbatches=1)


def test_a_coupled_loss_is_refused_where_a_later_step_has_several_microbatches() -> None:
    x, target = inputs(), {"real": sequence()["real"]}
    pipe = compiled(Chain(), COUPLED["rmse"][0], x, target, microbatches=1)
    pipe.materialize(device="cpu")
    halves = [((x[part],), {}, {"real": target["real"][part]}) for part in (slice(4), slice(4, 8))]
    with pytest.raises(fxpipe.CaptureError, match=r"sqrt .* couples the samples"):
        pipe.step(microbatches=halves)


@pytest.mark.parametrize("name", ["rmse", "dice", "in-batch negatives"])
def test_the_mean_of_microbatches_is_taken_where_the_user_says_so(name: str) -> None:
    loss = COUPLED[name][0]
    torch.manual_seed(0)
    model = Chain()
    plain = copy.deepcopy(model)
    x, target = inputs(), sequence()
    parts = [slice(start, start + 2) for start in range(0, SAMPLES, 2)]
    wanted = sum(loss(plain(x[part]), {k: v[part] for k, v in target.items()}) for part in parts) / 4
    wanted.backward()
    pipe = compiled(model, loss, x, target, loss_weight="microbatch")
    pipe.materialize(device="cpu")
    check_equal(pipe, plain, pipe.step(x, target=target), wanted.detach())
    assert "loss: the plain mean of the microbatches' losses" in str(pipe)


def test_loss_weight_is_a_function_a_word_or_nothing() -> None:
    with pytest.raises(fxpipe.ScheduleError, match="loss_weight is 'samples'\n  pass a function"):
        compiled(Chain(), entropy, inputs(), sequence(), loss_weight="samples")


def test_weights_found_at_compile_hold_for_other_batches() -> None:
    torch.manual_seed(0)
    model = Chain()
    plain = copy.deepcopy(model)
    loss = SEPARATE["cross entropy, guarded count"]
    pipe = compiled(model, loss, inputs(), sequence())
    pipe.materialize(device="cpu")
    other = {**sequence(), "mask": torch.zeros(SAMPLES, LENGTH, dtype=torch.bool)}
    other["mask"][5, 2] = True  # one token of the batch: three microbatches have none
    wanted = loss(plain(inputs(7)), other)
    wanted.backward()
    check_equal(pipe, plain, pipe.step(inputs(7), target=other), wanted.detach())


class Balanced(Chain):
    """Computes its loss itself, with a term that couples samples."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = super().forward(x)
        balance = logits.softmax(-1).mean((0, 1)).square().sum()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.1 * balance, "logits": logits}


def test_an_auxiliary_term_of_the_model_is_named_and_weighed_like_the_main_term() -> None:
    torch.manual_seed(0)
    model = Balanced()
    plain = copy.deepcopy(model)
    x, labels = inputs(), sequence()["labels"]
    pipe = fxpipe.compile(model, 2, (x, labels), microbatches=4, schedule="GPipe")
    assert "mean over valid targets + sum couples samples (auxiliary, weighed like the main term)" in str(pipe)
    pipe.materialize(device="cpu")
    counts = [(labels[start : start + 2] != -100).sum() for start in range(0, SAMPLES, 2)]
    wanted = torch.zeros((), dtype=torch.float64)
    for place, count in enumerate(counts):
        if count:
            part = slice(2 * place, 2 * place + 2)
            wanted = wanted + plain(x[part], labels[part])["loss"] * count / sum(counts)
    wanted.backward()
    check_equal(pipe, plain, pipe.step(x, labels), wanted.detach())


class Pairs(nn.Module):
    """A layer sees each sample with each other one, as XCLIP's prompts see texts with films."""

    def __init__(self, pair: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 7), nn.Linear(7, 7)
        self.pair = pair

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.first(x)
        return y, self.last(self.pair(y))


@pytest.mark.parametrize(
    "pair",
    [
        lambda y: y[:, None] - y[None],
        lambda y: (y[:, None] * y[None]).flatten(0, 1),
        lambda y: y.expand(len(y), *y.shape) * y[:, None, :1],
    ],
)
def test_a_loss_of_pairs_that_a_layer_sees_is_refused_beside_one_that_separates(pair: Any) -> None:
    def loss(given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return given[0].square().mean() + given[1].square().mean()

    with pytest.raises(fxpipe.CaptureError, match="last gives rows of which it cannot be told whose they are"):
        compiled(Pairs(pair), loss, inputs())


class First(Chain):
    """Returns a tuple whose first element is the loss."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y.square().mean(), y


def test_the_first_element_of_a_tuple_is_a_loss_where_it_is_one_number() -> None:
    torch.manual_seed(0)
    model = First()
    plain = copy.deepcopy(model)
    wanted = plain(inputs())[0]
    wanted.backward()
    pipe = compiled(model, None, inputs())
    pipe.materialize(device="cpu")
    check_equal(pipe, plain, pipe.step(inputs()), wanted.detach())


def test_a_loss_function_of_one_parameter_gets_the_output_alone() -> None:
    torch.manual_seed(0)
    model = Chain()
    plain = copy.deepcopy(model)
    wanted = plain(inputs()).square().mean()
    wanted.backward()
    pipe = compiled(model, lambda output: output.square().mean(), inputs())
    pipe.materialize(device="cpu")
    check_equal(pipe, plain, pipe.step(inputs()), wanted.detach())
    with pytest.raises(fxpipe.ScheduleError, match="compiled without a loss_fn that takes one"):
        pipe.step(inputs(), target=inputs())


def added_in_place(y: torch.Tensor) -> torch.Tensor:
    total = torch.tensor(0.0)
    total += y.square().mean()
    return total


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides it where it looks, but not from such as raise
@pytest.mark.parametrize(
    ("loss", "dtype"),
    [
        (added_in_place, torch.float32),
        (lambda y: y.float().square().mean() + 0.1 * y.bfloat16().abs().mean(), torch.float32),
        (lambda y: y.bfloat16().abs().mean() + y.square().mean(), torch.float64),
    ],
)
def test_a_loss_has_the_dtype_that_the_model_gives_it_whatever_its_terms_have(loss: Any, dtype: torch.dtype) -> None:
    # Lxmert's, found among the families of transformers: 0.0 of float32 to which a loss of float64 is added in place.
    torch.manual_seed(0)
    model = Chain()
    plain = copy.deepcopy(model)
    wanted = loss(plain(inputs()))
    assert wanted.dtype == dtype
    pipe = compiled(model, loss, inputs()).materialize(device="cpu")
    for found in (pipe.step(inputs()), pipe.evaluate(inputs())):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-2, atol=0)


def test_a_loss_has_the_dtype_that_the_stages_compute_it_in() -> None:
    pipe = compiled(Chain(), lambda y: y.square().mean(), inputs()).materialize(device="cpu", dtype=torch.float32)
    assert pipe.step(inputs().float()).dtype == torch.float32


class Vocabulary(nn.Module):
    """A head of many classes over long sequences."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, size)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)[:, :-1].reshape(-1, self.size)
        return F.cross_entropy(logits.float(), labels[:, 1:].reshape(-1), ignore_index=self.size - 1)


@pytest.mark.parametrize("samples", [4, 64])
def test_large_sizes_are_tried_at_small_ones(samples: int) -> None:
    with torch.device("meta"):
        model = Vocabulary(50257)
    labels = torch.randint(50257, (samples, 1024))
    before = torch.get_rng_state()
    pipe = fxpipe.compile(model, 2, (torch.empty(samples, 1024, 8, device="meta"), labels), microbatches=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    assert "loss: mean over valid targets" in str(pipe)


@pytest.mark.parametrize(
    "mean",
    [
        lambda chosen, t: chosen.sum() / (2 * len(chosen)),
        lambda chosen, t: chosen.sum() / (chosen.shape[0] + len(t["mask"])),
        lambda chosen, t: chosen.sum() * (1.0 / chosen[:, None].expand(-1, 3).numel()),
        lambda chosen, t: sum(chosen.unbind()) / (7 * t["mask"].sum()),
    ],
)
def test_a_number_that_python_took_from_a_shape_of_selected_elements_is_refused(mean: Any) -> None:
    with pytest.raises(fxpipe.CaptureError, match=r"the number of selected elements from a shape|take another path"):
        compiled(Chain(), lambda o, t: mean(per_token(o, t)[t["mask"]], t), inputs(), sequence())


def test_a_number_that_python_read_is_followed_to_where_it_came_from() -> None:
    check_step(lambda o, t: (per_token(o, t) * t["mask"]).sum() / t["mask"].sum().item())


class Selecting(Chain):
    """Asks how many a mask selects, in three ways, one of them after arithmetic."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        chosen = super().forward(x)[mask]
        halves = torch.cat([chosen, chosen * 2]).view(chosen.size(0), 2, -1)
        return chosen.square().sum() / chosen.shape[0] + halves.mean() * len(chosen[:, None]) / (len(chosen) + 1)


def test_a_size_that_python_took_from_what_a_mask_selects_is_taken_anew_from_each_mask() -> None:
    torch.manual_seed(0)
    model = Selecting()
    plain = copy.deepcopy(model)
    mask = sequence()["mask"]
    pipe = fxpipe.compile(model, 2, (inputs(), mask), microbatches=1, schedule="GPipe")
    pipe.materialize(device="cpu")
    for other in (mask, mask & (torch.arange(LENGTH) < 2), ~mask):
        plain.zero_grad()
        pipe.zero_grad()
        wanted = plain(inputs(7), other)
        wanted.backward()
        check_equal(pipe, plain, pipe.step(inputs(7), other), wanted.detach())


class PredictsSome(torch.nn.Module):
    """Computes its head, and its loss, for the targets there are alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        self.head = torch.nn.Linear(4, 5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return torch.nn.functional.cross_entropy(self.head(x[labels >= 0]), labels[labels >= 0])


def test_a_head_for_selected_targets_weighs_each_microbatch_by_them() -> None:
    torch.manual_seed(0)
    model, x = PredictsSome().double(), torch.randn(4, 5, 4, dtype=torch.float64)
    labels = torch.tensor([[1, -1, 2, -1, -1], [-1, -1, -1, 3, -1], [0, 1, 2, 3, -1], [-1, 4, 4, 0, 1]])
    with fxpipe.compile(model, 2, (x, labels), microbatches=2).materialize(device="cpu") as pipe:
        for given in (labels, labels.roll(1, 1), labels.flip(0)):
            torch.testing.assert_close(pipe.step(x, given), model(x, given).detach(), rtol=1e-12, atol=0)


def drawn_for_samples(output: torch.Tensor, target: Any) -> torch.Tensor:
    step = torch.randint(0, 20, (len(output),))
    return (torch.linspace(0.1, 2, 20)[step] * output.square().mean((1, 2))).mean()


def sampled(output: torch.Tensor, target: Any) -> torch.Tensor:
    chosen = torch.multinomial(output.flatten(0, 1).softmax(-1), 2, replacement=True)
    return output.flatten(0, 1).gather(1, chosen).square().mean()


def drawn_for_all(output: torch.Tensor, target: Any) -> torch.Tensor:
    return (output[..., torch.randperm(output.shape[-1])[:2]] * torch.rand(())).square().mean()


def in_another_order(output: torch.Tensor, target: Any) -> torch.Tensor:
    return (output - output[torch.randperm(len(output))]).square().mean()


def of_another_sample(output: torch.Tensor, target: Any) -> torch.Tensor:
    return (output * output[torch.randint(0, len(output), (len(output),))]).mean()


def rarely_counted(output: torch.Tensor, target: Any) -> torch.Tensor:
    counted = torch.randint(0, 1000, (len(output),)) < 5
    return (output.square().mean((1, 2)) * counted).sum() / counted.sum().clamp(min=1)


@pytest.mark.parametrize("loss", [drawn_for_samples, sampled, drawn_for_all])
def test_what_is_drawn_for_samples_or_for_all_of_them_couples_none(loss: Loss) -> None:
    losses = []
    for stages in (1, 2):
        torch.manual_seed(0)
        with fxpipe.compile(Chain(), stages, (inputs(),), {"target": sequence()}, loss_fn=loss, microbatches=4) as pipe:
            assert "mean over samples" in str(pipe)
            losses.append(pipe.materialize(device="cpu").step(inputs(), target=sequence()))
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("loss", [in_another_order, of_another_sample, rarely_counted])
def test_what_is_drawn_about_samples_is_refused(loss: Loss) -> None:
    with pytest.raises(fxpipe.CaptureError, match=r"the microbatches' losses|the losses of microbatches"):
        fxpipe.compile(Chain(), 2, (inputs(),), {"target": sequence()}, loss_fn=loss, microbatches=4)
