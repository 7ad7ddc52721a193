"""Ranks that differ, fail or come back: one rank of a script for each way, named by the first argument."""

from __future__ import annotations

import atexit
import concurrent.futures.thread
import contextlib
import gc
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fxpipe
import fxpipe.batch.digest
import fxpipe.training
from fxpipe.runtime.ranks import connections, joining, watch

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
    said(lambda: pipe.step(x, target=x, last=not RANK))
    said(lambda: pipe.infer(x, gather=bool(RANK)))
    said(lambda: pipe.clip_grad_norm_(1.0 + RANK))
    pipe.close()
    said(lambda: make().materialize(device="cpu", dtype=torch.float64 if RANK else None))


class Broken(Sequence[Any]):
    """Microbatches that cannot be read."""

    def __getitem__(self, index: Any) -> Any:
        raise KeyError("the loader is broken")

    def __len__(self) -> int:
        return 4


def seeds() -> None:
    dist.init_process_group("gloo")
    dist.all_gather_object = dist.all_reduce = None  # type: ignore[assignment]  # the user's group keeps no tensors of ours
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
    counts = []
    for _ in range(3):
        said(lambda: pipe.materialize(device="cpu", init=init))
        gc.collect()
        counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    print(counts[0] == counts[1] == counts[2] or counts, flush=True)
    with make().materialize(device="cpu") as other:
        other.step(batch(), target=batch())


def gone() -> None:
    """A rank that is killed while the groups are made, where the others would wait for it for ever."""
    dist.init_process_group("gloo")
    if RANK == 1:
        joining.make_groups = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    said(lambda: make().materialize(device="cpu"))


def absent() -> None:
    """A script that ends on one rank before it comes to materialize."""
    dist.init_process_group("gloo")
    if RANK == 0:
        said(lambda: make().materialize(device="cpu"))


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


def outside() -> None:
    """A loader that fails on one rank between two calls; then a rank that is killed while a child of its lives on."""
    x = batch()

    def trains() -> None:
        with make().materialize(device="cpu") as pipe:
            pipe.step(x, target=x)
            if RANK == 1:
                raise BufferError("the loader is broken")
            pipe.step(x, target=x)

    said(trains)
    pipe = make().materialize(device="cpu")
    pipe.step(x, target=x)
    if RANK == 1:
        if os.fork() == 0:
            time.sleep(60)  # holds the connections open, as the workers of a loader do
        os.kill(os.getpid(), signal.SIGKILL)
    said(lambda: pipe.step(x, target=x))


def ending() -> None:
    """A script that an error ends on one rank, as the interpreter does it: this one was forked."""
    pipe = make().materialize(device="cpu")
    x = batch()
    pipe.step(x, target=x)
    if RANK == 1:
        sys.last_value = sys.last_exc = BufferError("the loader is broken")
        atexit._run_exitfuncs()
        os._exit(1)
    said(lambda: pipe.step(x, target=x))


def versions() -> None:
    """Another version of a library on one rank."""
    real = joining.versions()
    joining.versions = lambda: {**real, "torch": f"2.{RANK}"}  # type: ignore[assignment]
    said(lambda: make().materialize(device="cpu"))


def late() -> None:
    """Batches that differ and lie on an accelerator, for which the CPU stands in; then the same ones."""
    for module in (fxpipe.batch.digest, fxpipe.training):
        module.on_host = lambda device: False  # type: ignore[assignment]
    pipe = make().materialize(device="cpu")
    x = batch()
    said(lambda: pipe.step(batch(RANK), target=x))
    print(all(parameter.grad is None for parameter in pipe.parameters()), flush=True)
    said(lambda: pipe.step(x, target=x))
    print(all(parameter.grad is not None for parameter in pipe.parameters()), flush=True)
    pipe.close()


def busy() -> None:
    """A rank that builds for longer than it may stand still; then one that stands still between two calls."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))

    def init(module: nn.Module) -> None:
        if RANK == 1:
            time.sleep(0.8)
        with torch.no_grad():
            for parameter in module.parameters(recurse=False):
                parameter.fill_(0.1)

    x = batch()
    pipe = fxpipe.compile(model, 2, (x,), {"target": x}, loss_fn=F.mse_loss, microbatches=4)
    said(lambda: pipe.materialize(device="cpu", init=init, timeout=0.5))
    pipe.step(x, target=x)
    if RANK == 1:
        time.sleep(3)
    said(lambda: pipe.step(x, target=x))


def paused() -> None:
    """The whole job is stopped for longer than a rank may stand still, while one waits for the other, and goes on."""
    pipe = make().materialize(device="cpu", timeout=3.0)
    x = batch()
    pipe.step(x, target=x)
    pids: list[int] = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    if RANK == 1:
        names = f"{pids[0]} {pids[1]}"
        subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -STOP {names}; sleep 4; kill -CONT {names}"])
        for _ in range(7):  # not one sleep, which would be over when the job goes on
            time.sleep(0.1)
    said(lambda: pipe.step(x, target=x))
    pipe.close()


def elsewhere() -> None:
    """A rank of another machine that fails in a stage: word of it goes through the store."""
    real = watch.OtherStatus
    watch.OtherStatus = lambda path, token: real("/nowhere", token)  # type: ignore[assignment, misc]
    pipe = make().materialize(device="cpu", timeout=1.0)
    x = batch()
    pipe.step(x, target=x)
    first = next(iter(pipe.stage_modules[0].children()))
    if RANK == 1:
        first.register_forward_pre_hook(lambda *_: [][0])
    said(lambda: pipe.step(x, target=x))
    said(lambda: pipe.step(x, target=x))


def ends() -> None:
    """Scripts that end: whether threads are left that may come back when the interpreter has ended, which aborts it."""
    dist.init_process_group("gloo")
    connections.STORE_S = watch.STORE_S = 0.2
    dist.all_reduce(torch.zeros(1))
    time.sleep(0.05)  # they name themselves
    own, x = _of_gloo(), batch()
    print(own > 0, flush=True)

    def open_() -> fxpipe.Pipeline:
        pipe = make().materialize(device="cpu")
        pipe.step(x, target=x)
        return pipe

    def saving() -> fxpipe.Pipeline:
        pipe = open_()
        pipe.save(pathlib.Path(sys.argv[2]) / "checkpoint", async_=True)
        concurrent.futures.thread._python_exit()  # as the interpreter begins its end: a pool's threads come first
        return pipe

    def refused() -> Exception | None:
        with make().materialize(device="cpu") as pipe:
            try:
                pipe.step(batch(RANK), target=x)
            except fxpipe.PlanError as error:
                return error
        return None

    def stopped() -> fxpipe.Pipeline:
        real = watch.OtherStatus
        watch.OtherStatus = lambda path, token: real("/nowhere", token)  # type: ignore[assignment, misc]
        pipe, pids = open_(), [0, 0]
        dist.all_gather_object(pids, os.getpid())
        if RANK == 1:
            line = connections.StoreLine()
            os.kill(pids[0], signal.SIGSTOP)  # it keeps the store
            continued.append(pids[0])
            while not all(" T " in path.read_text() for path in pathlib.Path(f"/proc/{pids[0]}/task").glob("*/stat")):
                time.sleep(0.01)
            assert line.ask(lambda store: store.check(["a key"])) is None
            line.end()
        return pipe

    continued: list[int] = []
    for way in (open_, refused, stopped, saving):
        kept = way()
        assert kept is not None
        atexit._run_exitfuncs()
        left = [t.name for t in threading.enumerate() if t.daemon and t.name.startswith("fxpipe-")]
        print(way.__name__, _of_gloo() - own, left, flush=True)
        del kept
        gc.collect()
        for pid in continued:
            os.kill(pid, signal.SIGCONT)
        continued.clear()


def _of_gloo() -> int:
    """Count the threads that carry out what gloo's groups exchange."""
    names = []
    for task in pathlib.Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text())
    return sum("gloo_runloop" in name for name in names)


def kept() -> None:
    """Pipelines that come and go, one by one and two at once, on a process group of the user's, which stays."""
    dist.init_process_group("gloo")
    x = batch()
    counts = []
    for _ in range(4):
        with make().materialize(device="cpu") as pipe, make(seed=1).materialize(device="cpu") as other:
            for each in (pipe, other, pipe):
                each.step(x, target=x)
        del pipe, other, each
        gc.collect()
        counts.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    print(counts[1] == counts[2] == counts[3] or counts, flush=True)
    total = torch.ones(1)
    dist.all_reduce(total)
    print(float(total), flush=True)
    dist.destroy_process_group()


def trains() -> None:
    """A run that saves, dies at its fourth step where the folder has no mark yet, and goes on when it is started again.

    The second argument is the folder.
    """
    folder = pathlib.Path(sys.argv[2])
    pipe = make().materialize(device="cpu")
    optimizer = pipe.optimizer(torch.optim.AdamW, lr=0.05)
    path = folder / "checkpoints"
    first = pipe.load(path, optimizer=optimizer) if path.exists() else 0
    for step in range(first, 6):
        if step == 3 and RANK == 1 and not (folder / "restarted").exists():
            (folder / "restarted").touch()
            raise RuntimeError("the power is gone")
        x = batch(step)
        loss = pipe.step(x, target=x)
        optimizer.step()
        pipe.zero_grad()
        if step % 2 == 1:
            pipe.save(path / str(step), optimizer=optimizer, extra=step + 1)
        print(f"{step} {float(loss)!r}", flush=True)
    pipe.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]]()
