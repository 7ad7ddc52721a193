"""What people train comes out as it went in: at every boundary, opened or not, in training and evaluation."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, padded, split, tokens, without_mask
from judge import CLOSE
from staged import Outcome, cut, differences, every_boundary, one_stage, run_model, run_program
from torch import nn

from fxpipe.capture.capture import Capture
from fxpipe.variants import Variants

GRAINS = ("block", "op")
CASES = [(name, grain) for name, a in ARCHITECTURES.items() for grain in GRAINS if grain == "block" or not a.branches]
MASKED = [name for name, a in ARCHITECTURES.items() if a.batch is tokens]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def real_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[name].build()


def meta_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return ARCHITECTURES[name].build()


@functools.cache
def has_loss(name: str) -> bool:
    """Whether the model computes a loss."""
    args, kwargs = split(ARCHITECTURES[name].batch(0))
    with torch.no_grad():
        given = copy.deepcopy(real_model(name).train())(*args, **kwargs)
    loss = given.get("loss") if isinstance(given, dict) else getattr(given, "loss", None)
    return loss is not None or (isinstance(given, torch.Tensor) and given.dim() == 0)


@functools.cache
def outcome(name: str, training: bool, batch: Any, seed: int, wide: bool) -> Outcome:
    """What the model itself gives for a batch, in float64 if wide."""
    model = real_model(name).train(training)
    return run_model(model, *split(batch(seed)), 7, has_loss(name), wide=wide)


def assert_equal(expected: Outcome, found: Outcome, what: str, wide: bool) -> None:
    """In float64 within rounding; else, where one stage runs what the model runs, every bit."""
    off = differences(expected, found, bits=not wide)
    worst = sorted(off.items(), key=lambda item: -item[1])[:3]
    assert all(distance <= (CLOSE if wide else 0) for _, distance in worst), f"{what}: {worst}"


@pytest.mark.parametrize(("name", "grain"), CASES)
def test_stages_compute_what_the_model_computes(name, grain):
    capture = Capture(meta_model(name))
    batch = ARCHITECTURES[name].batch
    inputs = capture.inputs(*split(batch(0)))
    numbers = random.Random(0)
    for training in (True, False):
        capture.skeleton.module.train(training)
        captured = capture.capture(inputs, grain=grain, with_loss=has_loss(name))
        graph = capture.layer_graph(captured)
        stages, number = every_boundary(graph)
        assert number >= 4
        cuts = [(one_stage(graph), 1), (stages, number), *((cut(graph, size, numbers), size) for size in (2, 3, 4))]
        for stage_of_layer, size in cuts:
            wide = size > 1
            program = captured.program(stage_of_layer, size)
            found = run_program(program, real_model(name).train(training), inputs.tensors, 7, wide=wide)
            expected = outcome(name, training, batch, 0, wide)
            assert_equal(expected, found, f"training={training}, {size} stages", wide)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_of_the_example_is_baked(name):
    capture = Capture(meta_model(name))
    batch = ARCHITECTURES[name].batch
    opened = () if ARCHITECTURES[name].branches else capture.blocks
    captured = capture.capture(capture.inputs(*split(batch(0))), opened=opened, with_loss=has_loss(name))
    variants = Variants(capture, one_stage(capture.layer_graph(captured)), 1, opened)
    variants.add(captured, with_loss=has_loss(name))
    others = [(batch, 3)] + [(padded, 1), (without_mask, 2)] * (batch is tokens)
    for other, seed in others:
        inputs = capture.inputs(*split(other(seed)))
        variant = variants.find(inputs, with_loss=has_loss(name))
        found = run_program(variant.program, real_model(name).train(), inputs.tensors, 7)
        assert_equal(outcome(name, True, other, seed, False), found, f"{other.__name__} {seed}", False)
