"""Schedule, microbatches and stages chosen by simulation, under a limit, and explained."""

import dataclasses
import math
import random

import layer_graphs
import pytest

import fxpipe
from fxpipe.errors import InfeasibleError, PartitionError, ScheduleError
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.schedule import SCHEDULES, schedule_named
from fxpipe.planning.configurations import (
    Configuration,
    Outcome,
    explain_choice,
    microbatch_counts,
    none_fits,
    ordered,
    outcome,
    shapes,
    sharpened,
)
from fxpipe.planning.costs.estimate import estimate_costs
from fxpipe.planning.planner import plan_pipeline
from fxpipe.planning.simulation.simulate import simulate

GRAPH = layer_graphs.gpt(blocks=8, tokens=128)
HARDWARE = layer_graphs.hardware()


def offer(_count):
    return GRAPH, layer_graphs.estimate(GRAPH, layer_graphs.settings(1, num_microbatches=1))


def tried(limit=None, training=None, count=8):
    wanted = [
        Configuration(stages, ranks, name, count, training or Training())
        for stages, ranks, name in shapes(stages=None, ranks=4, schedule=None)
    ]
    return [outcome(each, offer, HARDWARE, limit) for each in wanted]


def test_every_schedule_is_tried_and_the_fastest_that_fits_comes_first():
    found = tried()
    assert {each.configuration.schedule for each in found} == set(SCHEDULES)
    best = ordered(found)[0]
    assert best.step_s == min(each.step_s for each in found)
    assert best.step_s == fxpipe.simulate(best.plan).step_s
    limit = best.peak_bytes - 1
    again = ordered(tried(limit))
    assert again[0].fits
    assert again[0].peak_bytes <= limit < best.peak_bytes
    assert again[0].step_s == min(each.step_s for each in again if each.fits)


def chain(numbers, blocks):
    build = layer_graphs.Builder("Chain")
    x = None
    for index in range(blocks):
        work = numbers.choice([1, 2, 3, 5, 8, numbers.randint(1, 20)])
        weights = [("weight", (numbers.randint(1, 9),))]
        x = build.layer(
            f"h.{index}", [x] if x else [], (64,), weights, flops=work * 10**9, saves=[x] if x else [],
            saved_bytes=4, block=f"h.{index}",
        )  # fmt: skip
    return build.graph()


@pytest.mark.parametrize(
    ("seed", "blocks", "ranks", "count", "bandwidth"),
    # Found at random: with these another schedule was faster once it, too, was planned with all care, by 1.5 to 3.5 %.
    [(13, 16, 4, 16, math.inf), (18, 12, 2, 16, 1e5), (24, 24, 2, 4, math.inf)],
)
def test_what_is_chosen_is_as_fast_as_any_other_that_is_planned_with_all_care(seed, blocks, ranks, count, bandwidth):
    numbers = random.Random(seed)
    for options in ([8, 12, 16, 24], [2, 4], [4, 8, 16], [math.inf, 1e5]):
        numbers.choice(options)  # as when the case was found
    graph, hardware = chain(numbers, blocks), layer_graphs.hardware(link_bandwidth=bandwidth)
    estimate = layer_graphs.estimate(graph, layer_graphs.settings(ranks, grain="block", hardware=hardware))
    steps, found = {}, []
    for stages, on, name in shapes(stages=None, ranks=ranks, schedule=None):
        made = Configuration(stages, on, name, count)
        found.append(outcome(made, lambda _: (graph, estimate), hardware, None))
        made_for = layer_graphs.settings(
            stages, ranks=on, schedule=name, num_microbatches=count, grain="block", hardware=hardware
        )
        steps[made] = simulate(plan_pipeline(graph, estimate, made_for)).step_s
    best = sharpened(found, lambda _: (graph, estimate))[0].configuration
    assert steps[best] <= 1.005 * min(steps.values())


def test_what_was_chosen_is_explained_with_what_was_faster_and_does_not_fit():
    free = ordered(tried())[0]
    found = ordered(tried(free.peak_bytes - 1))
    said = explain_choice(found[0], found, ("schedule",))
    name = found[0].configuration.schedule
    assert said.startswith(f"chosen by simulation: {name} {1e6 * found[0].step_s:.0f} µs; runners-up: ")
    assert "\n" not in said
    if any(not each.fits and each.step_s < found[0].step_s for each in found):
        assert " MiB > " in said


def test_recomputation_is_chosen_where_that_makes_a_schedule_fit():
    plain = ordered(tried(training=Training()))
    limit = int(0.5 * min(each.peak_bytes for each in plain))
    assert not any(each.fits for each in tried(limit))
    with_it = ordered(tried(limit, Training(recompute="auto")))
    assert with_it[0].fits
    assert any(stage.recompute for stage in with_it[0].plan.stages)
    with pytest.raises(InfeasibleError, match=r"none of 10 configurations keeps .* per rank of custom: the nearest, "):
        raise none_fits(tried(limit), HARDWARE)


def test_where_nothing_can_be_planned_the_reasons_are_given():
    missing = Outcome(Configuration(4, 4, "1F1B", 3), problem="1F1B on 4 stages needs at least 4 microbatches, got 3")
    assert outcome(missing.configuration, offer, HARDWARE, None) == missing
    with pytest.raises(PartitionError, match="no configuration can be planned: 1F1B on 4 stages needs"):
        raise none_fits([missing], HARDWARE)


def test_numbers_of_microbatches_divide_the_batch_and_suit_the_schedule():
    assert microbatch_counts(24, 4, 4, "1F1B") == [4, 6, 8, 12, 24]
    counts = microbatch_counts(5040, 4, 4, "GPipe")
    assert len(counts) == 6
    assert all(5040 % count == 0 for count in counts)
    assert counts[-1] == 5040
    assert microbatch_counts(2, 4, 4, "1F1B") == []


# --- through compile ---


@pytest.fixture(scope="module")
def model():
    import torch
    from torch import nn

    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(256, 256) for _ in range(12))), (torch.zeros(64, 256, device="meta"),)


def compile(model, stages, **more):
    return fxpipe.compile(model[0], stages, model[1], **more)


def test_a_schedule_is_chosen_for_given_ranks(model):
    pipe = compile(model, "auto", ranks=4, schedule="auto", microbatches="auto")
    plan = pipe.plan
    assert plan.num_ranks == 4
    assert plan.notes[0].startswith(f"chosen by simulation: {plan.schedule}, {plan.num_stages} stages")
    others = [
        compile(model, stages, ranks=4, schedule=name, microbatches=plan.num_microbatches, grain="block")
        for stages, name in ((4, "1F1B"), (4, "GPipe"), (8, "ZBVZeroBubble"))
    ]
    assert fxpipe.simulate(plan).step_s <= min(fxpipe.simulate(other.plan).step_s for other in others) * (1 + 1e-12)


def test_the_fewest_stages_that_fit_are_taken(model):
    need = compile(model, 3).plan.stages
    limit = max(stage.peak_bytes for stage in need)
    plan = compile(model, "auto", memory_limit=limit).plan
    assert plan.num_stages <= 3
    assert max(stage.peak_bytes for stage in plan.stages) <= limit
    if plan.num_stages > 1:
        with pytest.raises(InfeasibleError):
            compile(model, plan.num_stages - 1, memory_limit=limit)
    assert "runners-up" in plan.notes[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"stages": "auto", "ranks": 4, "memory_limit": 1000}, InfeasibleError, "none of .* configurations? keeps"),
        ({"stages": "many"}, PartitionError, r"stages is 'many'\n  pass a whole number"),
        ({"stages": 4, "microbatches": "many"}, ScheduleError, r"microbatches is 'many'\n"),
        ({"stages": 4, "schedule": "auto", "microbatches": 7}, PartitionError, "no schedule can run a batch of 64"),
        ({"stages": 64, "schedule": "auto"}, PartitionError, "no configuration can be planned: cannot cut Sequential"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_one_clear_error(model, changes, error, message):
    changes = dict(changes)
    with pytest.raises(error, match=message):
        compile(model, changes.pop("stages"), **changes)


def test_outcomes_are_values():
    found = tried()[0]
    assert dataclasses.replace(found) == found


def test_the_best_configurations_are_cut_again_before_one_is_chosen():
    """Cut for the smallest stage, ZBVZeroBubble came behind Interleaved1F1B, LoopedBFS, 1F1B and GPipe."""
    graph = layer_graphs.llama(12, 1024, inner=2816, kv=256, tokens=2048)
    hardware = Hardware.preset("h100")
    estimate = estimate_costs(graph, "roofline", hardware, Training())
    limit = int(hardware.memory)
    ways = [Configuration(4 * (schedule_named(name).stages_per_rank or 1), 4, name, 8) for name in SCHEDULES]
    plain = [outcome(way, lambda _: (graph, estimate), hardware, limit) for way in ways]
    found = sharpened(plain, lambda _: (graph, estimate))
    before = {each.configuration: each.step_s for each in plain}
    assert all(each.step_s <= before[each.configuration] and each.fits for each in found)
    assert [each.configuration.schedule for each in found[:2]] == ["InterleavedZeroBubble", "ZBVZeroBubble"]
    assert [each.configuration.schedule for each in ordered(plain)].index("ZBVZeroBubble") > 1
    assert found == ordered(found)
    assert all(each.plan.memory_limit is None for each in found)  # they fit without being told
    assert all(each.step_s == simulate(each.plan).step_s for each in found)
