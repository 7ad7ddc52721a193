"""Weights of microbatches counted from what is written to in place, and of batches in which nothing counts."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpipe

CLASSES = 11


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(CLASSES, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, ids):
        return self.head(self.hidden(self.embedding(ids)).tanh())


def tokens(output, target, **options):
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), **options)


def single(output, target):
    return tokens(output, target, reduction="none").view(target.shape)


def weighted_classes(output, target):
    weight = torch.ones(CLASSES, dtype=output.dtype)
    weight[:3] = 2.0
    weight.view(-1)[5:].mul_(0.5)
    return tokens(output, target, weight=weight)


def listed_weights(output, target):
    return tokens(output, target, weight=output.new_tensor([1.0 + place for place in range(CLASSES)]))


def selected(output, target):
    mask = target != -100
    mask[:, 0] = False
    return single(output, target)[mask].mean()


def halved(output, target):
    mask = (target != -100).to(output.dtype)
    mask[:, 1::2] *= 0.5
    count = mask.sum()
    count.clamp_(min=1)
    return (single(output, target) * mask).sum() / count


def out(output, target):
    mask = torch.empty(target.shape, dtype=output.dtype)
    torch.mul((target != -100).to(output.dtype), torch.arange(6), out=mask)
    return (single(output, target) * mask).sum() / mask.sum()


def shifted(output, target):
    labels = target.new_full(target.shape, -100)
    labels[:, :-1] = target[:, 1:]
    return tokens(output, labels)


def targets(*valid):
    place = torch.arange(24).view(4, 6)
    return [torch.where(place % 24 < count, place % CLASSES, -100) for count in valid]


def check(loss_fn, batches):
    torch.manual_seed(0)
    model, ids = Model().double(), torch.randint(0, CLASSES, (4, 6))
    options = {"loss_fn": loss_fn, "microbatches": 4, "schedule": "GPipe"}
    example = {"ids": ids, "target": targets(17)[0]}
    with fxpipe.compile(copy.deepcopy(model), 2, (), example, **options).materialize(device="cpu") as pipe:
        for target in batches:
            model.zero_grad()
            pipe.zero_grad()
            expected = loss_fn(model(ids), target)
            expected.backward()
            torch.testing.assert_close(
                pipe.step(ids=ids, target=target), expected.detach(), rtol=1e-12, atol=0, equal_nan=True
            )
            for fqn, parameter in pipe.named_parameters():
                wanted = model.get_parameter(fqn).grad
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-12, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("loss_fn", [weighted_classes, listed_weights, selected, halved, out, shifted])
def test_what_is_written_before_it_is_read_counts_as_written(loss_fn):
    check(loss_fn, targets(17, 9, 24))


def kept_from_0(output, target):
    mask = target == 10
    return (single(output, target) * mask).sum() / mask.sum().clamp(min=1)


def of_no_number(output, target):
    return single(output, target)[target == 10].mean()


@pytest.mark.parametrize("loss_fn", [tokens, kept_from_0, of_no_number])
def test_where_nothing_counts_the_loss_is_what_it_is_of_the_batch(loss_fn):
    check(loss_fn, targets(0, 24, 5))
    assert not math.isfinite(tokens(torch.zeros(1, 1, 3), torch.tensor([[-100]])))
