"""What every layer costs, from counts, weights, measured times and the user's own numbers."""

from __future__ import annotations

import dataclasses
import math

import layer_graphs
import pytest

from fxpipe.errors import PartitionError
from fxpipe.ir.cost import LayerCost, LayerCounts, OpCount
from fxpipe.ir.hardware import Training
from fxpipe.ir.profile import Profile
from fxpipe.ir.spec import LayerSpec
from fxpipe.planning.costs.estimate import estimate_costs

DEVICE = layer_graphs.hardware(flops={"float32": 1e3, "bfloat16": 4e3}, memory_bandwidth=100.0)


def one_layer(*ops, uncounted=(), dtype="float32", block=""):
    build = layer_graphs.Builder("Model", dtype)
    build.layer("layer", weights=[("weight", (10,))], block=block)
    return dataclasses.replace(build.graph(), counts=(LayerCounts(tuple(ops), uncounted=tuple(uncounted)),))


MATMUL = OpCount("mm", "forward", 4_000, 100, "float32")  # 4 s of FLOPs, 1 s of bytes
ADD = OpCount("add", "input_grad", 10, 500, "float32")  # 0.01 s, 5 s
SCAN = OpCount("scan", "weight_grad", 0, 200, "float32")  # no formula; 2 s


def test_an_operation_takes_its_flops_or_its_bytes_whichever_is_longer():
    found = estimate_costs(one_layer(MATMUL, ADD, SCAN), "roofline", DEVICE, Training())
    assert found.costs == (LayerCost(4.0, 5.0, 2.0),)


def test_by_flops_an_operation_without_a_formula_counts_by_its_bytes_and_is_named():
    found = estimate_costs(one_layer(MATMUL, ADD, SCAN, uncounted=["scan"]), "flops", DEVICE, Training())
    assert found.costs == (LayerCost(4.0, 0.01, 2.0),)
    assert "scan" in found.notes[0]


def test_another_dtype_changes_rates_and_bytes_of_the_models_own_alone():
    loss = OpCount("exp", "forward", 0, 400, "int64")
    found = estimate_costs(one_layer(MATMUL, ADD, loss), "roofline", DEVICE, Training(param_dtype="bfloat16"))
    assert found.costs == (LayerCost(1.0 + 4.0, 2.5, 0.0),)


def test_parameters_weigh_a_layer_once_and_are_said_to_be_no_time():
    build = layer_graphs.Builder("Model")
    build.layer("a", weights=[("weight", (25,))])
    build.layer("b", ["a"], weights=[("weight", (50,))])
    build.layer("a", ["b"], weights=[("weight", (25,))])
    found = estimate_costs(build.graph(), "parameters", DEVICE, Training())
    assert [cost.seconds for cost in found.costs] == [3.0, 6.0, 0.0]
    assert not found.is_time
    assert "no times" in found.notes[0]


def test_recomputation_adds_the_forward_of_blocks_to_their_backward():
    ops = (MATMUL, ADD, SCAN)
    training = Training(recompute="block")
    assert estimate_costs(one_layer(*ops, block="h.0"), "roofline", DEVICE, training).costs == (
        LayerCost(4.0, 9.0, 2.0),
    )
    assert estimate_costs(one_layer(*ops, block="head"), "roofline", DEVICE, training).costs == (
        LayerCost(4.0, 5.0, 2.0),
    )


def test_equal_layers_are_estimated_once(monkeypatch):
    calls = []
    rate = type(DEVICE).peak_flops
    monkeypatch.setattr(type(DEVICE), "peak_flops", lambda self, dtype: calls.append(dtype) or rate(self, dtype))
    graph = layer_graphs.gpt(blocks=24)
    estimate_costs(graph, "roofline", DEVICE, Training())
    assert len(calls) < 10 * len({id(counts) for counts in graph.counts}) < 200


def test_a_mapping_gives_modules_whose_layers_share_by_flops():
    graph = layer_graphs.gpt(blocks=2)
    given = {"wte": 1.0, "h": 12.0, "h.1.fc": 3.0, "ln_f": 0.0, "lm_head": 2.0, "loss": 0.5}
    found = estimate_costs(graph, given, DEVICE, Training())
    seconds = dict(zip(graph.layer_names, (cost.seconds for cost in found.costs), strict=True))
    flops = dict(zip(graph.layer_names, (counts.flops() for counts in graph.counts), strict=True))
    inside = [name for name in graph.layer_names if name.startswith("h.") and name != "h.1.fc"]
    assert math.isclose(sum(seconds[name] for name in inside), 12.0)
    total = sum(flops[name] for name in inside)
    assert all(math.isclose(seconds[name], 12.0 * flops[name] / total, abs_tol=1e-12) for name in inside)
    assert (seconds["h.1.fc"], seconds["lm_head"], seconds["mask"]) == (pytest.approx(3.0), pytest.approx(2.0), 0.0)
    linear = found.costs[graph.layer_names.index("lm_head")]
    assert linear.forward_s == pytest.approx(linear.input_grad_s) == pytest.approx(linear.weight_grad_s)


def test_a_module_called_twice_shares_its_seconds_or_has_them_call_by_call():
    build = layer_graphs.Builder("Model")
    for read in ((), ["a"], ["a@1"]):
        build.layer("a", read, flops=6)
    graph = build.graph()
    found = estimate_costs(graph, {"a": 3.0}, DEVICE, Training())
    assert [cost.seconds for cost in found.costs] == pytest.approx([1.0, 1.0, 1.0])
    found = estimate_costs(graph, {"a": 3.0, "a@1": 5.0}, DEVICE, Training())
    assert [cost.seconds for cost in found.costs] == pytest.approx([1.5, 5.0, 1.5])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"wte": 1.0, "h": 1.0, "lm_head": 1.0, "loss": 1.0}, "leaves out 'ln_f'"),
        ({"": 1.0, "h.7": 1.0}, "names 'h.7', not in GPT"),
        ({"": 1.0, "wte": -1.0}, "cost of 'wte' is -1.0"),
        ({"": 1.0, "wte": math.nan}, "cost of 'wte' is nan"),
        ({"": math.inf}, "cost of '' is inf"),
        ({"": "fast"}, "cost of '' is 'fast'"),
        ({}, "leaves out 'wte', 'h.0.ln_1', 'h.0.qkv', 'h.0.sdpa', 'h.0.proj' and"),
    ],
)
def test_a_wrong_mapping_is_one_error_that_names_the_fqn(given, message):
    with pytest.raises(PartitionError, match=message) as caught:
        estimate_costs(layer_graphs.gpt(blocks=2), given, DEVICE, Training())
    assert str(caught.value).count("\n") == 1


def test_calls_of_functions_may_be_left_out_of_a_mapping_and_are_named():
    build = layer_graphs.Builder("Model")
    build.layer("fc", shape=(4,), weights=[("weight", (4,))], flops=6)
    build.layer("cross_entropy", ["fc"])
    graph = build.graph()
    specs = (graph.specs[0], LayerSpec.captured("cross_entropy", "torch.nn.functional:cross_entropy"))
    found = estimate_costs(dataclasses.replace(graph, specs=specs), {"fc": 3.0}, DEVICE, Training())
    assert [cost.seconds for cost in found.costs] == [3.0, 0.0]
    assert "'cross_entropy'" in found.notes[0]


def test_a_profile_is_taken_as_measured_and_fits_coarser_and_finer_graphs():
    whole, fine = layer_graphs.gpt(blocks=2, whole=True), layer_graphs.gpt(blocks=2)
    cost = LayerCost(1.0, 2.0, 3.0)
    by_block = Profile.of("laptop", dict.fromkeys(whole.layer_names, cost))
    found = estimate_costs(whole, by_block, DEVICE, Training(param_dtype="bfloat16"))
    assert found.cost == "profile"
    assert "laptop" in found.notes[0]
    assert found.costs[whole.layer_names.index("h.1")] == cost
    opened = estimate_costs(fine, by_block, DEVICE, Training())
    inside = [layer for layer, name in enumerate(fine.layer_names) if name.startswith("h.1.")]
    assert sum(opened.costs[layer].seconds for layer in inside) == pytest.approx(6.0)
    by_layer = Profile.of("laptop", dict(zip(fine.layer_names, opened.costs, strict=True)))
    again = estimate_costs(whole, by_layer, DEVICE, Training())
    assert again.costs[whole.layer_names.index("h.1")].weight_grad_s == pytest.approx(3.0)


def test_a_profile_without_a_layer_names_it():
    graph = layer_graphs.gpt(blocks=2)
    profile = Profile.of("laptop", {name: LayerCost(1.0) for name in graph.layer_names if name != "lm_head"})
    with pytest.raises(PartitionError, match="no times of 'lm_head'"):
        estimate_costs(graph, profile, DEVICE, Training())


@pytest.mark.parametrize(
    ("cost", "message"),
    [("speed", "unknown cost 'speed'\n.*roofline"), ("profile", "needs measured times"), (3, "unknown cost 3")],
)
def test_an_unknown_cost_is_refused_with_the_known_ones(cost, message):
    with pytest.raises(PartitionError, match=message):
        estimate_costs(layer_graphs.gpt(), cost, DEVICE, Training())


def test_layers_without_counts_ask_for_an_example():
    graph = dataclasses.replace(layer_graphs.gpt(), counts=())
    with pytest.raises(PartitionError, match=r"not counted\n.*example_args"):
        estimate_costs(graph, "roofline", DEVICE, Training())
    assert estimate_costs(graph, "parameters", DEVICE, Training()).costs
    given = estimate_costs(graph, {"": 1.0}, DEVICE, Training())
    assert sum(cost.seconds for cost in given.costs) == pytest.approx(1.0)
