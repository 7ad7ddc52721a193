"""How microbatches add up is found whatever sizes coincide: tokens, samples, classes, widths, and their neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpipe
from fxpipe.capture.graph.sizes import Sizes, small_sizes

HEAD = 64


class Decoder(nn.Module):
    """Embedding, two blocks with heads of 64, and a head over the vocabulary; the loss as transformers writes it."""

    def __init__(self, vocabulary: int, width: int, positions: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, form: Callable[..., Any]) -> Any:
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            heads = layer(x).unflatten(-1, (-1, math.gcd(HEAD, x.shape[-1]))).tanh()
            x = x + heads.flatten(-2)
        return form(self.head(x), labels)


def padded(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), shifted.view(-1), ignore_index=-100)


def cut(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def prefixed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Seven virtual tokens before the others."""
    none = labels.new_full((labels.shape[0], 7), -100)
    more = logits.new_zeros(logits.shape[0], 7, logits.shape[2])
    return F.cross_entropy(torch.cat([more, logits], 1).flatten(0, 1), torch.cat([none, labels], 1).flatten())


def flattened(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Through one row for each sample, of tokens times classes."""
    rows = logits.flatten(1).unflatten(1, labels.shape[1:] + logits.shape[2:])
    return F.cross_entropy(rows.transpose(1, 2), labels)


def planned(
    samples: int, tokens: int, vocabulary: int, width: int, form: Callable[..., torch.Tensor]
) -> fxpipe.Pipeline:
    with torch.device("meta"):
        model = Decoder(vocabulary, width, max(tokens, 8))
    ids = torch.zeros(samples, tokens, dtype=torch.long, device="meta")
    kwargs = {"input_ids": ids, "labels": ids.clone(), "form": form}
    return fxpipe.compile(model, 2, (), kwargs, microbatches=2)


SIZES = {
    "tokens at the limit": (4, 64, 50257, 128),
    "tokens below it": (4, 63, 50257, 128),
    "tokens above it": (4, 65, 50257, 128),
    "tokens further above": (4, 68, 50257, 128),
    "tokens are classes": (4, 1000, 1000, 128),
    "tokens are the width": (4, 768, 50257, 768),
    "tokens are the samples": (64, 64, 50257, 128),
    "all are 64": (64, 64, 64, 64),
    "all are 65": (130, 65, 65, 65),
    "samples are classes": (8, 12, 8, 64),
    "samples are the classes above": (66, 12, 66, 64),
    "a hundred tokens": (4, 100, 50257, 128),
    "classes are a multiple of tokens": (2, 96, 96 * 500, 128),
    "classes are a multiple of 64": (4, 64, 64 * 500, 128),
    "classes are tokens squared": (4, 128, 128 * 128, 128),
    "classes follow the tokens": (4, 64, 66, 128),
    "one token more than small names": (6, 11, 17, 66),
}


OTHERWISE = ("tokens at the limit", "tokens are classes", "tokens are the samples", "all are 65", "a hundred tokens")


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, padded) for name in SIZES] + [(name, form) for name in OTHERWISE for form in (cut, prefixed, flattened)],
)
def test_a_mean_over_targets_is_found(name: str, form: Callable[..., torch.Tensor]) -> None:
    pipe = planned(*SIZES[name], form)
    assert "mean over valid targets" in str(pipe.report())


class Classifier(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, classes)])

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return F.cross_entropy(x, labels)


@pytest.mark.parametrize("classes", [8, 64, 65, 1000])
@pytest.mark.parametrize("samples", [8, 64, 66])
def test_a_classification_loss_is_found(samples: int, classes: int) -> None:
    with torch.device("meta"):
        model = Classifier(64, classes)
    x = torch.empty(samples, 64, device="meta")
    labels = torch.zeros(samples, dtype=torch.long, device="meta")
    pipe = fxpipe.compile(model, 2, (x, labels), microbatches=2)
    assert "mean over valid targets" in str(pipe.report())


@pytest.mark.parametrize("tokens", [63, 64, 1000])
def test_what_couples_samples_is_still_refused(tokens: int) -> None:
    def coupled(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return padded(logits, labels).sqrt()

    with pytest.raises(fxpipe.CaptureError, match=r"sqrt .*couples the samples"):
        planned(4, tokens, 1000, 64, coupled)


def test_a_token_stays_below_every_size_that_it_was_below() -> None:
    for sizes in ([1024, 4096, 50257], [65, 140], [100, 101, 1000], [64, 65, 67, 128, 50257]):
        named = Sizes(4, small_sizes(sizes))
        for token in range(max(sizes)):
            small = named.identify(token)
            assert all(small < named.rename(size) for size in sizes if size > token), (sizes, token, small)


def test_what_marks_the_ignored_is_no_size() -> None:
    assert [Sizes(4, small_sizes([100, 50257])).identify(mark) for mark in (-100, -1, -200)] == [-100, -1, -200]
