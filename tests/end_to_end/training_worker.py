"""One of four ranks: what a training script does with a pipeline, held against the plain model or one process."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import judge
import launch
import models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fxpipe
import fxpipe.materialize
import fxpipe.verification
from fxpipe.runtime.run.distributed import DistributedEngine

RANKS = 4
STAGES = {
    "GPipe": 4,
    "1F1B": 4,
    "Interleaved1F1B": 8,
    "LoopedBFS": 8,
    "InterleavedZeroBubble": 8,
    "ZBVZeroBubble": 8,
    "DualPipeV": 8,
}


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Run as outside torchrun: every rank has all stages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fxpipe.runtime.ranks.joining, "is_distributed", lambda: False)
        yield


def street(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return models.Street(dropout)


def float_batch() -> dict[str, Any]:
    batch = models.street_batch()
    return {
        name: value.to(torch.get_default_dtype()) if value.is_floating_point() else value
        for name, value in batch.items()
    }


def compiled(model: nn.Module, schedule: str = "1F1B", **options: Any) -> fxpipe.Pipeline:
    batch = options.pop("batch", None) or float_batch()
    given = {
        "loss_fn": models.token_loss,
        "microbatches": models.BATCH,
        "schedule": schedule,
        "ranks": RANKS,
        **options,
    }
    return fxpipe.compile(model, given.pop("stages", STAGES[schedule]), (), batch, **given).materialize()


def own(pipe: fxpipe.Pipeline, wanted: dict[str, Any]) -> dict[str, Any]:
    return {fqn: wanted[fqn] for fqn, _ in pipe.named_parameters()}


def gradients(parameters: Any) -> dict[str, Any]:
    return {fqn: parameter.grad for fqn, parameter in parameters}


@functools.cache
def dropout_in_one_process(stages: int) -> tuple[list[torch.Tensor], dict[str, Any], torch.Tensor]:
    """Losses of two steps, the gradients, and the random state afterwards."""
    batch = float_batch()
    torch.manual_seed(3)
    with one_process(), compiled(street(0.1), "GPipe", stages=stages, ranks=stages, seed=5) as pipe:
        losses = [pipe.step(**batch), pipe.step(**batch)]
        return losses, gradients(pipe.named_parameters()), torch.get_rng_state()


def dropout_draws_the_same(schedule: str) -> None:
    """Stages, schedule and grain leave every draw as it is, and the random state afterwards too."""
    batch, grain = float_batch(), "op" if schedule == "1F1B" else "auto"
    losses, (wanted, *_), (*_, state) = zip(*map(dropout_in_one_process, (1, 2, 4)), strict=True)
    torch.manual_seed(3)
    with compiled(street(0.1), schedule, seed=5, grain=grain) as pipe:
        here = [pipe.step(**batch), pipe.step(**batch)]
        judge.assert_close(gradients(pipe.named_parameters()), own(pipe, wanted), "gradients")
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[0][0] != losses[0][1]
    for others in (*losses[1:], here):
        judge.assert_close(dict(enumerate(others)), dict(enumerate(losses[0])), "losses")


def attention_draws_the_same() -> None:
    """Dropout inside attention, in functional calls and in an opened block."""
    config = models.GPT2 | {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    torch.manual_seed(0)
    model = models.huggingface("GPT2Config", config, "GPT2LMHeadModel")()
    batch, losses = models.causal_batch(), []
    for stages in (1, 2, 4):
        with one_process(), compiled(model, "GPipe", stages=stages, ranks=stages, batch=batch) as pipe:
            losses.append(pipe.step(**batch))
    for grain in ("block", "op"):
        with compiled(model, "1F1B", batch=batch, grain=grain) as pipe:
            losses.append(pipe.step(**batch))
    for loss in losses[1:]:
        judge.assert_close(loss, losses[0], "loss")
    with compiled(model, "1F1B", batch=batch) as pipe:
        pipe.eval()
        assert pipe.step(**batch) != losses[0]


def outputs_are_the_models(schedule: str) -> None:
    """Any batch size and sequence length, on every rank or on the last alone."""
    model = street()
    with compiled(model, schedule) as pipe:
        for rows, length in ((models.BATCH, models.LENGTH), (5, models.LENGTH), (1, 3)):
            batch = {"tokens": models.ids(length)[:rows], "gain": float_batch()["gain"][:rows]}
            wanted = model(**batch).detach()
            for options in ({}, {"microbatches": rows}):
                judge.assert_close(pipe.infer(**batch, **options), wanted)
            alone = pipe.infer(**batch, gather=False)
            last = pipe.plan.stages[-1].rank == dist.get_rank()
            assert (alone is None) != last
            if last:
                judge.assert_close(alone, wanted)


def ready_microbatches_count_by_their_targets() -> None:
    """Unequal and padded microbatches, ready-split: the loss is that of all their targets together."""
    model, parts = street(), []
    rows = [slice(0, 1), slice(1, 4), slice(4, 6), slice(6, 12)]
    for place, row in enumerate(rows):
        length = 3 + place
        part = {name: value[row] for name, value in float_batch().items()}
        part |= {"tokens": part["tokens"][:, :length], "target": part["target"][:, :length]}
        parts.append(part)
    model.zero_grad()
    valid = [int((part["target"] != -100).sum()) for part in parts]
    loss = sum(
        models.token_loss(model(part["tokens"], part["gain"]), part["target"]) * count / sum(valid)
        for part, count in zip(parts, valid, strict=True)
        if count
    )
    loss.backward()
    with compiled(model, "1F1B") as pipe:
        for ready in (parts, list(reversed(parts))):
            pipe.zero_grad()
            judge.assert_close(pipe.step(microbatches=ready), loss.detach(), "loss")
            wanted = own(pipe, gradients(model.named_parameters()))
            judge.assert_close(gradients(pipe.named_parameters()), wanted, "gradients")


def accumulated_steps_add_up(schedule: str) -> None:
    """Two batches before one optimiser step; then the next step starts anew."""
    model, batch = street(), float_batch()
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 12), slice(None, None, 2))]
    halves[1] = {name: torch.cat([value, value]) for name, value in halves[1].items()}
    for half in halves:
        models.token_loss(model(half["tokens"], half["gain"]), half["target"]).backward()
    with compiled(model, schedule) as pipe:
        for _ in range(2):
            pipe.zero_grad()
            pipe.step(**halves[0], last=False)
            pipe.step(**halves[1])
            wanted = own(pipe, gradients(model.named_parameters()))
            judge.assert_close(gradients(pipe.named_parameters()), wanted, "gradients")
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        judge.assert_close(pipe.clip_grad_norm_(0.5), norm, "norm")


class OwnLoss(nn.Module):
    """Returns its own loss, as a sum or a mean, beside the logits."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.inner, self.reduction = models.Street(), reduction

    def forward(self, tokens: Any, gain: Any, labels: Any = None) -> Any:
        logits = self.inner(tokens, gain)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=self.reduction)
        return {"loss": loss, "logits": logits}


def the_models_own_loss_is_that_of_the_batch(reduction: str) -> None:
    torch.manual_seed(0)
    model, batch = OwnLoss(reduction), float_batch()
    batch["labels"] = batch.pop("target")
    loss = model(**batch)["loss"]
    loss.backward()
    with compiled(model, "1F1B", loss_fn=None, batch=batch) as pipe:
        judge.assert_close(pipe.step(**batch), loss.detach(), "loss")
        wanted = own(pipe, gradients(model.named_parameters()))
        judge.assert_close(gradients(pipe.named_parameters()), wanted, "gradients")


def samples_may_have_weights() -> None:
    """A loss that fxpipe cannot read: the user says what each microbatch weighs."""
    model, batch = street(), float_batch()
    weights = torch.linspace(0.5, 2.0, models.BATCH, dtype=torch.float64)

    def loss_fn(logits: torch.Tensor, target: dict[str, torch.Tensor]) -> torch.Tensor:
        each = F.cross_entropy(logits.transpose(1, 2), target["labels"].clamp(min=0), reduction="none").mean(1)
        return (each * target["weights"]).sum() / target["weights"].sum()

    target = {"labels": batch.pop("target"), "weights": weights}
    loss = loss_fn(model(**batch), target)
    loss.backward()
    options = {"loss_fn": loss_fn, "loss_weight": lambda *_, target=None, **__: float(target["weights"].sum())}
    with compiled(model, "1F1B", batch={**batch, "target": target}, microbatches=6, **options) as pipe:
        judge.assert_close(pipe.step(**batch, target=target), loss.detach(), "loss")
        wanted = own(pipe, gradients(model.named_parameters()))
        judge.assert_close(gradients(pipe.named_parameters()), wanted, "gradients")


class Normed(nn.Module):
    """Statistics that a forward changes; the biases before them have no gradient but rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(4, 4), nn.BatchNorm1d(4))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def verify_compares_and_leaves_everything_as_it_was(whole: bool) -> None:
    torch.set_default_dtype(torch.float32)
    batch = {"x": torch.randn(12, 4), "target": torch.randn(12, 4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fxpipe.verification, "fits_whole", lambda *_: whole)
        with compiled(Normed(), "ZBVZeroBubble", loss_fn=F.mse_loss, batch=batch, microbatches=4, ranks=4) as pipe:
            pipe.step(**batch)
            before = copy.deepcopy([pipe.state_dict(), gradients(pipe.named_parameters())])
            said = pipe.verify(**batch)
            assert said.compared >= 16 + 1 + 4  # gradients, the loss, an output of each microbatch
            assert ("unpartitioned" in said.reference) == whole
            torch.testing.assert_close([pipe.state_dict(), gradients(pipe.named_parameters())], before, rtol=0, atol=0)
        with compiled(street(0.1), "Interleaved1F1B") as pipe:
            pipe.verify(**float_batch())


def verify_names_what_is_wrong(whole: bool) -> None:
    torch.set_default_dtype(torch.float32)
    real = DistributedEngine.train

    def wrong(engine: DistributedEngine, jobs: Any) -> torch.Tensor:
        loss = real(engine, jobs)
        for fqn, parameter in engine._modules[-1].named_parameters():
            if fqn == "blocks.5.second.bias":
                parameter.grad += 1
        return loss

    with pytest.MonkeyPatch.context() as patch, compiled(street(), "1F1B") as pipe:
        patch.setattr(fxpipe.verification, "fits_whole", lambda *_: whole)
        pipe.verify(**float_batch())
        patch.setattr(DistributedEngine, "train", wrong)
        stage = next(stage.index for stage in pipe.plan.stages if any("blocks.5" in name for name in stage.layers))
        with pytest.raises(fxpipe.MismatchError, match=rf"blocks\.5\.second\.bias \(stage {stage}\)"):
            pipe.verify(**float_batch())


def modes_switch() -> None:
    """A pipeline goes from training to evaluation and back as the model would."""
    model, batch = street(0.3), float_batch()
    with compiled(model, "1F1B", seed=1) as pipe:
        model.eval()
        loss = models.token_loss(model(batch["tokens"], batch["gain"]), batch["target"]).detach()
        for _ in range(2):
            pipe.eval()
            judge.assert_close(pipe.step(**batch), loss, "loss")
            pipe.train()
            assert abs(pipe.step(**batch) - loss) > 1e-3  # dropout is on


class Ended(nn.Module):
    """Layers before and after one that gives its input no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place, layer in enumerate(self.layers):
            x = layer(x if place != 6 else x.detach()).tanh()
        return x


class Gate(nn.Module):
    """Lets through the samples whose mean lies above a limit."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.linear, self.limit = nn.Linear(6, 6), limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (open_for,) = (x.mean(1) > self.limit).nonzero(as_tuple=True)
        shut = self.linear.bias.expand_as(x)
        return shut.index_put((open_for,), self.linear(x[open_for])) if len(open_for) else shut


class Gated(nn.Module):
    """Two streams, one of which passes a gate."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.others = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.gate = Gate(limit)

    def streams(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x
        for layer, other in zip(self.layers, self.others, strict=True):
            x, y = layer(x).tanh(), other(y).tanh()
        return x, y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, y = self.streams(x)
        return self.gate(x) * 3 + y


def gated(share: float) -> Gated:
    """Give a model whose gate is open for a share of the samples."""
    torch.manual_seed(0)
    model = Gated(0.0)
    means = model.streams(samples())[0].mean(1).tolist()
    ordered = [*sorted(means, reverse=True), -9.0]
    number = round(share * len(means))
    model.gate.limit = (ordered[number] + ordered[number - 1]) / 2 if number else 9.0
    return model


def samples() -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradients_that_the_model_leaves_none_are_none(schedule: str) -> None:
    """On every rank; and no rank waits for what is not sent.

    Where values decide: a gate is shut for all samples, for all but one, or open. What crosses says so to the host, or
    hosts tell each other.
    """
    x = samples()
    torch.manual_seed(0)
    for model, named in ((Ended(), True), (gated(0.0), True), (gated(1 / 8), True), (gated(1 / 8), False)):
        model(x).pow(2).mean().backward()
        wanted = gradients(model.named_parameters())
        options = {"batch": {"x": x}, "loss_fn": lambda y: y.pow(2).mean(), "microbatches": 8, "grain": "block"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fxpipe.runtime.run.engine_stage, "carries_names", lambda device, named=named: named)
            pipe = compiled(copy.deepcopy(model), schedule, **options)
        with pipe:
            pipe.zero_grad()
            pipe.step(x=x)
            found = gradients(pipe.named_parameters())
            assert [fqn for fqn in found if found[fqn] is None] == [fqn for fqn in found if wanted[fqn] is None]
            there = {fqn: gradient for fqn, gradient in found.items() if gradient is not None}
            judge.assert_close(there, {fqn: wanted[fqn] for fqn in there}, "gradients")


def ranks_may_differ_in_what_they_set_for_themselves() -> None:
    """A loss function or a forward that knows its rank, or a counter of one rank's, is the same model everywhere."""
    own = {"rank": dist.get_rank(), "step": 0, "weight": 1.0}

    class Knowing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1.0 if own["rank"] >= 0 else 2.0)

    def loss_fn(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(y, target) * own["weight"] * (1.0 if own["rank"] + own["step"] >= 0 else 2.0)

    torch.manual_seed(0)
    model, x = nn.Sequential(*(Knowing(4, 4) for _ in range(4))), torch.randn(12, 4)
    with compiled(copy.deepcopy(model), loss_fn=loss_fn, batch={"input": x, "target": x}) as pipe:
        for step in range(3):
            own["step"] += dist.get_rank() == 0
            own["weight"] = 1.0 + step  # what all set is looked at, too
            judge.assert_close(pipe.step(input=x, target=x), loss_fn(model(x), x).detach(), "loss")
        for length in (3, 2, 5, 2, 3, 6):  # lengths follow as symbols on one rank, and are recorded on the other
            own["step"] += dist.get_rank() == 0
            wide = torch.randn(12, length, 4, generator=torch.Generator().manual_seed(length), dtype=x.dtype)
            judge.assert_close(pipe.step(input=wide, target=wide), loss_fn(model(wide), wide).detach(), "loss")


def few_microbatches_run_or_are_refused() -> None:
    """One, one less than stages, and as many: no schedule hangs."""
    model = street()
    for schedule in ("GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble"):
        for number in (1, 3, 4):
            with compiled(model, schedule, microbatches=number, grain="block") as pipe:
                pipe.step(**float_batch())
    for schedule, number in (("1F1B", 1), ("1F1B", 3), ("DualPipeV", 4)):
        with pytest.raises(fxpipe.ScheduleError, match=schedule):
            compiled(model, schedule, microbatches=number)


def cases() -> dict[str, Callable[[], None]]:
    bind = functools.partial
    return {
        **{f"dropout-{schedule}": bind(dropout_draws_the_same, schedule) for schedule in STAGES},
        **{f"infer-{schedule}": bind(outputs_are_the_models, schedule) for schedule in STAGES},
        **{f"none-{schedule}": bind(gradients_that_the_model_leaves_none_are_none, schedule) for schedule in STAGES},
        **{f"accumulate-{name}": bind(accumulated_steps_add_up, name) for name in ("1F1B", "ZBVZeroBubble")},
        **{f"own-loss-{name}": bind(the_models_own_loss_is_that_of_the_batch, name) for name in ("mean", "sum")},
        **{f"verify-{whole}": bind(verify_compares_and_leaves_everything_as_it_was, whole) for whole in (True, False)},
        **{f"verify-wrong-{whole}": bind(verify_names_what_is_wrong, whole) for whole in (True, False)},
        "dropout-in-attention": attention_draws_the_same,
        "ready-microbatches": ready_microbatches_count_by_their_targets,
        "sample-weights": samples_may_have_weights,
        "modes": modes_switch,
        "own-settings": ranks_may_differ_in_what_they_set_for_themselves,
        "few-microbatches": few_microbatches_run_or_are_refused,
    }


if __name__ == "__main__":
    import sys

    dist.init_process_group("gloo")
    wanted = {name: case for name, case in cases().items() if not sys.argv[1:] or name in sys.argv[1:]}
    launch.run_cases(wanted, dtype=torch.float64)
    dist.destroy_process_group()
