"""One of two ranks: each mistake is one clear error on every rank, at once, and the next step works."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fxpipe


class Chain(nn.Module):
    def __init__(self, width: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


class Reads(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else -y


BATCH = (torch.ones(8, 4),)
TARGET = torch.zeros(8, 4)


def compiled(model: nn.Module | None = None, stages: int = 2, **options: object) -> fxpipe.Pipeline:
    torch.manual_seed(0)
    return fxpipe.compile(
        model or Chain(), stages, BATCH, {"target": TARGET}, loss_fn=F.mse_loss, **{"microbatches": 4, **options}
    )


def expect(kind: type[Exception], message: str, action: object) -> None:
    """Run something that must fail on this rank with this message."""
    with pytest.raises(kind, match=message) as found:
        action()  # type: ignore[operator]
    assert "\n  " in str(found.value), f"no way out in {found.value}"


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    expect(fxpipe.ScheduleError, "not divisible into 3", lambda: compiled(microbatches=3))
    expect(fxpipe.ScheduleError, "unknown schedule '1B1F'", lambda: compiled(schedule="1B1F"))
    expect(fxpipe.PartitionError, "cannot cut Chain into 20 stages", lambda: compiled(stages=20, schedule="GPipe"))
    expect(fxpipe.CaptureError, r"bad_input_worker.py:\d+", lambda: compiled(Reads()))
    expect(fxpipe.ScheduleError, "3 ranks, but 2 processes", lambda: compiled(stages=3, schedule="GPipe").materialize())
    plan = compiled().plan
    expect(fxpipe.PlanError, "made for another model", lambda: compiled(Chain(width=4, layers=6), plan=plan))
    expect(
        fxpipe.PlanError,
        "the plan differs between ranks in seed: rank 0 has '0', rank 1 has '1'",
        lambda: compiled(seed=rank).materialize(),
    )
    with torch.device("meta"):
        empty = Chain()
    expect(fxpipe.MaterializeError, r"blocks\.", lambda: compiled(empty).materialize())

    pipe = compiled()
    expect(fxpipe.MaterializeError, "no parameters yet", lambda: list(pipe.parameters()))
    pipe.materialize()
    expect(fxpipe.MaterializeError, "materialized already", pipe.materialize)
    loss = pipe.step(*BATCH, target=TARGET)

    too_small = r"a batch of 1 is too small for 1F1B on 2 stages: the least size is 2\n.*drop_last=True"
    expect(fxpipe.ScheduleError, too_small, lambda: pipe.step(torch.ones(1, 4), target=TARGET[:1]))
    expect(fxpipe.ScheduleError, "no target for loss_fn", lambda: pipe.step(*BATCH))
    only_one = None if rank else TARGET
    expect(fxpipe.ScheduleError, "no target for loss_fn", lambda: pipe.step(*BATCH, target=only_one))
    rows = 8 if rank else 4
    differs = "the batch differs between ranks"
    expect(fxpipe.PlanError, differs, lambda: pipe.step(torch.ones(rows, 4), target=torch.zeros(rows, 4)))
    expect(fxpipe.ScheduleError, "cannot split target", lambda: pipe.step(*BATCH, target=TARGET[:6]))
    expect(fxpipe.CaptureError, "forward of Chain failed", lambda: pipe.step(torch.ones(8, 5), target=TARGET))
    state = {**pipe.state_dict(), "nothing.weight": torch.zeros(1)} if rank else pipe.state_dict()
    expect(fxpipe.WeightsError, r"nothing\.weight", lambda: pipe.load_state_dict(state))

    pipe.zero_grad()
    assert torch.equal(pipe.step(*BATCH, target=TARGET), loss), "the pipeline does not work after the errors"
    pipe.close()
    dist.destroy_process_group()
    print("ok")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
