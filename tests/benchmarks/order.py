"""Two ranks on the CPU, one core each: plans whose predicted steps differ, run in turns.

``python -m tests.benchmarks simulation order`` starts the ranks; rank 0 prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import nn

import fxpipe
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.plan import PipelinePlan
from fxpipe.ir.profile import Profile
from fxpipe.planning.costs.estimate import estimate_costs
from fxpipe.planning.layout import make_layout
from fxpipe.planning.plan import make_plan
from fxpipe.planning.settings import Settings
from fxpipe.planning.simulation.simulate import simulate

RANKS, PLANS, APART, ROUNDS = 2, 12, 0.03, 9
BLOCKS, WIDTH, ROWS, TOKENS = 12, 128, 16, 32
COUNTS = (2, 4, 8)
SCHEDULES = ("1F1B", "GPipe")


def model() -> nn.Module:
    torch.manual_seed(0)
    blocks = (nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(BLOCKS))
    return nn.Sequential(*blocks, nn.Linear(WIDTH, 16))


def mean_square(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def plans(profiles: dict[int, tuple[LayerGraph, Profile]]) -> Iterator[tuple[str, PipelinePlan]]:
    """Give every cut between blocks, at each number of microbatches and with each schedule."""
    for count, (graph, profile) in profiles.items():
        hardware = profile.on_links(fxpipe.Hardware.preset("cpu"))
        for schedule in SCHEDULES:
            made_for = Settings.of(
                stages=RANKS, ranks=RANKS, schedule=schedule, num_microbatches=count, hardware=hardware,
                training=fxpipe.Training(), cost="profile", grain="block",
            )  # fmt: skip
            layout = make_layout(graph, estimate_costs(graph, profile, hardware, made_for.training), made_for)
            firsts = [min(block.layers) for block in layout.blocks]
            for place, first in enumerate(firsts[1:], 1):
                stage_of = [int(node >= first) for node in range(len(layout.layers))]
                yield f"{schedule}, {count} microbatches, {place} of {BLOCKS} blocks first", make_plan(layout, stage_of)


def chosen(profiles: dict[int, tuple[LayerGraph, Profile]]) -> list[tuple[str, float, PipelinePlan]]:
    """Give twelve of them that lie far enough apart, spread over what there is, the fastest first."""
    known = sorted(((name, simulate(plan).step_s, plan) for name, plan in plans(profiles)), key=lambda entry: entry[1])
    apart = known[:1]
    for entry in known[1:]:
        if entry[1] >= apart[-1][1] * (1 + APART):
            apart.append(entry)
    places = [round(index * (len(apart) - 1) / (PLANS - 1)) for index in range(PLANS)]
    return [apart[place] for place in dict.fromkeys(places)]


def measured(found: list[tuple[str, float, PipelinePlan]], module: nn.Module, batch: torch.Tensor) -> list[float]:
    """Run the plans in turns and give the median step of each, of the slower rank."""
    pipes = []
    for _, _, plan in found:
        pipe = fxpipe.compile(
            module, RANKS, (batch,), loss_fn=mean_square, microbatches=plan.num_microbatches, schedule=plan.schedule,
            hardware="cpu", plan=plan,
        )  # fmt: skip
        pipes.append(pipe.materialize())
    times: list[list[float]] = [[] for _ in pipes]
    for turn in range(ROUNDS + 2):
        for pipe, own in zip(pipes, times, strict=True):
            dist.barrier()
            start = time.perf_counter()
            pipe.step(batch)
            spent = torch.tensor(time.perf_counter() - start)
            pipe.zero_grad()
            dist.all_reduce(spent, dist.ReduceOp.MAX)
            own += [spent.item()] if turn >= 2 else []
    for pipe in pipes:
        pipe.close()
    return [statistics.median(own) for own in times]


def rank() -> None:
    """Measure, plan, run: one of the ranks."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    dist.init_process_group("gloo")
    module, batch = model(), torch.randn(ROWS, TOKENS, WIDTH)
    profiles = {}
    for count in COUNTS:
        pipe = fxpipe.compile(
            module, RANKS, (batch,), loss_fn=mean_square, microbatches=count, cost="profile", hardware="cpu",
            grain="block",
        )  # fmt: skip
        assert pipe.profile is not None
        profiles[count] = pipe.graph, pipe.profile
    found = chosen(profiles)
    steps = measured(found, module, batch)
    if dist.get_rank() == 0:
        print(json.dumps([[name, predicted, step] for (name, predicted, _), step in zip(found, steps, strict=True)]))
    dist.destroy_process_group()


def run() -> str:
    """Start the ranks and write down what they found."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--master-port", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "tests.benchmarks.order",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == PLANS
    assert all(b[1] >= a[1] * (1 + APART) for a, b in pairwise(rows))
    off = statistics.median(abs(predicted / real - 1) for _, predicted, real in rows)
    behind = rows[0][2] / min(real for _, _, real in rows) - 1
    cells = [[name, f"{1e3 * a:.0f}", f"{1e3 * b:.0f}", f"{a / b - 1:+.1%}"] for name, a, b in rows]
    return (
        f"Rank correlation {spearman([row[1] for row in rows], [row[2] for row in rows]):.3f}; the plan chosen is "
        f"{behind:.1%} behind the fastest measured; the predicted step is {off:.1%} off (median).\n\n"
        + tabulate(cells, ["plan", "predicted, ms", "measured, ms", "off"], tablefmt="github", disable_numparse=True)
    )


def spearman(a: list[float], b: list[float]) -> float:
    """Give the rank correlation of numbers that all differ."""
    ranks = [[sorted(row).index(value) for value in row] for row in (a, b)]
    count = len(a)
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(*ranks, strict=True)) / (count * (count**2 - 1))


if __name__ == "__main__":
    rank()
