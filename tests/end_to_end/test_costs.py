"""What layers are said to cost is what a real run on the CPU does: FLOPs, bytes kept, microbatches alive, times."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import launch
import pytest
import torch
from architectures import ARCHITECTURES, split
from costs_worker import RANKS, SCHEDULES, kept_bytes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import fxpipe
from fxpipe import profiling
from fxpipe.capture.calls.counting import LayerCounter
from fxpipe.capture.capture import Capture
from fxpipe.ir.graph import LayerGraph
from fxpipe.runtime.run.profile import measure_layer

aten = torch.ops.aten
CHOSEN = [
    *(
        "GPT-2",
        "Llama",
        "OPT",
        "Mixtral",
        "Mamba",
        "BERT",
        "T5",
        "Whisper",
        "ViT",
        "Swin",
        "ConvNeXt",
        "ResNet",
        "CLIP",
    ),
    *("Wav2Vec2", "U-Net with skips", "nn.Transformer", "module called twice"),
]
# Torch has formulas for attention, but not under the name of the CPU's kernel.
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, query, key, value, *_, **__: (
        sdpa_backward_flop_count(grad, query, key, value)
    ),
}
FORMULAS = {str(packet).rpartition(".")[2] for packet in (*flop_registry, *ATTENTION)}


def built(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    return ARCHITECTURES[name].build().train(), *split(ARCHITECTURES[name].batch(0))


def loss_of(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    return output["loss"] if isinstance(output, Mapping) else output.loss


def counted(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grain: str) -> LayerGraph:
    capture = Capture(model)
    counter = LayerCounter(capture.skeleton, fused_attention=False)
    return capture.layer_graph(capture.capture(capture.inputs(args, kwargs), grain=grain, counter=counter))


def flops_of(graph: LayerGraph, names: set[str] | None = None) -> int:
    """Add up the layers' FLOPs, of some operations or of all; what is recomputed runs once in one process."""
    ops = [op for counts in graph.counts for op in counts.ops]
    return sum(op.flops for op in ops if names is None or op.name in names)


def run_flops(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Count a real forward and backward."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as mode:
        loss_of(copy.deepcopy(model)(*args, **copy.deepcopy(kwargs))).backward()
    return mode.get_total_flops()


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize("name", CHOSEN)
def test_flops_are_those_of_a_real_forward_and_backward(name, grain):
    model, args, kwargs = built(name)
    assert flops_of(counted(model, args, kwargs, grain), FORMULAS) == run_flops(model, args, kwargs) > 0


def test_grouped_products_of_experts_count_as_experts_one_by_one_do():
    model, args, kwargs = built("Mixtral")
    grouped = flops_of(counted(model, args, kwargs, "op"))
    model.set_experts_implementation("eager")
    assert grouped == run_flops(model, args, kwargs)


@pytest.mark.parametrize("name", CHOSEN)
def test_bytes_kept_for_backward_are_within_five_per_cent_of_a_real_run(name):
    model, args, kwargs = built(name)
    pipe = fxpipe.compile(model, 1, args, kwargs, microbatches=1, hardware="cpu")
    real = kept_bytes(copy.deepcopy(model), lambda copied: loss_of(copied(*args, **copy.deepcopy(kwargs))))
    assert pipe.plan.stages[0].activation_bytes == pytest.approx(real, rel=0.05)


@pytest.fixture(scope="module")
def said():
    return {ranks: launch.launch_cases("end_to_end/costs_worker.py", ranks) for ranks in RANKS}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", RANKS)
def test_live_activations_are_within_ten_per_cent_of_what_ranks_keep(ranks, schedule, said):
    launch.passed(said[ranks], schedule, ranks)


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_measure_together_and_plan_with_what_the_first_found(ranks, said):
    launch.passed(said[ranks], "profile", ranks)


def test_a_layer_is_measured_as_in_a_stage():
    """Other layers run before each phase, and weights add up their gradients, of which inputs get none."""
    phases: list[str] = []

    class Others:
        def run(self) -> None:
            phases.append("others")

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            phases.append("forward")
            return x * x

        @staticmethod
        def backward(ctx, gradient):
            phases.append("backward")
            return gradient

    x, weight = torch.ones(2, 3, requires_grad=True), nn.Parameter(torch.ones(3))
    made = {"x": x, "weight": weight}
    call = lambda x, weight: Square.apply(x) * weight  # noqa: E731
    cost = measure_layer(call, ("x", "weight"), {}, torch.device("cpu"), lambda leaf, _: made[leaf], Others())
    assert cost.forward_s > 0
    turn = ["others", "forward", "others", "backward", "others", "backward"]
    turns = len(phases) // len(turn)
    assert phases == turn * turns
    assert torch.equal(weight.grad, torch.full((3,), 2.0 * turns))
    assert torch.equal(x.grad, torch.ones(2, 3))


def test_equal_blocks_are_measured_once(monkeypatch):
    measured: list[object] = []
    real = profiling.measure_layer
    monkeypatch.setattr(profiling, "measure_layer", lambda call, *rest: measured.append(call) or real(call, *rest))
    blocks = (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(24))
    model = nn.Sequential(nn.Linear(16, 16), *blocks, nn.Linear(16, 4))
    pipe = fxpipe.compile(model, 1, (torch.zeros(2, 8, 16),), microbatches=1, cost="profile")
    assert len(measured) == 3
    assert len({pipe.profile.costs[str(block)] for block in range(1, 25)}) == 1


def test_recurrent_layers_count_a_product_with_either_weight_per_step():
    rows, steps, sizes, width = 8, 5, (16, 32), 32
    model = nn.Sequential(nn.LSTM(sizes[0], width, len(sizes), batch_first=True))
    pipe = fxpipe.compile(model, 1, (torch.zeros(rows, steps, sizes[0]),), microbatches=1, hardware="cpu")
    (counts,) = [counts for counts in pipe.graph.counts if counts.ops]
    flops = {phase: sum(op.flops for op in counts.ops if op.phase == phase) for phase in ("forward", "weight_grad")}
    products = sum(2 * rows * steps * 4 * width * (size + width) for size in sizes)
    assert flops == {"forward": products, "weight_grad": 2 * products}


def test_recurrent_layers_keep_what_they_keep():
    model, x = nn.LSTM(128, 128, 2, batch_first=True), torch.randn(16, 32, 128)
    pipe = fxpipe.compile(nn.Sequential(model), 1, (x,), microbatches=1, hardware="cpu")
    real = kept_bytes(model, lambda module: module(x.clone().requires_grad_())[0])
    assert pipe.plan.stages[0].activation_bytes == pytest.approx(real, rel=0.05)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        return x + self.out(nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1))


class Attentions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_attention_is_one_kernel_at_either_grain():
    """At op grain the call was compared with what already stood in its place, and counted with all its scores."""
    with torch.device("meta"):
        model, example = Attentions(), torch.zeros(2, 4, 64, 16)
    moved = []
    for grain in ("block", "op"):
        capture = Capture(model)
        counter = LayerCounter(capture.skeleton, fused_attention=True)
        captured = capture.capture(capture.inputs((example,), {}, None), grain=grain, counter=counter)
        graph = capture.layer_graph(captured)
        assert not any("softmax" in op.name for counts in graph.counts for op in counts.ops)
        moved.append(sum(counts.bytes("forward") for counts in graph.counts))
    assert moved[0] == moved[1]
