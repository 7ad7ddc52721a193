import collections
import types

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from fxpipe.errors import ScheduleError
from fxpipe.ir.schedule import (
    SCHEDULES,
    check_microbatches,
    default_ranks,
    fits_microbatches,
    least_microbatches,
    live_microbatches,
    live_sets,
    placement,
    schedule_named,
)

SHAPES = [
    (name, per_rank * ranks, ranks)
    for name, schedule in SCHEDULES.items()
    for per_rank in ([schedule.stages_per_rank] if schedule.stages_per_rank else [1, 2, 3])
    for ranks in (1, 2, 3, 4)
]


def torch_order(name, num_stages, num_ranks, num_microbatches):
    """torch's own order of work, ``{rank: [action, …]}``; ValueError where torch refuses."""
    ranks = placement(name, num_stages, num_ranks)
    stages = [
        types.SimpleNamespace(
            stage_index=i,
            num_stages=num_stages,
            group_rank=0,
            group_size=num_ranks,
            submod=None,
            is_first=i == 0,
            is_last=i == num_stages - 1,
        )
        for i in range(num_stages)
        if ranks[i] == 0
    ]
    cls = torch_schedules.get_schedule_class(name)
    if issubclass(cls, torch_schedules.PipelineScheduleSingle):
        return cls(stages[0], num_microbatches)._get_pipeline_order()
    return cls(stages, num_microbatches).pipeline_order


@pytest.mark.parametrize(("name", "num_stages", "num_ranks"), SHAPES)
def test_placement_and_microbatches_are_torchs(name, num_stages, num_ranks):
    for num_microbatches in range(1, 14):
        try:
            order = torch_order(name, num_stages, num_ranks, num_microbatches)
        except ValueError:
            assert not fits_microbatches(name, num_stages, num_ranks, num_microbatches)
            continue
        assert fits_microbatches(name, num_stages, num_ranks, num_microbatches)
        found = {action.stage_index: rank for rank, actions in order.items() for action in unfolded(actions)}
        assert tuple(found[stage] for stage in range(num_stages)) == placement(name, num_stages, num_ranks)


@pytest.mark.parametrize(("name", "num_stages", "num_ranks"), SHAPES)
def test_live_microbatches_are_those_of_torchs_order(name, num_stages, num_ranks):
    for num_microbatches in range(1, 14):
        if not fits_microbatches(name, num_stages, num_ranks, num_microbatches):
            continue
        alive, peak = collections.Counter(), collections.Counter()
        for actions in torch_order(name, num_stages, num_ranks, num_microbatches).values():
            for action in unfolded(actions):
                kind = action.computation_type.name
                alive[action.stage_index] += (kind == "FORWARD") - (kind in ("FULL_BACKWARD", "BACKWARD_WEIGHT"))
                peak[action.stage_index] = max(peak[action.stage_index], alive[action.stage_index])
        expected = tuple(peak[stage] for stage in range(num_stages))
        assert live_microbatches(name, num_stages, num_ranks, num_microbatches) == expected


@pytest.mark.parametrize(("name", "num_stages", "num_ranks"), SHAPES)
def test_no_rank_of_torchs_order_keeps_more_at_once_and_every_combination_occurs(name, num_stages, num_ranks):
    ranks = placement(name, num_stages, num_ranks)
    for num_microbatches in range(1, 14):
        if not fits_microbatches(name, num_stages, num_ranks, num_microbatches):
            continue
        predicted = live_sets(name, num_stages, num_ranks, num_microbatches)
        for rank, actions in torch_order(name, num_stages, num_ranks, num_microbatches).items():
            own = [stage for stage in range(num_stages) if ranks[stage] == rank]
            alive, seen = collections.Counter(), set()
            for action in unfolded(actions):
                kind = action.computation_type.name
                alive[action.stage_index] += (kind == "FORWARD") - (kind in ("FULL_BACKWARD", "BACKWARD_WEIGHT"))
                seen.add(tuple(alive[stage] for stage in own))
            assert set(predicted[rank]) <= seen
            for entry in seen:
                assert any(all(x <= y for x, y in zip(entry, most, strict=True)) for most in predicted[rank])


def unfolded(actions):
    for action in actions:
        if action is not None:
            yield from action.sub_actions or (action,)


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ScheduleError, match=r"'2F2B'\n.*GPipe, 1F1B"):
        schedule_named("2F2B")


@pytest.mark.parametrize(
    ("name", "num_stages", "num_ranks", "message"),
    [
        ("1F1B", 4, 2, r"exactly 1 stage per rank.*\n.*stages=2.*Interleaved1F1B"),
        ("ZBVZeroBubble", 4, 4, r"exactly 2 stages per rank.*\n.*stages=8.*GPipe"),
        ("LoopedBFS", 5, 2, r"equally many.*\n.*stages=6"),
        ("GPipe", 0, 1, "at least one"),
    ],
)
def test_stages_that_do_not_fit_the_ranks_are_refused(name, num_stages, num_ranks, message):
    with pytest.raises(ScheduleError, match=message):
        placement(name, num_stages, num_ranks)


def test_microbatches_that_do_not_fit_are_refused_with_the_nearest_that_do():
    with pytest.raises(ScheduleError, match=r"needs at least 4 microbatches, got 3\n.*drop_last=True"):
        check_microbatches("1F1B", 4, 4, 3)
    with pytest.raises(ScheduleError, match=r"cannot run 9 microbatches.*\n.*microbatches=8 or 12"):
        check_microbatches("Interleaved1F1B", 8, 4, 9)
    with pytest.raises(ScheduleError, match="at least 1"):
        check_microbatches("GPipe", 2, 2, 0)
    assert check_microbatches("GPipe", 2, 2, 5) is None
    assert least_microbatches("DualPipeV", 8) == 8


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_default_ranks_can_be_placed(name):
    for num_stages in (2, 4, 6, 8):
        assert len(placement(name, num_stages, default_ranks(name, num_stages))) == num_stages
