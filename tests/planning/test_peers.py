"""Others' rules, against what their authors say and against the plan."""

from __future__ import annotations

import itertools
import math

import layer_graphs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpipe.ir.hardware import Hardware
from fxpipe.planning.judge import step_s
from fxpipe.planning.layout import make_layout
from fxpipe.planning.peers import (
    NoCutError,
    balanced,
    block_partition,
    counted,
    divided,
    modules_of,
    partitions,
    peer_baselines,
    uniform,
)
from fxpipe.planning.planner import plan_of, plan_pipeline, solve_pipeline
from fxpipe.planning.simulation.simulate import simulate
from fxpipe.planning.solve import EVENNESS

SIZES = st.lists(st.integers(0, 20), min_size=1, max_size=9)


def parts(sizes, cuts):
    return [sum(sizes[start:stop]) for start, stop in itertools.pairwise(cuts)]


@settings(deadline=None)
@given(SIZES, st.integers(1, 6))
def test_every_rule_cuts_the_whole_list_into_so_many_stages(sizes, stages):
    for cuts in (uniform(len(sizes), stages), balanced(sizes, stages)):
        assert (cuts[0], cuts[-1], len(cuts)) == (0, len(sizes), stages + 1)
        assert cuts == sorted(cuts)
    if stages <= len(sizes):
        cuts = block_partition(sizes, stages)
        assert (cuts[0], cuts[-1], len(cuts)) == (0, len(sizes), stages + 1)


@settings(deadline=None)
@given(SIZES, st.integers(1, 5))
def test_balanced_keeps_one_cut_of_least_difference_for_two_parts(sizes, stages):
    if len(sizes) <= 2:
        return
    best = min(abs(sum(sizes[:cut]) - sum(sizes[cut:])) for cut in range(1, len(sizes)))
    one, other = parts(sizes, balanced(sizes, 2))
    assert abs(one - other) == best


@settings(deadline=None)
@given(SIZES, st.integers(1, 6))
def test_block_partition_stops_within_one_module_of_even(sizes, stages):
    if stages > len(sizes):
        with pytest.raises(NoCutError, match=f"needs {stages} modules"):
            block_partition(sizes, stages)
        return
    spread = max(sizes) - min(sizes)
    scaled = [(size - min(sizes)) / spread if spread else 0 for size in sizes]
    found = parts(scaled, block_partition(sizes, stages))
    assert max(found) <= min(found) + 1 + 1e-9  # sums of ninths and the like


def test_counting_gives_ends_one_block_less():
    blocks = [False] + [True] * 30 + [False, False]
    assert parts([int(block) for block in blocks], counted(blocks, 4)) == [7, 8, 8, 7]
    assert parts([int(block) for block in blocks], divided(blocks, 3)) == [10, 10, 10]
    with pytest.raises(NoCutError, match="multiple of 4 blocks, not 30"):
        divided(blocks, 4)
    with pytest.raises(NoCutError, match="the model has none"):
        counted([False, False], 2)


def test_a_stage_may_stay_empty_under_block_partition():
    assert block_partition([1, 1, 3, 4], 3) == [0, 3, 3, 4]


def test_units_are_the_blocks_and_what_has_weights_beside_them():
    graph = layer_graphs.gpt(blocks=3)
    made_for = layer_graphs.settings(2)
    layout = make_layout(graph, layer_graphs.estimate(graph, made_for), made_for)
    units = modules_of(layout)
    assert [unit.name for unit in units] == ["wte", "h.0", "h.1", "h.2", "ln_f", "lm_head"]
    assert [unit.is_repeated for unit in units] == [False, True, True, True, False, False]
    assert sorted(node for unit in units for node in unit.nodes) == list(range(len(layout.layers)))
    assert math.fsum(unit.seconds for unit in units) == pytest.approx(math.fsum(layout.problem.seconds))
    assert units[-1].parameters == 512 * 64


@pytest.mark.parametrize("hardware", ["free", "h100", "slow"])
@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("model", ["gpt", "llama", "unet"])
def test_no_rule_cuts_better_than_the_plan(model, stages, hardware):
    graph = {
        "gpt": lambda: layer_graphs.gpt(blocks=12, hidden=128),
        "llama": lambda: layer_graphs.llama(8, 256, 4096, 128, 1024, 64),
        "unet": lambda: layer_graphs.unet(5, 16, 128),
    }[model]()
    links = {
        "free": layer_graphs.hardware(),
        "h100": Hardware.preset("h100"),
        "slow": layer_graphs.hardware(link_bandwidth=1e9),
    }
    made_for = layer_graphs.settings(stages, hardware=links[hardware])
    estimate = layer_graphs.estimate(graph, made_for)
    found = plan_pipeline(graph, estimate, made_for)
    rows = peer_baselines(make_layout(graph, estimate, made_for))
    assert [row.name for row in rows] == [
        "DeepSpeed parameters",
        "DeepSpeed uniform",
        "torchtitan",
        "Megatron",
        "torchgpipe",
    ]
    cut = [row for row in rows if row.bottleneck is not None]
    assert len(cut) >= 3
    layout = make_layout(graph, estimate, made_for)
    assert all(step_s(layout, other) >= simulate(found).step_s * (1 - 1e-9) for other in partitions(layout))
    _, least = solve_pipeline(graph, estimate, made_for, simulated=False)
    for row in cut:
        assert least.bottleneck <= row.bottleneck * (1 + 1e-9)
        assert row.balance >= 1 - 1e-12
        assert len(row.stages) == stages
    for row in rows:
        assert (row.bottleneck is None) <= bool(row.remark)


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "LoopedBFS", "ZBVZeroBubble"])
def test_rows_and_plan_are_both_of_ranks_where_they_have_several_stages(schedule):
    graph = layer_graphs.gpt(blocks=24, whole=True)
    made_for = layer_graphs.settings(8, ranks=4, schedule=schedule, grain="block")
    estimate = layer_graphs.estimate(graph, made_for)
    layout = make_layout(graph, estimate, made_for)
    seconds = {unit.name: unit.seconds for unit in modules_of(layout)}
    rank_of = made_for.rank_of_stage
    found = plan_of(*solve_pipeline(graph, estimate, made_for, simulated=False), estimate)
    loads = [math.fsum(stage.seconds for stage in found.stages if stage.rank == rank) for rank in range(4)]
    assert found.bottleneck == pytest.approx(max(loads), rel=1e-12)
    rows = [row for row in peer_baselines(layout) if row.bottleneck is not None]
    assert len(rows) == 5
    for row in rows:
        of_stage = [math.fsum(seconds[name] for name in names) for names in row.stages]
        of_rank = [math.fsum(of_stage[stage] for stage in range(8) if rank_of[stage] == rank) for rank in range(4)]
        assert max(of_stage) < row.bottleneck == pytest.approx(max(of_rank), rel=1e-12)
        assert row.balance == pytest.approx(max(of_rank) / (math.fsum(of_rank) / 4), rel=1e-12)
        assert found.bottleneck <= row.bottleneck * (1 + EVENNESS)
