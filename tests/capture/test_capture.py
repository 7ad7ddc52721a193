"""What capture promises beside right graphs: it leaves no trace, says what it cannot do, and follows one plan."""

from __future__ import annotations

import copy
import gc
import logging
import random
import re
import warnings

import judge
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, padded, split, tokens, without_mask
from staged import one_stage
from torch import nn

import fxpipe
from fxpipe.capture.capture import Capture
from fxpipe.errors import CaptureError
from fxpipe.variants import Variants

DECODERS = ("Llama", "Qwen3", "GPT-2")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.norm(self.first(x)))


class Model(nn.Module):
    """Draws random numbers, updates buffers, makes tensors on the default device; ``fails`` says whether it raises."""

    def __init__(self, fails=False):
        super().__init__()
        self.fails, self.table = fails, torch.arange(4.0, device="cpu")
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks[1].eval()
        self.blocks[0].first.weight.requires_grad_(False)

    def forward(self, x, target):
        x = x + torch.rand(4) * self.table.to(x.device)
        for block in self.blocks:
            x = block(x)
        if self.fails:
            raise ValueError("no such path")
        return (x - target).pow(2).mean()


def meta_model(name):
    with torch.device("meta"):
        return ARCHITECTURES[name].build()


def state_of(model):
    """Everything of a model that capture could change, by identity or by value."""
    return {
        "tensors": {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()},
        "attributes": {
            name: {
                key: {inner: id(item) for inner, item in value.items()} if isinstance(value, dict) else id(value)
                for key, value in vars(part).items()
            }
            for name, part in model.named_modules()
        },
        "flags": [(tensor.requires_grad, tensor.grad, tensor.device) for tensor in model.parameters()],
        "versions": [tensor._version for tensor in (*model.parameters(), *model.buffers())],
        "training": [part.training for part in model.modules()],
        "classes": [(type(part).__call__, type(part).forward, nn.Module.__call__) for part in model.modules()],
    }


def global_state():
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "python": random.getstate(),
        "device": torch.get_default_device(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "functions": (nn.Module.__call__, nn.Module._apply, torch.from_numpy, torch.vmap),
        "distributions": torch.distributions.Distribution._validate_args,
        "garbage": gc.isenabled(),
    }


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_model_and_process_are_as_before_whether_it_succeeds_or_fails(grain, fails, device):
    with torch.device(device):
        model = Model(fails)
    inputs = {"x": torch.randn(3, 4), "target": torch.randn(3, 4)}
    values = {name: tensor.clone() for name, tensor in inputs.items()}
    weights = copy.deepcopy(model.state_dict()) if device == "cpu" else {}
    before = state_of(model), global_state()
    if fails:
        with pytest.raises(CaptureError, match=r"ValueError: no such path \(.*test_capture\.py:\d+\)"):
            fxpipe.compile(model, 2, (), inputs, grain=grain, microbatches=1, schedule="GPipe")
    else:
        fxpipe.compile(model, 2, (), inputs, grain=grain, microbatches=1, schedule="GPipe")
    assert (state_of(model), global_state()) == before
    assert all(torch.equal(inputs[name], value) for name, value in values.items())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_who_looks_for_no_garbage_still_does_not_afterwards():
    gc.disable()
    try:
        capture = Capture(Model())
        capture.capture(capture.inputs((torch.randn(3, 4), torch.randn(3, 4)), {}))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_default_device_of_the_user_s_stays_and_is_not_captured():
    model = Model()
    with torch.device("meta"):
        capture = Capture(model)
        capture.capture(capture.inputs((torch.randn(3, 4, device="cpu"), torch.randn(3, 4, device="cpu")), {}))
        assert torch.empty(()).is_meta


@pytest.mark.parametrize("name", ["GPT-2", "DETR", "Wav2Vec2"])
def test_capture_neither_warns_nor_logs_nor_prints(name, caplog, capfd):
    model = meta_model(name)
    capture = Capture(model)
    inputs = capture.inputs(*split(ARCHITECTURES[name].batch(0)))
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        capture.capture(inputs)
    assert [record.getMessage() for record in caplog.records] == []
    assert capfd.readouterr() == ("", "")


# --- new shapes and other paths on one plan ---


@pytest.mark.parametrize("name", DECODERS)
def test_a_new_length_and_a_smaller_batch_are_captured_once_on_the_same_plan(name, monkeypatch):
    capture = Capture(meta_model(name))
    captured = capture.capture(capture.inputs(*split(tokens(0))))
    variants = Variants(capture, one_stage(capture.layer_graph(captured)), 1, ())
    variants.add(captured, with_loss=True)
    captures = []
    monkeypatch.setattr(capture, "capture", lambda *args, **kwargs: captures.append(1) or real(*args, **kwargs))
    real = Capture.capture.__get__(capture)
    batches = [tokens(0), *({key: value[:1] for key, value in tokens(1).items()} for _ in range(2))]
    batches += [{key: value[:, :7] for key, value in tokens(2).items()} for _ in range(2)]
    found = [variants.find(capture.inputs(*split(batch)), with_loss=True) for batch in batches]
    assert len(captures) == 2
    assert found[1] is found[2]
    assert found[3] is found[4]
    assert len({each.key for each in found}) == 3


class Changes(nn.Module):
    """Calls its blocks in the order that the batch asks for."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

    def forward(self, x, backwards):
        for block in reversed(self.blocks) if backwards.any() else self.blocks:
            x = block(x)
        return x.pow(2).mean()


def test_a_batch_that_does_not_follow_the_plan_says_what_changed():
    inputs = {"x": torch.randn(4, 4), "backwards": torch.zeros(4, dtype=torch.bool)}
    pipe = fxpipe.compile(Changes(), 2, (), inputs, microbatches=2, grain="block").materialize("cpu")
    pipe.step(**inputs)
    other = inputs | {"backwards": torch.ones(4, dtype=torch.bool)}
    message = (
        r"no longer follows its plan: blocks\.\d of stage 0 reads what blocks\.\d of stage 1 makes\n  compile with"
    )
    with pytest.raises(CaptureError, match=message):
        pipe.step(**other)
    pipe.step(**inputs)


# --- guards and forms of attention ---


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(("batch", "form"), [(without_mask, "causal"), (tokens, "causal"), (padded, "mask")])
@pytest.mark.parametrize("grain", ["block", "op"])
def test_the_report_names_the_form_of_attention(name, batch, form, grain):
    pipe = fxpipe.compile(
        meta_model(name), 2, (), batch(0), microbatches=1, schedule="GPipe", grain=grain, cost="flops"
    )
    assert f"attention: {form} (" in pipe.report()
    assert pipe.report().count("attention:") == 1


@pytest.mark.parametrize("name", DECODERS)
def test_another_mask_takes_its_own_variant_and_an_equal_one_does_not(name):
    capture = Capture(meta_model(name))
    captured = capture.capture(capture.inputs(*split(tokens(0))))
    variants = Variants(capture, one_stage(capture.layer_graph(captured)), 1, ())
    variants.add(captured, with_loss=True)
    first, other, again, more = (
        variants.find(capture.inputs(*split(batch)), with_loss=True).key
        for batch in (tokens(0), padded(1), tokens(2), padded(3))
    )
    assert first == again != other == more


def test_guards_are_seen_by_a_step_and_its_numbers_are_the_model_s():
    torch.manual_seed(0)
    model = ARCHITECTURES["Llama"].build()
    options = {"microbatches": 1, "schedule": "GPipe", "grain": "block"}
    pipe = fxpipe.compile(model, 2, (), tokens(0), **options).materialize("cpu").eval()
    for batch in (tokens(1), padded(1), without_mask(2), padded(2)):
        wanted = model.eval()(**batch)
        assert torch.equal(pipe.step(**batch), wanted.loss.detach())


# --- loud failures ---


class Ends(nn.Module):
    """Two blocks, then whatever a test wants."""

    def __init__(self, then):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.then = then

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.then(x)


HIDDEN = torch.ones(4, requires_grad=True)
KEPT = torch.ones(4)
REFUSALS = {
    "branches on floats": (
        lambda x: x if x.isfinite().all() else x * 0,
        "takes a path that depends on values",
        "leaves=",
    ),
    "reads a float": (lambda x: x * x.mean().item(), r"item\(\) takes a path", "leaves="),
    "shape of values": (lambda x: x[x[:, 0] > 0], "whose shape depends on values", "leaves="),
    "random branch": (lambda x: x if torch.rand(()) < 0.5 else x * 2, "reads a random number", "leaves="),
    "Python's random": (lambda x: torch.relu(x * random.random()), "Python's or numpy's random generator", "leaves="),
    "hidden parameter": (lambda x: x * HIDDEN, "takes a gradient is hidden in a closure or a global", "register it as"),
    "hidden buffer": (lambda x: x * KEPT.add_(1), "writes to a tensor kept outside of the model", "register_buffer"),
    "sets .grad": (lambda x: setattr(x, "grad", None) or x, r"assigns \.grad of a tensor", "leaves="),
    "reseeds": (lambda x: torch.manual_seed(0) and x, r"calls torch\.manual_seed\(\)", "leaves="),
}


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize("grain", ["block", "op"])
def test_what_cannot_be_recorded_is_refused_with_module_file_line_and_way_out(kind, grain):
    then, reason, way_out = REFUSALS[kind]
    with pytest.raises(CaptureError) as raised:
        fxpipe.compile(Ends(then), 2, (torch.randn(4, 4),), grain=grain, loss_fn=None)
    first, second = str(raised.value).split("\n")
    assert re.search(rf"{reason}.*\(module Ends, .*test_capture\.py:\d+\)", first), first
    assert second.startswith("  ")
    assert way_out in second


class Writes(Ends):
    def forward(self, x):
        x[0] = 0
        return super().forward(x)


class Hides(Ends):
    def __init__(self, then):
        super().__init__(then)
        self.scales = [nn.Parameter(torch.ones(4))]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Writes(torch.relu), r"writes to its input 'x' \(setitem, .*test_capture\.py:\d+\)\n  write to a copy"),
        (Hides(torch.relu), r"scales\[0\] takes a gradient but is no parameter of its module: .*\n  register it"),
    ],
)
def test_writes_to_inputs_and_hidden_parameters_are_refused(model, message):
    with pytest.raises(CaptureError, match=message):
        fxpipe.compile(model, 2, (torch.randn(4, 4),))


def test_an_output_that_is_an_input_is_refused():
    capture = Capture(Ends(torch.relu))
    capture.skeleton.module.forward = lambda x: {"x": x[1:]}
    with pytest.raises(CaptureError, match=r"\['x'\] is the input 'x' itself, or a view of it\n  return a copy"):
        capture.capture(capture.inputs((torch.randn(4, 4),), {}))


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        y = self.inner(x)
        return y if y.isfinite().all() else torch.zeros_like(y)


@pytest.mark.parametrize("leaves", [[Reads], ["Reads"], ["blocks.*"]])
def test_leaves_is_a_way_out(leaves):
    model = Ends(lambda x: x.pow(2).mean())
    model.blocks = nn.ModuleList([Reads(), Reads()])
    model, batch = model.double(), torch.randn(4, 4, dtype=torch.float64)
    pipe = fxpipe.compile(model, 2, (batch,), leaves=leaves, grain="op", microbatches=2).materialize("cpu")
    judge.assert_close(pipe.step(batch), model(batch).detach(), "loss")


# --- what crosses boundaries ---


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("batch", [tokens, padded, without_mask])
@pytest.mark.parametrize("grain", ["block", "op"])
def test_one_hidden_state_and_nothing_else_crosses_between_blocks(name, batch, grain):
    capture = Capture(meta_model(name))
    captured = capture.capture(capture.inputs((), batch(0)), grain=grain)
    graph = capture.layer_graph(captured)
    blocks = [block for block in capture.blocks if re.search(r"\.\d+$", block)]
    for first in blocks[1:]:
        starts = next(i for i, block in enumerate(graph.blocks) if block == first)
        stages = {layer: int(i >= starts) for i, layer in enumerate(graph.layer_names)}
        program = captured.program(stages, 2)
        (sent,) = program.stages[0].sent
        assert (sent.meta.shape, sent.meta.requires_grad) == ((2, 12, 32), True), first
        assert "input_ids" not in program.stages[1].inputs


def test_the_report_shows_one_hidden_state_per_boundary():
    pipe = fxpipe.compile(meta_model("Llama"), 3, (), padded(0), microbatches=1, schedule="GPipe", grain="block")
    hidden = 2 * 12 * 32 * 4
    sends = [line.split("  ")[-1].strip() for line in pipe.report().splitlines() if re.match(r"\d ", line)]
    assert sends[:2] == [f"{hidden / 1024:.1f} KiB"] * 2


# --- what layers are made of ---


class Given(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, scale):
        return self.inner(x) * scale


class Gives(nn.Module):
    """Hands its own parameter and buffer to blocks."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 0.5))
        self.register_buffer("shift", torch.full((4,), 2.0))
        self.blocks = nn.ModuleList([Given() for _ in range(4)])

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            x = block(x, self.scale if index % 2 else self.shift)
        return x.pow(2).mean()


class Dense(nn.Module):
    """Each block gets the list of all before it, which grows afterwards."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Joins(4 * (index + 1)) for index in range(4)])

    def forward(self, x):
        states = [x]
        for block in self.blocks:
            states.append(block(states))
        return states[-1].pow(2).mean()


class Joins(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, 4)

    def forward(self, states):
        return self.inner(torch.cat(states, 1))


class Packs(nn.Module):
    """A named tuple passes from block to block."""

    def __init__(self):
        super().__init__()
        self.recurrences = nn.ModuleList([nn.GRU(4, 4) for _ in range(4)])

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2, 2, 1]), batch_first=True)
        for recurrence in self.recurrences:
            packed, _ = recurrence(packed)
        return packed.data.pow(2).mean()


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize(("build", "shape"), [(Gives, (4, 4)), (Dense, (4, 4)), (Packs, (4, 3, 4))])
def test_what_modules_are_given_is_where_they_run(build, shape, grain):
    torch.manual_seed(0)
    model, batch = build().double(), torch.randn(shape, dtype=torch.float64)
    pipe = fxpipe.compile(model, 2, (batch,), grain=grain, microbatches=1, schedule="GPipe").materialize("cpu")
    judge.assert_close(pipe.step(batch), model(batch).detach(), "loss")
    model(batch).backward()
    found, wanted = ({fqn: p.grad for fqn, p in each.named_parameters()} for each in (pipe, model))
    judge.assert_close(found, wanted, "gradients")
