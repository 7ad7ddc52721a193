"""What limits a step, and what would help: each gain is that of a plan with the change."""

import dataclasses

import layer_graphs
import pytest

from fxpipe.ir.hardware import Training
from fxpipe.ir.plan import PipelinePlan, StagePlan
from fxpipe.planning.explain import explain
from fxpipe.planning.planner import plan_pipeline
from fxpipe.planning.simulation.simulate import simulate


def chain(*seconds, count=32):
    stages = tuple(
        StagePlan(index, index, (f"l{index}",), forward_s=s, backward_s=2 * s) for index, s in enumerate(seconds)
    )
    return PipelinePlan("Chain", "", stages, num_ranks=len(seconds), num_microbatches=count)


def gains(plan):
    return {change.what: change.gain for change in explain(plan).changes}


def test_a_short_step_is_limited_by_its_bubble_and_more_microbatches_help_by_what_they_give():
    plan = chain(1, 1, 1, 1, count=4)
    found = explain(plan)
    assert found.line.startswith("limited by the bubble; ")
    more = dataclasses.replace(plan, num_microbatches=8)
    gain = 1 - simulate(more).step_s / 8 * 4 / simulate(plan).step_s
    assert gains(plan)["4 more microbatches of this size"] == pytest.approx(gain)
    assert [change.gain for change in found.changes] == sorted((c.gain for c in found.changes), reverse=True)


def test_a_slow_stage_is_named_and_even_stages_help():
    plan = chain(1, 3, 1, count=64)
    assert "stage 1" in explain(plan).line
    even = chain(5 / 3, 5 / 3, 5 / 3, count=64)
    assert gains(plan)["stages of equal time"] == pytest.approx(1 - simulate(even).step_s / simulate(plan).step_s)


def test_links_that_limit_are_said_to():
    graph = layer_graphs.gpt(blocks=4)
    plan = layer_graphs.settings(4, hardware=layer_graphs.hardware(link_bandwidth=1e6), num_microbatches=64)
    made = plan_pipeline(graph, layer_graphs.estimate(graph, plan), dataclasses.replace(plan, grain="block"))
    assert explain(made).line.startswith("limited by links")


def test_recomputation_and_the_vocabulary_are_priced():
    graph = layer_graphs.gpt(blocks=8, vocab=16_384, hidden=64)
    made_for = layer_graphs.settings(4, grain="block", training=Training(recompute="block"), num_microbatches=32)
    plan = plan_pipeline(graph, layer_graphs.estimate(graph, made_for), made_for)
    plain = dataclasses.replace(made_for, training=Training())
    assert sum(stage.recompute_s for stage in plan.stages) == pytest.approx(
        sum(
            cost.forward_s
            for cost, block in zip(layer_graphs.estimate(graph, plain).costs, graph.blocks, strict=True)
            if block
        )
    )
    assert plan.stages[-1].head in ("lm_head", "loss")
    found = gains(plan)
    name = f"the vocabulary of {plan.stages[-1].head} split over the ranks (not built yet)"
    assert 0 < found[name] < 1
    assert PipelinePlan.from_json(plan.to_json()) == plan


def test_nothing_helps_a_perfect_single_stage():
    found = explain(chain(1, count=1))
    assert found.changes == ()
    assert "no change that was tried would help" in str(found)
