"""One rank of a pipeline in which rank 1 fails in the middle of a step, in the way the first argument says."""

import os
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
    way, schedule = sys.argv[1:]
    pipe = engines.Pipe(handmade.chain(), schedule)
    jobs = pipe.jobs(8)
    pipe.step(jobs)

    def fail(*_):
        if way == "kill":
            os._exit(9)
        raise ValueError("the weights are gone")

    if os.environ["RANK"] == "1":
        layer = next(iter(pipe.stages[0].layers))
        (layer.register_full_backward_hook if way == "backward" else layer.register_forward_hook)(fail)
    start = time.monotonic()
    try:
        pipe.step(jobs)
    except RankError as error:
        print(f"{time.monotonic() - start:.2f} {error}", flush=True)
        try:
            pipe.step(jobs)
        except RankError as again:
            print(again, flush=True)
        sys.exit(3)
    except ValueError as error:
        print(f"{time.monotonic() - start:.2f} {error}", flush=True)
        time.sleep(4)  # stays alive: the others must not wait for its end
        sys.exit(4)
