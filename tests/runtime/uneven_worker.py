"""torch's own engine on microbatches of different sizes: the process aborts."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleGPipe

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    stage = PipelineStage(nn.Linear(4, 4), rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 3, F.mse_loss)
    rows = 4  # 2, 1 and 1
    schedule.step(*((torch.ones(rows, 4),) if rank == 0 else ()), target=torch.zeros(rows, 4) if rank else None)
    dist.destroy_process_group()
