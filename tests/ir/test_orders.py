"""Our action lists beside torch's."""

import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from fxpipe.errors import ScheduleError
from fxpipe.ir.orders import action_text, orders_of
from fxpipe.ir.schedule import SCHEDULES, fits_microbatches, placement, schedule_named


class Recorder:
    """A stage that writes down what torch's single-stage schedules have it do, and exchanges nothing."""

    submod = None

    def __init__(self, index, num_stages):
        self.stage_index, self.num_stages = index, num_stages
        self.group_rank, self.group_size = index, num_stages
        self.is_first, self.is_last, self.has_backward = index == 0, index == num_stages - 1, True
        self.done = []

    def forward_one_chunk(self, index, *_args, **_options):
        self.done.append(f"{self.stage_index}F{index}")

    def backward_one_chunk(self, index, **_options):
        self.done.append(f"{self.stage_index}B{index}")

    def get_fwd_recv_ops(self, _index):
        return []

    get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = get_fwd_recv_ops

    def perform_reduce_grad(self, _factor):
        pass


def as_run(cls, num_stages, num_microbatches):
    """What each rank really does: its step on stages that record, since torch's drawn order of 1F1B is another."""
    found = []
    for rank in range(num_stages):
        stage = Recorder(rank, num_stages)
        schedule = cls(stage, num_microbatches)
        schedule._stage_initialized = schedule._stage_forward_initialized = True
        schedule._initialize_stage = lambda *_: None
        nothing = [()] * num_microbatches
        schedule._step_microbatches(nothing, [{}] * num_microbatches)
        found.append(stage.done)
    return found


def as_planned(cls, num_stages, num_ranks, num_microbatches, ranks):
    """Torch's lists for all ranks, without the lowering to messages, which takes longer than linear time."""
    stages = [
        types.SimpleNamespace(
            stage_index=stage, num_stages=num_stages, group_rank=0, group_size=num_ranks, submod=None,
            is_first=stage == 0, is_last=stage == num_stages - 1,
        )
        for stage in range(num_stages) if ranks[stage] == 0
    ]  # fmt: skip
    quick = type("Quick", (cls,), {"_prepare_schedule_with_comms": lambda *_args, **_options: None})
    order = quick(stages, num_microbatches).pipeline_order
    return [[str(action) for action in unfolded(order[rank])] for rank in range(num_ranks)]


def unfolded(actions):
    for action in actions:
        if action is not None:
            yield from action.sub_actions or (action,)


SHAPES = [
    (name, per_rank * ranks, ranks)
    for name, schedule in SCHEDULES.items()
    for per_rank in ([schedule.stages_per_rank] if schedule.stages_per_rank else [1, 2, 3])
    for ranks in range(1, 9)
]


@pytest.mark.parametrize(("name", "num_stages", "num_ranks"), SHAPES)
def test_the_orders_are_torchs_up_to_8_ranks_and_32_microbatches(name, num_stages, num_ranks):
    cls = torch_schedules.get_schedule_class(name)
    ranks = placement(name, num_stages, num_ranks)
    tried = 0
    for num_microbatches in range(1, 33):
        if not fits_microbatches(name, num_stages, num_ranks, num_microbatches):
            continue
        tried += 1
        if schedule_named(name).stages_per_rank == 1:
            expected = as_run(cls, num_stages, num_microbatches)
        else:
            expected = as_planned(cls, num_stages, num_ranks, num_microbatches, ranks)
        found = orders_of(name, num_stages, num_ranks, num_microbatches)
        assert [[*map(action_text, order)] for order in found] == expected
    assert tried


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 20), st.integers(1, 3), st.integers(1, 80))
def test_every_microbatch_goes_once_forward_and_once_backward_through_every_stage(name, ranks, per_rank, count):
    schedule = schedule_named(name)
    num_stages = ranks * (schedule.stages_per_rank or per_rank)
    if not fits_microbatches(name, num_stages, ranks, count):
        with pytest.raises(ScheduleError):
            orders_of(name, num_stages, ranks, count)
        return
    place = placement(name, num_stages, ranks)
    done = {}
    for rank, order in enumerate(orders_of(name, num_stages, ranks, count)):
        for stage, kind, index in order:
            assert place[stage] == rank
            done.setdefault((stage, index), []).append(kind)
    assert len(done) == num_stages * count
    assert {"".join(kinds) for kinds in done.values()} <= {"FB", "FIW"}
