"""Random initialisation programmes: recorded, they give the bits, the answers and the random state of plain ones."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fxpipe
from fxpipe.recipes.deferred import replay
from tests.recipes.test_constructors import assert_same_bits

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = ((1,), (3,), (16,), (17,), (5, 4), (4, 8), (2, 3, 4), (40,), (33,), (6, 6))
STEPS = {}


def step(function):
    STEPS[function.__name__] = function
    return function


class Programme:
    """A pool of tensors that steps work on; each step takes what it needs from a few numbers."""

    def __init__(self):
        self.pool = [torch.zeros(4, 8)]
        self.answers = []
        self.own = torch.Generator().manual_seed(77)
        self.saved = torch.get_rng_state()

    def run(self, steps):
        with torch.no_grad():
            for name, first, second, third in steps:
                STEPS[name](self, first, second, third)
        return self

    def tensor(self, number):
        return self.pool[number % len(self.pool)]


def new(number, other):
    return torch.empty(SIZES[number % len(SIZES)], dtype=DTYPES[other % len(DTYPES)])


@step
def normal(p, a, b, c):
    p.pool.append(new(a, b).normal_(c / 3, 0.5))


@step
def uniform(p, a, b, c):
    p.pool.append(new(a, b).uniform_(-1, c + 1))


@step
def own_normal(p, a, b, c):
    p.pool.append(new(a, b).normal_(generator=p.own))


@step
def other_draws(p, a, b, c):
    tensor = new(a, b)
    draws = (tensor.exponential_, tensor.random_, lambda: tensor.bernoulli_(0.4), tensor.log_normal_, tensor.cauchy_)
    draws[c % len(draws)]()
    p.pool.append(tensor)


@step
def truncated(p, a, b, c):
    p.pool.append(nn.init.trunc_normal_(new(a, b), std=(0.02, 1.0, 0.5)[c % 3]))


@step
def factories(p, a, b, c):
    size = SIZES[a % len(SIZES)]
    kinds = (
        torch.rand,
        torch.randn,
        torch.ones,
        lambda size: torch.randint(0, 9, size),
        lambda size: torch.full(size, c),
    )
    p.pool.append(kinds[b % len(kinds)](size))


@step
def again(p, a, b, c):
    """The second pass over what is there."""
    tensor = p.tensor(a)
    if tensor.is_floating_point():
        (lambda: tensor.normal_(0, 0.02), lambda: tensor.uniform_(), lambda: tensor.zero_())[b % 3]()


@step
def part(p, a, b, c):
    view = p.tensor(a)[c % len(p.tensor(a)) :]
    if view.is_floating_point():
        (view.normal_, view.uniform_, lambda: view.fill_(c), lambda: view.mul_(1.5))[b % 4]()


@step
def keep_view(p, a, b, c):
    tensor = p.tensor(a)
    views = (lambda: tensor[c % len(tensor) :], lambda: tensor.t() if tensor.dim() == 2 else tensor, tensor.detach)
    p.pool.append(views[b % 3]())


@step
def combine(p, a, b, c):
    one, other = p.tensor(a).flatten(), p.tensor(b).flatten()
    size = min(len(one), len(other))
    p.pool.append((one[:size] * 2 + other[:size], torch.cat([one, other.to(one.dtype)]), one[:size].clone())[c % 3])


@step
def write(p, a, b, c):
    target, source = p.tensor(a), p.tensor(b)
    target = target.view(-1) if target.is_contiguous() else target[0].reshape(-1)
    size = min(len(target), source.numel())
    target[:size].copy_(source.flatten()[:size].nan_to_num(0.5))


@step
def copied(p, a, b, c):
    p.pool.append(
        copy.deepcopy(nn.Parameter(p.tensor(a))).data if p.tensor(a).is_floating_point() else p.tensor(a).clone()
    )


@step
def cast(p, a, b, c):
    p.pool.append(p.tensor(a).nan_to_num(1.0).clamp(-50, 50).to(DTYPES[b % len(DTYPES)]))


@step
def decide(p, a, b, c):
    tensor = p.tensor(a)
    answer = (lambda: tensor.double().sum().item(), lambda: bool((tensor > 0).any()), lambda: tensor.flatten().tolist())
    p.answers.append(answer[b % 3]())
    if bool((tensor > 0).any()):
        p.pool.append(torch.rand(3 + c % 20))


@step
def select(p, a, b, c):
    tensor = p.tensor(a).flatten()
    p.pool.append(torch.cat([tensor[tensor > 0], torch.ones(1, dtype=tensor.dtype)]))


@step
def permute(p, a, b, c):
    tensor = p.tensor(a).flatten()
    p.pool.append(tensor[torch.randperm(len(tensor))])


@step
def scatter(p, a, b, c):
    tensor = p.tensor(a)
    tensor[torch.randint(0, len(tensor), (2,))] = c


@step
def reseed(p, a, b, c):
    (lambda: torch.manual_seed(a), lambda: p.own.manual_seed(b))[c % 2]()


@step
def save(p, a, b, c):
    p.saved = torch.get_rng_state()


@step
def restore(p, a, b, c):
    torch.set_rng_state(p.saved)


@step
def forked(p, a, b, c):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + a)
        p.pool.append(torch.rand(5))


@step
def layer(p, a, b, c):
    kinds = (
        lambda: nn.Linear(4, 5),
        lambda: nn.LSTM(3, 4),
        lambda: nn.Embedding(5, 6, padding_idx=1),
        lambda: nn.Conv1d(2, 3, 2),
    )
    p.pool += [parameter.data for parameter in kinds[b % 4]().parameters()]


@step
def on_meta(p, a, b, c):
    p.pool.append(torch.rand(2))  # a model that is on meta as a whole draws what it would on the CPU
    with torch.device("meta"):
        nn.Linear(5, 3)(torch.rand(2, 5))


numbers = st.integers(0, 40)
programmes = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), numbers, numbers, numbers), min_size=1, max_size=25)


def check(steps, seed, wanted):
    torch.manual_seed(seed)
    plain = Programme().run(steps)
    end = torch.get_rng_state()
    with fxpipe.deferred_init(seed=seed):
        recorded = Programme().run(steps)
    assert torch.equal(torch.get_rng_state(), end)
    assert torch.equal(recorded.own.get_state(), plain.own.get_state())
    assert str(recorded.answers) == str(plain.answers)
    assert [t.shape for t in recorded.pool] == [t.shape for t in plain.pool]
    everything = dict(enumerate(recorded.pool))
    for tensors in (everything, {wanted % len(plain.pool): everything[wanted % len(plain.pool)]}):
        for index, value in replay(tensors):
            assert_same_bits(value, plain.pool[index])
    assert torch.equal(torch.get_rng_state(), end)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=programmes, seed=st.integers(0, 2**40), wanted=numbers)
def test_a_random_programme_gives_the_same_bits(steps, seed, wanted):
    check(steps, seed, wanted)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=programmes, seed=st.integers(0, 2**40), wanted=numbers)
def test_many_random_programmes_give_the_same_bits(steps, seed, wanted):
    check(steps, seed, wanted)


@pytest.mark.parametrize("name", STEPS)
def test_every_step_works(name):
    check([("normal", 4, 0, 1), (name, 4, 5, 6), (name, 1, 2, 3), ("normal", 1, 0, 0)], 5, 1)
