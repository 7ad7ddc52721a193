"""Measure how long messages between ranks take, as a step sends them: after work, and both ways at once."""

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
WORK_S = 1e-3
"""Seconds of work before each message: a rank that has just worked takes longer to wake its threads than one that does
nothing but answer."""


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
    """Exchange messages between rank 0 and its neighbours: the next rank, and the first one of the next node.

    Every rank of the group calls it. Both ranks work for a moment, then each sends to the other; the exchange counts
    from when the later one was done, which is the one that waited less.

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
            seconds = _exchange_s(group, other, size, device, waiting) if own in (0, other) else 0.0
            found += [LinkTime(size, seconds, far)] if own == 0 else []
    with waiting():
        dist.barrier(group)
    return found


def _exchange_s(
    group: dist.ProcessGroup,
    other: int,
    size: int,
    device: torch.device,
    waiting: Callable[[], AbstractContextManager[None]],
) -> float:
    """Give the mean of the faster nine tenths: a step has many exchanges, and their sum counts, not the usual one."""
    first = dist.get_rank(group) == 0
    peer = other if first else 0
    sent, received = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    filled = torch.zeros(256, 256, device=device)
    waited: list[float] = []
    goes_on, begin = torch.ones(1, device=device), time.perf_counter()
    while goes_on.item():
        work_until = time.perf_counter() + WORK_S
        while time.perf_counter() < work_until:
            filled = filled @ filled
            _finish(device)
        with waiting():
            waited.append(_once_s(group, peer, sent, received))
            if first:
                spent = time.perf_counter() - begin
                few = len(waited) < WARM_UPS + LEAST_RUNS or (spent < ENOUGH_S and len(waited) < MOST_RUNS)
                dist.send(goes_on.fill_(float(few)), group=group, group_dst=other)
            else:
                dist.recv(goes_on, group=group, group_src=0)
    own = torch.tensor(waited, dtype=torch.float64, device=device)
    theirs = torch.empty_like(own)
    with waiting():
        if not first:
            dist.send(own, group=group, group_dst=0)
            return 0.0
        dist.recv(theirs, group=group, group_src=other)
    times = sorted(torch.minimum(own, theirs).tolist()[WARM_UPS:])
    return max(statistics.fmean(times[: -(len(times) // 10) or None]), 1e-9)


def _once_s(group: dist.ProcessGroup, peer: int, sent: torch.Tensor, received: torch.Tensor) -> float:
    start = time.perf_counter()
    operations = [
        dist.P2POp(kind, message, group=group, group_peer=peer)
        for kind, message in ((dist.isend, sent), (dist.irecv, received))
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    _finish(received.device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
