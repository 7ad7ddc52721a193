"""Whether long runs stay as they are: steps over ever new shapes, numbers and modes, and forwards of every length.

``python -m tests.chaos.flat --page`` runs both and writes the figures into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import pathlib
import random
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

import launch  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from benchmarks.sections import write_section  # noqa: E402
from torch import nn  # noqa: E402

import fxpipe  # noqa: E402

RANKS, WIDTH, ROWS = 4, 8, 8
PAGE = ROOT / "docs" / "reliability.md"


class Scaled(nn.Module):
    """A chain over sequences of any length, with a number and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(RANKS))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        for layer in self.layers:
            x = self.drop(torch.tanh(layer(x))) * scale
        return x


def now() -> dict[str, int]:
    """What this process holds: resident bytes of its own, file descriptors, threads.

    The allocator gives back first what is free: which pages it keeps goes up and down by two MiB.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = pathlib.Path("/proc/self/statm").read_text().split()
    private = (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
    kinds = {"descriptors": "/proc/self/fd", "threads": "/proc/self/task"}
    # More than once: a thread may be looking at a file right now.
    counts = [{name: len(os.listdir(path)) for name, path in kinds.items()} for _ in range(9)]
    return {
        "bytes": private,
        **{name: min(each[name] for each in counts) for name in kinds},
    }


def run(steps: int, lengths: int) -> None:
    """In a rank: make steps and forwards, and print what it holds now and again."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(ROWS, 4, WIDTH)
    pipe = fxpipe.compile(
        Scaled(), RANKS, (x,), {"scale": 0.5, "target": x}, loss_fn=F.mse_loss, microbatches=4, cost="flops"
    )
    pipe.materialize(device="cpu", check_batches=True)
    optimizer = pipe.optimizer(torch.optim.SGD, lr=1e-3)
    order = random.Random(0)  # lengths in no order: what grows is not the batch
    steps_lengths = order.sample(range(1, steps + 1), steps)
    marks = {10, 50, 100, steps // 2, steps}
    for step in range(1, steps + 1):
        pipe.train(step % 7 != 0)
        x = torch.randn(ROWS, steps_lengths[step - 1], WIDTH)
        pipe.step(x, target=x, scale=1.0 + step / 1e4)
        optimizer.step()
        pipe.zero_grad()
        if step in marks:
            print(json.dumps({"what": "step", "at": step, **now()}), flush=True)
    pipe.eval()
    for number, length in enumerate(order.sample(range(1, lengths + 1), lengths), start=1):
        pipe.infer(torch.zeros(2, length, WIDTH), scale=1.0)
        if number in (50, lengths):
            print(json.dumps({"what": "infer", "at": number, **now()}), flush=True)
    pipe.close()


def table(found: list[list[dict[str, object]]]) -> str:
    """Give the figures of rank 0 and the largest growth of any rank."""
    rows = ["| rank 0, after | resident | file descriptors | threads |", "|---|--:|--:|--:|"]
    for line in found[0]:
        size = f"{int(line['bytes']) / 2**20:.1f} MiB"  # type: ignore[call-overload]
        rows.append(f"| {line['what']} {line['at']} | {size} | {line['descriptors']} | {line['threads']} |")
    growths = []
    for what, first in (("step", 50), ("step", 100), ("infer", 50)):
        sizes = [
            [int(line["bytes"]) for line in rank if line["what"] == what and line["at"] >= first] for rank in found
        ]  # type: ignore[call-overload, operator]
        growths.append(f"{what}: {max((size[-1] / size[0] - 1 for size in sizes), default=0.0):+.2%} from {first} on")
    about = (
        f"{RANKS} ranks; every step another length up to their number, in no order, another number and, each seventh, "
        f"another mode; then a forward of every length. Resident is what is left when the allocator has given back "
        "what is free; torch's own record of the last 2,000 exchanges is filled on the way. "
        f"Largest growth of any rank's memory: {'; '.join(growths)}."
    )
    return "\n".join([about, "", *rows])


def main() -> None:
    """Run from the command line; a rank is told so by its first argument."""
    if sys.argv[1:2] == ["rank"]:
        run(int(sys.argv[2]), int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.flat", description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lengths", type=int, default=300)
    parser.add_argument("--page", action="store_true", help=f"write the figures into {PAGE.name}")
    options = parser.parse_args()
    given = str(options.steps), str(options.lengths)
    results = launch.launch("chaos/flat.py", RANKS, "rank", *given, timeout_s=7200, fresh=True)
    launch.check(results)
    text = table([[json.loads(line) for line in result.stdout.splitlines()] for result in results])
    print(text)
    if options.page:
        write_section("python -m tests.chaos.flat --page", text, PAGE)


if __name__ == "__main__":
    main()
