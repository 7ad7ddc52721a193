"""The whole model is kept: what the loss does not reach, what modules save beside tensors, and every name."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpipe
from fxpipe.errors import WeightsError


def compiled(model, x, **options):
    options = {"loss_fn": F.mse_loss, "microbatches": 2, **options}
    return fxpipe.compile(model, 2, (x,), {"target": x}, **options).materialize(device="cpu")


class Counting(nn.Linear):
    number = 3

    def get_extra_state(self):
        return {"number": self.number}

    def set_extra_state(self, state):
        self.number = state["number"]


class Within(nn.Module):
    """Extra state of a module through which cuts may go."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.number = nn.Linear(6, 6), nn.Linear(6, 6), 3

    get_extra_state, set_extra_state = Counting.get_extra_state, Counting.set_extra_state

    def forward(self, x):
        return self.two(self.one(x))


class Bare(nn.Module):
    """Extra state of a module without tensors."""

    number = 3
    get_extra_state, set_extra_state = Counting.get_extra_state, Counting.set_extra_state

    def forward(self, x):
        return x.tanh()


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: [Counting(6, 6) for _ in range(4)],
        lambda: [Within() for _ in range(3)],
        lambda: [nn.Sequential(nn.Linear(6, 6), Bare()) for _ in range(3)],
    ],
)
def test_extra_state_is_saved_and_loaded(build, grain):
    model, x = nn.Sequential(*build()), torch.randn(4, 6)
    pipe = compiled(model, x, grain=grain)
    state = pipe.state_dict(full=True)
    assert set(state) == set(model.state_dict())
    key = next(key for key in state if key.endswith("_extra_state"))
    pipe.load_state_dict({**model.state_dict(), key: {"number": 8}})
    assert pipe.state_dict(full=True)[key] == {"number": 8}
    pipe.load_state_dict(pipe.state_dict())


def test_a_state_without_extra_state_is_refused():
    model, x = nn.Sequential(*(Counting(6, 6) for _ in range(4))), torch.randn(4, 6)
    state = {key: value for key, value in model.state_dict().items() if key != "1._extra_state"}
    with pytest.raises(WeightsError, match=r"missing 1\._extra_state"):
        compiled(model, x).load_state_dict(state)


def whole(model):
    return torch.compile(model, backend="eager")


def blocks(model):
    for place, block in enumerate(model):
        model[place] = torch.compile(block, backend="eager")
    return model


def in_place(model):
    for block in model:
        block.compile(backend="eager")
    return model


@pytest.mark.parametrize("how", [whole, blocks, in_place])
def test_a_compiled_model_has_its_own_names(how):
    torch.manual_seed(0)
    model, x = how(nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))), torch.randn(4, 6)
    pipe = compiled(model, x)
    assert set(pipe.state_dict(full=True)) == set(model.state_dict())
    assert {fqn for fqn, _ in pipe.named_parameters()} == {fqn for fqn, _ in model.named_parameters()}
    pipe.load_state_dict(model.state_dict())
    pipe.load_state_dict(pipe.state_dict(full=True))


class Growing(nn.Module):
    def __init__(self, start, persistent=True):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("places", start, persistent)

    def forward(self, x):
        if self.places is None or self.places.shape[0] != x.shape[1]:
            self.places = torch.arange(x.shape[1], dtype=x.dtype)
        return self.linear(x) * self.places


@pytest.mark.parametrize("start", [torch.zeros(1), torch.zeros(9), torch.zeros(0)])
def test_a_buffer_is_judged_by_the_tensor_there_is(start):
    model, x = nn.Sequential(*(Growing(start.clone()) for _ in range(3))), torch.randn(4, 6)
    before = {fqn: tensor.clone() for fqn, tensor in model.state_dict().items()}
    pipe = compiled(model, x)
    pipe.step(x, target=x)
    state = pipe.state_dict(full=True)
    assert state["0.places"].tolist() == [0, 1, 2, 3, 4, 5]
    pipe.load_state_dict(state)
    with pytest.raises(WeightsError, match=r"0\.places has shape"):
        pipe.load_state_dict(before)


class Pooling(nn.Module):
    """Computes what the loss does not reach, as FNet's pooler."""

    def __init__(self, dead):
        super().__init__()
        self.blocks, self.pooler, self.dead = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 6), dead
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        if self.dead == "called":
            self.pooler(x)
        if self.dead == "detached":
            return x + self.pooler(x).detach() * 0
        return x


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize("dead", ["called", "never", "detached"])
def test_parameters_that_the_loss_does_not_reach_belong_to_a_stage(dead, grain):
    model, x = Pooling(dead), torch.randn(4, 6)
    pipe = compiled(model, x, grain=grain)
    assert {fqn for fqn, _ in pipe.named_parameters()} == {fqn for fqn, _ in model.named_parameters()}
    assert set(pipe.state_dict(full=True)) == set(model.state_dict())
    assert "pooler" in " ".join(layer for stage in pipe.plan.stages for layer in stage.layers)
    pipe.load_state_dict(model.state_dict())
    pipe.step(x, target=x)
    F.mse_loss(model(x), x).backward()
    wanted = {fqn: parameter.grad is None for fqn, parameter in model.named_parameters()}
    assert {fqn: parameter.grad is None for fqn, parameter in pipe.named_parameters()} == wanted


class Normed(nn.Module):
    def __init__(self, layer, dim=0):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.layer = nn.utils.weight_norm(layer, dim=dim)

    def forward(self, x):
        return x + self.layer(x).tanh()


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: Normed(nn.Linear(6, 6)), (4, 6)),
        (lambda: Normed(nn.Linear(6, 6), dim=None), (4, 6)),
        (lambda: Normed(nn.Conv1d(3, 3, 3, padding=1)), (4, 3, 8)),
    ],
)
def test_weights_that_hooks_compute_are_trained(build, shape, grain):
    torch.manual_seed(0)
    model, x = nn.Sequential(*(build() for _ in range(3))).double(), torch.randn(*shape, dtype=torch.float64)
    pipe = compiled(model, x, grain=grain)
    loss = pipe.step(x, target=x)
    expected = F.mse_loss(model(x), x)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    gradients = {fqn: parameter.grad for fqn, parameter in pipe.named_parameters()}
    assert gradients.keys() == {fqn for fqn, _ in model.named_parameters()}
    for fqn, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[fqn], parameter.grad, rtol=1e-12, atol=1e-14)


def masked(gradient):
    return gradient * torch.linspace(0, 1, gradient.shape[-1], dtype=gradient.dtype)


@pytest.mark.parametrize(
    ("fqn", "kind"), [("0.weight", "hook"), ("1.0.bias", "hook"), ("2.weight", "post_accumulate_grad_hook")]
)
def test_a_hook_on_a_parameter_is_not_lost(fqn, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    options = {"loss_fn": nn.functional.mse_loss, "microbatches": 2, "schedule": "GPipe"}
    handle = getattr(model.get_parameter(fqn), f"register_{kind}")(masked)
    with pytest.raises(fxpipe.CaptureError, match=f"parameter {fqn} has a hook on its gradient.*\n  register it on"):
        fxpipe.compile(model, 2, (x,), {"target": x}, **options)
    handle.remove()
    with fxpipe.compile(model, 2, (x,), {"target": x}, **options).materialize(device="cpu") as pipe:
        model.get_parameter(fqn).register_hook(masked)
        dict(pipe.named_parameters())[fqn].register_hook(masked)
        pipe.step(x, target=x)
        nn.functional.mse_loss(model(x), x).backward()
        for name, parameter in pipe.named_parameters():
            torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize("recorded", [False, True])
def test_what_was_set_on_a_parameter_is_on_the_stage_s(grain, recorded):
    """How optimisers are told which weights decay and how fast they learn."""

    def build():
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4))
        model[0].weight.no_weight_decay = True
        model[1][0].bias.options = {"lr": 0.1}
        model[2].weight = model[0].weight
        return model

    with fxpipe.deferred_init() if recorded else contextlib.nullcontext():
        model = build()
    x = torch.randn(4, 4)
    options = {"loss_fn": nn.functional.mse_loss, "microbatches": 2, "schedule": "GPipe", "grain": grain}
    with fxpipe.compile(model, 2, (x,), {"target": x}, **options).materialize(device="cpu") as pipe:
        found = dict(pipe.named_parameters())
        assert [name for name, each in found.items() if getattr(each, "no_weight_decay", False)] == ["0.weight"]
        assert {name: each.options for name, each in found.items() if hasattr(each, "options")} == {
            "1.0.bias": {"lr": 0.1}
        }
        pipe.optimizer(torch.optim.AdamW, lambda _, each: {"weight_decay": 0.0 if hasattr(each, "options") else 0.1})
        pipe.step(x, target=x)


class Twice(nn.Module):
    """One module that has a buffer, and a parameter, under two names each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.register_buffer("scratch", torch.ones(6), persistent=False)
        self.register_buffer("scale", self.scratch)
        self.layers[1].register_parameter("again", self.layers[1].weight)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x @ self.layers[1].again * self.scale


@pytest.mark.parametrize("stages", [2, 3])
def test_a_tensor_keeps_both_names_that_one_module_has_for_it(stages):
    model, x = Twice(), torch.randn(4, 6)
    with fxpipe.compile(model, stages, (x,), {"target": x}, loss_fn=F.mse_loss, schedule="GPipe") as pipe:
        state = pipe.materialize(device="cpu").state_dict(full=True)
        assert list(state) == list(model.state_dict())
        changed = {fqn: tensor + 1 for fqn, tensor in state.items()}
        pipe.load_state_dict(changed)
        model.load_state_dict(changed)
        torch.testing.assert_close(pipe.infer(x), model(x))
