"""Recomputation: which modules it is of, what it costs, and how it is chosen with the cut."""

import dataclasses

import layer_graphs
import pytest

from fxpipe.errors import PartitionError, ScheduleError
from fxpipe.ir.hardware import Training
from fxpipe.ir.spec import LayerSpec
from fxpipe.planning.costs.recompute import checkpoints, recomputed_modules
from fxpipe.planning.planner import plan_pipeline


def with_attention(graph, calls="sdpa", mark=("causal",)):
    """The same graph, whose layers of that name call attention."""
    counts = tuple(
        dataclasses.replace(count, attention=mark) if name.endswith(calls) else count
        for name, count in zip(graph.layer_names, graph.counts, strict=True)
    )
    specs = tuple(
        LayerSpec.captured(name, "torch._C._nn:scaled_dot_product_attention") if name.endswith(calls) else spec
        for name, spec in zip(graph.layer_names, graph.specs, strict=True)
    )
    return dataclasses.replace(graph, counts=counts, specs=specs)


def plan(graph, made_for):
    return plan_pipeline(graph, layer_graphs.estimate(graph, made_for), made_for)


LLAMA = with_attention(layer_graphs.llama(blocks=4, hidden=64, vocab=256, tokens=32, inner=128, kv=16))


def test_blocks_attention_and_patterns_name_modules_in_the_models_order():
    assert recomputed_modules(LLAMA, None) == recomputed_modules(LLAMA, "auto") == ()
    assert recomputed_modules(LLAMA, "block") == tuple(f"layers.{index}" for index in range(4))
    assert recomputed_modules(LLAMA, "attention") == tuple(f"layers.{index}.self_attn" for index in range(4))
    assert recomputed_modules(LLAMA, ("layers.3", "layers.*.mlp", "layers.3.mlp")) == (
        "layers.0.mlp", "layers.1.mlp", "layers.2.mlp", "layers.3",
    )  # fmt: skip
    with pytest.raises(PartitionError, match=r"names 'layers\.\*\.moe', and Llama has no such module"):
        recomputed_modules(LLAMA, ("layers.*.moe",))


def test_a_block_whose_attention_is_not_known_is_recomputed_whole():
    whole = layer_graphs.gpt(blocks=2, whole=True)
    assert recomputed_modules(whole, "attention") == ("h.0", "h.1")
    inside = checkpoints(LLAMA, recomputed_modules(LLAMA, "attention"))
    assert {LLAMA.layer_names[layer].rpartition(".")[0].removesuffix(".q") for layer in inside} >= {
        "layers.0.self_attn"
    }
    assert not any("mlp" in LLAMA.layer_names[layer] for layer in inside)


@pytest.mark.parametrize("choice", ["block", "attention", ("layers.*.mlp",)])
def test_the_plan_says_per_stage_what_is_recomputed_and_its_times_and_bytes_follow(choice):
    made_for = layer_graphs.settings(2, grain="block")
    plain = plan(LLAMA, made_for)
    again = plan(LLAMA, dataclasses.replace(made_for, training=Training(recompute=choice)))
    assert plain.stages[0].recompute == ()
    found = [name for stage in again.stages for name in stage.recompute]
    assert tuple(found) == recomputed_modules(LLAMA, choice)
    for stage in again.stages:
        assert all(name.startswith(tuple(stage.layers)) for name in stage.recompute)
    assert sum(s.backward_s for s in again.stages) > sum(s.backward_s for s in plain.stages)
    assert sum(s.weight_grad_s for s in again.stages) == pytest.approx(sum(s.weight_grad_s for s in plain.stages))
    assert sum(s.activation_bytes for s in again.stages) < sum(s.activation_bytes for s in plain.stages)


def test_a_block_that_a_cut_crosses_is_recomputed_in_both_stages():
    graph = with_attention(layer_graphs.gpt(blocks=1))
    found = plan(graph, layer_graphs.settings(2, grain="op", training=Training(recompute="block")))
    assert [stage.recompute for stage in found.stages] == [("h.0",), ("h.0",)]


@pytest.mark.parametrize("choice", ["block", "attention", ("layers.0",)])
def test_schedules_that_split_the_backward_recompute_nothing(choice):
    with pytest.raises(ScheduleError, match="splits the backward: recompute="):
        layer_graphs.settings(4, ranks=2, schedule="ZBVZeroBubble", training=Training(recompute=choice))
    layer_graphs.settings(4, ranks=2, schedule="ZBVZeroBubble", training=Training(recompute="auto"))
