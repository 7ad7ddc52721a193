"""One rank on a device of its own: steps and forward passes on every schedule, started cold."""

import sys

import engine_worker as engines
import handmade
import torch
import torch.distributed as dist

from fxpipe.ir.schedule import SCHEDULES, fits_microbatches, placement
from fxpipe.runtime.ranks.groups import make_groups, start_process_group
from fxpipe.runtime.run.distributed import DistributedEngine
from fxpipe.runtime.run.gradients import Gradients

if __name__ == "__main__":
    num = int(sys.argv[1])
    import os

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.set_default_dtype(torch.float64)
    start_process_group(device)
    ranks = dist.get_world_size()
    for schedule, facts in SCHEDULES.items():
        num_stages = ranks * (facts.stages_per_rank or 2)
        if not fits_microbatches(schedule, num_stages, ranks, num):
            continue
        case = handmade.knot()
        placed = placement(schedule, num_stages, ranks)
        program = case.draft(case.model, num_stages, case.batch)
        own = [stage for stage in range(num_stages) if placed[stage] == dist.get_rank()]
        stages = handmade.stages_of(case.model, program, own, device=str(device))
        held = [set(stage.modules) | set(stage.attributes) for stage in program.stages]
        ties = engines.ties_of(case.model, held)
        groups = make_groups([range(ranks)], [[placed[s] for s in tie.stages] for tie in ties], device)
        engine = DistributedEngine(stages, num_stages, schedule, groups, device)
        gradients = Gradients(stages, ties, placed, groups)
        jobs = handmade.jobs_of(case, stages, num_stages, num, device=str(device))
        gradients.begin()
        engine.train(jobs)
        gradients.finish(last=True)
        _, wanted = handmade.reference(case, num)
        for fqn, parameter in engines.named_parameters(stages):
            fqn = "wte.weight" if fqn == "head.weight" else fqn
            torch.testing.assert_close(parameter.grad.cpu(), wanted[fqn], rtol=0, atol=1e-9)
        gradients.clip(1.0)
