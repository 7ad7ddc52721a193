"""The order in which each rank works under each schedule: the action lists that torch's engine runs.

Made anew from the definitions of the schedules, since torch's own lists come with its engine (and lowering them takes
longer than linear time); ``tests/ir/test_orders.py`` holds them equal. Sources: GPipe, arXiv 1811.06965; 1F1B,
arXiv 1806.03377; interleaving, arXiv 2104.04473; breadth first, arXiv 2211.05953; split backward and its V form,
arXiv 2401.10241 and 2405.15362; DualPipe, arXiv 2412.19437.
"""

from __future__ import annotations

from typing import Literal

from fxpipe.ir.schedule import check_microbatches, placement, schedule_named

Kind = Literal["F", "B", "I", "W"]
"""Forward, whole backward, gradients of the inputs, gradients of the weights."""

Action = tuple[int, Kind, int]
"""Stage, kind and microbatch; a plain tuple, since a step may have millions."""

Order = list[Action]


def action_text(action: Action) -> str:
    """Write an action as torch does.

    >>> action_text((2, "F", 0))
    '2F0'
    """
    stage, kind, microbatch = action
    return f"{stage}{kind}{microbatch}"


def orders_of(name: str, num_stages: int, num_ranks: int, num_microbatches: int) -> list[Order]:
    """Give for each rank what it computes, in order.

    Forwards and backwards that DualPipeV means to overlap follow each other, as torch runs them.

    Args:
        name: The schedule.
        num_stages: Stages of the pipeline.
        num_ranks: Ranks that run them.
        num_microbatches: Microbatches of a step.

    Returns:
        One list of actions for each rank.

    Raises:
        ScheduleError: The schedule cannot run so many stages or microbatches.

    >>> [" ".join(map(action_text, order)) for order in orders_of("1F1B", 2, 2, 3)]
    ['0F0 0F1 0B0 0F2 0B1 0B2', '1F0 1B0 1F1 1B1 1F2 1B2']
    """
    schedule = schedule_named(name)
    placement(name, num_stages, num_ranks)
    check_microbatches(name, num_stages, num_ranks, num_microbatches)
    if name == "GPipe":
        return [_gpipe(rank, num_microbatches) for rank in range(num_ranks)]
    if name == "1F1B":
        return [_one_by_one(rank, num_ranks, num_microbatches) for rank in range(num_ranks)]
    if name == "LoopedBFS":
        return [_breadth_first(rank, num_stages, num_ranks, num_microbatches) for rank in range(num_ranks)]
    if name == "ZBVZeroBubble":
        return [_zero_bubble_v(rank, num_ranks, num_microbatches) for rank in range(num_ranks)]
    if name == "DualPipeV":
        return [_DualPipe(rank, num_ranks, num_microbatches).order() for rank in range(num_ranks)]
    split = schedule.splits_backward
    return [_interleaved(rank, num_stages, num_ranks, num_microbatches, split=split) for rank in range(num_ranks)]


def _gpipe(stage: int, num_microbatches: int) -> Order:
    forwards: Order = [(stage, "F", index) for index in range(num_microbatches)]
    return [*forwards, *((stage, "B", index) for index in range(num_microbatches))]


def _one_by_one(stage: int, num_stages: int, num_microbatches: int) -> Order:
    ahead = min(num_microbatches, num_stages - stage)
    order: Order = [(stage, "F", index) for index in range(ahead)]
    for index in range(num_microbatches):
        order.append((stage, "B", index))
        if ahead + index < num_microbatches:
            order.append((stage, "F", ahead + index))
    return order


def _breadth_first(rank: int, num_stages: int, num_ranks: int, num_microbatches: int) -> Order:
    stages = range(rank, num_stages, num_ranks)
    order: Order = [(stage, "F", index) for stage in stages for index in range(num_microbatches)]
    order += [(stage, "B", index) for stage in reversed(stages) for index in reversed(range(num_microbatches))]
    return order


def _interleaved(rank: int, num_stages: int, num_ranks: int, num_microbatches: int, *, split: bool) -> Order:
    """Warm-up forwards, then forward and backward by turns, then backwards; microbatches pass in rounds.

    With a split backward, the weight gradients trail the input gradients by ``rank`` backwards.
    """
    local = num_stages // num_ranks
    round_size = num_microbatches // max(1, num_microbatches // num_ranks)
    total = local * num_microbatches
    warm_up = min((local - 1) * round_size + (1 if split else 2) * (num_ranks - 1 - rank), total)

    def turn(step: int, *, backward: bool) -> tuple[int, int]:
        place = step // round_size % local
        stage = (local - 1 - place if backward else place) * num_ranks + rank
        return stage, step // (round_size * local) * round_size + step % round_size

    forwards = [turn(step, backward=False) for step in range(total)]
    backwards = [turn(step, backward=True) for step in range(total)]
    order: Order = [(stage, "F", index) for stage, index in forwards[:warm_up]]
    waiting = 0  # weight gradients done so far
    for step, (stage, index) in enumerate(backwards):
        if warm_up + step < total:
            order.append((forwards[warm_up + step][0], "F", forwards[warm_up + step][1]))
        order.append((stage, "I" if split else "B", index))
        if split and step >= rank:
            order.append((backwards[waiting][0], "W", backwards[waiting][1]))
            waiting += 1
    if split:
        order += [(stage, "W", index) for stage, index in backwards[waiting:]]
    return order


def _zero_bubble_v(rank: int, num_ranks: int, num_microbatches: int) -> Order:
    """Down the ranks and up again; actions of microbatches that are not there are left out."""
    count = max(2 * num_ranks - 1, num_microbatches)
    down, up = rank, 2 * num_ranks - 1 - rank
    order: Order = []
    made = {(stage, kind): 0 for stage in (down, up) for kind in "FIW"}

    def add(stage: int, kinds: str) -> None:
        for kind in kinds:
            index = made[stage, kind]
            made[stage, kind] = index + 1
            if index < num_microbatches:
                order.append((stage, kind, index))  # type: ignore[arg-type]  # one of the letters

    for _ in range(2 * (num_ranks - rank) - 1):
        add(down, "F")
    for _ in range(rank):
        add(up, "F")
        add(down, "F")
    for _ in range(num_ranks - rank):
        add(up, "FIW")
    while made[up, "F"] < made[down, "F"] or made[down, "F"] < count:
        if made[down, "F"] < count:
            add(down, "F")
        add(down, "IW")
        add(up, "FIW")
    for _ in range(rank):
        add(down, "I")
        add(up, "I")
    for _ in range(num_ranks - rank):
        add(down, "IW")
    for stage in (up, down):
        while made[stage, "W"] < made[stage, "I"]:
            add(stage, "W")
    return order


class _DualPipe:
    """One rank's order of DualPipeV, in the eight steps of its authors' code (``deepseek-ai/DualPipe``)."""

    def __init__(self, rank: int, num_ranks: int, num_microbatches: int) -> None:
        self._rank, self._num_ranks, self._num_microbatches = rank, num_ranks, num_microbatches
        self._down, self._up = rank, 2 * num_ranks - 1 - rank
        self._order: Order = []
        self._forwards = {self._down: 0, self._up: 0}
        self._backwards = {self._down: 0, self._up: 0}
        self._waiting: list[tuple[int, int]] = []

    def order(self) -> Order:
        """Give the actions in order."""
        rank, behind, down, up = self._rank, self._num_ranks - self._rank - 1, self._down, self._up
        for _ in range(2 * behind):
            self._forward(down)
        for _ in range(rank + 1):
            self._forward(down)
            self._forward(up)
        for _ in range(behind):
            self._backward(up, split=True)
            self._weight()
            self._forward(up)
        for _ in range(self._num_microbatches - 2 * self._num_ranks + rank + 1):
            self._forward(down)
            self._backward(up)
            self._forward(up)
            self._backward(down)
        for _ in range(behind):
            self._backward(up)
            self._forward(up)
            self._backward(down)
        # The second half of what is left splits the backward; odd ranks begin one action earlier.
        half, split = (rank + 1) // 2, False
        for index in range(rank + 1):
            split = split or (index == half and rank % 2 == 1)
            self._backward(up, split=split)
            split = split or (index == half and rank % 2 == 0)
            self._backward(down, split=split)
        for _ in range(behind):
            self._weight()
            self._backward(down, split=split)
        for _ in range(rank + 1):
            self._weight()
        return self._order

    def _forward(self, stage: int) -> None:
        self._order.append((stage, "F", self._forwards[stage]))
        self._forwards[stage] += 1

    def _backward(self, stage: int, *, split: bool = False) -> None:
        index = self._backwards[stage]
        self._backwards[stage] += 1
        self._order.append((stage, "I" if split else "B", index))
        if split:
            self._waiting.append((stage, index))

    def _weight(self) -> None:
        if self._waiting:
            stage, index = self._waiting.pop(0)
            self._order.append((stage, "W", index))
