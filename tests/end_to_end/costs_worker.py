"""One of several ranks: how many bytes of activations a step keeps alive at most, against what the plan says."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import launch
import models
import torch
import torch.distributed as dist
from torch import nn

import fxpipe
from fxpipe.ir.plan import PipelinePlan
from fxpipe.ir.schedule import live_sets

RANKS = (2, 4)
SCHEDULES = {"GPipe": 1, "1F1B": 1, "ZBVZeroBubble": 2}
MICROBATCHES = 8
WIDTH, LENGTH, BLOCKS = 64, 64, 16


class Decoder(nn.Module):
    """Transformer blocks between embeddings and a head; no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(BLOCKS)
        )
        self.head = nn.Linear(WIDTH, models.WORDS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Kept:
    """Counts bytes that autograd keeps, each storage once, for as long as anything is left that holds it."""

    def __init__(self, free: Iterable[torch.Tensor]) -> None:
        self.bytes = self.most = 0
        self._free = {tensor.untyped_storage().data_ptr() for tensor in free}
        self._holders: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> Held:
        return Held(self, tensor)

    def change(self, storage: torch.UntypedStorage, by: int) -> None:
        place = storage.data_ptr()
        if place in self._free or not storage.nbytes():
            return
        before = self._holders.get(place, 0)
        self._holders[place] = before + by
        if before == 0 or before + by == 0:
            self.bytes += by * storage.nbytes()
            self.most = max(self.most, self.bytes)


class Held:
    """Stands for a tensor that autograd keeps, until it lets go of it."""

    def __init__(self, kept: Kept, tensor: torch.Tensor) -> None:
        # Detached: an operation's own result would hold the graph that holds it.
        self.kept, self.tensor = kept, tensor.detach()
        kept.change(tensor.untyped_storage(), +1)

    def __del__(self) -> None:
        self.kept.change(self.tensor.untyped_storage(), -1)


def kept_bytes(module: nn.Module, run: Callable[[nn.Module], torch.Tensor]) -> int:
    """Give the bytes that a forward keeps for its backward, weights and buffers left out."""
    kept = Kept((*module.parameters(), *module.buffers()))
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        loss = run(module)
    most = kept.most
    del loss
    return most


def predicted(plan: PipelinePlan, rank: int) -> int:
    """Give the most bytes of activations alive at once on a rank, by the plan."""
    own = [stage.activation_bytes for stage in plan.stages if stage.rank == rank]
    sets = live_sets(plan.schedule, plan.num_stages, plan.num_ranks, plan.num_microbatches)[rank]
    return max(sum(count * nbytes for count, nbytes in zip(counts, own, strict=True)) for counts in sets)


def check(schedule: str) -> None:
    tokens = torch.randint(models.WORDS, (MICROBATCHES, LENGTH), generator=models.numbers())
    batch = {"tokens": tokens, "target": tokens}
    stages = SCHEDULES[schedule] * dist.get_world_size()
    # Without latency, so that no stage is left with next to nothing: what it sends is kept, but not by autograd.
    hardware = dataclasses.replace(fxpipe.Hardware.preset("cpu"), link_latency=0.0)
    options = {"schedule": schedule, "microbatches": MICROBATCHES, "hardware": hardware, "loss_fn": models.token_loss}
    with fxpipe.compile(Decoder(), stages, (), batch, **options).materialize() as pipe:
        pipe.step(**batch)
        tensors = [*pipe.parameters(), *(buffer for _, buffer in pipe.named_buffers())]
        kept = Kept(tensors)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
            pipe.step(**batch)
        assert kept.bytes == 0, f"{kept.bytes} bytes are still kept after the step"
        expected = predicted(pipe.plan, dist.get_rank())
        said = f"{kept.most} bytes were kept, {expected} predicted: {kept.most / expected:.3f}"
        assert 0.9 <= kept.most / expected <= 1.1, said


def check_profile() -> None:
    """All ranks measure at once; every rank plans with what rank 0 measured of layers and of messages."""
    size = dist.get_world_size()
    model, x = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(size))), torch.zeros(MICROBATCHES, WIDTH)
    options = {"loss_fn": lambda output: output.sum(), "microbatches": size, "cost": "profile", "hardware": "cpu"}
    pipe = fxpipe.compile(model, size, (x,), **options)
    profiles = [None] * size
    dist.all_gather_object(profiles, pipe.profile)
    assert all(profile == pipe.profile for profile in profiles)
    assert pipe.profile is not None
    assert {link.bytes for link in pipe.profile.links} == {1024, 2048}
    assert {layer for layer, _ in pipe.profile.kept} >= {str(index) for index in range(size)}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    cases = {schedule: functools.partial(check, schedule) for schedule in SCHEDULES}
    launch.run_cases({**cases, "profile": check_profile})
    dist.destroy_process_group()
