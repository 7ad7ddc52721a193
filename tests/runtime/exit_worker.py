"""A script that ends without closing anything."""

import sys

import engine_worker as engines
import handmade
import torch
import torch.distributed as dist

from fxpipe.runtime.ranks.groups import start_process_group

if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "user":
        dist.init_process_group("gloo")
    started = start_process_group(engines.CPU)
    assert started == (sys.argv[1] != "user")
    pipe = engines.Pipe(handmade.chain(), "1F1B", (tuple(range(dist.get_world_size())),))
    pipe.step(pipe.jobs(4))
    if sys.argv[1] == "closed":
        pipe.groups.close()
        pipe.groups.close()
