"""Arguments that are objects, caches that are passed on, and what the user compiled."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpipe

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))

    def forward(self, x, use=None):
        for block in self.blocks:
            x = block(x)
        return x if use is None else use(x)


def tower():
    torch.manual_seed(0)
    return Tower().double()


def made(model, *args, stages=2, **options):
    options = {"loss_fn": F.mse_loss, "microbatches": 2, "schedule": "GPipe", "grain": "op", **options}
    return fxpipe.compile(model, stages, args, {"target": X}, **options).materialize(device="cpu")


class Scaling:
    """What it holds can be compared."""

    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x * self.by


class Locked(Scaling):
    """What it holds cannot be compared."""

    def __init__(self, by):
        super().__init__(by)
        self.stack = contextlib.ExitStack().__enter__
        self.frames = (each for each in ())


def closure(by):
    return lambda x: x * by


def over_an_object(by):
    holder = Scaling(by)
    return lambda x: holder(x)


def over_a_tensor(by):
    return closure(torch.tensor(by))


@pytest.mark.parametrize("make", [Scaling, Locked, closure, over_an_object, over_a_tensor])
def test_objects_of_one_class_share_no_graph(make):
    model = tower()
    with made(model, X, make(2.0)) as pipe:
        for by in (2.0, 3.0, 0.5):
            use = make(by)
            wanted = F.mse_loss(model(X, make(by)), X).detach()
            torch.testing.assert_close(pipe.step(X, use, target=X), wanted, rtol=1e-12, atol=0)


def test_an_object_that_the_user_changes_is_another_one():
    model, use = tower(), Scaling(2.0)
    with made(model, X, use) as pipe:
        for use.by in (2.0, 4.0):
            wanted = F.mse_loss(model(X, use), X).detach()
            torch.testing.assert_close(pipe.step(X, use, target=X), wanted, rtol=1e-12, atol=0)


class Counter:
    def __init__(self):
        self.steps, self.seen = 0, []


class Counting(Tower):
    def forward(self, x, counter):
        counter.steps += 1
        counter.seen.append(x)
        return super().forward(x) * counter.steps


def test_an_object_that_the_forward_changes_is_refused_and_left_alone():
    counter = Counter()
    with pytest.raises(
        fxpipe.CaptureError, match=r"the forward changes argument 1, a Counter that it is given"
    ) as error:
        made(Counting().double(), X, counter)
    assert "use_cache=False" in str(error.value)
    assert (counter.steps, counter.seen) == (0, [])


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
def test_a_cache_passed_back_is_told_what_to_do():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=17, n_positions=16)
    model, ids = transformers.GPT2LMHeadModel(config).double().eval(), torch.arange(12).reshape(2, 6)
    pipe = fxpipe.compile(model, 2, (), {"input_ids": ids, "labels": ids}, microbatches=2, schedule="GPipe")
    with pipe.materialize(device="cpu"):
        pipe.eval()
        plain = {"attention_mask": torch.ones(2, 6, dtype=torch.long), "position_ids": torch.arange(6)[None]}
        found = pipe.infer(input_ids=ids, use_cache=False, logits_to_keep=1, **plain)
        torch.testing.assert_close(found.logits, model(ids).logits[:, -1:], rtol=1e-12, atol=1e-12)
        cache = transformers.DynamicCache()
        with pytest.raises(fxpipe.CaptureError, match="DynamicCache") as error:
            pipe.infer(input_ids=ids, past_key_values=cache, use_cache=True)
        assert "use_cache=False" in str(error.value)
        assert cache.get_seq_length() == 0
        with torch.no_grad():
            past = model(ids, use_cache=True).past_key_values
        with pytest.raises(fxpipe.CaptureError, match="DynamicCache") as error:
            pipe.infer(input_ids=ids[:, :1], past_key_values=past, use_cache=True)
        assert "use_cache=False" in str(error.value)
        other = transformers.GPT2LMHeadModel(config).double().eval()
        other.load_state_dict(model.state_dict())
        other.forward = lambda *args, **named: pipe.infer(*args, **named)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "use_cache": False}
        assert torch.equal(other.generate(ids, **options), model.generate(ids, **options))


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


@torch.compile(backend="eager")
def activation(x):
    return torch.tanh(x)


class Calling(Apart):
    def forward(self, x):
        return self.two(activation(self.one(x)))


def compiled(kind):
    if kind == "function":
        return nn.Sequential(*(Calling() for _ in range(3))).double()
    model = nn.Sequential(*(Apart() for _ in range(3))).double()
    if kind == "in place":
        for block in model:
            block.compile(backend="eager")
    elif kind == "wrapped":
        model = nn.Sequential(*(torch.compile(block, backend="eager") for block in model))
    elif kind == "whole":
        model = torch.compile(model, backend="eager")
    return model


@pytest.mark.filterwarnings("ignore")  # of torch._dynamo, about itself
@pytest.mark.parametrize(
    ("kind", "stages", "lost"),
    [
        *(("in place", 6, True), ("in place", 3, True), ("wrapped", 6, True), ("wrapped", 3, False)),
        *(("whole", 3, True), ("function", 6, True), ("function", 3, False)),
    ],
)
def test_what_was_compiled_stays_so_or_the_report_says_not(kind, stages, lost):
    model = compiled(kind)
    options = {"loss_fn": F.mse_loss, "microbatches": 2, "schedule": "GPipe", "grain": "op" if stages > 3 else "block"}
    pipe = fxpipe.compile(model, stages, (X,), {"target": X}, **options)
    assert ("runs uncompiled; materialize(compile=)" in " ".join(str(pipe.report()).split())) == lost
    with pipe:
        pipe.materialize(device="cpu")
        kinds = {type(part).__name__ for stage in pipe.stage_modules for part in stage.modules()}
        assert ("OptimizedModule" in kinds) == (kind == "wrapped" and stages == 3)
        wanted = F.mse_loss(model(X), X).detach()
        torch.testing.assert_close(pipe.step(X, target=X), wanted, rtol=1e-12, atol=0)
