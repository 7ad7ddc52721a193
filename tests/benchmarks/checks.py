"""Measure what the checks between ranks cost: steps with them beside steps of the same pipeline without.

    python -m tests.benchmarks checks [--rounds 150] [--layers 6] [--width 256] [--page]

Two processes of one thread each. A round has four steps, one with the checks as in the steady state (checksums of the
batch in every 32nd round), one with checksums, and two without any check, in turns forwards and backwards; the ratio of
the two without is what the machine's noise alone makes of 1. Off are: the exchange of verdicts and all it compares, the
look at modes and at modules that a schedule gets wrong, the guards around calls and stages, and what a rank says it
does. The thread beside a pipeline runs all the time: its processor time is read by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from tabulate import tabulate

import fxpipe
import fxpipe.training
from fxpipe.materialize import Running
from fxpipe.runtime.ranks.groups import Groups
from fxpipe.runtime.ranks.modes import Modes
from fxpipe.runtime.ranks.trained import Trained

sys.path.insert(0, str(Path(__file__).parents[1]))
import launch
from benchmarks.running import RANKS, WORDS, gpt, loss_fn
from benchmarks.sections import DOCS, write_section

PAGE = DOCS / "reliability.md"
NAMES = ("as by default", "with checksums in every step")


@contextlib.contextmanager
def unchecked(pipe: fxpipe.Pipeline) -> Iterator[None]:
    """Take all checks away for a while."""
    engine = pipe._running.engine  # type: ignore[union-attr]
    nothing = contextlib.nullcontext
    with contextlib.ExitStack() as stack:
        for owner, name, instead in (
            (fxpipe.training, "agree", lambda *_, **__: None),
            (fxpipe.training, "busy", lambda *_: nothing()),
            (Running, "checks_batch", lambda *_: False),
            (Running, "check_ready", lambda *_: None),
            (Modes, "changed", lambda *_: False),
            (Trained, "before_step", lambda *_: None),
            (Trained, "after_step", lambda *_: None),
            (Groups, "guard", lambda *_: nothing()),
            (Groups, "waiting", lambda *_: nothing()),
            (engine._checkpoints, "watch", nothing),
            *((stage, "work", lambda *_: nothing()) for stage in engine._stages),
        ):
            stack.enter_context(mock.patch.object(owner, name, instead))
        yield


def work(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    numbers = torch.Generator().manual_seed(0)
    inputs, target = torch.randint(WORDS, (2, options.rows, options.length), generator=numbers)
    pipe = fxpipe.compile(
        gpt(options.layers, options.width, 0.0), RANKS, (inputs,), {"target": target}, loss_fn=loss_fn,
        microbatches=options.microbatches, grain="block", hardware="cpu",
    ).materialize()  # fmt: skip

    def seconds(*, checksums: bool) -> tuple[float, float]:
        dist.barrier()
        start, computed = time.perf_counter(), time.process_time()
        pipe.zero_grad()
        with mock.patch.object(Running, "checks_batch", return_value=checksums):
            pipe.step(inputs, target=target)
        computed = time.process_time() - computed
        dist.barrier()
        return time.perf_counter() - start, computed

    def without() -> tuple[float, float]:
        with unchecked(pipe):
            return seconds(checksums=False)

    for _ in range(3):
        seconds(checksums=True), without()
    watch = next(thread for thread in threading.enumerate() if thread.name == "fxpipe-watch")
    clock = time.pthread_getcpuclockid(watch.ident)  # type: ignore[arg-type]
    began, beside = time.perf_counter(), time.clock_gettime(clock)
    ratios: dict[str, list[float]] = {name: [] for name in (*NAMES, "none / none")}
    processor: list[tuple[float, float]] = []
    plain: list[float] = []
    for number in range(options.rounds):
        took, used = [0.0] * 4, [0.0] * 4
        for place in (0, 1, 2, 3) if number % 2 else (3, 2, 1, 0):
            found = without() if place in (1, 3) else seconds(checksums=place == 2 or number % 32 == 0)
            took[place], used[place] = found
        none = (took[1] + took[3]) / 2
        for name, ratio in zip(ratios, (took[0] / none, took[2] / none, took[1] / took[3]), strict=True):
            ratios[name].append(ratio)
        plain.append(none)
        processor.append((used[0], (used[1] + used[3]) / 2))
    thread_share = (time.clock_gettime(clock) - beside) / (time.perf_counter() - began)
    if dist.get_rank() == 0:
        print(table(ratios, statistics.median(plain), thread_share, processor))
    pipe.close()
    dist.destroy_process_group()


def table(
    ratios: dict[str, list[float]], step_s: float, thread_share: float, processor: list[tuple[float, float]]
) -> str:
    """Give medians and how sure they are."""
    rows = []
    for name, found in ratios.items():
        ordered, half = sorted(found), 0.98 * math.sqrt(len(found))
        middle = len(found) / 2
        low, high = ordered[max(round(middle - half), 0)], ordered[min(round(middle + half), len(found) - 1)]
        label = name if "/" in name else f"checks {name} / none"
        rows.append([label, *(f"{value:.4f}" for value in (statistics.median(found), low, high))])
    headers = ["ratio of step times", "median", "from", "to"]
    more_s = statistics.median(one - other for one, other in processor)
    plain_s = statistics.median(other for _, other in processor)
    return (
        f"Two ranks, {1e3 * step_s:.0f} ms a step without checks, {len(next(iter(ratios.values())))} rounds side by "
        "side; the median lies between the last two columns with 95 % certainty. The thread that watches takes "
        f"{thread_share:.3%} of a processor. In processor time, which nothing else on the machine changes, a step with "
        f"the checks as by default takes {1e3 * more_s:.2f} ms more than {1e3 * plain_s:.1f} ms: "
        f"{more_s / plain_s:.2%}.\n\n" + tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="checks", description=__doc__.splitlines()[0])
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="samples of a batch")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--page", action="store_true", help=f"write the figures into {PAGE.name}")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    results = launch.launch("benchmarks/checks.py", RANKS, "--worker", *sys.argv[1:], timeout_s=3600)
    launch.check(results)
    text = results[0].stdout
    print(text, end="")
    if options.page:
        write_section("python -m tests.benchmarks checks --page", text, PAGE)


if __name__ == "__main__":
    main()
