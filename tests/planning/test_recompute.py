"""Recomputation: which modules it is of, what it costs, and how it is chosen with the cut."""

import dataclasses
import functools
import itertools
import math
import re

import layer_graphs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fxpipe.errors import InfeasibleError, PlanError, ScheduleError
from fxpipe.ir.hardware import Training
from fxpipe.ir.plan import PipelinePlan
from fxpipe.ir.spec import LayerSpec
from fxpipe.planning.costs.recompute import checkpoints, recomputed_modules
from fxpipe.planning.planner import plan_pipeline
from fxpipe.planning.settings import device_limit
from fxpipe.planning.simulation.engine import StageTimes
from fxpipe.planning.simulation.simulate import simulate, step_seconds


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
    with pytest.raises(PlanError, match=r"names 'layers\.\*\.moe', which no module of Llama matches"):
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


# --- chosen with the cut ---


@st.composite
def chains(draw):
    """Eight blocks, equal or not; weights, activations and times from nothing to much."""
    equal = draw(st.booleans())
    number = st.tuples(st.integers(0, 12), st.integers(0, 30), st.integers(0, 10))
    rows = [draw(number)] * 8 if equal else [draw(number) for _ in range(8)]
    return [(weights, kept, work) for weights, kept, work in rows], draw(st.integers(1, 8))


def chain_graph(rows, stream):
    build = layer_graphs.Builder("Chain")
    x = None
    for index, (weights, kept, work) in enumerate(rows):
        x = build.layer(
            f"h.{index}", [x] if x else [], (stream,), [("weight", (weights,))], flops=work * 10**9,
            saves=[x] if x else [], saved_bytes=4 * kept, block=f"h.{index}",
        )  # fmt: skip
    return build.graph()


def exhaustive(rows, stream, costs, made_for):
    """The fastest step over all cuts, and over all blocks that each stage may recompute; None where nothing fits.

    Bytes from the words of the contract: weight, gradient and two states; what a block keeps; what enters a block, once
    where it is made and once where it is received; a buffer for what comes, and one for each gradient.
    """
    size = 4 * stream
    bandwidth, latency = made_for.hardware.link(0, 1)
    move_s = latency + size / bandwidth

    @functools.cache
    def stage_times(stage, low, high):
        static = sum(16 * weights for weights, _, _ in rows[low:high])
        static += (size if high < 8 else 0) + (2 * size if low else 0)
        edges = size * (high - low - (high == 8) + (low > 0))
        blocks = range(low, high)
        least = math.inf
        for again in itertools.chain.from_iterable(itertools.combinations(blocks, n) for n in range(len(blocks) + 1)):
            kept = edges + sum(4 * rows[block][1] for block in blocks if block not in again)
            working = max((4 * rows[block][1] for block in again), default=0)
            if static + working + made_for.live_microbatches[stage] * kept <= made_for.memory_limit:
                least = min(least, sum(costs[block].forward_s for block in again))
        own = costs[low:high]
        backward_s = sum(c.input_grad_s for c in own) + least
        return StageTimes(sum(c.forward_s for c in own), backward_s, sum(c.weight_grad_s for c in own), move_s, move_s)

    cuts = ((0, *cut, 8) for cut in itertools.combinations(range(1, 8), 2))
    stages = ([stage_times(stage, *ends) for stage, ends in enumerate(itertools.pairwise(cut))] for cut in cuts)
    fitting = (times for times in stages if all(time.input_grad_s < math.inf for time in times))
    return min((step_seconds("1F1B", times, 3, made_for.num_microbatches) for times in fitting), default=None)


@pytest.mark.parametrize(
    ("schedule", "grain"),
    [
        ("1F1B", "block"), ("1F1B", "op"), ("1F1B", "auto"), ("GPipe", "block"), ("GPipe", "op"),
        ("Interleaved1F1B", "block"), ("LoopedBFS", "block"),
    ],
)  # fmt: skip
def test_what_no_partition_fits_is_repaired_and_says_so(schedule, grain):
    graph = with_attention(layer_graphs.gpt(blocks=8, tokens=128))
    ranks = 4 if schedule in ("1F1B", "GPipe") else 2
    free = layer_graphs.settings(4, ranks=ranks, schedule=schedule, num_microbatches=8, grain=grain)
    plain = plan(graph, free)
    limit = int(0.6 * max(sum(s.peak_bytes for s in plain.stages if s.rank == rank) for rank in range(ranks)))
    tight = dataclasses.replace(free, memory_limit=limit)
    with pytest.raises(InfeasibleError):
        plan(graph, tight)
    found = plan(graph, dataclasses.replace(tight, training=Training(recompute="auto")))
    assert any(stage.recompute for stage in found.stages)
    assert max(sum(s.peak_bytes for s in found.stages if s.rank == rank) for rank in range(ranks)) <= limit
    assert max(simulate(found).peak_bytes) <= limit
    everything = plan(graph, dataclasses.replace(tight, training=Training(recompute="block")))
    assert simulate(found).step_s <= simulate(everything).step_s


@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "DualPipeV"])
def test_where_nothing_can_be_recomputed_the_least_limit_is_named_and_works(schedule):
    graph = layer_graphs.gpt(blocks=8)
    made_for = layer_graphs.settings(
        4, ranks=2, schedule=schedule, grain="block", memory_limit=1000, training=Training(recompute="auto")
    )
    with pytest.raises(InfeasibleError) as caught:
        plan(graph, made_for)
    plan(graph, dataclasses.replace(made_for, memory_limit=caught.value.least_memory_limit))


def test_a_plan_that_does_not_fit_its_device_says_what_would_make_it_fit_and_what_that_costs():
    graph = with_attention(layer_graphs.gpt(blocks=8, tokens=128))
    free = layer_graphs.settings(4, grain="block")
    need = max(stage.peak_bytes for stage in plan(graph, free).stages)
    small = dataclasses.replace(free, hardware=layer_graphs.hardware(memory=0.8 * need))
    said = plan(graph, small).notes[-1]
    fitting = plan(graph, dataclasses.replace(
        small, training=Training(recompute="auto"), memory_limit=device_limit(small.hardware)
    ))  # fmt: skip
    more = simulate(fitting).step_s / simulate(plan(graph, free)).step_s - 1
    count = sum(len(stage.recompute) for stage in fitting.stages)
    assert said.startswith(f"recomputing {count} module")
    assert f"for a step {100 * more:+.1f} %" in said
    assert 'Training(recompute="auto"), memory_limit="device"' in said
    tiny = dataclasses.replace(free, hardware=layer_graphs.hardware(memory=0.01 * need))
    said = plan(graph, tiny).notes[-1]
    assert said.startswith("no recomputation makes it fit: no partition into 4 stages keeps")
    size = r"[\d.]+ [KMG]iB"
    assert re.search(rf"keeps memory_limit={size}: the least limit that works (is|found is) {size}(;|$)", said), said
    split = layer_graphs.settings(4, ranks=2, schedule="ZBVZeroBubble", hardware=small.hardware, grain="block")
    assert "ZBVZeroBubble splits the backward" in plan(graph, split).notes[-1]
    assert plan(graph, free).notes == ()


@settings(max_examples=200, deadline=None)
@given(chains(), st.sampled_from([3, 6, 12]), st.floats(0.3, 1.1), st.sampled_from([math.inf, 1e5]))
@example(([(3, 10, 5)] * 8, 2), 6, 0.6, math.inf)
@example(([(0, 0, 0)] * 8, 1), 3, 1.0, math.inf)
def test_cut_and_recomputation_are_as_fast_as_the_best_of_all_and_never_over_the_limit(chain, count, share, bandwidth):
    rows, stream = chain
    graph = chain_graph(rows, stream)
    made_for = layer_graphs.settings(
        3, num_microbatches=count, grain="block", training=Training(recompute="auto"),
        hardware=layer_graphs.hardware(link_bandwidth=bandwidth),
    )  # fmt: skip
    free = plan(graph, made_for)
    assert all(not stage.recompute for stage in free.stages)
    limit = max(math.ceil(share * max(stage.peak_bytes for stage in free.stages)), 1)
    made_for = dataclasses.replace(made_for, memory_limit=limit)
    best = exhaustive(rows, stream, layer_graphs.estimate(graph, made_for).costs, made_for)
    if best is None:
        with pytest.raises(InfeasibleError) as caught:
            plan(graph, made_for)
        assert caught.value.least_memory_limit > limit
        return
    found = plan(graph, made_for)
    assert max(stage.peak_bytes for stage in found.stages) <= limit
    assert simulate(found).step_s <= best * 1.01 + 1e-18
    assert found.training.recompute == "auto"
    assert PipelinePlan.from_json(found.to_json()) == found
