"""Gradients that end on their way back: what the model leaves None is None in every stage before, and nothing else."""

import copy

import judge
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxpipe

pytestmark = pytest.mark.usefixtures("in_float64")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x).tanh()


class Codes(Layer):
    """Takes the nearest of its trained codes."""

    def forward(self, x):
        return F.embedding(torch.cdist(x, self.linear.weight.detach()).argmin(-1), self.linear.weight)


class Detached(Layer):
    def forward(self, x):
        return self.linear(x.detach())


class Signs(Layer):
    """Takes its input as a mask alone."""

    def forward(self, x):
        return torch.where(x > 0, self.linear.bias, -self.linear.bias)


class Quiet(Layer):
    def forward(self, x):
        with torch.no_grad():
            x = self.linear(x)
        return self.linear(x)


class Rounded(torch.autograd.Function):
    """Gives its weight a gradient, and its input None."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        return x.round() * weight

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return None, (gradient * x.round()).sum((0, 1))


class Custom(Layer):
    def forward(self, x):
        return Rounded.apply(x * 3, self.linear.bias)


class Checkpointed(Layer):
    def forward(self, x):
        return checkpoint(lambda y: self.linear(y.detach()).tanh(), x, use_reentrant=False)


class Asking(Layer):
    """Looks whether its input takes a gradient, as it does in the model."""

    def forward(self, x):
        x.register_hook(lambda gradient: gradient * 2)
        return self.linear(x.detach()) * (1 if x.requires_grad else 2)


class Force(Layer):
    def forward(self, x):
        (force,) = torch.autograd.grad(self.linear(x).tanh().sum(), x)
        return self.linear(force)


class Branches(Layer):
    """Two streams; ``kind`` says what of them goes back where."""

    def __init__(self, kind):
        super().__init__()
        self.other, self.kind = nn.Linear(8, 8), kind

    def forward(self, x, y):
        if self.kind == "mask":
            return self.linear(x) * (y > 0), self.other(y)
        if self.kind == "detached":
            return self.linear(x) * y.detach().sigmoid(), self.other(y).detach()
        if self.kind == "crossed":
            return self.linear(y), self.other(x)
        return self.linear(x), x.detach() + y


class Streams(nn.Module):
    def __init__(self, kind, both):
        super().__init__()
        self.first, self.second, self.both = Layer(), Layer(), both
        self.blocks = nn.ModuleList(Branches(kind) for _ in range(4))

    def forward(self, x):
        x, y = self.first(x), self.second(x)
        for block in self.blocks:
            x, y = block(x, y)
        return x + y if self.both else x


class Written(nn.Module):
    """Writes in place before, after and around where the gradient ends, or where it does not."""

    def __init__(self, kind, middle):
        super().__init__()
        self.first, self.last = nn.Sequential(Layer(), Layer()), nn.ModuleList([Layer(), Layer()])
        self.middle, self.kind = middle(), kind
        self.norm, self.relu = nn.BatchNorm1d(6, momentum=0.0), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.first(x)
        if self.kind == "parts":
            parts = torch.zeros_like(x)
            parts[..., :4], parts[..., 4:] = x[..., 4:], x.detach()[..., :4]
            x = parts
        x = self.relu(self.middle(x) + 0.1)
        for layer in self.last:
            x = layer(x) + 0
            x.mul_(1.5)
            if self.kind == "zeroed":
                x[:, 0] = 0.0
        return x


class Remembering(nn.Module):
    """Reads a view of a store before what has a gradient is written there, so that the view has one too, afterwards."""

    def __init__(self, read, write):
        super().__init__()
        self.first, self.last = Layer(), Layer()
        self.read, self.write = read, write

    def forward(self, x):
        store = torch.zeros(len(x), 4, 8)
        old = self.read(store)
        x = self.first(torch.cat([torch.cat([old, old], 1), x], 1))
        self.write(store, x)
        return self.last(x)


class Gate(Layer):
    """Lets through the samples whose mean lies above a limit."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        (through,) = (x.mean((1, 2)) > self.limit).nonzero(as_tuple=True)
        return (
            torch.zeros_like(x).index_add(0, through, self.linear(x[through])) if len(through) else torch.zeros_like(x)
        )


class Valve(nn.Module):
    """Passes on what it is given, or nothing of it, without a weight of its own."""

    def __init__(self, passes):
        super().__init__()
        self.passes = passes

    def forward(self, x):
        return x if self.passes(x.detach()) else torch.zeros_like(x)


class Tied(nn.Module):
    """An embedding and a head of one weight; ``kind`` says through which of them gradients come."""

    def __init__(self, kind):
        super().__init__()
        self.embedding, self.head, self.kind = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False), kind
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        weight = self.embedding.weight if self.kind == "head" else self.embedding.weight.detach()
        return (x if self.kind == "embedding" else x.detach()) @ weight.t() + self.layers[1].linear.bias.sum()


class Rescaled(torch.autograd.Function):
    """Its backward looks at values of its weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return (gradient * weight if weight.sum() < 1e9 else None), gradient.sum((0, 1))


class Looking(Layer):
    def forward(self, x):
        return self.linear(Rescaled.apply(x, self.linear.bias))


class Differentiated(Layer):
    def forward(self, x):
        return self.linear(torch.func.grad(lambda y: (y.tanh() * self.linear.bias).sum())(x))


class Alone(Layer):
    """Takes nothing of its input: what stands before is called for nothing."""

    def forward(self, x):
        return self.linear.weight[0].expand(*x.shape[:2], 8) * 1.0


class Experts(nn.Module):
    """Each sample goes through one of two layers, as its first element says, and around it."""

    def __init__(self):
        super().__init__()
        self.one, self.other = Layer(), Layer()

    def forward(self, x):
        found = torch.zeros_like(x)
        for expert, mine in ((self.one, x[:, 0] > 0), (self.other, x[:, 0] <= 0)):
            if mine.any():
                found = found.index_add(0, mine.nonzero()[:, 0], expert(x[mine]))
        return x + 0.1 * found


def mean_square(output):
    return output.pow(2).mean()


def between(*middle):
    return nn.Sequential(Layer(), Layer(), *middle, Layer(), Layer())


def check(model, inputs, stages, schedule="GPipe", **options):
    plain = copy.deepcopy(model)
    loss = mean_square(plain(inputs))
    loss.backward()
    wanted = {fqn: parameter.grad for fqn, parameter in plain.named_parameters()}
    pipe = fxpipe.compile(model, stages, (inputs,), loss_fn=mean_square, schedule=schedule, **options)
    with pipe.materialize(device="cpu") as pipe:
        torch.testing.assert_close(pipe.step(inputs), loss.detach(), rtol=1e-12, atol=0)
        assert {fqn for fqn, _ in pipe.named_parameters()} == set(wanted)
        for fqn, parameter in pipe.named_parameters():
            assert (parameter.grad is None) == (wanted[fqn] is None), fqn
            if parameter.grad is not None:
                far = (parameter.grad - wanted[fqn]).abs().max()
                assert far <= 1e-12 * max(wanted[fqn].abs().max(), 1e-3), fqn
    return [fqn for fqn, gradient in wanted.items() if gradient is None]


@pytest.mark.parametrize(("stages", "grain"), [(4, "block"), (3, "op")])
@pytest.mark.parametrize("kind", [Codes, Detached, Signs, Quiet, Custom, Checkpointed])
def test_before_a_block_with_weights_that_gives_no_gradient(kind, stages, grain):
    assert len(check(between(kind()), torch.randn(4, 6, 8), stages, microbatches=2, grain=grain)) >= 4


@pytest.mark.parametrize("kind", [Looking, Differentiated, Alone])
def test_other_ways_to_a_gradient(kind):
    ends = check(between(kind(), kind()), torch.randn(4, 6, 8), 3, microbatches=2, grain="op")
    assert bool(ends) == (kind is Alone)


@pytest.mark.parametrize("limits", [(9.0,), (-9.0, 9.0), (9.0, -9.0), (-9.0,)])
def test_a_gate_that_lets_nothing_of_the_batch_through(limits):
    ends = check(between(*map(Gate, limits)), torch.randn(4, 6, 8), 4, microbatches=4, grain="block")
    assert bool(ends) == (9.0 in limits)


@pytest.mark.parametrize(
    "passes", [lambda x: x.sum() > 1e-3, lambda x: x.sum() < -1e-3, lambda x: x.amax() > 2, lambda x: x.norm() < 1e-3]
)
def test_a_path_by_values_may_take_a_gradient_where_the_one_of_zeros_takes_none(passes):
    """Whatever the batch, and where it comes to nothing it is None."""
    model = nn.Sequential(Layer(), nn.Linear(8, 8), Valve(passes), Layer(), Layer())
    ended = set()
    for bias in (1.0, -1.0, 0.0):
        with torch.no_grad():
            model[1].weight.mul_(0.0 if bias == 0 else 1.0)
            model[1].bias.fill_(3 * bias)
        ended.add(bool(check(copy.deepcopy(model), torch.randn(4, 6, 8), 3, microbatches=2, grain="block")))
    assert ended == {True, False}


def test_a_gate_that_lets_nothing_of_some_microbatches_through():
    model, inputs = between(Gate(0.0)), torch.randn(4, 6, 8)
    means = model[:2](inputs).mean((1, 2)).tolist()
    model[2].limit = sum(sorted(means)[1:3]) / 2
    assert not check(model, inputs, 4, microbatches=4, grain="block")


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize(
    "loss_fn",
    [
        F.cross_entropy,
        lambda x, target: (F.cross_entropy(x, target, reduction="none") * (target >= 0)).sum() / (target >= 0).sum(),
        lambda x, target: F.cross_entropy(x, target, reduction="none")[target >= 0].mean(),
    ],
)
def test_what_leads_to_ignored_targets_alone_gets_zeros_as_in_the_model(loss_fn, stages):
    inputs, target = torch.randn(8, 8), torch.randint(0, 8, (8,))
    inputs[:, 0] = torch.where(torch.arange(8) < 2, -3.0, 3.0)
    model = nn.Sequential(Experts(), Experts(), Experts(), nn.Linear(8, 8))
    options = {"loss_fn": loss_fn, "microbatches": 4, "grain": "block"}
    pipe = fxpipe.compile(copy.deepcopy(model), stages, (inputs,), {"target": target}, **options)
    target = target.where(torch.arange(8) >= 2, -100)
    loss_fn(model(inputs), target).backward()
    with pipe.materialize(device="cpu") as pipe:
        pipe.step(inputs, target=target)
        wanted = {fqn: parameter.grad for fqn, parameter in model.named_parameters()}
        judge.assert_close({fqn: parameter.grad for fqn, parameter in pipe.named_parameters()}, wanted, "gradients")
        assert not wanted["0.other.linear.weight"].any()


@pytest.mark.parametrize("kind", [Asking, Force])
def test_a_block_finds_its_input_as_in_the_model(kind):
    assert check(between(kind()), torch.randn(4, 6, 8), 4, microbatches=2, grain="block")


@pytest.mark.parametrize("kind", [Layer, Detached])
def test_equal_blocks_are_alike_in_this_too(kind):
    ends = check(between(*(kind() for _ in range(5))), torch.randn(4, 6, 8), 4, microbatches=2, grain="block")
    assert bool(ends) == (kind is Detached)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("kind", ["mask", "detached", "crossed", "passed"])
def test_each_result_has_its_own_way_back(kind, both):
    check(Streams(kind, both), torch.randn(4, 6, 8), 4, microbatches=2, grain="block")


@pytest.mark.parametrize("middle", [Detached, Layer])
@pytest.mark.parametrize(("kind", "grain"), [("plain", "block"), ("parts", "op"), ("zeroed", "block")])
def test_writes_in_place_pass_on_what_was_written(kind, middle, grain):
    ends = check(Written(kind, middle), torch.randn(4, 6, 8), 3, microbatches=2, grain=grain)
    assert "first.0.linear.weight" in ends or middle is Layer


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides it where it looks, but not from such as raise
@pytest.mark.parametrize(
    ("read", "write"),
    [
        (lambda store: store[:, :2], lambda store, x: store[:, :2].copy_(x[:, :2])),
        (lambda store: store[:, :0], lambda store, x: store.index_copy_(1, torch.arange(2), x[:, :2])),
        (lambda store: store[:, 1:].transpose(0, 1).transpose(0, 1), lambda store, x: store.mul_(x[:, :1])),
    ],
)
def test_what_takes_a_gradient_only_since_a_later_write_is_read_without_one(read, write):
    check(Remembering(read, write), torch.randn(4, 6, 8), 6, microbatches=2, grain="op")


@pytest.mark.parametrize("kind", ["head", "embedding", "neither"])
def test_a_tie_has_a_gradient_where_one_of_its_uses_has(kind):
    check(Tied(kind), torch.randint(0, 11, (4, 6)), 3, microbatches=2)


def test_a_gradient_that_comes_where_none_came_is_refused_and_not_lost():
    class Switched(Layer):
        ends = True

        def forward(self, x):
            return self.linear(x.detach() if self.ends else x)

    model, x = between(Switched()), torch.randn(4, 6, 8)
    for schedule, stages, ranks in (("1F1B", 3, 3), ("ZBVZeroBubble", 4, 2)):
        options = {"loss_fn": mean_square, "microbatches": 4, "schedule": schedule, "grain": "block", "ranks": ranks}
        pipe = fxpipe.compile(model, stages, (x,), **options).materialize(device="cpu")
        pipe.step(x)
        for module in pipe.stage_modules:
            for part in module.modules():
                if isinstance(part, Switched):
                    part.ends = False
        with pytest.raises(fxpipe.ScheduleError, match=r"a gradient comes back to .*\n  compile the model"):
            pipe.step(x)
        pipe.close()
