"""Process groups: started if nobody has, private to the pipeline, made in one order on all ranks, warm before use."""

from __future__ import annotations

import atexit
import datetime
import itertools
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fxpipe.errors import MaterializeError, ScheduleError
from fxpipe.runtime.ranks.connections import Connections
from fxpipe.runtime.ranks.failures import Failures
from fxpipe.runtime.ranks.place import key_of
from fxpipe.runtime.ranks.watch import RankWatch

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits for another one that stands still before it gives up."""
_FOR_EVER = datetime.timedelta(days=365)
"""Of exchanges themselves: the watch beside them ends them, since it knows whether another rank is busy."""


def is_time(given: object) -> bool:
    """Tell whether something is a number of seconds that can be waited for.

    >>> is_time(0.5), is_time(0), is_time(True), is_time(float("inf"))
    (True, False, False, False)
    """
    if not isinstance(given, int | float) or isinstance(given, bool):
        return False
    return 0 < given <= datetime.timedelta.max.total_seconds() / 2


def patience(timeout: float | None) -> datetime.timedelta:
    """Give how long a rank waits for another one; the usual time for None, and for what is no time."""
    return datetime.timedelta(seconds=timeout) if timeout is not None and is_time(timeout) else TIMEOUT


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
        failures: What is done when a rank fails; None for groups beside those of a pipeline.
        made_beside: What ``beside`` made.
    """

    ranks: tuple[int, ...]
    position: int
    pipeline: dist.ProcessGroup
    control: dist.ProcessGroup
    ties: Mapping[tuple[int, ...], dist.ProcessGroup]
    members: tuple[int, ...]
    everyone: dist.ProcessGroup
    replicas: Replicas | None = None
    failures: Failures | None = None
    made_beside: list[Groups] = field(default_factory=list)

    @property
    def replica(self) -> int:
        """Which data-parallel replica this is, from 0."""
        return self.replicas.index if self.replicas is not None else 0

    def check_open(self) -> None:
        """Refuse to go on where the pipeline has ended.

        Raises:
            RankError: A rank failed; says why.
            MaterializeError: It was closed.
        """
        if self.failures is not None:
            self.failures.check()
        if not hasattr(self, "everyone"):
            raise MaterializeError("this pipeline was closed\n  compile again to go on")

    def guard(self, call: str) -> AbstractContextManager[None]:
        """Guard a call in which ranks meet: what goes wrong on one of them raises on all; see ``Failures.guard``."""
        return self.failures.guard(call) if self.failures is not None else nullcontext()

    def leave(self, error: BaseException) -> None:
        """Tell the other ranks why this one takes part no more; see ``Failures.leave``."""
        if self.failures is not None:
            self.failures.leave(error)

    def work(self, stage: int, kind: str, microbatch: int, module: nn.Module) -> AbstractContextManager[None]:
        """Say that a stage's own work is under way; see ``Failures.work``."""
        return self.failures.work(stage, kind, microbatch, module) if self.failures is not None else nullcontext()

    def waiting(self) -> AbstractContextManager[None]:
        """Say that this rank exchanges something with others: it is not to blame if that takes long."""
        return self.failures.watch.status.waiting() if self.failures is not None else nullcontext()

    def gather(self, value: Any) -> list[Any]:
        """Give every rank of all pipelines what each of them has."""
        found: list[Any] = [None] * len(self.members)
        with self.waiting():
            dist.all_gather_object(found, value, group=self.everyone)
        return found

    def gather_along(self, value: Any) -> list[Any]:
        """Give every rank of this pipeline what each of them has."""
        found: list[Any] = [None] * len(self.ranks)
        with self.waiting():
            dist.all_gather_object(found, value, group=self.control)
        return found

    def beside(self) -> Groups:
        """Make one more group of all members, for exchanges beside those of training; every rank calls this."""
        assert self.failures is not None
        watch = self.failures.watch
        with watch.connections.made_here(), self.waiting():  # where a rank is gone, nothing else would end it
            group = dist.new_group(list(self.members), backend="gloo", timeout=_FOR_EVER)
        group = _made(group)
        made = Groups(self.members, self.members.index(dist.get_rank()), group, group, {}, self.members, group)
        watch.adopt(made.gather, self.members)
        self.made_beside.append(made)
        return made

    def all(self) -> list[dist.ProcessGroup]:
        """List the groups."""
        across = (self.replicas.gradients, self.replicas.control) if self.replicas is not None else ()
        return [self.pipeline, self.control, *self.ties.values(), *across, self.everyone]

    def close(self, *, aborts: bool = True) -> None:
        """End the groups; whoever waits for this rank in one of them learns of it at once.

        The connections and threads of gloo's end when nothing refers to its group any more: whatever else does lets
        go of it first.

        Args:
            aborts: Whether to end what accelerators still exchange. The last messages of a script may be under way as
                it ends: what accelerators have is left alone then.
        """
        for each in self.made_beside:
            each.close()
        if not hasattr(self, "pipeline"):
            return
        if self.failures is not None:
            self.failures.watch.close()
            self.failures.let_go()
        open_ones = list({id(group): group for group in self.all()}.values())
        if self.replicas is not None:
            del self.replicas.gradients, self.replicas.control
        self.ties, self.replicas = {}, None
        del self.pipeline, self.control, self.everyone
        _end(open_ones, aborts=aborts)


def _end(groups: list[dist.ProcessGroup], *, aborts: bool) -> None:
    """Destroy groups, one after the other; the list is empty afterwards."""
    while groups:
        group = groups.pop()
        with suppress(ValueError):  # the process group itself has ended, and with it all others
            on_accelerators = dist.get_backend(group) == "nccl"
            if on_accelerators and aborts:
                group.abort()  # what is under way never ends once a rank is gone
            if aborts or not on_accelerators:
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
    store itself stays: the rank that keeps it could not open its port again at once. Under torchrun it outlives the
    processes, so that those which are started again must not find the keys of the ones before them either.
    """
    if not _meetings:
        _meetings.append(next(rendezvous("env://", timeout=timeout)))
    store, rank, world = _meetings[0]
    return PrefixStore(key_of(str(next(_starts))), store), rank, world


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
    mine = next((tuple(ranks) for ranks in pipelines if own in ranks), None)
    if mine is None:
        raise ScheduleError(
            f"rank {own} is in none of the pipelines {[list(ranks) for ranks in pipelines]}\n"
            "  start as many processes as the plan has ranks, or give a mesh that covers all of them"
        )
    members = next((tuple(ranks) for ranks in unions if own in ranks), mine)
    opened: list[dist.ProcessGroup] = []
    key = key_of(f"failure/{next(_pipelines)}")
    watch = RankWatch(members, own, timeout.total_seconds(), key, lambda: _abort(opened))
    make = _Maker(watch.connections, device, [])
    found: Groups | None = None
    try:
        found = _make_all(make, own, pipelines, ties, replicas, unions)
        opened += found.all()
        _warm_up(found, device)
        watch.start(found.gather)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they refer to the groups, as this one does
        found = None
        opened.clear()
        watch.close()
        _end(make.made, aborts=True)
        raise
    make.made.clear()
    found.failures = Failures(own, watch, found.close)
    return found


def _make_all(
    make: _Maker,
    own: int,
    pipelines: Sequence[Sequence[int]],
    ties: Iterable[Sequence[int]],
    replicas: Sequence[Sequence[int]],
    unions: Sequence[Sequence[int]],
) -> Groups:
    sets = sorted({tuple(sorted(set(positions))) for positions in ties if len(set(positions)) > 1})
    found: Groups | None = None
    for ranks in map(tuple, pipelines):
        pipeline, control = make.pair(ranks)
        tied = {positions: make.group([ranks[position] for position in positions]) for positions in sets}
        if own in ranks:
            position = ranks.index(own)
            held = {positions: group for positions, group in tied.items() if position in positions}
            found = Groups(ranks, position, pipeline, control, held, ranks, control)
    assert found is not None
    for ranks in map(tuple, replicas):
        across = make.pair(ranks)
        if own in ranks:
            found.replicas = Replicas(ranks, ranks.index(own), *across)
    for ranks in map(tuple, unions):
        everyone = make.group(ranks, on_cpu=True)
        if own in ranks:
            found.members, found.everyone = ranks, everyone
    return found


_pipelines = itertools.count()
"""Of this process; every rank makes its groups in the same order."""


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes groups, and notes the connections they open."""

    connections: Connections
    device: torch.device
    made: list[dist.ProcessGroup]

    def group(self, ranks: Sequence[int], *, on_cpu: bool = False) -> dist.ProcessGroup:
        """Make a group for tensors on the device, or on the CPU."""
        if self.device.type == "cpu" or on_cpu:
            backend = "gloo" if self.device.type != "cpu" else None
            with self.connections.made_here():
                group = dist.new_group(list(ranks), timeout=_FOR_EVER, backend=backend)
        else:
            group = dist.new_group(list(ranks), timeout=_FOR_EVER)
        self.made.append(_made(group))
        return self.made[-1]

    def pair(self, ranks: Sequence[int]) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Make a group for tensors on the device, and one for tensors on the CPU."""
        group = self.group(ranks)
        return group, group if self.device.type == "cpu" else self.group(ranks, on_cpu=True)


def _made(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    assert group is not None  # torch's type for a rank outside the group
    return group


def busy(groups: Groups | None, action: str) -> AbstractContextManager[None]:
    """Say that what follows may take long on this rank alone: others wait for as long as its process lives.

    Args:
        groups: The pipeline's groups; None where one process holds it all.
        action: What is done, in a word.
    """
    if groups is None or groups.failures is None:
        return nullcontext()
    return groups.failures.watch.status.busy(action)


def _abort(groups: list[dist.ProcessGroup]) -> None:
    """End what is under way on accelerators: no connection tells them, and a device would wait for ever."""
    for group in groups:
        with suppress(RuntimeError, ValueError):
            if dist.get_backend(group) == "nccl":
                group.abort()


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
