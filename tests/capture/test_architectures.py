"""What people train comes out as it went in: at every boundary, opened or not, in training and evaluation."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, padded, split, tokens, without_mask
from staged import Outcome, cut, differences, every_boundary, one_stage, run_model, run_program
from torch import nn

from fxpipe.capture.capture import Capture
from fxpipe.variants import Variants

MOST_ULPS = 4
MOST_ULPS_EVERYWHERE = 16  # with a stage per layer, hundreds of boundaries add their roundings up
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
def outcome(name: str, training: bool, batch: Any, seed: int) -> tuple[Outcome, bool]:
    """What the model itself gives for a batch, and whether it computes a loss."""
    model = real_model(name).train(training)
    args, kwargs = split(batch(seed))
    with torch.no_grad():
        given = copy.deepcopy(model)(*args, **copy.deepcopy(kwargs))
    loss = given.get("loss") if isinstance(given, dict) else getattr(given, "loss", None)
    has_loss = loss is not None or (isinstance(given, torch.Tensor) and given.dim() == 0)
    return run_model(model, args, kwargs, 7, has_loss), has_loss


def assert_equal(name: str, expected: Outcome, found: Outcome, what: str, most_ulps: int = 0) -> None:
    off = differences(expected, found)
    allowed = most_ulps if ARCHITECTURES[name].inexact else 0
    worst = sorted(off.items(), key=lambda item: -item[1])[:3]
    assert all(distance <= allowed for _, distance in worst), f"{what}: {worst}"


@pytest.mark.parametrize(("name", "grain"), CASES)
def test_stages_compute_what_the_model_computes(name, grain):
    capture = Capture(meta_model(name))
    batch = ARCHITECTURES[name].batch
    inputs = capture.inputs(*split(batch(0)))
    numbers = random.Random(0)
    for training in (True, False):
        expected, has_loss = outcome(name, training, batch, 0)
        capture.skeleton.module.train(training)
        captured = capture.capture(inputs, grain=grain, with_loss=has_loss)
        graph = capture.layer_graph(captured)
        stages, number = every_boundary(graph)
        assert number >= 4
        cuts = [(one_stage(graph), 1, 0), (stages, number, MOST_ULPS_EVERYWHERE)]
        cuts += [(cut(graph, size, numbers), size, MOST_ULPS) for size in (2, 3, 4)]
        for stage_of_layer, size, most_ulps in cuts:
            program = captured.program(stage_of_layer, size)
            found = run_program(program, real_model(name).train(training), inputs.tensors, 7)
            assert_equal(name, expected, found, f"training={training}, {size} stages", most_ulps)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_of_the_example_is_baked(name):
    capture = Capture(meta_model(name))
    batch = ARCHITECTURES[name].batch
    _, has_loss = outcome(name, True, batch, 0)
    opened = () if ARCHITECTURES[name].branches else capture.blocks
    captured = capture.capture(capture.inputs(*split(batch(0))), opened=opened, with_loss=has_loss)
    variants = Variants(capture, one_stage(capture.layer_graph(captured)), 1, opened)
    variants.add(captured, with_loss=has_loss)
    others = [(batch, 3)] + [(padded, 1), (without_mask, 2)] * (batch is tokens)
    for other, seed in others:
        inputs = capture.inputs(*split(other(seed)))
        variant = variants.find(inputs, with_loss=has_loss)
        expected, _ = outcome(name, True, other, seed)
        found = run_program(variant.program, real_model(name).train(), inputs.tensors, 7)
        assert_equal(name, expected, found, f"{other.__name__} {seed}")
