"""Ranks that differ, fail or come back: one rank of a script for each way, named by the first argument."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxpipe

RANK = int(os.environ.get("RANK", "0"))


def make(seed: int = 0, width: int = 6, **options: object) -> fxpipe.Pipeline:
    torch.manual_seed(seed)
    x = torch.randn(8, width)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    return fxpipe.compile(
        model,
        2,
        (x,),
        {"target": x},
        loss_fn=F.mse_loss,
        microbatches=4,
        **options,  # type: ignore[arg-type]
    )


def batch(seed: int = 0, rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def said(call: Callable[[], object]) -> None:
    """Print what a call raised, or that it did not."""
    try:
        call()
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n  ", " | "), flush=True)
    else:
        print("nothing raised", flush=True)


def again() -> None:
    """Materialize, step and close, several times in one script, two pipelines at once among them."""
    for width in (6, 4, 6):
        with make(width=width).materialize(device="cpu") as pipe:
            x = torch.randn(8, width, generator=torch.Generator().manual_seed(1))
            first = float(pipe.step(x, target=x))
            with make(seed=1, width=width).materialize(device="cpu") as other:
                other.step(x, target=x)
            assert float(pipe.step(x, target=x)) == first
        said(lambda: pipe.step(x, target=x))  # noqa: B023
        said(lambda: pipe.materialize(device="cpu"))
        assert pipe.plan.num_stages == 2


def differing() -> None:
    """What each rank has for itself: named before anything is exchanged, and the pipeline goes on afterwards."""
    pipe = make().materialize(device="cpu", check_batches=True)
    x = batch()
    said(lambda: pipe.step(batch(RANK), target=batch(RANK)))
    said(lambda: pipe.step(x, target=x) if RANK else pipe.evaluate(x, target=x))
    said(lambda: pipe.step(x, target=x, microbatches=[x] if RANK else None))
    said(lambda: pipe.step(x.to(torch.float64) if RANK else x, target=x))
    said(lambda: pipe.step(x, target=None if RANK else x))
    parts = [((part,), {}, part) for part in x.split(2)]
    said(lambda: pipe.step(microbatches=Broken() if RANK else parts))
    said(lambda: pipe.eval().step(x, target=x) if RANK else pipe.train().step(x, target=x))
    pipe.train()
    said(lambda: pipe.step(x, target=x))
    pipe.close()


class Broken(Sequence[Any]):
    """Microbatches that cannot be read."""

    def __getitem__(self, index: Any) -> Any:
        raise KeyError("the loader is broken")

    def __len__(self) -> int:
        return 4


def seeds() -> None:
    said(lambda: make().materialize(device="cpu", seed=RANK))


def building() -> None:
    """An initialiser that fails on one rank."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))

    def init(module: nn.Module) -> None:
        if RANK == 1:
            raise ZeroDivisionError("no values")

    x = torch.randn(8, 6)
    pipe = fxpipe.compile(model, 2, (x,), {"target": x}, loss_fn=F.mse_loss, microbatches=4)
    said(lambda: pipe.materialize(device="cpu", init=init))


def leaving() -> None:
    """A layer that ends the script on one rank, as Ctrl-C or sys.exit do; then another call."""
    pipe = make().materialize(device="cpu")
    x = batch()
    pipe.step(x, target=x)
    if RANK == 1:
        next(iter(pipe.stage_modules[0].children())).register_forward_pre_hook(lambda *_: sys.exit("enough"))
    try:
        pipe.step(x, target=x)
    except SystemExit as error:
        print(f"SystemExit: {error}", flush=True)
    except fxpipe.RankError as error:
        print(f"RankError: {error}".replace("\n  ", " | "), flush=True)
    said(lambda: pipe.step(x, target=x))


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]]()
