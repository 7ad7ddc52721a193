"""The simulator against the literature, against a plainer one, and in what must hold whatever the times."""

import dataclasses
import itertools
import math

import layer_graphs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_memory import TRAININGS, graphs

import fxpipe
from fxpipe.errors import PartitionError, PlanError, ScheduleError
from fxpipe.ir.orders import orders_of
from fxpipe.ir.plan import PipelinePlan, StagePlan, TieGroup
from fxpipe.ir.schedule import SCHEDULES, fits_microbatches, live_microbatches, placement, schedule_named
from fxpipe.planning.judge import step_s
from fxpipe.planning.planner import plan_of, solve_pipeline
from fxpipe.planning.simulation.engine import StageTimes
from fxpipe.planning.simulation.simulate import Reduction, simulate_stages, step_seconds
from tests.benchmarks.papers import ZERO_BUBBLE

EQUAL = StageTimes(1, 1, 1)


# --- what papers say ---


@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
@pytest.mark.parametrize(("ranks", "count"), [(2, 2), (4, 4), (4, 8), (8, 32)])
def test_gpipe_and_1f1b_take_ranks_less_one_microbatches_more_than_the_ideal(name, ranks, count):
    """Extra over the ideal, Megatron's definition: (P - 1) / M (arXiv 2104.04473, section 2.2)."""
    done = simulate_stages(name, [EQUAL] * ranks, ranks, count)
    assert done.step_s / (3 * count) - 1 == pytest.approx((ranks - 1) / count)


@pytest.mark.parametrize("per_rank", [1, 2, 4])
@pytest.mark.parametrize(("ranks", "count"), [(2, 2), (4, 8), (8, 16)])
def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank(ranks, count, per_rank):
    """Extra over the ideal: (P - 1) / (v M) (arXiv 2104.04473, section 2.3)."""
    done = simulate_stages("Interleaved1F1B", [EQUAL] * ranks * per_rank, ranks, count)
    assert done.step_s / (3 * per_rank * count) - 1 == pytest.approx((ranks - 1) / (per_rank * count))


@pytest.mark.parametrize(
    ("ranks", "count", "steps"), [(4, 8, (57, 57, 51, 51, 54)), (8, 16, (117, 117, 103, 103, 110))]
)
def test_two_stages_per_rank_take_what_torchs_action_lists_take(ranks, count, steps):
    """F = B = W = 1: extra over 6 M is 3 (P - 1), 3 (P - 1), P - 1, P - 1 and 2 (P - 1)."""
    names = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
    found = {name: simulate_stages(name, [EQUAL] * 2 * ranks, ranks, count) for name in names}
    assert tuple(done.step_s for done in found.values()) == steps
    assert found["ZBVZeroBubble"].window_s == 6 * count
    assert found["ZBVZeroBubble"].window_bubble == 0


@pytest.mark.parametrize("row", ZERO_BUBBLE, ids=lambda row: f"{row.model}-{row.microbatches}")
def test_the_bubble_of_1f1b_is_that_of_the_zero_bubble_paper(row):
    """Profiled times of four models on 8, 16 and 32 ranks (arXiv 2401.10241): to the four digits that it gives."""
    assert round(row.simulated(), 4) == row.bubble


@pytest.mark.parametrize("name", SCHEDULES)
def test_live_microbatches_are_those_of_the_formulas(name):
    per_rank = schedule_named(name).stages_per_rank or 2
    for ranks, count in ((2, 4), (4, 8), (4, 16), (6, 12)):
        found = simulate_stages(name, [EQUAL] * per_rank * ranks, ranks, count).stage_peaks
        assert found == live_microbatches(name, per_rank * ranks, ranks, count)
    peaks = simulate_stages(name, [EQUAL] * per_rank * 4, 4, 16).peak_microbatches
    assert (
        peaks
        == {
            "GPipe": (16, 16, 16, 16),  # all of them
            "1F1B": (4, 3, 2, 1),  # P - rank
            "Interleaved1F1B": (11, 9, 7, 5),  # (v - 1) P + 2 (P - rank - 1) + 1
            "LoopedBFS": (32, 32, 32, 32),
            "InterleavedZeroBubble": (8, 8, 8, 8),  # v P on every rank
            "ZBVZeroBubble": (8, 8, 8, 8),  # 2 P on every rank
            "DualPipeV": (9, 9, 9, 9),  # 2 P + 1
        }[name]
    )


# --- against a plainer simulator ---


def plain_step_s(name, times, ranks, count):
    """The longest path through the actions, found by asking for ends recursively; messages are free."""
    place = placement(name, len(times), ranks)
    seconds = {
        (stage, kind): value
        for stage, t in enumerate(times)
        for kind, value in zip(
            "FBIW", (t.forward_s, t.input_grad_s + t.weight_grad_s, t.input_grad_s, t.weight_grad_s), strict=True
        )
    }
    orders = orders_of(name, len(times), ranks, count)
    before = {action: previous for order in orders for previous, action in zip([None, *order], order, strict=False)}
    behind = {(stage, index): (stage, kind, index) for stage, kind, index in before if kind in "BI"}
    pairs = name == "DualPipeV"
    after = {previous: action for action, previous in before.items()}

    ends = {}

    def end(action):
        if action not in ends:
            ends[action] = start(action) + seconds[action[0], action[1]]
        return ends[action]

    def sent(action, to):
        """When a message leaves: behind the whole backward that DualPipeV pairs a forward with."""
        follower = after.get(action)
        held = pairs and action[1] == "F" and follower is not None and follower[1] == "B"
        return end(follower) if held and place[to] != place[action[0]] else end(action)

    def start(action):
        stage, kind, index = action
        known = [0.0] if before[action] is None else [end(before[action])]
        if kind == "F" and stage:
            known.append(sent((stage - 1, "F", index), stage))
        if kind in "BI" and stage < len(times) - 1:
            known.append(end(behind[stage + 1, index]))
        return max(known)

    return max(end(order[-1]) for order in orders)


# What the property tests draw from: all schedules, 1 to 4 ranks of 1 to 3 stages, 1 to 16 microbatches. Seconds of each
# phase and of each message apart, 0 to 20 and whole, so that sums are exact; links are free, cheap, and dearer than
# work. What is negative or not finite is refused.
NUMBERS = st.integers(0, 20).map(float)


@st.composite
def cases(draw, most_ranks=4):
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    ranks = draw(st.integers(1, most_ranks))
    stages = ranks * (schedule_named(name).stages_per_rank or draw(st.integers(1, 3)))
    count = draw(st.sampled_from([m for m in range(1, 17) if fits_microbatches(name, stages, ranks, m)]))
    times = [StageTimes(*(draw(NUMBERS) for _ in range(5))) for _ in range(stages)]
    return name, times, ranks, count


@settings(max_examples=150, deadline=None)
@given(cases())
@example(("DualPipeV", [EQUAL] * 8, 4, 8))
def test_without_messages_the_step_is_the_longest_path(case):
    name, times, ranks, count = case
    free = [dataclasses.replace(time, send_s=0, return_s=0) for time in times]
    assert step_seconds(name, free, ranks, count) == plain_step_s(name, free, ranks, count)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_no_action_begins_before_its_input_and_ranks_do_one_thing_at_a_time(case):
    name, times, ranks, count = case
    done = simulate_stages(name, times, ranks, count)
    place = placement(name, len(times), ranks)
    ends = {}
    for events in done.timeline:
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(events))
        ends.update({(event.stage, event.kind, event.microbatch): event.end_s for event in events})
    for event in (event for events in done.timeline for event in events):
        stage, index = event.stage, event.microbatch
        if event.kind == "F" and stage:
            move = times[stage - 1].send_s if place[stage] != place[stage - 1] else 0
            assert event.start_s >= ends[stage - 1, "F", index] + move
        elif event.kind in "BI" and stage < len(times) - 1:
            move = times[stage].return_s if place[stage] != place[stage + 1] else 0
            ended = [ends[key] for key in ((stage + 1, kind, index) for kind in "BI") if key in ends]
            assert event.start_s >= ended[0] + move
        elif event.kind in "BI":
            assert event.start_s >= ends[stage, "F", index]
    assert done.step_s >= max(ends.values())
    assert done.step_s == step_seconds(name, times, ranks, count)


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_a_longer_layer_never_shortens_the_step_and_a_free_link_never_lengthens_it(case, data):
    name, times, ranks, count = case
    step_s = step_seconds(name, times, ranks, count)
    stage = data.draw(st.integers(0, len(times) - 1))
    field = data.draw(st.sampled_from([field.name for field in dataclasses.fields(StageTimes)]))
    more = getattr(times[stage], field) + data.draw(NUMBERS)
    longer = [*times[:stage], dataclasses.replace(times[stage], **{field: more}), *times[stage + 1 :]]
    assert step_seconds(name, longer, ranks, count) >= step_s
    free = [*times[:stage], dataclasses.replace(times[stage], send_s=0, return_s=0), *times[stage + 1 :]]
    assert step_seconds(name, free, ranks, count) <= step_s


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_memory_is_never_below_what_is_held_and_all_is_given_back(case, data):
    name, times, ranks, count = case
    sizes = tuple(data.draw(st.integers(0, 9)) for _ in times)
    stages = tuple(
        StagePlan(
            index, rank, (f"l{index}",), forward_s=t.forward_s, backward_s=t.input_grad_s + t.weight_grad_s,
            weight_grad_s=t.weight_grad_s, activation_bytes=size, peak_bytes=1000,
        )
        for index, (rank, t, size) in enumerate(zip(placement(name, len(times), ranks), times, sizes, strict=True))
    )  # fmt: skip
    plan = PipelinePlan("Chain", "", stages, num_ranks=ranks, schedule=name, num_microbatches=count)
    done = fxpipe.simulate(plan)
    for rank, curve in enumerate(done.memory):
        own = sum(stage.peak_bytes for stage in stages if stage.rank == rank)
        assert curve[0][0] == 0
        assert all(nbytes >= done.static_bytes[rank] >= 0 for _, nbytes in curve)
        assert curve[-1][1] == done.static_bytes[rank]
        if max(t.compute_s for t in times):  # else all happens at once
            assert done.peak_bytes[rank] <= own
        if min(min(t.forward_s, t.input_grad_s, t.weight_grad_s) for t in times):
            assert done.peak_bytes[rank] == own


# --- links ---


def test_the_schedules_of_one_stage_wait_for_what_they_receive_and_1f1b_for_what_it_sends():
    """Two stages, two microbatches, F = B + W = 2, a message of 1.

    GPipe asks for an activation when it needs it: that of F1 is there at 4 and moves from 5 to 6.
    """
    times = [StageTimes(2, 2, 0, 1, 1)] * 2
    gpipe = simulate_stages("GPipe", times, 2, 2)
    assert [[event.start_s for event in events] for events in gpipe.timeline] == [[0, 2, 11, 14], [3, 6, 8, 10]]
    # 1F1B: F1's activation and the first gradient cross at once; each rank waits for both.
    turns = simulate_stages("1F1B", times, 2, 2)
    assert [[event.start_s for event in events] for events in turns.timeline] == [[0, 2, 8, 13], [3, 5, 8, 10]]


def test_one_link_carries_one_message_at_a_time():
    """Stages 0, 2 and 1, 3 on two ranks: activations of stages 0 and 2 share the link from rank 0 to rank 1."""
    times = [StageTimes(1, 1, 0, send_s=10, return_s=0)] * 4
    done = simulate_stages("LoopedBFS", times, 2, 4)
    begun = {(e.stage, e.microbatch): e.start_s for e in done.timeline[1] if e.kind == "F"}
    assert [begun[1, index] for index in range(4)] == [11, 21, 31, 41]
    assert [begun[3, index] for index in range(4)] == [51, 61, 71, 81]  # each behind the one before


def test_gradients_are_added_up_when_all_holders_are_done_one_after_the_other():
    times = [EQUAL] * 4
    alone = step_seconds("1F1B", times, 4, 8)
    assert step_seconds("1F1B", times, 4, 8, [Reduction((0, 3), 2.0), Reduction((0, 1), 3.0)]) == alone + 5.0
    assert step_seconds("1F1B", times, 4, 8, [Reduction((2, 3), 1.0)]) == alone  # done before the first rank is


# --- plans ---


def chain(name="1F1B", ranks=4, per_rank=1, count=8, **changes):
    place = placement(name, ranks * per_rank, ranks)
    stages = tuple(
        StagePlan(index, rank, (f"l{index}",), forward_s=1.0, backward_s=2.0, weight_grad_s=1.0)
        for index, rank in enumerate(place)
    )
    return dataclasses.replace(
        PipelinePlan("Chain", "", stages, num_ranks=ranks, schedule=name, num_microbatches=count), **changes
    )


@pytest.mark.parametrize(("name", "step_s"), [("1F1B", 33), ("InterleavedZeroBubble", 51), ("ZBVZeroBubble", 51)])
def test_a_plan_is_simulated_from_its_seconds_also_from_json(name, step_s):
    plan = chain(name, per_rank=1 if name == "1F1B" else 2)
    done = fxpipe.simulate(PipelinePlan.from_json(plan.to_json()))
    assert done == fxpipe.simulate(plan)
    assert done.step_s == step_s
    assert done.bubble == tuple(1 - done.busy_s[0] / step_s for _ in range(4))


def test_ties_are_added_up_once():
    tie = TieGroup("a", ("a", "b"), (0, 3), 8, 0.5)
    assert fxpipe.simulate(chain(ties=(tie,))).step_s == 33.5
    assert fxpipe.simulate(chain(ties=(dataclasses.replace(tie, trainable=False),))).step_s == 33


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_times_that_are_none_are_refused_by_name(wrong):
    plan = chain()
    stages = (*plan.stages[:2], dataclasses.replace(plan.stages[2], forward_s=wrong), plan.stages[3])
    with pytest.raises(PlanError, match=rf"forward_s of stage 2 is {wrong}\n  "):
        fxpipe.simulate(dataclasses.replace(plan, stages=stages))
    with pytest.raises(PlanError, match=r"simulate\(\) got str\n  pass a plan"):
        fxpipe.simulate("plan.json")
    with pytest.raises(PlanError, match=r"adding up gradients of ranks \(0, 3\) takes"):
        fxpipe.simulate(chain(ties=(TieGroup("a", ("a", "b"), (0, 3), 8, -1.0),)))


def test_a_schedule_that_cannot_run_so_many_microbatches_is_refused():
    with pytest.raises(ScheduleError, match="needs at least 4 microbatches, got 3"):
        fxpipe.simulate(chain(count=3))


# --- partitions, before there is a plan ---


@settings(max_examples=60, deadline=None)
@given(graphs(), TRAININGS, st.integers(2, 3), st.sampled_from(["1F1B", "GPipe", "Interleaved1F1B"]))
def test_a_partition_is_judged_by_the_step_of_its_plan(graph, training, stages, schedule):
    made_for = layer_graphs.settings(
        stages, schedule=schedule, training=training, hardware=layer_graphs.hardware(link_bandwidth=1e4), grain="op"
    )
    estimate = layer_graphs.estimate(graph, made_for)
    try:
        layout, solution = solve_pipeline(graph, estimate, made_for)
    except PartitionError:
        return
    found = step_s(layout, solution.partition.stage_of)
    assert found == pytest.approx(fxpipe.simulate(plan_of(layout, solution, estimate)).step_s, rel=1e-12)
