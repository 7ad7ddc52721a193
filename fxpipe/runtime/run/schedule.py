"""torch's schedules: the order in which the stages of a rank work."""

from __future__ import annotations

import gc
import inspect
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.distributed.pipelining import schedules

from fxpipe.ir.schedule import schedule_named


def make_schedule(name: str, stages: Sequence[Any], num_microbatches: int, *, defer_recv: bool = False) -> Any:
    """Make torch's schedule object for a number of microbatches.

    Args:
        name: The schedule.
        stages: This rank's stages, ascending.
        num_microbatches: Microbatches per step; ``check_microbatches`` passed.
        defer_recv: Whether receives are posted late; only where a rank may have several stages, and torch knows how
            (``defer_pp_recv``, from 2.13).
    """
    kind: Any = schedules.get_schedule_class(name)
    # The engine's stages weigh and keep the losses; the schedule only has to know that there is a backward.
    options: dict[str, Any] = {"loss_fn": lambda _output, _target: None, "scale_grads": False}
    if schedule_named(name).stages_per_rank == 1:
        return kind(stages[0], num_microbatches, **options)
    if defer_recv and "defer_pp_recv" in inspect.signature(kind).parameters:
        options["defer_pp_recv"] = True
    schedule = kind(list(stages), num_microbatches, **options)
    if defer_recv:
        keep_messages_in_order(schedule.pipeline_order_with_comms, schedule.stage_index_to_group_rank)
    return schedule


def keep_messages_in_order(orders: dict[int, list[Any]], rank_of: Mapping[int, int]) -> None:
    """Let every rank receive from another in the order in which that one sends.

    Messages between two ranks carry no name: what is sent first is received first. ``defer_pp_recv`` of torch 2.13
    sorts receives by when they are needed, and where two streams of messages run between two ranks (activations of one
    stage, gradients of another) it mixes them up: silently, as long as their sizes are the same. A receive that comes
    too late moves up to the next one from the same rank; none moves down.

    Args:
        orders: Each rank's actions; changed in place.
        rank_of: Rank of each stage.
    """
    sent: dict[tuple[int, int], list[str]] = {}
    for rank, actions in orders.items():
        for action in actions:
            step = {"SEND_F": 1, "SEND_B": -1}.get(action.computation_type.value, 0)
            if step:
                stage = action.stage_index + step
                kind = f"RECV_{'F' if step > 0 else 'B'}"
                sent.setdefault((rank, rank_of[stage]), []).append(f"{stage}{kind}{action.microbatch_index}")
    for rank, actions in orders.items():
        by_name = {str(action): action for action in actions}
        ordered: list[Any] = []
        done: set[str] = set()
        for action in actions:
            step = {"RECV_F": -1, "RECV_B": 1}.get(action.computation_type.value, 0)
            if not step:
                ordered.append(action)
            elif str(action) not in done:
                queue = sent[rank_of[action.stage_index + step], rank]
                due = [name for name in queue[: queue.index(str(action)) + 1] if name not in done]
                ordered.extend(by_name[name] for name in due)
                done.update(due)
        actions[:] = ordered


def forget_exchanges(error: BaseException) -> None:
    """Let go of the exchanges under way when a step failed: they keep the connections to other ranks open.

    The frames of the traceback refer to them, and outlive it through the functions defined in them.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == schedules.__file__:
            owner = frame.f_locals.get("self")
            pending = (getattr(owner, "fwd_recv_ops", None), getattr(owner, "bwd_recv_ops", None))
            for value in (*frame.f_locals.values(), *pending):
                if isinstance(value, list | dict):
                    value.clear()
    traceback.clear_frames(error.__traceback__)
    gc.collect()  # schedules refer to themselves


@contextmanager
def without_dumps() -> Iterator[None]:
    """Keep torch from logging its whole order of work beside every error."""
    logger = logging.getLogger(schedules.__name__)
    logger.addFilter(_drop)
    try:
        yield
    finally:
        logger.removeFilter(_drop)


def _drop(_record: logging.LogRecord) -> bool:
    return False
