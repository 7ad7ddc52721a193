"""Is killed at random points of a save, again and again; the last whole checkpoint must load every time."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import sys
import time

import models
import torch

import fxpipe

POINTS = 20


def filled(pipe: fxpipe.Pipeline, value: int) -> None:
    with torch.no_grad():
        for parameter in pipe.parameters():
            parameter.fill_(value)


def killed(pipe: fxpipe.Pipeline, path: pathlib.Path, value: int, after_s: float) -> None:
    """Save in a child, which knows what the parent knows, and end it in the middle."""
    child = os.fork()
    if child == 0:
        filled(pipe, value)
        pipe.save(path)
        os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main(folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    numbers = random.Random(7)
    batch = {**models.street_batch(), "gain": torch.ones(models.BATCH)}
    pipe = fxpipe.compile(models.Street(), 2, (), batch, loss_fn=models.token_loss, microbatches=12, schedule="GPipe")
    pipe.materialize()
    filled(pipe, 0)
    pipe.save(folder / "at-0")
    start = time.perf_counter()
    pipe.save(folder / ".timed")
    window = time.perf_counter() - start  # follows the saves: wider after one that was cut short, else narrower
    unfinished = 0
    for point in range(1, POINTS + 1):
        path = folder / f"at-{point}"
        killed(pipe, path, point, numbers.uniform(0, window))
        last = max(int(place.name.removeprefix("at-")) for place in folder.iterdir() if not place.name.startswith("."))
        unfinished += last != point
        window *= 1.3 if last != point else 0.6
        filled(pipe, -1)
        pipe.load(folder)
        held = {float(value) for parameter in pipe.parameters() for value in parameter.detach().unique()}
        assert held == {float(last)}, (point, last, held)
    assert 0 < unfinished < POINTS, f"{unfinished} of {POINTS} saves were cut short"
    print(unfinished)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
