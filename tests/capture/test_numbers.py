"""Python numbers among the inputs that differ from step to step: one graph for all of them, and the model's numbers."""

import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpipe

pytestmark = pytest.mark.usefixtures("in_float64")


class Reversed(torch.autograd.Function):
    """The gradient, turned and scaled."""

    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.alpha * gradient, None


@dataclasses.dataclass
class Options:
    """Numbers beside a tensor."""

    scale: float
    mask: torch.Tensor | None = None


class Block(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.linear, self.use = nn.Linear(6, 6), use

    def forward(self, x, number):
        return torch.tanh(self.use(self.linear(x), number))


class Model(nn.Module):
    """A number that every block uses, and the end."""

    def __init__(self, use, last=lambda x, _: x):
        super().__init__()
        self.blocks = nn.ModuleList(Block(use) for _ in range(4))
        self.last = last

    def forward(self, x, number):
        for block in self.blocks:
            x = block(x, number)
        return self.last(x, number)


def chosen(x, number):
    return x * 2 if number > 1.5 else x - number


def repeated(x, number):
    for _ in range(number):
        x = torch.sin(x) + number
    return x


ONE = {
    "divide": lambda x, n: x / n,
    "reflected": lambda x, n: n - 2**-n + n * x + n**2 / 7,
    "in place": lambda x, n: x.clone().mul_(n).add_(x, alpha=n),
    "functions": lambda x, n: F.softplus(torch.lerp(x, -x, n), beta=n).clamp(max=n) + torch.full((6,), n),
    "math": lambda x, n: x * math.exp(-n) + math.cos(n * math.pi) + abs(-n),
    "bounded": lambda x, n: x * max(0.01, min(n, 100.0)),
    "tensors": lambda x, n: x * torch.tensor(n) + torch.tensor([n, 1.0]).sum(),
    "gradients": lambda x, n: Reversed.apply(x, n),
    "attention": lambda x, n: x.masked_fill(x > n, n) + torch.where(x < -n, x, n),
    "rounded": lambda x, n: x * round(n, 2),
}
FEW = {"chosen": chosen, "int": lambda x, n: x * int(n)}
EACH = {"text": lambda x, n: x + len(f"{n:.0f}"), "type": lambda x, n: x * 2 if type(n) is float else x * n}


def compare(model, pipe, x, number, target, loss_fn=F.mse_loss):
    model.zero_grad(), pipe.zero_grad()
    wanted = loss_fn(model(x, number), target)
    wanted.backward()
    found = pipe.step(x, number, target=target)
    assert torch.allclose(found, wanted.detach(), rtol=1e-12, atol=0)
    for fqn, parameter in model.named_parameters():
        other = dict(pipe.named_parameters())[fqn].grad
        assert float((parameter.grad - other).abs().max()) <= 1e-12 * max(float(parameter.grad.abs().max()), 1e-9), fqn


def made(model, x, number, target, loss_fn=F.mse_loss, **options):
    options = {"microbatches": 2, "schedule": "GPipe", **options}
    return fxpipe.compile(model, 2, (x, number), {"target": target}, loss_fn=loss_fn, **options).materialize(
        device="cpu"
    )


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize("name", [*ONE, *FEW, *EACH])
def test_a_number_that_enters_arithmetic_has_one_graph(name, grain):
    model, x = Model({**ONE, **FEW, **EACH}[name]), torch.randn(4, 6)
    with made(model, x, 1.0, x, grain=grain) as pipe:
        for step in range(8):
            compare(model, pipe, x, 1.0 + step / 7.3, x)
        assert len(pipe._trainer.variants.names) <= (2 if name in ONE else 4 if name in FEW else 8)


@pytest.mark.parametrize(
    "value", [lambda step: 3 + step, lambda step: True if step else 1, lambda step: 2 + (step > 4)]
)
@pytest.mark.parametrize(
    "use", [lambda x, n: x * n - 7 % n + n // 2, repeated, lambda x, n: x[:, :n].sum(-1, keepdim=True) + x], ids="abc"
)
def test_whole_numbers_are_numbers_or_guards(use, value):
    model, x = Model(use), torch.randn(4, 6)
    with made(model, x, 1, x) as pipe:
        for step in range(6):
            compare(model, pipe, x, value(step), x)


def test_three_hundred_values_give_one_graph():
    model, x = Model(ONE["divide"]), torch.randn(2, 6)
    with made(model, x, 1.0, x, microbatches=1) as pipe:
        for step in range(300):
            pipe.step(x, 1 + step / 1000, target=x)
        assert len(pipe._trainer.variants.names) == 2
        compare(model, (pipe.zero_grad(), pipe)[1], x, 0.3, x)


def test_numbers_and_lengths_that_change_together_take_one_graph():
    class Average(nn.Module):
        """The loss as Hugging Face's trainer has it: a sum over all that a whole batch of microbatches has."""

        def __init__(self):
            super().__init__()
            self.embedding, self.blocks = nn.Embedding(9, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, ids, temperature, num_items_in_batch):
            x = self.embedding(ids) + torch.arange(ids.shape[1])[None, :, None] / temperature
            for block in self.blocks:
                x = x + torch.tanh(block(x))
            if temperature > 1.5:
                x = x * 2
            return {"loss": x.square().sum() / num_items_in_batch}

    model = Average()
    pipe = fxpipe.compile(model, 2, (torch.ones(4, 3).long(), 1.0, 12), microbatches=2, schedule="GPipe").materialize()
    with pipe:
        for step in range(24):
            ids = torch.randint(9, (4, 4 + step % 11))
            given = ids, 1 + step / 23, ids.numel()
            model.zero_grad(), pipe.zero_grad()
            wanted = model(*given)["loss"]
            wanted.backward()
            torch.testing.assert_close(pipe.step(*given), wanted.detach(), rtol=1e-12, atol=0)
            for fqn, parameter in pipe.named_parameters():
                torch.testing.assert_close(parameter.grad, model.get_parameter(fqn).grad, rtol=1e-10, atol=1e-12)
        assert pipe._trainer.variants.num_captures <= 6  # two paths, each with values, with numbers, with sizes


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x, options, more):
        for block in self.blocks:
            x = block(x) * options.scale + more["shift"][0]
            x = x if options.mask is None else x * options.mask
        return {"loss": x.square().sum() / more["count"], "shift": more["shift"][0]}


def test_numbers_in_dictionaries_and_dataclasses():
    model, x = Nested(), torch.randn(4, 6)

    def given(step, count=int):
        return Options(1 + step / 3, torch.ones(4, 6)), {"shift": [0.1 * step], "count": count(4 + step)}

    options, more = given(0)
    pipe = fxpipe.compile(model, 2, (x, options, more), microbatches=2, schedule="GPipe").materialize(device="cpu")
    with pipe:
        for step in range(1, 7):
            model.zero_grad(), pipe.zero_grad()
            options, more = given(step)
            wanted = model(x, options, more)["loss"]
            wanted.backward()
            assert torch.allclose(pipe.step(x, options, more), wanted.detach(), rtol=1e-12)
        assert len(pipe._trainer.variants.names) == 2
        for step in range(3):
            options, more = given(step)
            found = pipe.infer(x, options, more)
            assert found["shift"] == more["shift"][0]
            assert type(found["shift"]) is float
            assert torch.allclose(found["loss"], model(x, options, more)["loss"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_numbers_promote_as_numbers_do(dtype):
    seen = []

    class Promoting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, number):
            y = x.to(dtype) * number
            seen.append(y.dtype)
            return self.linear(y.to(self.linear.weight.dtype)).to(torch.float64) + 0 * y.sum()

    model, x = Promoting(), torch.arange(12.0).reshape(4, 3)
    pipe = fxpipe.compile(model, 1, (x, 2), {"target": x}, loss_fn=F.mse_loss, microbatches=2).materialize(device="cpu")
    with pipe:
        for number in (3, 4, 2.5, 0.1, 7):
            compare(model, pipe, x, number, x)


def test_a_number_of_the_target_weighs_the_loss():
    def loss_fn(output, target):
        labels, weight, count = target
        return (F.cross_entropy(output, labels, reduction="none").sum() / count) * weight

    model, x, labels = Model(lambda x, n: x + n), torch.randn(4, 6), torch.randint(6, (4,))
    with made(model, x, 1.0, (labels, 0.5, 4), loss_fn) as pipe:
        for step in range(5):
            compare(model, pipe, x, 1.0, (labels, 0.5 + step, 4 + step), loss_fn)
        assert len(pipe._trainer.variants.names) == 2


def test_a_number_that_makes_the_loss_couple_samples_is_found():
    """With an exponent of 1 the mean separates, with another it does not."""

    def loss_fn(output, target):
        return (output - target[0]).square().mean() ** target[1]

    model, x = Model(lambda x, n: x + n), torch.randn(4, 6)
    with made(model, x, 1.0, (x, 1), loss_fn) as pipe:
        compare(model, pipe, x, 1.0, (x, 1), loss_fn)
        for power in (2, 3):
            with pytest.raises(fxpipe.CaptureError, match="couples the samples"):
                pipe.step(x, 1.0, target=(x, power))


def test_dropout_of_another_rate_is_seeded_alike():
    model, x = Model(lambda x, n: F.dropout(x, n, training=True)), torch.randn(4, 6)
    losses = []
    for stages in (1, 2):
        pipe = fxpipe.compile(model, stages, (x, 0.0), {"target": x}, loss_fn=F.mse_loss, microbatches=2)
        with pipe.materialize(device="cpu"):
            losses.append([float(pipe.step(x, rate, target=x)) for rate in (0.0, 0.1, 0.3, 0.5)])
    assert losses[0] == losses[1]


LENGTHS = {  # tensors in the place of numbers: what they hold decides about a shape
    "slice": lambda x, n: x[:, :n],
    "rest": lambda x, n: x[:, n - 1 :],
    "narrow": lambda x, n: x.narrow(1, 0, n),
    "expand": lambda x, n: x[:, :1].expand(-1, n, -1),
    "repeat": lambda x, n: x.repeat(1, n, 1),
    "pad": lambda x, n: F.pad(x, (0, 0, 0, n)),
    "topk": lambda x, n: x.topk(n, 1)[0],
    "chunks": lambda x, n: x.chunk(n, 1)[0],
    "zeros": lambda x, n: torch.cat([x, torch.zeros(len(x), n, 6)], 1),
    "full": lambda x, n: x[:, :1] * torch.full((n,), 2.0)[:, None],
    "one hot": lambda x, n: F.one_hot(torch.ones(len(x), dtype=torch.int64), n).to(x)[..., None] * x[:, :1],
    "item": lambda x, n: x[:, : n.item()],
    "mask": lambda x, n: x[:, torch.arange(x.shape[1]) < n],
    "a place": lambda x, n: x[:, n],
    "turned": lambda x, n: x.roll(n, 1),
}


class Trimmed(nn.Module):
    """Takes of each sample what the longest is said to have, after its second block or in it."""

    def __init__(self, use, inside):
        super().__init__()
        self.blocks = nn.ModuleList([Block(lambda x, _: x), Block(use if inside else lambda x, _: x), nn.Linear(6, 6)])
        self.use, self.head = (lambda x, _: x) if inside else use, nn.Linear(6, 2)

    def forward(self, x, lengths):
        longest = lengths.max()
        x = self.blocks[1](self.blocks[0](x, longest), longest)
        x = self.blocks[2](self.use(x, longest))
        return self.head(x.reshape(len(x), -1, 6).sum(1) / x.shape[1])


@pytest.mark.parametrize("inside", [False, True], ids=["between", "inside"])
@pytest.mark.parametrize("use", LENGTHS)
def test_a_tensor_in_the_place_of_a_number_is_that_number(use, inside):
    torch.manual_seed(0)
    model, target = Trimmed(LENGTHS[use], inside), torch.randn(4, 2)
    x, lengths = torch.randn(4, 5, 6), torch.tensor([3, 1, 3, 2])
    options = {"loss_fn": F.mse_loss, "microbatches": 2, "grain": "block" if inside else "op"}
    pipe = fxpipe.compile(model, 2, (x, lengths), {"target": target}, **options)
    with pipe.materialize(device="cpu"):
        for longest in (3, 4, 2, 3):
            compare(model, pipe, x, torch.tensor([longest, 1, longest, 2]), target)


def test_a_drawn_number_that_decides_about_a_shape_is_refused():
    model, x = Model(lambda x, _: x, lambda x, _: x[:, : torch.randint(1, 5, ())]), torch.randn(4, 6)
    with pytest.raises(fxpipe.CaptureError, match="reads a random number: the path changes by chance"):
        fxpipe.compile(model, 2, (x, 1.0), {"target": x[:, :1]}, loss_fn=lambda output, y: (output - y).mean())


SELECTIONS = {
    "mask": (lambda x, m: x[m], lambda x, v, m: torch.zeros_like(x).masked_scatter(m[..., None], v)),
    "places": (lambda x, m: x[m.nonzero(as_tuple=True)], lambda x, v, m: x.index_put(m.nonzero(as_tuple=True), v)),
    "one by one": (
        lambda x, m: x.masked_select(m[..., None]).view(-1, 6),
        lambda x, v, m: x.masked_scatter(m[..., None], v),
    ),
}


class Selecting(nn.Module):
    """Blocks that see no more than what is selected: packed sequences, masked patches."""

    def __init__(self, how):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.select, self.put_back = SELECTIONS[how]
        self.head = nn.Linear(6, 2)

    def forward(self, x, mask):
        selected = self.select(x, mask)
        for block in self.blocks:
            selected = torch.tanh(block(selected))
        return self.head(self.put_back(x, selected, mask).sum(1))


@pytest.mark.parametrize("how", SELECTIONS)
def test_what_is_selected_crosses_stages_whatever_its_number(how):
    model, x, target = Selecting(how), torch.randn(4, 5, 6), torch.randn(4, 2)
    mask = torch.rand(4, 5) < 0.5
    options = {"loss_fn": F.mse_loss, "microbatches": 2, "schedule": "GPipe"}
    with fxpipe.compile(model, 3, (x, mask), {"target": target}, **options).materialize(device="cpu") as pipe:
        for seed in range(4):
            torch.manual_seed(seed)
            compare(model, pipe, torch.randn(4, 5, 6), torch.rand(4, 5) < 0.3 + seed / 5, target)


BETA = 1.0
OPTIONS = {"beta": 1.0, "parts": [1.0, 2.0]}


class Annealed:
    """What a script keeps of its training."""

    step, scale = 0, 2.0

    def __init__(self):
        self.most = 4

    @property
    def beta(self):
        return min(1.0, (self.step + 1) / self.most)

    def loss(self, output, target):
        return F.mse_loss(output, target) * self.weight() * self.scale

    def weight(self):
        return self.beta


def by_global(output, target):
    return F.mse_loss(output, target) * BETA


def by_options(output, target):
    return F.mse_loss(output, target) * OPTIONS["beta"] * OPTIONS["parts"][0]


@pytest.mark.parametrize("name", ["global", "dictionary", "method", "closure", "lambda"])
def test_what_a_loss_finds_outside_of_its_arguments_is_looked_at_each_step(name, monkeypatch):
    state, model, x = Annealed(), Model(lambda x, _: x), torch.randn(4, 6)
    weight = 1.0

    def by_closure(output, target):
        return F.mse_loss(output, target) * weight

    losses = {"global": by_global, "dictionary": by_options, "method": state.loss, "closure": by_closure}
    loss_fn = losses.get(name, lambda output, target: state.loss(output, target))
    with made(model, x, 1.0, x, loss_fn) as pipe:
        for step in range(4):
            weight = state.step = step
            monkeypatch.setitem(globals(), "BETA", 1.0 + step)
            monkeypatch.setitem(OPTIONS, "parts", [1.0 + step])
            compare(model, pipe, x, 1.0, x, loss_fn)
        compare(model, pipe, x, 1.0, x, loss_fn)
        assert len(pipe._trainer.variants.names) <= 5


def test_a_number_that_is_set_anew_each_step_is_named_once():
    steps, model, x = [1.0], Model(lambda x, _: x), torch.randn(4, 6)
    with made(model, x, 1.0, x, lambda output, target: F.mse_loss(output, target) * steps[0]) as pipe:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for step in range(12):
                steps[0] = 2.0 + step
                pipe.step(x, 1.0, target=x)
        (said,) = [str(each.message) for each in warned]
        assert said.startswith("steps[0], which the loss function or the forward finds outside of its arguments")
        assert "in target (target=(labels, weight))" in said
