"""Losses put together in place, and what couples samples before random numbers are drawn: right, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from losses import SAMPLES, Chain, Loss, check_equal, compiled, entropy, inputs, per_token, sequence

import fxpipe


def square(o: torch.Tensor, t: Any) -> torch.Tensor:
    return F.mse_loss(o, t["real"])


def check(loss: Loss) -> None:
    torch.manual_seed(0)
    model = Chain()
    plain = copy.deepcopy(model)
    target = {key: value for key, value in sequence().items() if key in ("labels", "clean", "real", "weights")}
    with compiled(model, loss, inputs(), target).materialize(device="cpu") as pipe:
        wanted = loss(plain(inputs(7)), target)
        wanted.backward()
        check_equal(pipe, plain, pipe.step(inputs(7), target=target), wanted.detach())


def added(o: torch.Tensor, t: Any) -> torch.Tensor:
    loss = square(o, t)
    loss += entropy(o, t)
    return loss / 2


def scaled(o: torch.Tensor, t: Any) -> torch.Tensor:
    loss = square(o, t)
    loss *= 0.3
    loss += entropy(o, t)
    loss *= 2
    loss -= 0.1 * o.abs().mean()
    loss /= 3
    return loss


def named_twice(o: torch.Tensor, t: Any) -> torch.Tensor:
    first = loss = square(o, t)
    loss += entropy(o, t)
    return loss + 0.1 * first


def kept_before(o: torch.Tensor, t: Any) -> torch.Tensor:
    loss = square(o, t)
    logged = loss.detach() + 0
    loss += entropy(o, t)
    return loss + logged


def saved_by_its_backward(o: torch.Tensor, t: Any) -> torch.Tensor:
    loss = o.square().mean((1, 2)).sqrt().mean() + entropy(o, t)
    loss /= 2
    return loss


def masked(o: torch.Tensor, t: Any) -> torch.Tensor:
    each = per_token(o, t)
    each *= t["weights"]
    return each.sum() / t["weights"].sum()


def within_the_sample(o: torch.Tensor, t: Any) -> torch.Tensor:
    x = o.clone()
    x[:, 1:] = o[:, :-1]
    x -= x.mean(1, keepdim=True)
    return F.mse_loss(x, t["real"])


@pytest.mark.parametrize(
    "loss", [added, scaled, named_twice, kept_before, saved_by_its_backward, masked, within_the_sample]
)
def test_a_loss_that_is_put_together_in_place_is_that_of_the_batch(loss: Loss) -> None:
    check(loss)


def shares_of_the_batch(o: torch.Tensor, t: Any) -> torch.Tensor:
    with torch.no_grad():
        share = (o[:, 0] / 0.5).exp().T
        share /= share.sum()
    return -(share.T * o[:, 1].log_softmax(-1)).sum(-1).mean()


def centred(o: torch.Tensor, t: Any) -> torch.Tensor:
    x = o.clone()
    x.sub_(x.mean(0))
    return x.square().mean()


def written_through_a_view(o: torch.Tensor, t: Any) -> torch.Tensor:
    loss = square(o, t)
    other = loss.view(())
    other += entropy(o, t)
    return other + 0.1 * loss


def dropped_out(o: torch.Tensor, t: Any) -> torch.Tensor:
    return F.mse_loss(F.dropout(o.softmax(0), 0.5), t["real"])


def sampled(o: torch.Tensor, t: Any) -> torch.Tensor:
    return (F.gumbel_softmax(o - o.mean(0)) * t["real"]).mean()


def drawn_in_the_batch(o: torch.Tensor, t: Any) -> torch.Tensor:
    return (torch.bernoulli((o / o.norm()).sigmoid()) * o).mean()


@pytest.mark.parametrize(
    ("loss", "call"),
    [
        (shares_of_the_batch, "div_"),
        (centred, "sub_"),
        (written_through_a_view, "add_"),
        (dropped_out, "softmax"),
        (sampled, "sub"),
        (drawn_in_the_batch, "norm"),
    ],
)
def test_what_is_written_in_place_or_drawn_afterwards_couples_samples_all_the_same(loss: Loss, call: str) -> None:
    with pytest.raises(fxpipe.CaptureError, match=rf"^{call} \(loss\.\w+\) couples the samples of a batch"):
        compiled(Chain(), loss, inputs(), sequence())


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: F.mse_loss(F.dropout(o, 0.5), t["real"]),
        lambda o, t: F.mse_loss(o + o.exp() * torch.randn_like(o), t["real"]),
        lambda o, t: (F.gumbel_softmax(o) * t["real"]).mean(),
        lambda o, t: (per_token(o, t) * (torch.rand(len(o), 5) < 0.5)).mean(),
    ],
)
def test_what_is_drawn_for_each_sample_couples_none(loss: Loss) -> None:
    assert "loss: a mean over samples" in str(compiled(Chain(), loss, inputs(), sequence(), microbatches=SAMPLES // 2))


def test_a_loss_whose_backward_fails_is_refused_by_what_torch_says() -> None:
    def overwritten(o: torch.Tensor, t: Any) -> torch.Tensor:
        return F.nll_loss(o.softmax(-1).log_().transpose(1, 2), t["clean"])

    with pytest.raises(fxpipe.CaptureError, match="cannot be tried: its backward failed: one of the variables needed"):
        compiled(Chain(), overwritten, inputs(), sequence())


def one_after_the_other(o: torch.Tensor, t: Any) -> torch.Tensor:
    each = [F.cross_entropy(*sample) for sample in zip(o, t["clean"], strict=True)]
    return (torch.stack(each).mean() - 0.1).abs()


class Logits(Chain):
    """Reaches any logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 20


@pytest.mark.parametrize(
    ("loss", "call"),
    [
        (lambda o, t: (entropy(o, t) - 0.1).abs() + 0.1, "abs"),
        (lambda o, t: entropy(o, t).clamp(max=1.5) + square(o, t), "clamp"),
        (lambda o, t: torch.maximum(entropy(o, t), entropy(o, t).new_tensor(0.2)), "maximum"),
        (lambda o, t: (F.binary_cross_entropy_with_logits(o, t["bits"]) - 0.05).relu(), "relu"),
        (lambda o, t: (0.5 * (o.square() + o.exp() - 1 - o)).mean((0, 1)).clamp(min=0.2).sum(), "clamp"),
        (one_after_the_other, ""),
    ],
    ids=["flooded", "from above", "from below", "hinge", "free bits", "one after the other"],
)
def test_a_bound_on_a_mean_that_a_trained_model_reaches_is_seen(loss: Loss, call: str) -> None:
    with pytest.raises(fxpipe.CaptureError, match=rf"^{call or '.*'} \(loss\.\w+\) couples the samples of a batch"):
        compiled(Logits(), loss, inputs(), sequence())


def test_a_sum_over_more_than_is_counted_is_refused_where_too_few_batches_tell() -> None:
    """It is right for counts that are not 0; so is a bound that masks reach where they are empty."""

    def soft_targets(o: torch.Tensor, t: Any) -> torch.Tensor:
        quality = t["probabilities"] * t["mask"][..., None]
        return F.binary_cross_entropy_with_logits(o, quality, reduction="none").sum() / (quality > 0).sum()

    target = {"probabilities": sequence()["probabilities"], "mask": torch.arange(5)[None] < torch.arange(1, 9)[:, None]}
    with pytest.raises(fxpipe.CaptureError, match="couples the samples"):
        compiled(Chain(), soft_targets, inputs(), target)


def summed(o: torch.Tensor, t: Any) -> torch.Tensor:
    return (per_token(o, t) * t["mask"]).sum()


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: summed(o, t) / sum(t["lengths"].tolist()),
        lambda o, t: summed(o, t) / (2 * int(t["lengths"].sum())),
        lambda o, t: summed(o, t) / len(set(t["class"].tolist())),
        lambda o, t: o[:, : int(t["lengths"].numpy().max())].square().mean(),
        lambda o, t: per_token(o, t).mean() + o[..., int(t["class"][0])].mean(),
    ],
    ids=["list", "doubled", "classes", "array", "first"],
)
def test_what_python_reads_of_an_input_by_itself_is_no_constant(loss: Loss) -> None:
    with pytest.raises(fxpipe.CaptureError, match="Python reads a number from an input"):
        compiled(Chain(), loss, inputs(), sequence())


def batch_decides(o: torch.Tensor, t: Any) -> torch.Tensor:
    return per_token(o, t).mean() * (2.0 if t["class"].max() > 5 else 1.0)


def undivided(o: torch.Tensor, t: Any) -> torch.Tensor:
    return summed(o, t) / t["mask"].sum() if t["mask"].any() else per_token(o, t).sum()


def early(o: torch.Tensor, t: Any) -> torch.Tensor:
    loss = o.square().mean()
    return loss + summed(o, t) / t["mask"].sum() if t["mask"].any() else loss


def guarded(o: torch.Tensor, t: Any) -> torch.Tensor:
    return summed(o, t) / max(1, t["mask"].sum())


def none_counts(o: torch.Tensor, t: Any) -> torch.Tensor:
    return per_token(o, t)[t["mask"]].mean() if t["mask"].any() else 0 * o.sum()


@pytest.mark.parametrize(
    ("loss", "refused"),
    [(batch_decides, True), (undivided, True), (early, False), (guarded, False), (none_counts, False)],
)
def test_a_microbatch_on_another_path_than_its_batch_adds_what_it_adds_there(loss: Loss, refused: bool) -> None:
    target = {key: sequence()[key] for key in ("mask", "clean", "class")}
    target["mask"] = torch.arange(5)[None] < torch.arange(1, 9)[:, None]
    torch.manual_seed(0)
    model = Chain()
    plain = copy.deepcopy(model)
    with compiled(model, loss, inputs(), target, microbatches=2).materialize(device="cpu") as pipe:
        other = {**target, "mask": target["mask"] & (torch.arange(8) > 3)[:, None]}
        other["class"] = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])
        if refused:
            with pytest.raises(fxpipe.CaptureError, match="takes another path than that of the whole batch"):
                pipe.step(inputs(), target=other)
            return
        wanted = loss(plain(inputs()), other)
        wanted.backward()
        check_equal(pipe, plain, pipe.step(inputs(), target=other), wanted.detach())
        pipe.zero_grad()
        parts = [((inputs()[at],), {}, {key: value[at] for key, value in other.items()}) for at in (FIRST, REST)]
        check_equal(pipe, plain, pipe.step(microbatches=parts), wanted.detach())


FIRST, REST = slice(4), slice(4, 8)


def hooked(hook: Any) -> Loss:
    def loss(o: torch.Tensor, t: Any) -> torch.Tensor:
        hidden = o * 1
        hidden.register_hook(hook)
        return F.mse_loss(hidden, t["real"])

    return loss


def test_a_hook_that_looks_at_the_gradients_of_the_batch_couples_samples() -> None:
    with pytest.raises(fxpipe.CaptureError, match=r"register_hook \(loss\.register_hook\) couples the samples"):
        compiled(Chain(), hooked(lambda gradient: gradient / gradient.norm()), inputs(), sequence())
    check(hooked(lambda gradient: gradient.clamp(-1e-3, 1e-3)))


def test_a_loss_that_writes_to_the_output_is_verified_against_the_outputs_of_the_model() -> None:
    def zeroed(o: torch.Tensor, t: Any) -> torch.Tensor:
        return o.mul_(t["weights"][..., None]).square().mean()

    target = {"weights": sequence()["weights"]}
    with compiled(Logits(), zeroed, inputs(), target).materialize(device="cpu") as pipe:
        assert pipe.verify(inputs(), target=target).compared > 6


WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)


def both(o: torch.Tensor, t: Any) -> torch.Tensor:
    return torch.stack([square(o, t), entropy(o, t)])


class Uncertain(Chain):
    """Learns how its tasks weigh."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = torch.nn.Parameter(torch.tensor([0.1, -0.2], dtype=torch.float64))

    def forward(self, x: torch.Tensor, labels: torch.Tensor, real: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        losses = both(super().forward(x), {"labels": labels, "real": real})
        return ((-self.spread).exp() * losses + self.spread).sum()


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: (both(o, t) * WEIGHTS).sum(),
        lambda o, t: both(o, t).mean() + 0.5,
        lambda o, t: torch.lerp(square(o, t), entropy(o, t), 0.3),
        lambda o, t: torch.einsum("i,ij,j->", WEIGHTS, torch.eye(2).double() + 1, both(o, t)),
    ],
    ids=["weighted", "mean", "lerp", "einsum"],
)
def test_a_loss_that_is_linear_in_means_of_several_kinds_is_taken_apart(loss: Loss) -> None:
    check(loss)


def test_weights_of_tasks_that_are_learned_get_the_gradients_of_the_batch() -> None:
    torch.manual_seed(0)
    model = Uncertain()
    plain = copy.deepcopy(model)
    given = sequence()["labels"], sequence()["real"]
    wanted = plain(inputs(7), *given)
    wanted.backward()
    with fxpipe.compile(model, 2, (inputs(), *given), microbatches=4, schedule="GPipe") as pipe:
        pipe.materialize(device="cpu")
        check_equal(pipe, plain, pipe.step(inputs(7), *given), wanted.detach())


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: both(o, t).max(),
        lambda o, t: (both(o, t).clamp(max=1.5) * WEIGHTS).sum(),
        lambda o, t: both(o, t).prod(),
        lambda o, t: (both(o, t) * both(o, t).detach().softmax(0)).sum(),
        lambda o, t: both(o, t).norm(),
    ],
    ids=["max", "clamp", "product", "softmax", "norm"],
)
def test_a_loss_that_is_not_linear_in_them_is_refused(loss: Loss) -> None:
    with pytest.raises(fxpipe.CaptureError, match="couples the samples of a batch"):
        compiled(Logits(), loss, inputs(), sequence())
