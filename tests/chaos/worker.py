"""Injects faults into ranks that are forked for each, from models that are compiled once; prints a line for each."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import gc
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from chaos.faults import ENDED, RANKS, STALL_S, Fault, Said, faults_of, possible
from launch import free_port, stay_of_one_thread
from torch import nn

import fxpipe
import fxpipe.profiling
import fxpipe.runtime.build.state
import fxpipe.runtime.run.gradients
import fxpipe.runtime.weights.loading
import fxpipe.runtime.weights.writing
from fxpipe.ir.schedule import SCHEDULES
from fxpipe.runtime.ranks.awake import Awake
from fxpipe.runtime.ranks.groups import Groups

WIDTH, BATCH, MICROBATCHES = 6, 12, 6
GIVEN_UP_S = 40.0  # after the fault
NEVER_REACHED_S = 600.0  # ranks of a starved machine take their time until then
PAUSE_S = 1.0  # a machine, or a job, that stands still for longer is no fault's doing


class Tied(nn.Module):
    """A chain whose first and last layers share their weight."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.layers[-1].weight = self.layers[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def compiled(schedule: str, **options: object) -> fxpipe.Pipeline:
    stages = RANKS * (SCHEDULES[schedule].stages_per_rank or 2)
    with torch.device("meta"):
        model = Tied(stages)
    x = torch.zeros(BATCH, WIDTH)
    return fxpipe.compile(
        model,
        stages,
        (x,),
        {"target": x},
        loss_fn=F.mse_loss,
        microbatches=MICROBATCHES,
        schedule=schedule,
        ranks=RANKS,
        **options,  # type: ignore[arg-type]
    )


def be_impatient(groups: Groups | None) -> None:
    """Set ``timeout`` short where the fault comes next: until then, a starved rank is waited for."""
    assert groups is not None
    assert groups.failures is not None
    groups.failures.watch.timeout_s = STALL_S


class Rank:
    """One rank of a script in which one rank fails."""

    def __init__(self, fault: Fault, rank: int, folder: pathlib.Path) -> None:
        self.fault, self.rank, self.folder = fault, rank, folder
        self.is_victim = fault.rank == rank
        self.armed = False
        self.pipe: fxpipe.Pipeline | None = None

    def fail(self, *_: object) -> None:
        """Do what the fault says, once."""
        if not (self.armed and self.is_victim):
            return
        self.armed = False
        self.note()
        kind = self.fault.kind
        if kind == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "SIGSTOP":
            while True:  # whoever lets it go on
                os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "endless loop":
            while True:
                time.sleep(0.01)
        elif kind == "out of memory":
            raise torch.OutOfMemoryError("chaos")
        else:
            raise {"exception": ValueError, "SystemExit": SystemExit, "KeyboardInterrupt": KeyboardInterrupt}[kind](
                "chaos"
            )

    def note(self) -> None:
        (self.folder / "injected").write_text(str(time.monotonic()))

    def init(self, module: nn.Module) -> None:
        if self.fault.place == "initialiser":
            self.fail()
        with torch.no_grad():
            for parameter in module.parameters(recurse=False):
                parameter.fill_(0.1)

    def batch(self, seed: int = 0) -> torch.Tensor:
        return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(seed))

    def patched(self, owner: object, name: str) -> None:
        """Let a function of fxpipe's fail before it does anything: what memory that runs out looks like."""
        real = getattr(owner, name)

        def instead(*args: object, **kwargs: object) -> object:
            self.fail()
            return real(*args, **kwargs)

        setattr(owner, name, instead)

    def impatient_from(self, owner: object, name: str) -> None:
        """Let ranks wait for each other no longer than the fault needs from where this function is called."""
        real = getattr(owner, name)

        def instead(*args: object) -> object:
            be_impatient(next(each for each in args if isinstance(each, Groups)))
            return real(*args)

        setattr(owner, name, instead)

    def run(self, pipe: fxpipe.Pipeline) -> None:
        """Do what a script does, and fail where the fault says."""
        place = self.fault.place
        self.armed = place in ("materialize", "initialiser", "profiling")
        if place == "profiling":
            self.patched(fxpipe.profiling.Profiler, "_measure")
            pipe = compiled(self.fault.schedule, cost="profile")
        if place == "materialize":
            self.patched(fxpipe.materialize_module, "_parts")
        self.pipe = pipe
        if self.armed and self.fault.stands_still:
            self.impatient_from(fxpipe.materialize_module, "_build_own")
        pipe.materialize(device="cpu", init=self.init, timeout=NEVER_REACHED_S, check_batches=True)
        x = self.batch()
        optimizer = pipe.optimizer(torch.optim.SGD, lr=1e-3)
        pipe.step(x, target=x)
        optimizer.step()
        self.armed = True
        if self.fault.stands_still:
            be_impatient(pipe._running.groups)  # type: ignore[union-attr]
        getattr(self, "_" + place.replace(" ", "_"))(pipe, x, optimizer)
        if place != "step":  # a rank whose part of the call was over hears of it in its next one
            pipe.step(x, target=x)

    def _step(self, pipe: fxpipe.Pipeline, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        if self.is_victim:
            self.note()
        kind = self.fault.kind
        if kind == "wrong batch":
            pipe.step(self.batch(int(self.is_victim)), target=x)
        elif kind == "wrong order of calls":
            pipe.clip_grad_norm_(1.0) if self.is_victim else pipe.step(x, target=x)
        elif kind == "another mode":
            (pipe.eval() if self.is_victim else pipe.train()).step(x, target=x)
        elif kind == "optimiser left out":
            pipe.step(x, target=x)
            if not self.is_victim:
                optimizer.step()
            else:
                self.note()
            pipe.step(x, target=x)

    def _batch(self, pipe: fxpipe.Pipeline, x: torch.Tensor, _: object) -> None:
        rank = self

        class Loader(list):  # type: ignore[type-arg]
            def __iter__(self):  # type: ignore[no-untyped-def]
                rank.fail()
                return super().__iter__()

            def __getitem__(self, index):  # type: ignore[no-untyped-def]
                rank.fail()
                return super().__getitem__(index)

        pipe.step(microbatches=Loader(((part,), {}, part) for part in x.split(BATCH // MICROBATCHES)))

    def _hooked(self, *, backward: bool = False) -> None:
        assert self.pipe is not None
        for stage in self.pipe.stage_modules:
            for layer in stage.modules():
                if isinstance(layer, nn.Linear):
                    hook = layer.register_full_backward_hook if backward else layer.register_forward_hook
                    hook(lambda *_: self.fail())

    def _forward(self, pipe: fxpipe.Pipeline, x: torch.Tensor, _: object) -> None:
        self._hooked()
        pipe.step(x, target=x)

    def _backward(self, pipe: fxpipe.Pipeline, x: torch.Tensor, _: object) -> None:
        self._hooked(backward=True)
        pipe.step(x, target=x)

    def _tied_gradients(self, pipe: fxpipe.Pipeline, x: torch.Tensor, _: object) -> None:
        self.patched(fxpipe.runtime.run.gradients.GroupSum, "start")
        pipe.step(x, target=x)
        self.fail()  # a schedule whose holders are one rank: between calls
        pipe.step(x, target=x)

    def _clipping(self, pipe: fxpipe.Pipeline, x: torch.Tensor, _: object) -> None:
        pipe.step(x, target=x)
        self.patched(fxpipe.runtime.run.gradients, "_norms")
        pipe.clip_grad_norm_(1.0)

    def _infer(self, pipe: fxpipe.Pipeline, x: torch.Tensor, _: object) -> None:
        self._hooked()
        pipe.infer(x)

    def _evaluate(self, pipe: fxpipe.Pipeline, x: torch.Tensor, _: object) -> None:
        self._hooked()
        pipe.evaluate(x, target=x)

    def _verify(self, pipe: fxpipe.Pipeline, x: torch.Tensor, _: object) -> None:
        self._hooked()
        pipe.verify(x, target=x)

    def _state_dict(self, pipe: fxpipe.Pipeline, x: torch.Tensor, _: object) -> None:
        self.patched(fxpipe.runtime.build.state, "_moved")
        pipe.state_dict(full=True)

    def _save(self, pipe: fxpipe.Pipeline, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.patched(fxpipe.runtime.weights.writing.WritePlan, "write")
        pipe.save(self.folder / "checkpoint", optimizer=optimizer)

    def _load(self, pipe: fxpipe.Pipeline, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.armed = False
        pipe.save(self.folder / "checkpoint", optimizer=optimizer)
        self.patched(fxpipe.runtime.weights.loading, "read_into")
        self.armed = True
        pipe.load(self.folder / "checkpoint", optimizer=optimizer)

    def _between_calls(self, pipe: fxpipe.Pipeline, x: torch.Tensor, _: object) -> None:
        self.fail()
        pipe.step(x, target=x)

    def again(self) -> str:
        """Say what another call does afterwards."""
        if self.pipe is None:
            return "not made"
        try:
            x = self.batch()
            self.pipe.step(x, target=x)
        except fxpipe.MaterializeError:
            return "not made"
        except fxpipe.RankError as error:
            return str(error)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"


def rank_main(fault: Fault, rank: int, folder: pathlib.Path, port: int, pipe: fxpipe.Pipeline | None) -> None:
    """Run one rank, and write what it raised."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    for number in (1, 2):
        with open(folder / f"{rank}.out", "a") as file:
            os.dup2(file.fileno(), number)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    own = Rank(fault, rank, folder)
    code = 0
    try:
        own.run(pipe)  # type: ignore[arg-type]
        said = Said("nothing", "no error", time.monotonic(), "")
    except BaseException as error:
        at = time.monotonic()
        goes_on = fault.place in ("initialiser", "batch", "profiling", "step") or own.pipe is None
        again = "nothing" if goes_on or (own.is_victim and fault.place == "between calls") else own.again()
        said = Said(type(error).__name__, str(error), at, again)
        code = 3
    whole = folder / f"{rank}.part"
    whole.write_text(json.dumps(dataclasses.asdict(said)))
    whole.rename(folder / f"{rank}.json")
    if fault.place != "between calls" or not own.is_victim:
        with contextlib.suppress(Exception):
            if own.pipe is not None:
                own.pipe.close()
    os._exit(code)


class Injection:
    """The ranks of one fault, while they run."""

    def __init__(self, fault: Fault, pipe: fxpipe.Pipeline | None) -> None:
        context = multiprocessing.get_context("fork")
        port = free_port()
        self.fault, self.folder, self.start = fault, pathlib.Path(tempfile.mkdtemp()), time.monotonic()
        self.injected_at: float | None = None
        self.processes = [
            context.Process(target=rank_main, args=(fault, rank, self.folder, port, pipe)) for rank in range(RANKS)
        ]
        for process in self.processes:
            process.start()
        self.heard = [rank for rank in range(RANKS) if rank != fault.rank or fault.is_heard]

    def is_over(self, clock: Awake) -> bool:
        self._look()
        reached, limit = (self.start, NEVER_REACHED_S) if self.injected_at is None else (self.injected_at, GIVEN_UP_S)
        running = any(self.processes[rank].is_alive() for rank in self.heard)
        return not running or clock.since(reached) > limit

    def _look(self) -> None:
        noted = self.folder / "injected"
        if self.injected_at is None and noted.exists() and (text := noted.read_text()):
            self.injected_at = float(text)

    def result(self, clock: Awake) -> dict[str, object]:
        """End what is left, and say what was wrong."""
        orphans = [rank for rank in self.heard if self.processes[rank].is_alive()]
        for rank in orphans:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)  # type: ignore[arg-type]  # it prints where it is
        time.sleep(0.5 if orphans else 0.0)
        codes = {rank: process.exitcode for rank, process in enumerate(self.processes)}
        for process in self.processes:
            process.kill()
            process.join()
            process.close()
        said: dict[int, Said | None] = {}
        for rank in range(RANKS):
            path = self.folder / f"{rank}.json"
            said[rank] = Said(**json.loads(path.read_text())) if path.exists() else None
        self._look()
        at = self.injected_at
        ended = {rank: (self.folder / f"{rank}.out").read_text() for rank in range(RANKS) if codes[rank] == ENDED}
        after = {rank: clock.between(at or what.at, what.at) for rank, what in said.items() if what}
        wrong = faults_of(self.fault, at is not None, said, after, codes, ended)
        wrong += [f"orphan: rank {rank}" for rank in orphans]
        slowest = max((seconds for rank, seconds in after.items() if rank in self.heard), default=0.0)
        if wrong:
            wrong += [f"rank {r} printed: {(self.folder / f'{r}.out').read_text()[-1500:]}" for r in range(RANKS)]
        shutil.rmtree(self.folder, ignore_errors=True)
        others = [what.text for r, what in said.items() if what and r != self.fault.rank]
        text = others[0] if others else ""
        return {
            "fault": dataclasses.asdict(self.fault),
            "wrong": wrong,
            "seconds": slowest,
            "text": text,
            "ended": len(ended),
            "reached": at is not None,
        }


def main(names: list[str], at_once: int) -> None:
    by_name = {fault.name: fault for fault in possible()}
    waiting = [by_name[name] for name in names]
    stay_of_one_thread()
    pipes = {schedule: compiled(schedule) for schedule in {f.schedule: 0 for f in waiting if f.place != "profiling"}}
    gc.collect()
    gc.freeze()  # ranks share it
    clock = Awake(PAUSE_S / 2)
    running: list[Injection] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            fault = waiting.pop(0)
            running.append(Injection(fault, pipes.get(fault.schedule)))
        time.sleep(0.02)
        clock.tick()
        for injection in [each for each in running if each.is_over(clock)]:
            running.remove(injection)
            print(json.dumps(injection.result(clock)), flush=True)


if __name__ == "__main__":
    import fxpipe.materialize

    fxpipe.materialize_module = sys.modules["fxpipe.materialize"]  # type: ignore[attr-defined]
    main(json.loads(pathlib.Path(sys.argv[1]).read_text()), int(sys.argv[2]))
