"""Random losses of log-softmax, gathers, masks, sums, means, roots and products: right to rounding, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from losses import Chain, inputs, per_token, sequence

import fxpipe

Tokens = Callable[[torch.Tensor, Any], torch.Tensor]
"""A number for each token of each sample, from logits and targets."""

LEAVES: dict[str, Tokens] = {
    "cross entropy": per_token,
    "log probability": lambda o, t: o.log_softmax(-1).gather(-1, t["clean"][..., None]).squeeze(-1),
    "square": lambda o, t: (o - t["real"]).square().mean(-1),
    "normaliser": lambda o, t: o.logsumexp(-1),
    "largest": lambda o, t: o.max(-1)[0],
    "mask": lambda o, t: t["mask"].to(o.dtype),
    "weights": lambda o, t: t["weights"],
    "normalised mask": lambda o, t: t["weights"] / t["weights"].sum(),
    "advantages": lambda o, t: t["advantages"],
}
ONE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "root": lambda x: (1 + x.square()).sqrt(),
    "exponential": lambda x: (-x.square()).exp(),
    "tanh": torch.tanh,
    "twice": lambda x: 2 * x,
    "less the sample's mean": lambda x: x - x.mean(1, keepdim=True),
    "less the batch's mean": lambda x: x - x.mean(0),
    "share of the sample": lambda x: x.softmax(1),
    "share of the batch": lambda x: x.softmax(0),
}
TWO: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "product": lambda x, y: x * y,
    "sum": lambda x, y: x + y,
    "smaller": torch.minimum,
}
REDUCTIONS: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "mean": lambda x, t: x.mean(),
    "sum": lambda x, t: x.sum(),
    "mean over the mask": lambda x, t: (x * t["mask"]).sum() / t["mask"].sum(),
    "guarded mean over the mask": lambda x, t: (x * t["weights"]).sum() / t["weights"].sum().clamp(min=1),
    "selected mean": lambda x, t: x[t["mask"]].mean(),
    "mean of samples": lambda x, t: x.sum(1).mean(),
    "sum over samples": lambda x, t: x.sum() / len(x),
    "mean of sample means": lambda x, t: ((x * t["mask"]).sum(1) / t["mask"].sum(1).clamp(min=1)).mean(),
    "weighted samples": lambda x, t: (x.mean(1) * t["sample_weights"]).sum() / t["sample_weights"].sum(),
    "root mean square": lambda x, t: x.square().mean().sqrt(),
    "largest": lambda x, t: x.max(),
    "mean above a threshold": lambda x, t: (x.mean() - 0.5).relu(),
    "larger of two means": lambda x, t: torch.maximum(x.mean(), x.square().mean()),
    "spread": lambda x, t: x.std(),
    "mean by root of a count": lambda x, t: (x * t["mask"]).sum() / t["mask"].sum().sqrt(),
    "mean of two rows": lambda x, t: x[:2].mean(),
    "mean of means": lambda x, t: x.mean(0).square().mean(),
}
SCALARS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "first": lambda x, y: x,
    "sum": lambda x, y: x + 0.3 * y,
    "difference": lambda x, y: x - y,
    "product": lambda x, y: x * y,
    "ratio": lambda x, y: x / (1 + y.square()),
    "root": lambda x, y: (1 + x.square()).sqrt() + y,
}

tokens = st.recursive(
    st.sampled_from(list(LEAVES)).map(lambda name: (name,)),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(list(ONE)), inner), st.tuples(st.sampled_from(list(TWO)), inner, inner)
    ),
    max_leaves=4,
)
numbers = st.tuples(st.sampled_from(list(REDUCTIONS)), tokens)
losses = st.tuples(st.sampled_from(list(SCALARS)), numbers, numbers)


def token_values(spelled: Any, o: torch.Tensor, t: Any) -> torch.Tensor:
    if len(spelled) == 1:
        return LEAVES[spelled[0]](o, t)
    if len(spelled) == 2:
        return ONE[spelled[0]](token_values(spelled[1], o, t))
    return TWO[spelled[0]](token_values(spelled[1], o, t), token_values(spelled[2], o, t))


def value(spelled: Any, o: torch.Tensor, t: Any) -> torch.Tensor:
    combine, *parts = spelled
    one, two = (REDUCTIONS[name](token_values(inner, o, t), t) for name, inner in parts)
    return SCALARS[combine](one, two)


def check(spelled: Any) -> bool:
    """Whether the loss is accepted, and then equal to that of the whole batch."""
    torch.manual_seed(0)
    model = Chain()
    plain = copy.deepcopy(model)
    x, target = inputs(), sequence()
    wanted = value(spelled, plain(x), target)
    if not wanted.requires_grad:
        return False
    try:
        pipe = fxpipe.compile(
            model, 2, (x,), {"target": target}, loss_fn=lambda o, t: value(spelled, o, t), microbatches=4,
            schedule="GPipe", grain="block",
        )  # fmt: skip
    except fxpipe.CaptureError:
        return False
    wanted.backward()
    pipe.materialize(device="cpu")
    loss = pipe.step(x, target=target)
    own = {name: parameter.grad for name, parameter in plain.named_parameters()}
    found = {name: parameter.grad for name, parameter in pipe.named_parameters()}
    scale = max([1e-3, *(float(gradient.abs().max()) for gradient in own.values() if gradient is not None)])
    assert abs(float(loss) - float(wanted.detach())) <= 1e-12 * max(abs(float(wanted.detach())), scale)
    for name, gradient in own.items():
        if gradient is not None and found[name] is not None:
            assert float((found[name] - gradient).abs().max()) <= 1e-12 * scale
    return True


@example(("sum", ("mean over the mask", ("cross entropy",)), ("mean", ("square",))))
@example(("first", ("sum", ("product", ("normalised mask",), ("square",))), ("mean", ("square",))))
@example(("first", ("root mean square", ("square",)), ("mean", ("square",))))
@example(  # a gather forbids ignored targets: masks must be uneven all the same
    (
        "first",
        ("guarded mean over the mask", ("product", ("tanh", ("cross entropy",)), ("log probability",))),
        ("mean", ("square",)),
    )
)
@example(  # of the masks that were tried, those without a count told nothing, and others were tried twice
    ("root", ("mean of sample means", ("mask",)), ("mean", ("cross entropy",)))
)
@settings(max_examples=20)
@given(losses)
def test_no_loss_is_silently_wrong(spelled: Any) -> None:
    check(spelled)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@settings(max_examples=100)  # `tox -e fuzz` tries twenty times as many
@given(losses)
def test_none_of_two_thousand_losses_is_silently_wrong(spelled: Any) -> None:
    check(spelled)
