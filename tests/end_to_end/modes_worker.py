"""One of two ranks: a flag that is changed on one rank counts on all."""

from __future__ import annotations

import sys

import modes
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fxpipe


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = modes.tower()
    pipe = fxpipe.compile(
        model, 6, (modes.X,), {"target": modes.TARGET}, loss_fn=F.mse_loss, microbatches=2, schedule="LoopedBFS",
        ranks=2, grain="op",
    )  # fmt: skip
    assert pipe.plan.opened
    pipe.materialize()
    modes.quiet(model.named_modules())
    for stage in pipe.stage_modules:
        modes.quiet(stage.named_modules())
    modes.check(pipe, model)
    if rank == 0:
        pipe.stage_modules[0].eval()
    names = dict(model.named_modules())
    for layer in pipe.plan.stages[0].layers:  # the model itself goes on in training: it stands in all stages
        names.get(layer, nn.Module()).eval()
    modes.check(pipe, model)
    for stage in pipe.stage_modules:
        stage.eval()
    modes.check(pipe, model.eval())
    pipe.close()
    dist.destroy_process_group()
    print("ok")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
