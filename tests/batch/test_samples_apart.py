"""``infer`` in several microbatches: the whole batch's output, or refused where samples depend on each other."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpipe
from fxpipe.ir.tree import tree_leaves

COUPLED = {
    "centred": lambda h: h - h.mean(0),
    "softmax over samples": lambda h: h.softmax(0),
    "summed up": lambda h: {"sums": h.cumsum(0)},
    "numbered": lambda h: h + torch.arange(len(h)).unsqueeze(1),
    "sorted": lambda h: (h, h.sort(0).values),
    "similarities": lambda h: F.normalize(h, dim=-1) @ F.normalize(h, dim=-1).T,
    "mean": lambda h: {"h": h, "mean": h.mean()},
    "counted": lambda h: (h, h.shape[0]),
    "normed": lambda h: h / h.norm(),
}
APART = {
    "rows": lambda h: h.softmax(-1),
    "columns": lambda h: h.T,
    "flat": lambda h: h.reshape(-1),
    "weights too": lambda h: {"h": h, "table": torch.arange(3), "width": h.shape[1]},
    "numbers": lambda h: h.argmax(-1),
}

pytestmark = pytest.mark.usefixtures("in_float64")


class Model(nn.Module):
    def __init__(self, last, middle=nn.Identity):
        super().__init__()
        self.first, self.middle, self.second, self.last = nn.Linear(8, 8), middle(), nn.Linear(8, 8), last

    def forward(self, x):
        return self.last(self.second(self.middle(self.first(x)).tanh()))


def materialized(model, x):
    options = {"loss_fn": lambda output: next(iter(tree_leaves(output)))[1].sum(), "loss_weight": "microbatch"}
    return fxpipe.compile(model, 2, (x,), microbatches=1, schedule="GPipe", **options).materialize(device="cpu")


def same(found, wanted):
    pairs = zip(tree_leaves(found), tree_leaves(wanted), strict=True)
    near = functools.partial(torch.allclose, rtol=1e-12, atol=1e-12)
    return all(near(a, b) if isinstance(a, torch.Tensor) else a == b for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("last", APART)
def test_what_keeps_samples_apart_is_put_together(last):
    model = Model(APART[last])
    with materialized(copy.deepcopy(model), torch.randn(8, 8)) as pipe:
        for size, parts in ((8, 2), (6, 2), (9, 3), (3, 3)):
            x = torch.randn(size, 8)
            assert same(pipe.infer(x, microbatches=parts), model(x))


@pytest.mark.parametrize("last", COUPLED)
def test_what_couples_samples_is_refused(last):
    model = Model(COUPLED[last])
    with materialized(copy.deepcopy(model), torch.randn(8, 8)) as pipe:
        for size, parts in ((8, 4), (6, 3)):
            x = torch.randn(size, 8)
            with pytest.raises(fxpipe.ScheduleError, match=r"(?s)output.*infer with one microbatch"):
                pipe.infer(x, microbatches=parts)
            assert same(pipe.infer(x), model(x))


def test_batchnorm_is_refused_in_training_and_keeps_its_buffers():
    model, x = Model(APART["rows"], lambda: nn.BatchNorm1d(8)), torch.randn(8, 8)
    with materialized(copy.deepcopy(model), x) as pipe:
        before = {fqn: buffer.clone() for fqn, buffer in pipe.named_buffers()}
        with pytest.raises(fxpipe.ScheduleError, match=r"pipe\.eval\(\)"):
            pipe.infer(x, microbatches=2)
        for fqn, buffer in pipe.named_buffers():
            assert torch.equal(buffer, before[fqn]), fqn
        pipe.eval()
        assert same(pipe.infer(x, microbatches=2), model.eval()(x))
        pipe.train()
        with pytest.raises(fxpipe.ScheduleError, match=r"pipe\.eval\(\)"):
            pipe.infer(x, microbatches=2)


def test_of_samples_that_are_all_the_same_nothing_is_concluded():
    model = Model(COUPLED["centred"])
    with materialized(copy.deepcopy(model), torch.randn(8, 8)) as pipe:
        assert same(pipe.infer(torch.ones(8, 8), microbatches=2), torch.zeros(8, 8))
        with pytest.raises(fxpipe.ScheduleError, match="depends on the others"):
            pipe.infer(torch.randn(8, 8), microbatches=2)


def test_a_model_that_returns_a_size_returns_that_of_each_batch():
    model = Model(lambda h: (h, h.shape[0], 2 * h.shape[0] + 1))
    with materialized(copy.deepcopy(model), torch.randn(8, 8)) as pipe:
        for size in (8, 5, 3, 7, 8):
            assert pipe.infer(torch.randn(size, 8))[1:] == (size, 2 * size + 1)


class Deep(nn.Module):
    """Rounding grows on its way through the layers, to more than a unit of the output's."""

    def __init__(self, couples):
        super().__init__()
        self.layers, self.couples = nn.ModuleList(nn.Linear(64, 64) for _ in range(12)), couples

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(3 * layer(x)) + x
        x = x - x.mean(0) if self.couples else x
        return {"y": x.float(), "chosen": x.argmax(-1)}


@pytest.mark.parametrize("couples", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
def test_rounding_is_no_dependence_and_dependence_no_rounding(dtype, couples):
    narrow = torch.float32 if dtype == "autocast" else dtype
    model, x = Deep(couples).to(narrow), torch.randn(16, 64, dtype=narrow)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"), materialized(model, x) as pipe:
        before = {fqn: parameter.clone() for fqn, parameter in pipe.named_parameters()}
        refused = pytest.raises(fxpipe.ScheduleError, match=r"output\['(y|chosen)'\] of a sample depends on the others")
        with refused if couples else contextlib.nullcontext():
            pipe.infer(x, microbatches=4)
        for fqn, parameter in pipe.named_parameters():
            assert torch.equal(parameter, before[fqn]), fqn
