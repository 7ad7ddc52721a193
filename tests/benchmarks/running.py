"""Measure steps: fxpipe against the same cut written by hand on torch's engine, and two ranks against one process.

    python -m tests.benchmarks running [--schedule Interleaved1F1B] [--pairs 50] [--layers 8] [--width 512]
    python -m tests.benchmarks running --width 16 --layers 8 --microbatches 32 --rows 32 --length 8  # the host
    python -m tests.benchmarks running page  # three of them, as a section of docs/benchmarks.md

Two processes of one thread each; the model is built whole on both, so that the hand-written cut is the plan's own.
Every pair runs both, in turns first; beside the ratio stands that of the hand-written cut to itself, which is what the
machine's noise alone makes of 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

import fxpipe

sys.path.insert(0, str(Path(__file__).parents[1]))
import launch

from tests.benchmarks.sections import write_section

WORDS, RANKS = 512, 2
STAGES = {"1F1B": 2, "GPipe": 2, "Interleaved1F1B": 4}


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        part = min(width, 64)
        q, k, v = self.qkv(self.norms[0](x)).view(rows, length, 3, width // part, part).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.down(F.gelu(self.up(self.norms[1](x)))))


def gpt(layers: int, width: int, dropout: float) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block(width, dropout) for _ in range(layers)]
    return nn.Sequential(nn.Embedding(WORDS, width), *blocks, nn.LayerNorm(width), nn.Linear(width, WORDS))


def loss_fn(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def by_hand(model: nn.Sequential, schedule: str, cuts: list[int], num_microbatches: int) -> Callable[[Any, Any], float]:
    """Write the pipeline as torch's tutorial does."""
    rank = dist.get_rank()
    bounds = list(zip([0, *cuts], [*cuts, len(model)], strict=True))
    own = [index for index in range(len(bounds)) if index % RANKS == rank]
    parts = [model[slice(*bounds[index])] for index in own]
    stages = [
        PipelineStage(part, index, len(bounds), torch.device("cpu")) for part, index in zip(parts, own, strict=True)
    ]
    kind = get_schedule_class(schedule)
    runner = kind(stages if len(bounds) > RANKS else stages[0], num_microbatches, loss_fn=loss_fn)
    holds_loss = len(bounds) - 1 in own

    def step(inputs: torch.Tensor, target: torch.Tensor) -> float:
        for part in parts:
            part.zero_grad()
        losses: list[torch.Tensor] = []
        runner.step(*([inputs] if rank == 0 else []), target=target, losses=losses, return_outputs=False)
        loss = torch.stack(losses).mean().detach() if holds_loss else torch.zeros(())
        dist.broadcast(loss, RANKS - 1)  # every rank logs the loss, as with fxpipe
        return float(loss)

    return step


def seconds(step: Callable[[Any, Any], float], batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """Give the seconds that a step takes, and those of this rank's processor."""
    dist.barrier()
    start, used = time.perf_counter(), time.process_time()
    step(*batch)
    used = time.process_time() - used
    dist.barrier()
    return time.perf_counter() - start, used


def work(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = gpt(options.layers, options.width, options.dropout)
    numbers = torch.Generator().manual_seed(0)
    inputs, target = torch.randint(WORDS, (2, options.rows, options.length), generator=numbers)
    pipe = fxpipe.compile(
        model, STAGES[options.schedule], (inputs,), {"target": target}, loss_fn=loss_fn,
        microbatches=options.microbatches, schedule=options.schedule, grain="block", hardware="cpu",
    ).materialize()  # fmt: skip
    first = [
        min(int(layer.split(".")[0]) for layer in stage.layers if layer[0].isdigit()) for stage in pipe.plan.stages
    ]
    cuts = first[1:]
    hand = by_hand(model, options.schedule, cuts, options.microbatches)

    def ours(inputs: torch.Tensor, target: torch.Tensor) -> float:
        pipe.zero_grad()
        return float(pipe.step(inputs, target=target))

    def alone(inputs: torch.Tensor, target: torch.Tensor) -> float:
        if dist.get_rank():
            return 0.0
        model.zero_grad()
        total = 0.0
        for part, wanted in zip(inputs.chunk(options.microbatches), target.chunk(options.microbatches), strict=True):
            loss = loss_fn(model(part), wanted) / options.microbatches
            loss.backward()
            total += float(loss)
        return total

    batch = inputs, target
    if options.dropout == 0:
        assert abs(ours(*batch) - hand(*batch)) < 1e-4
    for step in (ours, hand, alone) * 2:
        seconds(step, batch)
    ratios, itself, times, used = [], [], [], []
    for pair in range(options.pairs):
        order = ("ours", "hand", "again") if pair % 2 else ("again", "hand", "ours")
        took = {name: seconds(ours if name == "ours" else hand, batch) for name in order}
        ratios.append(took["ours"][0] / took["hand"][0])
        itself.append(took["again"][0] / took["hand"][0])
        times.append(took["ours"][0])
        used.append([took[name][1] for name in ("ours", "hand", "again")])
    single = [seconds(alone, batch)[0] for _ in range(max(options.pairs // 5, 3))]
    of_ranks = torch.tensor(used)
    dist.all_reduce(of_ranks)
    ours_used, hand_used, again_used = of_ranks.unbind(1)
    processor, own = (each / hand_used for each in (ours_used, again_used))
    if dist.get_rank() == 0:
        step_s = statistics.median(times)
        if options.json:
            print(json.dumps([1e3 * step_s, *map(spread, (ratios, itself, processor.tolist(), own.tolist()))]))
            return
        rows = [
            ["fxpipe / by hand", *spread(ratios)],
            ["by hand / by hand", *spread(itself)],
            ["fxpipe / by hand, processor time of both ranks", *spread(processor.tolist())],
            ["by hand / by hand, processor time of both ranks", *spread(own.tolist())],
            ["one process on one core / fxpipe on two ranks", statistics.median(single) / step_s, "", ""],
        ]
        print(f"{options.schedule}, cut before layers {cuts}, {1e3 * step_s:.0f} ms a step, {len(times)} pairs")
        print(tabulate(rows, ["ratio of step times", "median", "first quartile", "third quartile"], floatfmt=".3f"))


def spread(ratios: list[float]) -> tuple[float, float, float]:
    first, middle, third = statistics.quantiles(ratios, n=4)
    return middle, first, third


SHOWN = {
    "near-zero compute, 1F1B": ("1.05", 4, "--width 16 --layers 8 --microbatches 32 --rows 32 --length 8"),
    "real compute, 1F1B": ("1.03", 1, "--schedule 1F1B"),
    "real compute, Interleaved1F1B": ("1.00 + half", 1, "--schedule Interleaved1F1B"),
}
"""What the page shows: at most what ratio, how many times as many pairs as given, and how it is measured."""
TEXT = """\
## Steps beside the same cut by hand

Two ranks of one core each, gloo. The cut is the plan's own, written by hand on `torch.distributed.pipelining` as its
tutorial does; both run in turns, {pairs} pairs, of the short steps {short}. Ratios are fxpipe over the cut by hand, as
medians with quartiles: of times, and of the processor time of both ranks, which other work on the machine changes less.
*Half* is half the distance of the quartiles of the cut by hand against itself. Near-zero compute is a width of 16, 8
blocks, 32 microbatches of 8 tokens; real compute a width of 256, 6 blocks, 8 microbatches of 256 tokens.

Written by `python -m tests.benchmarks running page` with torch {torch}.

"""


def page(pairs: int) -> str:
    """Measure all that the page shows; gives its section."""
    rows = []
    for name, (most, times, arguments) in SHOWN.items():
        given = [*arguments.split(), "--pairs", str(times * pairs), "--json"]
        results = launch.launch("benchmarks/running.py", RANKS, "--worker", *given, timeout_s=3600)
        launch.check(results)
        step_ms, *found = json.loads(results[0].stdout.splitlines()[-1])
        ratios = [f"{middle:.3f} ({first:.3f} to {third:.3f})" for middle, first, third in found]
        rows.append([name, f"{step_ms:.1f}", most, *ratios])
        print(*rows[-1], sep="  ", flush=True)
    heads = ["", "step ms", "at most", "time", "by hand against itself", "processor time", "by hand against itself"]
    short = max(times for _, times, _ in SHOWN.values()) * pairs
    return TEXT.format(pairs=pairs, short=short, torch=torch.__version__.partition("+")[0]) + tabulate(
        rows, heads, tablefmt="github", disable_numparse=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="running", description=__doc__.splitlines()[0])
    parser.add_argument("--schedule", default="1F1B", choices=list(STAGES))
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="samples of a batch")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("page", nargs="?", choices=["page"], help="measure what the page shows, and write its section")
    options = parser.parse_args()
    if options.worker:
        work(options)
        dist.destroy_process_group()
        return
    if options.page:
        write_section("running", page(options.pairs))
        return
    results = launch.launch("benchmarks/running.py", RANKS, "--worker", *sys.argv[1:], timeout_s=3600)
    launch.check(results)
    print(results[0].stdout, end="")


if __name__ == "__main__":
    main()
