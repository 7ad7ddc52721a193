"""Four ranks: every model on every schedule computes what the unpartitioned model computes, in float64.

Everything is compiled, and the unpartitioned models trained, once; then the ranks are forked.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import launch
import models
import torch
import torch.distributed as dist
from torch import nn

import fxpipe

RANKS = 4
STEPS = 3
# Stages, and numbers of microbatches: as many as stages, twice as many, and another one where the schedule allows it.
SCHEDULES = {
    "GPipe": (4, (4, 6, 12)),
    "1F1B": (4, (4, 6, 12)),
    "Interleaved1F1B": (8, (4, 12, 2)),
    "LoopedBFS": (8, (4, 12, 6)),
    "InterleavedZeroBubble": (8, (4, 12, 2)),
    "ZBVZeroBubble": (8, (4, 12, 6)),
    "DualPipeV": (8, (12,)),
}
OPENED = (("1F1B", 4), ("ZBVZeroBubble", 12))  # where blocks may be opened; capture at block grain takes less time


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)


@functools.cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.CASES[name].build().double()


@functools.cache
def reference(name: str, parts: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train the unpartitioned model, one part of the batch after another, each with its share of valid targets.

    Gives the losses, the gradients of the first step, and the weights after the last.
    """
    case, model = models.CASES[name], copy.deepcopy(model_of(name))
    batch = case.batch()
    cut = {key: value.split(models.BATCH // parts) for key, value in batch.items()}
    valid = [float((target != -100).sum()) for target in cut["target"]]
    optimizer = optimizer_of(model.parameters())
    losses, gradients = [], {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(torch.zeros((), dtype=torch.float64))
        for index in range(parts):
            inputs = {key: value[index] for key, value in cut.items() if key != "target"}
            loss = case.loss_fn(model(**inputs), cut["target"][index]) * (valid[index] / sum(valid))
            loss.backward()
            losses[-1] += loss.detach()
        gradients = gradients or {fqn: p.grad.clone() for fqn, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return losses, gradients, dict(model.named_parameters())


def prepared(name: str, schedule: str, number: int, ranks: int = RANKS) -> Callable[[], None]:
    """Compile, and train the unpartitioned model; gives what is left to do on the ranks."""
    try:
        case, stages = models.CASES[name], SCHEDULES[schedule][0] * ranks // RANKS
        grain = "auto" if (schedule, number) in OPENED else "block"
        options = {"microbatches": number, "schedule": schedule, "ranks": ranks, "grain": grain}
        pipe = fxpipe.compile(model_of(name), stages, (), case.batch(), loss_fn=case.loss_fn, **options)
        wanted = [reference(name, parts) for parts in dict.fromkeys((number, 1))]
    except Exception as error:
        return functools.partial(failed, error)
    return functools.partial(check, name, pipe, wanted)


def failed(error: Exception) -> None:
    raise error


def check(name: str, pipe: fxpipe.Pipeline, wanted: list[Any]) -> None:
    batch = models.CASES[name].batch()
    with pipe.materialize():
        optimizer = optimizer_of(pipe.parameters())
        for step in range(STEPS):
            pipe.zero_grad()
            loss = pipe.step(**batch)
            gradients = {fqn: p.grad for fqn, p in pipe.named_parameters() if p.grad is not None}
            for losses, first, _ in wanted:
                torch.testing.assert_close(loss, losses[step], rtol=0, atol=1e-12 if step == 0 else 1e-10)
                if step == 0:
                    held = {fqn: grad for fqn, grad in first.items() if fqn in dict(pipe.named_parameters())}
                    torch.testing.assert_close(gradients, held, rtol=1e-12, atol=1e-12)
            optimizer.step()
        for _, _, weights in wanted:
            held = {fqn: weights[fqn] for fqn, _ in pipe.named_parameters()}
            torch.testing.assert_close(dict(pipe.named_parameters()), held, rtol=0, atol=1e-10)
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, [fqn for fqn, _ in pipe.named_parameters()])
    assert {fqn for fqns in seen for fqn in fqns} == {fqn for fqn, _ in model_of(name).named_parameters()}


def cases(wanted: tuple[str, ...] = tuple(models.CASES)) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name in wanted:
        for schedule, (_, numbers) in SCHEDULES.items():
            for number in numbers:
                yield f"{name}-{schedule}-{number}", (name, schedule, number)


def street_cases(ranks: int) -> dict[str, tuple[Any, ...]]:
    """A tie, a skip and a late input on fewer ranks."""
    return {name: ("street", name, 6, ranks) for name in ("GPipe", "1F1B")}


def on_a_rank(checks: dict[str, Callable[[], None]]) -> None:
    dist.init_process_group("gloo")
    launch.run_cases(checks, dtype=torch.float64)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    ranks = int(os.environ["WORLD_SIZE"])
    chosen = dict(cases(tuple(sys.argv[1:]) or tuple(models.CASES))) if ranks == RANKS else street_cases(ranks)
    launch.fork_ranks(functools.partial(on_a_rank, {case: prepared(*given) for case, given in chosen.items()}))
