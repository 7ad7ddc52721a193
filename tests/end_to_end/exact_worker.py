"""One of four ranks: every case on every schedule equals the unpartitioned model."""

from __future__ import annotations

import sys
import time

import models
import torch
import torch.distributed as dist

import fxpipe

SCHEDULES = {
    "GPipe": (4, (4, 2, 1)),
    "1F1B": (4, (4, 6, 12)),
    "Interleaved1F1B": (8, (4, 12, 2)),
    "LoopedBFS": (8, (4, 6, 3)),
    "InterleavedZeroBubble": (8, (4, 12, 2)),
    "ZBVZeroBubble": (8, (4, 12, 6)),
    "DualPipeV": (8, (12,)),
}


def reference(model, case, batch, parts):
    """Loss and gradients of the plain model, microbatch by microbatch with the shares of valid targets."""
    model.zero_grad()
    batch = dict(batch)
    target = batch.pop("target")
    size = models.BATCH // parts
    counts = [float((t != -100).sum()) if t.dtype == torch.long else float(t.numel()) for t in target.split(size)]
    total = torch.zeros((), dtype=torch.float64)
    for index, (part, weight) in enumerate(zip(target.split(size), counts, strict=True)):
        inputs = {name: value.split(size)[index] for name, value in batch.items()}
        loss = case.loss_fn(model(**inputs), part) * (weight / sum(counts))
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(found, wanted):
    """The largest difference of any gradient, relative to the largest entry."""
    return max(
        (float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-30)), name)
        for name in found
    )


def main():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    names = sys.argv[1].split(",") if len(sys.argv) > 1 else list(models.CASES)
    bad = 0
    for name in names:
        case = models.CASES[name]
        torch.manual_seed(0)
        model = case.build()
        batch = case.batch()
        for schedule, (stages, numbers) in SCHEDULES.items():
            for number in numbers:
                started = time.time()
                pipe = fxpipe.compile(
                    model, stages, (), batch, loss_fn=case.loss_fn, microbatches=number, schedule=schedule, ranks=4
                )
                pipe.materialize()
                loss = pipe.step(**batch)
                found = {fqn: p.grad for fqn, p in pipe.named_parameters() if p.grad is not None}
                errors = []
                for parts in (number, 1):
                    wanted_loss, wanted = reference(model, case, batch, parts)
                    difference, where = worst(found, wanted)
                    errors.append((abs(float(loss - wanted_loss)), difference, where))
                missing = set(dict(pipe.named_parameters())) & set(wanted) - set(found)
                wrong = any(e[0] > 1e-12 or e[1] > 1e-12 for e in errors) or missing
                bad += bool(wrong)
                gathered = [None] * 4
                dist.all_gather_object(gathered, (wrong, errors, missing))
                if rank == 0:
                    mark = "WRONG" if any(g[0] for g in gathered) else "ok"
                    print(
                        name,
                        schedule,
                        number,
                        mark,
                        max(e[1] for g in gathered for e in g[1]),
                        f"{time.time() - started:.2f}",
                        flush=True,
                    )
                    if mark == "WRONG":
                        print(gathered)
                pipe.close()
    dist.destroy_process_group()
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
