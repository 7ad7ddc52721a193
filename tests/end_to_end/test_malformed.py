"""Specs, costs, batches and plans that are malformed at random are refused by an error of fxpipe's, no other."""

from __future__ import annotations

import contextlib
import copy
import json

import hypothesis
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

import fxpipe

ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=4) | st.just(torch.zeros(2)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
PLAIN = st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats(allow_nan=False) | st.text(max_size=4)
X = torch.zeros(8, 4)


def compiled(**options) -> fxpipe.Pipeline:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    given = {"loss_fn": F.mse_loss, "microbatches": 2, **options}
    return fxpipe.compile(model, 2, (X,), {"target": X}, **given)


PIPE = compiled(ranks=None).materialize(device="cpu", init="reset")
PLAN = json.loads(PIPE.plan.to_json())


def refused_or_right() -> contextlib.AbstractContextManager[None]:
    return contextlib.suppress(fxpipe.FxpipeError)


@hypothesis.settings(max_examples=60)
@hypothesis.given(ANY, st.lists(ANY, max_size=2), st.dictionaries(st.sampled_from(["bias", "x"]), ANY, max_size=2))
def test_specs(kind, args, kwargs):
    with refused_or_right():
        fxpipe.LayerSpec(kind, *args, **kwargs)
    with refused_or_right():
        hash(fxpipe.LayerSpec(nn.Linear, *args, **kwargs).fingerprint)


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.dictionaries(st.sampled_from(["0", "1", "loss", "x", 3]), ANY, max_size=4))
def test_costs(cost):
    with refused_or_right():
        compiled(cost=cost)


@hypothesis.settings(max_examples=30)
@hypothesis.given(ANY, ANY)
def test_batches(x, target):
    with refused_or_right():
        PIPE.step(x, target=target)
    with refused_or_right():
        PIPE.step(microbatches=x)


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.sampled_from(sorted(PLAN)), PLAIN, st.booleans())
def test_plans(field, value, inside):
    changed = copy.deepcopy(PLAN)
    where = changed["stages"][0] if inside else changed
    where[field if field in where else sorted(where)[len(field) % len(where)]] = value
    with refused_or_right():
        compiled(plan=fxpipe.PipelinePlan.from_json(json.dumps(changed)))
