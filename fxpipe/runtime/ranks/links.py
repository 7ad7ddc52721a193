"""Measure how long messages between ranks take."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from fxpipe.ir.profile import LinkTime

LEAST_BYTES, MOST_BYTES = 1024, 2**30
WARM_UPS, LEAST_RUNS, MOST_RUNS = 2, 5, 100
ENOUGH_S = 0.1
"""Seconds of messages of one size after which there are enough of them."""


def sizes_up_to(most_bytes: int) -> list[int]:
    """Give the sizes that are measured: from 1 KiB on, each four times the one before, and the largest.

    >>> sizes_up_to(20_000)
    [1024, 4096, 16384, 20000]
    """
    most = min(max(most_bytes, 2 * LEAST_BYTES), MOST_BYTES)
    sizes = [LEAST_BYTES]
    while 4 * sizes[-1] < most:
        sizes.append(4 * sizes[-1])
    return [*sizes, most]


def measure_links(
    group: dist.ProcessGroup,
    device: torch.device,
    most_bytes: int,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[LinkTime]:
    """Send messages to and fro between rank 0 and its neighbours: the next rank, and the first one of the next node.

    Every rank of the group calls it. Half of the median round trip counts, as rank 0 sees it.

    Args:
        group: All ranks.
        device: Where tensors of a pipeline lie.
        most_bytes: The largest message, 1 GiB at most.
        waiting: Goes around every exchange: a rank that makes one after the other does not stand still.

    Returns:
        On rank 0 what was measured; elsewhere nothing.
    """
    world, own = dist.get_world_size(group), dist.get_rank(group)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    others = [(1, False)] if per_node > 1 else []
    others += [(per_node, True)] if per_node < world else []
    found = []
    for other, far in others if world > 1 else []:
        for size in sizes_up_to(most_bytes):
            seconds = _half_round_trip_s(group, other, size, device, waiting) if own in (0, other) else 0.0
            found += [LinkTime(size, seconds, far)] if own == 0 else []
    with waiting():
        dist.barrier(group)
    return found


def _half_round_trip_s(
    group: dist.ProcessGroup,
    other: int,
    size: int,
    device: torch.device,
    waiting: Callable[[], AbstractContextManager[None]],
) -> float:
    message = torch.zeros(size, dtype=torch.uint8, device=device)
    first = dist.get_rank(group) == 0
    times: list[float] = []
    goes_on = torch.ones(1, device=device)
    while goes_on.item():
        with waiting():
            times.append(_round_trip_s(group, other, message))
            if first:
                few = len(times) < WARM_UPS + LEAST_RUNS or (sum(times) < ENOUGH_S and len(times) < MOST_RUNS)
                dist.send(goes_on.fill_(float(few)), group=group, group_dst=other)
            else:
                dist.recv(goes_on, group=group, group_src=0)
    return max(statistics.median(times[WARM_UPS:]) / 2, 1e-9)


def _round_trip_s(group: dist.ProcessGroup, other: int, message: torch.Tensor) -> float:
    start = time.perf_counter()
    if dist.get_rank(group) == 0:
        dist.send(message, group=group, group_dst=other)
        dist.recv(message, group=group, group_src=other)
    else:
        dist.recv(message, group=group, group_src=0)
        dist.send(message, group=group, group_dst=0)
    if message.device.type == "cuda":
        torch.cuda.synchronize(message.device)
    return time.perf_counter() - start
