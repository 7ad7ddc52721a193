"""Process groups: started if nobody has, private to the pipeline, made in one order on all ranks, warm before use."""

from __future__ import annotations

import atexit
import datetime
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fxpipe.errors import ScheduleError

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits for another one before it gives up."""


@dataclass(slots=True, eq=False)
class Replicas:
    """The ranks that hold the same stages, one per data-parallel replica.

    Attributes:
        ranks: Their global ranks, by replica.
        index: Which replica this process belongs to.
        gradients: For tensors on the stages' device.
        control: For tensors on the CPU.
    """

    ranks: tuple[int, ...]
    index: int
    gradients: dist.ProcessGroup
    control: dist.ProcessGroup


@dataclass(slots=True, eq=False)
class Groups:
    """The process groups of one pipeline, as one of its ranks sees them; live, until ``close``.

    Attributes:
        ranks: Global ranks of the pipeline, in the order of the plan's ranks.
        position: Which of them this process is.
        pipeline: For tensors on the stages' device.
        control: For tensors on the CPU, and objects.
        ties: For the gradients of tied parameters: by the positions that hold a copy, this rank among them.
        members: Global ranks of all pipelines that go together.
        everyone: For tensors on the CPU, and objects, of all of them.
        replicas: This rank's data-parallel replicas; None where there are none.
        cause: Why the pipeline ended, where a rank failed; None otherwise.
    """

    ranks: tuple[int, ...]
    position: int
    pipeline: dist.ProcessGroup
    control: dist.ProcessGroup
    ties: Mapping[tuple[int, ...], dist.ProcessGroup]
    members: tuple[int, ...]
    everyone: dist.ProcessGroup
    replicas: Replicas | None = None
    cause: str | None = None

    @property
    def replica(self) -> int:
        """Which data-parallel replica this is, from 0."""
        return self.replicas.index if self.replicas is not None else 0

    def close(self) -> None:
        """End the groups; whoever waits for this rank in one of them learns of it at once.

        A connection of gloo's closes when nothing refers to its group any more, so this object lets go of it too.
        """
        if not hasattr(self, "pipeline"):
            return
        across = (self.replicas.gradients, self.replicas.control) if self.replicas is not None else ()
        every = (self.pipeline, self.control, *self.ties.values(), *across, self.everyone)
        open_ones = {id(group): group for group in every}
        self.ties = {}
        self.replicas = None
        del self.pipeline, self.control, self.everyone, across, every
        while open_ones:
            _, group = open_ones.popitem()
            if dist.is_initialized():
                if dist.get_backend(group) == "nccl":
                    group.abort()  # what is under way never ends once a rank is gone
                dist.destroy_process_group(group)
            del group


def start_process_group(device: torch.device, timeout: datetime.timedelta = TIMEOUT) -> bool:
    """Start the default process group from torchrun's environment, if nobody has.

    What is started here is also ended at exit, so that a script may simply end.

    Args:
        device: Device of this rank; NCCL for CUDA, gloo for the CPU.
        timeout: How long a rank waits for another one.

    Returns:
        Whether it was started here.
    """
    if dist.is_initialized():
        return False
    store, rank, world = _fresh_store(timeout)
    if device.type == "cuda":
        # Named at the start, so that the communicator is made now and not at the first exchange.
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=world, timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    atexit.register(stop_process_group)
    return True


_meetings: list[tuple[Store, int, int]] = []  # where this process met the others, once
_starts = itertools.count()


def _fresh_store(timeout: datetime.timedelta) -> tuple[Store, int, int]:
    """Give a store without keys of an earlier process group, this process's rank, and the number of ranks.

    A second group on the first one's keys would take its addresses for those of the new one, and wait for ever. The
    store itself stays: the rank that keeps it could not open its port again at once.
    """
    if not _meetings:
        _meetings.append(next(rendezvous("env://", timeout=timeout)))
    store, rank, world = _meetings[0]
    return PrefixStore(f"fxpipe/{next(_starts)}", store), rank, world


def stop_process_group() -> None:
    """End the default process group and all others, if there are any."""
    atexit.unregister(stop_process_group)
    if dist.is_initialized():
        dist.destroy_process_group()


def make_groups(
    pipelines: Sequence[Sequence[int]],
    ties: Iterable[Sequence[int]],
    device: torch.device,
    timeout: datetime.timedelta = TIMEOUT,
    *,
    replicas: Sequence[Sequence[int]] = (),
    unions: Sequence[Sequence[int]] = (),
) -> Groups:
    """Make the private groups of all pipelines; every rank of the default group calls this with the same arguments.

    Args:
        pipelines: Global ranks of each pipeline; each rank is in one of them.
        ties: Sets of positions that hold copies of one parameter; those of one position need no group.
        device: Device of this rank's stages.
        timeout: How long a rank waits for another one.
        replicas: Global ranks that hold the same stages, by replica; empty where every pipeline is by itself.
        unions: Global ranks of the pipelines that go together; empty where every pipeline is by itself.

    Returns:
        The groups of this rank's own pipeline, warmed up.

    Raises:
        ScheduleError: This rank is in none of the pipelines.
    """
    own = dist.get_rank()
    sets = sorted({tuple(sorted(set(positions))) for positions in ties if len(set(positions)) > 1})
    found: Groups | None = None
    for ranks in map(tuple, pipelines):
        pipeline, control = _pair_of_groups(ranks, device, timeout)
        tied = {
            positions: dist.new_group([ranks[position] for position in positions], timeout=timeout)
            for positions in sets
        }
        if own in ranks:
            position = ranks.index(own)
            held = {positions: group for positions, group in tied.items() if position in positions}
            found = Groups(ranks, position, pipeline, control, held, ranks, control)
    if found is None:
        raise ScheduleError(
            f"rank {own} is in none of the pipelines {[list(ranks) for ranks in pipelines]}\n"
            "  start as many processes as the plan has ranks, or give a mesh that covers all of them"
        )
    for ranks in map(tuple, replicas):
        across = _pair_of_groups(ranks, device, timeout)
        if own in ranks:
            found.replicas = Replicas(ranks, ranks.index(own), *across)
    for ranks in map(tuple, unions):
        everyone = dist.new_group(list(ranks), timeout=timeout, backend="gloo" if device.type != "cpu" else None)
        if own in ranks:
            found.members, found.everyone = ranks, everyone
    _warm_up(found, device)
    return found


def _pair_of_groups(
    ranks: Sequence[int], device: torch.device, timeout: datetime.timedelta
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Make a group for tensors on a device, and one for tensors on the CPU."""
    group = dist.new_group(list(ranks), timeout=timeout)
    if device.type == "cpu":
        return group, group
    return group, dist.new_group(list(ranks), timeout=timeout, backend="gloo")


def _warm_up(groups: Groups, device: torch.device) -> None:
    """Make every communicator now, in one order on all ranks.

    A communicator made at the first exchange makes the rank wait for its peer, which may wait elsewhere for this one.
    Besides the group's own, NCCL makes one per pair of ranks that send to each other.
    """
    for group, where in [(groups.pipeline, device), (groups.control, torch.device("cpu"))]:
        dist.all_reduce(torch.zeros(1, device=where), group=group)
    for _, group in sorted(groups.ties.items()):
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    if groups.replicas is not None:
        dist.all_reduce(torch.zeros(1, device=device), group=groups.replicas.gradients)
        dist.all_reduce(torch.zeros(1), group=groups.replicas.control)
    dist.all_reduce(torch.zeros(1), group=groups.everyone)
    size = len(groups.ranks)
    token = torch.zeros(1, device=device)
    for left, right in sorted({tuple(sorted((at, (at + 1) % size))) for at in range(size) if size > 1}):
        for source, target in ((left, right), (right, left)):
            if groups.position == source:
                dist.send(token, group=groups.pipeline, group_dst=target)
            elif groups.position == target:
                dist.recv(token, group=groups.pipeline, group_src=source)
