"""What runs is what the flags of the stages' modules say, in whole and in opened blocks, however they are set."""

import modes
import pytest
import torch
import torch.nn.functional as F
from launch import check, launch
from torch import nn

import fxpipe


def frozen(model):
    modes.quiet(model.named_modules())
    for block in model.blocks[:2]:
        block.eval()


def by_stage(pipe, model):
    for stage in pipe.stage_modules:
        stage.eval()
    model.eval()


def by_flag(pipe, model):
    for stage in pipe.stage_modules:
        modes.quiet(stage.named_modules())
    modes.quiet(model.named_modules())


def norms_alone(pipe, model):
    by_flag(pipe, model)
    for part in (*pipe.stage_modules, model):
        for norm in part.modules():
            norm.training = norm.training and not isinstance(norm, nn.BatchNorm1d)


def again(pipe, model):
    by_stage(pipe, model)
    pipe.train(), model.train()
    by_flag(pipe, model)


def untouched(pipe, model):
    del pipe, model


@pytest.mark.parametrize("stages", [1, 2, 7])
@pytest.mark.parametrize(
    ("before", "change"),
    [(nn.Module.train, change) for change in (by_stage, by_flag, norms_alone, again)]
    + [(frozen, change) for change in (by_stage, by_flag, untouched)],  # untouched and in training it draws
)
def test_a_flag_counts_wherever_it_is_set(change, before, stages):
    model = modes.tower()
    before(model)
    example = {"target": modes.TARGET}
    options = {"loss_fn": F.mse_loss, "microbatches": 2, "schedule": "GPipe", "grain": "op"}
    with fxpipe.compile(model, stages, (modes.X,), example, **options).materialize(device="cpu") as pipe:
        assert pipe.plan.opened or stages < 7
        pipe.evaluate(modes.X, target=modes.TARGET)  # with the flags that it was compiled with
        for (_, buffer), (_, own) in zip(pipe.named_buffers(), model.named_buffers(), strict=True):
            buffer.copy_(own)
        change(pipe, model)
        modes.check(pipe, model)


def test_a_flag_that_one_rank_changes_counts_on_all():
    results = launch("end_to_end/modes_worker.py", 2)
    check(results)
    assert [result.stdout.strip() for result in results] == ["ok", "ok"]


def test_a_flag_that_did_not_change_costs_no_capture():
    model = modes.tower()
    frozen(model)
    options = {"loss_fn": F.mse_loss, "microbatches": 2, "schedule": "GPipe", "grain": "op"}
    with fxpipe.compile(model, 7, (modes.X,), {"target": modes.TARGET}, **options).materialize(device="cpu") as pipe:
        pipe.step(modes.X, target=modes.TARGET)
        for stage in pipe.stage_modules:
            for part in stage.modules():
                part.train(part.training) if not list(part.children()) else None
        pipe.step(modes.X, target=modes.TARGET)
        assert len(pipe._trainer.variants.names) == 1
        assert torch.is_grad_enabled()


class Asks(nn.Linear):
    """Does something else where no gradient is wanted, as the fast path of torch's encoder does."""

    def forward(self, x):
        y = super().forward(x)
        return y if torch.is_grad_enabled() and y.requires_grad else 2 * y


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("grain", ["block", "op"])
def test_evaluate_does_what_the_model_does_without_gradients(grain):
    model, x = nn.Sequential(*(Asks(4, 4) for _ in range(3))), torch.randn(4, 4)
    options = {"loss_fn": F.mse_loss, "microbatches": 2, "schedule": "GPipe", "grain": grain}
    with fxpipe.compile(model, 2, (x,), {"target": x}, **options).materialize(device="cpu") as pipe:
        for _ in range(2):
            torch.testing.assert_close(pipe.step(x, target=x), F.mse_loss(model(x), x).detach())
            with torch.no_grad():
                torch.testing.assert_close(pipe.evaluate(x, target=x), F.mse_loss(model(x), x))
                torch.testing.assert_close(pipe.infer(x), model(x))


class Functional(nn.Module):
    """Calls of functions on its own weights, and views of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.start = nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        return (
            F.linear(torch.tanh(F.linear(x + self.start[0], self.first)), self.first.t()) @ self.second + self.start[1]
        )


@pytest.mark.usefixtures("in_float64")
def test_functions_on_weights_infer_and_evaluate():
    model, x = Functional(), torch.randn(4, 4)
    options = {"loss_fn": F.mse_loss, "microbatches": 2, "schedule": "GPipe"}
    with fxpipe.compile(model, 2, (x,), {"target": x}, **options).materialize(device="cpu") as pipe, torch.no_grad():
        torch.testing.assert_close(pipe.infer(x), model(x))
        torch.testing.assert_close(pipe.evaluate(x, target=x), F.mse_loss(model(x), x))


class Kept(modes.Block):
    """Keeps its statistics, as a backbone that is fine-tuned does, and its first layer frozen."""

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        self.drop.eval()
        self.training = False
        if mode:
            self.first.requires_grad_(False)
        return self


class KeptTower(modes.Tower):
    def train(self, mode=True):
        super().train(mode)
        self.blocks[2].eval()
        return self


@pytest.mark.parametrize("stages", [1, 3, 7])
def test_the_model_s_own_train_counts(stages):
    model = modes.tower()
    modes.quiet(model.named_modules())
    model.__class__ = KeptTower
    for block in model.blocks[:2]:
        block.__class__ = Kept
    options = {"loss_fn": F.mse_loss, "microbatches": 2, "schedule": "GPipe", "grain": "op"}
    with fxpipe.compile(model, stages, (modes.X,), {"target": modes.TARGET}, **options).materialize("cpu") as pipe:
        pipe.train()
        model.train()
        parts = [named for part in (*pipe.stage_modules, model) for named in part.named_modules()]
        assert not any(part.training for fqn, part in parts if fqn in ("blocks.0.norm", "blocks.2", "blocks.2.drop"))
        modes.quiet(named for named in parts if named[0].startswith("blocks.3"))
        modes.check(pipe, model)
        pipe.eval()
        model.eval()
        modes.check(pipe, model)


SCALES = {"of": 1.0}


def scaled(x):
    return x * SCALES["of"]


class Scaled(nn.Module):
    """Finds numbers outside of its arguments, itself and in a function that it calls."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.sharpness = nn.Linear(4, 4), nn.Linear(4, 4), 1.0

    def forward(self, x):
        return x + self.last(scaled(torch.tanh(self.first(x) * self.sharpness))) / SCALES["of"] ** 2


def opened_pipe(model, x, **options):
    options = {"loss_fn": F.mse_loss, "microbatches": 2, "schedule": "GPipe", "grain": "op", **options}
    return fxpipe.compile(model, 3, (x,), {"target": x}, **options).materialize(device="cpu")


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.Sequential(nn.Sequential(*model), nn.Tanh())])
def test_what_a_script_sets_counts_in_opened_blocks_too(wrap, monkeypatch):
    model, x = wrap(nn.Sequential(Scaled(), Scaled())), torch.randn(4, 4)
    with opened_pipe(model, x) as pipe:
        assert pipe.plan.opened
        for step in (0, 1, 1, 2):
            monkeypatch.setitem(SCALES, "of", 1.0 + step)
            for part in (*pipe.stage_modules, model):
                for inner in part.modules():
                    if hasattr(inner, "sharpness"):
                        inner.sharpness = 1.0 + step % 2
            torch.testing.assert_close(pipe.step(x, target=x), F.mse_loss(model(x), x).detach(), rtol=1e-12, atol=0)
        assert len(pipe._trainer.variants.names) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda part: part.register_forward_hook(lambda module, args, output: output * 2), "has got a hook"),
        (lambda part: setattr(part, "forward", lambda x: x), r"forward was set"),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_what_nothing_would_call_is_refused(change, words, steps):
    x = torch.randn(4, 4)
    with opened_pipe(nn.Sequential(Scaled(), Scaled()), x) as pipe:
        for _ in range(steps):
            pipe.step(x, target=x)
            pipe.verify(x, target=x)
        opened = [part for stage in pipe.stage_modules for fqn, part in stage.named_modules() if fqn == "0"]
        change(opened[0])
        with pytest.raises(fxpipe.MaterializeError, match=rf"^0.*{words}.*\n  name it in leaves="):
            pipe.step(x, target=x)
