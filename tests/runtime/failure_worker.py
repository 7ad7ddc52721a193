"""One rank of a pipeline in which rank 1 fails in the middle of a step, in the way the first argument says.

The others leave a file in the folder of the last argument when they know; until then rank 1 stays alive, so that they
cannot have learned it from its end.
"""

import os
import pathlib
import sys
import time

import engine_worker as engines
import handmade
import torch

from fxpipe.errors import RankError
from fxpipe.runtime.ranks.groups import start_process_group

if __name__ == "__main__":
    torch.set_num_threads(1)
    start_process_group(engines.CPU)
    way, schedule, folder = sys.argv[1:]
    rank, informed = os.environ["RANK"], pathlib.Path(folder)
    pipe = engines.Pipe(handmade.chain(), schedule)
    jobs = pipe.jobs(8)
    pipe.step(jobs)

    def fail(*_):
        if way == "kill":
            os._exit(9)
        raise ValueError("the weights are gone")

    if rank == "1":
        layer = next(iter(pipe.stages[0].layers))
        (layer.register_full_backward_hook if way == "backward" else layer.register_forward_hook)(fail)
    try:
        pipe.step(jobs)
    except RankError as error:
        print(error, flush=True)
        (informed / rank).touch()
        try:
            pipe.step(jobs)
        except RankError as again:
            print(again, flush=True)
        sys.exit(3)
    except ValueError as error:
        print(error, flush=True)
        while len(list(informed.iterdir())) < 3:
            time.sleep(0.05)
        sys.exit(4)
