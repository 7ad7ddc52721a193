"""Two ranks on the CPU, one core each: plans whose predicted steps differ, run in turns.

``python -m tests.benchmarks simulation order`` starts the ranks; rank 0 prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

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

RANKS, PLANS, APART, ROUNDS = 2, 12, 0.03, 7
BLOCKS, WIDTH, ROWS, TOKENS = 12, 256, 16, 32
MOST_OTHERS, TRIES = 0.05, 5
"""Share of the cores that other processes may take while something is measured; else it is measured again, so often."""
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


class Others:
    """Looks how much of the machine's cores processes beside the ranks take."""

    def __init__(self) -> None:
        self._began = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle, tick_s = fields[3] + fields[4], 1 / os.sysconf("SC_CLK_TCK")
        return sum(fields) * tick_s, (sum(fields) - idle) * tick_s, time.process_time()

    def share(self) -> float:
        """Give their share since this was made, the same on all ranks."""
        whole, busy, own = (after - before for before, after in zip(self._began, self._now(), strict=True))
        seen = torch.tensor([own, busy / RANKS, whole / RANKS], dtype=torch.float64)
        dist.all_reduce(seen)
        return max(0.0, float((seen[1] - seen[0]) / seen[2]))


def profiled(module: nn.Module, batch: torch.Tensor, count: int) -> tuple[LayerGraph, Profile]:
    """Profile with so many microbatches, while nobody else works on the machine."""
    found = []
    for _ in range(TRIES):
        others = Others()
        pipe = fxpipe.compile(
            module, RANKS, (batch,), loss_fn=mean_square, microbatches=count, cost="profile", hardware="cpu",
            grain="block",
        )  # fmt: skip
        assert pipe.profile is not None
        found.append((others.share(), pipe.graph, pipe.profile))
        if found[-1][0] <= MOST_OTHERS:
            break
        time.sleep(1)
    if dist.get_rank() == 0:
        print(f"profiled {count}: others' shares", [round(share, 3) for share, _, _ in found], file=sys.stderr)
    _, graph, profile = min(found, key=lambda entry: entry[0])
    return graph, profile


def measured(found: list[tuple[str, float, PipelinePlan]], module: nn.Module, batch: torch.Tensor) -> list[float]:
    """Run the plans in turns and give the median step of each, of the slower rank."""
    pipes = []
    for _, _, plan in found:
        pipe = fxpipe.compile(
            module, RANKS, (batch,), loss_fn=mean_square, microbatches=plan.num_microbatches, schedule=plan.schedule,
            hardware="cpu", plan=plan,
        )  # fmt: skip
        pipes.append(pipe.materialize())
    times: list[list[tuple[float, float]]] = [[] for _ in pipes]
    for turn in range(2 + 2 * ROUNDS):
        for pipe, own in zip(pipes, times, strict=True):
            if sum(share <= MOST_OTHERS for share, _ in own) >= ROUNDS:
                continue
            dist.barrier()
            others, start = Others(), time.perf_counter()
            pipe.step(batch)
            spent = torch.tensor(time.perf_counter() - start)
            pipe.zero_grad()
            share = others.share()
            dist.all_reduce(spent, dist.ReduceOp.MAX)
            own += [(share, spent.item())] if turn >= 2 else []
    for pipe in pipes:
        pipe.close()
    if dist.get_rank() == 0:
        print("others' share:", [round(sorted(own)[:ROUNDS][-1][0], 3) for own in times], file=sys.stderr)
    return [statistics.median(seconds for _, seconds in sorted(own)[:ROUNDS]) for own in times]


def rank() -> None:
    """Measure, plan, run: one of the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    module, batch = model(), torch.randn(ROWS, TOKENS, WIDTH)
    found = chosen({count: profiled(module, batch, count) for count in COUNTS})
    steps = measured(found, module, batch)
    if dist.get_rank() == 0:
        print(json.dumps([[name, predicted, step] for (name, predicted, _), step in zip(found, steps, strict=True)]))
    dist.destroy_process_group()


def run() -> str:
    """Start the ranks and write down what they found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    command = [sys.executable, "-m", "tests.benchmarks.order"]
    ranks = [
        subprocess.Popen(command, env={**common, "RANK": str(index)}, stdout=subprocess.PIPE, text=True)
        for index in range(RANKS)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "a rank failed"
    rows = json.loads(said[0].splitlines()[-1])
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
