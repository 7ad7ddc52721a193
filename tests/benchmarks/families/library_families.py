"""Try every family of a library: each model small, in two stages, against itself; ``coverage hf`` and ``vision``.

Every model is tried in a process of its own, with a limit of time and of memory; what is known stands in a file beside,
so that a run that was stopped goes on where it was. The tables are sections of ``docs/coverage.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import json
import multiprocessing
import multiprocessing.connection
import random
import re
import resource
import signal
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from judge import distance as distance_of
from judge import distances, largest
from torch import nn

import fxpipe
from fxpipe.errors import FxpipeError
from tests.benchmarks.families.small_models import Case, Unsuitable, hugging_face_cases, vision_cases
from tests.benchmarks.families.tables import section
from tests.benchmarks.sections import write_section

SAMPLES, MICROBATCHES, STAGES = 4, 2, 2
FINDING_S = 10  # of processor time; after that no other size of a model is looked at
FURTHER_S = 30  # the same for one that took none of the likeliest inputs
PATIENCE = 20  # times that: when a model that waits is given up
FORK = multiprocessing.get_context("fork")
MEMORY_BYTES = 8 * 2**30
CLOSE = 1e-5  # of a tensor's largest element: many a model casts to float32 inside, whatever its weights are
CLOSE_IN_FLOAT32 = 1e-3  # the same of what knows no float64, if the model by itself is as far off over halves
NOTHING = 1e-7  # of the largest of all tensors: such a one is zero but for rounding
TITLES = {"hf": "Every family of transformers", "vision": "Families of torchvision and timm"}
CASES: dict[str, Callable[[], dict[str, Case]]] = {"hf": hugging_face_cases, "vision": vision_cases}
OF_DTYPES = re.compile(r"dtype|Double|Float|double|float")

WARM = {"hf": "gpt2 (", "vision": "torchvision alexnet ("}


def squares(output: Any) -> torch.Tensor:
    """One number of all that a model returns: means of squares, weighed so that no norm makes them constant."""
    found = [leaf for leaf in leaves(output) if leaf.is_floating_point() and leaf.requires_grad]
    if not found:
        raise Unsuitable("nothing that it returns takes a gradient")
    weights = [1 + torch.arange(leaf.shape[-1] if leaf.dim() > 1 else 1).cos() / 2 for leaf in found]
    means = [(leaf.double().square() * each).mean() for leaf, each in zip(found, weights, strict=True)]
    return sum(means, torch.zeros((), dtype=torch.float64))


def leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)


def loss_in(output: Any) -> torch.Tensor | None:
    found = output.get("loss") if isinstance(output, Mapping) else None
    return found if isinstance(found, torch.Tensor) and found.requires_grad else None


@dataclass(frozen=True, slots=True)
class Found:
    """A small model, and a batch that it was trained with.

    Attributes:
        build: Makes it anew.
        real: The model after a backward, its weights large enough for every layer to be felt.
        initial: Its parameters as it was built, by name.
        batch: By name of the argument.
        loss: Of that batch.
        own: Whether the loss is the model's own.
    """

    build: Callable[[], nn.Module]
    real: nn.Module
    initial: dict[str, torch.Tensor]
    batch: dict[str, torch.Tensor]
    loss: torch.Tensor
    own: bool


@torch.no_grad()
def amplify(model: nn.Module) -> None:
    """Make small weights as large as keeps activations alive, and zeros small numbers.

    Deep models as they are built give gradients that vanish, or start from zeros: whatever was computed would be right.
    """
    numbers = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if not parameter.numel():
            continue
        noise = torch.randn(parameter.shape, generator=numbers).to(parameter)
        if parameter.ndim < 2:
            if not bool(parameter.any()):
                parameter.copy_(0.02 * noise)
            continue
        wanted = parameter[0].numel() ** -0.5
        spread = float(parameter.std())
        if spread == 0 and not bool(parameter.any()):
            parameter.copy_(wanted * noise)
        elif 0 < spread < wanted:
            parameter.mul_(wanted / spread)


@torch.no_grad()
def calibrated(model: nn.Module, batch: dict[str, torch.Tensor]) -> bool:
    """Take the statistics of batch norms from a batch, so that they keep activations alive in evaluation too."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train().momentum = 1.0
        model(**copy.deepcopy(batch))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
    return bool(norms)


def suitable(case: Case) -> Found:
    """Find a small model and a batch that it can be trained with."""
    try:
        return found_in(case, FINDING_S, 4)
    except Unsuitable:
        if case.further is None:
            raise
    gc.collect()
    return found_in(case.further, FURTHER_S, 12)


def found_in(case: Case, seconds: float, each: float) -> Found:
    """Find it within some seconds of processor time, as many at most for one size of the model."""
    why = Unsuitable("no small model was found")
    end, models, failed = time.process_time() + seconds, case.find(), None
    try:
        while True:
            try:
                build, failed = models.send(failed), None
            except StopIteration:
                break
            for wide in (True, False):  # some kernels know no float64
                torch.manual_seed(0)
                real = build().eval()
                real = real.double() if wide else real
                initial = {fqn: parameter.detach().clone() for fqn, parameter in real.named_parameters()}
                amplify(real)
                try:
                    for batch, output in case.batch_for(real, SAMPLES, each):
                        try:
                            if calibrated(real, batch):
                                output = real(**copy.deepcopy(batch))
                            own = loss_in(output)
                            loss = own if own is not None else squares(output)
                            loss.backward()
                        except Exception as error:
                            why = Unsuitable(f"no loss was found: {first_line(error)}")
                            real.zero_grad()
                            continue
                        gradients = [p.grad for p in real.parameters() if p.grad is not None]
                        if gradients and all(bool(number.isfinite().all()) for number in (loss, *gradients)):
                            return Found(build, real, initial, batch, loss.detach(), own is not None)
                        why = Unsuitable("its own loss or gradients are not finite")
                        real.zero_grad()
                except Unsuitable as error:
                    why = error
                    if isinstance(error.__cause__, Exception):
                        failed = failed or error.__cause__
                        if case.further is None and not OF_DTYPES.search(str(failed)):
                            break
            if time.process_time() > end:
                break
    except Unsuitable as error:
        why = error
    raise why


def attempt(case: Case) -> dict[str, Any]:
    """Build, compile, run one step, and compare; gives the row."""
    found = suitable(case)
    real, batch, own = found.real, found.batch, found.own
    size = sum(parameter.numel() for parameter in real.parameters())
    dtype = next(parameter.dtype for parameter in real.parameters() if parameter.is_floating_point())
    loss_fn = None if own else squares
    wanted = {fqn: p.grad for fqn, p in real.named_parameters() if p.grad is not None}
    with fxpipe.deferred_init(seed=0):
        model = found.build().eval().to(dtype)
    row: dict[str, Any] = {"parameters": size, "loss": "its own" if own else "squares", "dtype": str(dtype)}
    for microbatches in (MICROBATCHES, 1):
        try:
            options = {"microbatches": microbatches, "schedule": "GPipe"}
            pipe = fxpipe.compile(model, STAGES, (), batch, loss_fn=loss_fn, **options)
        except FxpipeError as error:
            row |= {"result": "refused", "why": first_line(error)}
            if microbatches > 1 and ("microbatch" in str(error) or not takes_half(found)):
                continue  # its loss couples the samples of a batch, or the model takes no part of the batch itself
            return row
        if microbatches == 1:
            row |= {"whole": row.pop("why")}
        break
    else:
        return row
    with pipe.materialize():
        initial = distances(dict(pipe.named_parameters()), found.initial, bits=True)
        changed = [name for name, far in initial.items() if far > 0]
        pipe.load_state_dict(real.state_dict())
        loss = pipe.eval().step(**batch)
        gradients = {fqn: p.grad for fqn, p in pipe.named_parameters() if p.grad is not None}
    nothing = NOTHING * largest(wanted.values())
    row["felt"] = round(sum(largest([each]) > nothing for each in wanted.values()) / len(wanted), 2)
    wanted["the loss"], gradients["the loss"] = found.loss, loss
    off = {
        name: distance_of(gradients.get(name), wanted.get(name), nothing)
        for name in dict.fromkeys((*wanted, *gradients))
    }
    worst = max(off, key=off.__getitem__) if off else ""
    distance = off.get(worst, 0.0)
    row |= {"result": "exact" if distance <= CLOSE else "differs", "distance": distance}
    if distance > CLOSE:
        again, half = control(found)
        itself = f"the model itself by {again:.0e} when called again, by {half:.0e} with half of the batch"
        row |= {"why": f"{worst} is off by {distance:.0e}; {itself}"}
        alone = by_halves(found, own, nothing) if dtype == torch.float32 and distance < CLOSE_IN_FLOAT32 else 0.0
        if alone > CLOSE:
            row["why"] += f"; its gradients in float32 by {alone:.0e} when added up over two halves"
        if again > CLOSE or half > distance or alone >= distance:
            row["result"] = "as far off itself"
    elif changed:
        row |= {"result": "differs", "why": f"{changed[0]} is initialised otherwise"}
    return row


def warm(case: Case) -> None:
    """Try one here: what it imports and fills caches with is then there for all that are forked."""
    torch.set_num_threads(1)
    with warnings.catch_warnings(action="ignore"):
        if (row := attempt(case))["result"] != "exact":
            raise SystemExit(f"the first model is not exact: {row}")
    gc.freeze()


@torch.no_grad()
def takes_half(found: Found) -> bool:
    """Whether the model by itself takes half of the batch."""
    half = {name: part[: len(part) // 2] if part.dim() else part for name, part in found.batch.items()}
    try:
        found.real(**half)
    except Exception:
        return False
    return True


def by_halves(found: Found, own: bool, nothing: float) -> float:
    """Give how far gradients that the model by itself adds up over halves of the batch are off those of the whole."""
    model, half = found.real, SAMPLES // 2
    whole = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    for start in (0, half):
        output = model(**{name: part[start : start + half] for name, part in found.batch.items()})
        loss = loss_in(output) if own else squares(output)
        (loss / 2).backward()  # type: ignore[operator]
    pairs = zip(model.parameters(), whole, strict=True)
    return max(distance_of(parameter.grad, gradient, nothing) for parameter, gradient in pairs)


@torch.no_grad()
def control(found: Found) -> tuple[float, float]:
    """Give how far the model by itself is off its own outputs: called again, and with half of the batch."""

    def outputs(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [leaf for leaf in leaves(found.real(**copy.deepcopy(batch))) if leaf.is_floating_point()]

    def far(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
        alike = [(a, b) for a, b in zip(one, other, strict=False) if a.shape == b.shape]
        return max((distance_of(a, b) for a, b in alike), default=0.0)

    half = SAMPLES // 2
    whole = outputs(found.batch)
    first = outputs({name: part[:half] for name, part in found.batch.items()})
    cut = [leaf[:half] if leaf.dim() and len(leaf) == SAMPLES else leaf for leaf in whole]
    again = far(whole, outputs(found.batch))
    return again, far(cut, first)


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).strip().splitlines()[:1]) or type(error).__name__
    return textwrap.shorten(f"{type(error).__name__}: {text}", 220, placeholder=" …")


def child(case: Case, path: str, seconds: float) -> None:
    """In a process of its own: try one model, and write down how it went."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        row = attempt(case)
    except Unsuitable as error:
        row = {"result": "not built", "why": first_line(error).removeprefix("Unsuitable: ")}
    except FxpipeError as error:
        row = {"result": "refused", "why": first_line(error)}
    except MemoryError:
        row = {"result": "not built", "why": f"needs more than {MEMORY_BYTES >> 30} GiB"}
    except Exception as error:
        row = {"result": "fails", "why": first_line(error)}
        if "can't allocate memory" in str(error):
            row = {"result": "not finished", "why": f"needs more than {MEMORY_BYTES >> 30} GiB"}
    row["seconds"] = round(time.process_time(), 1)
    Path(path).write_text(json.dumps(row), encoding="utf-8")


@dataclass
class Trial:
    """A model that is being tried in a process of its own."""

    name: str
    path: Path
    process: Any
    end: float

    def row(self) -> dict[str, Any] | None:
        """Give how it went; None while it goes on."""
        if self.process.is_alive() and time.monotonic() < self.end:
            return None
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            return {"result": "not finished", "why": "it waits for something"}
        if self.path.exists():
            return json.loads(self.path.read_text(encoding="utf-8"))
        if self.process.exitcode == -signal.SIGXCPU:
            return {"result": "not finished", "why": "more processor time than a model is given here"}
        return {"result": "not finished", "why": f"its process ended with {self.process.exitcode}"}


def trials(
    cases: Mapping[str, Case], names: Iterator[str], seconds: float, jobs: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Try one after the other, ``jobs`` at a time, each for some seconds of processor time; gives the rows."""
    running: dict[str, Trial] = {}
    number = itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        while True:
            for name in itertools.islice(names, jobs - len(running)):
                path = Path(folder, f"{next(number)}.json")
                process = FORK.Process(target=child, args=(cases[name], str(path), seconds))
                process.start()
                running[name] = Trial(name, path, process, time.monotonic() + PATIENCE * seconds)
            if not running:
                return
            multiprocessing.connection.wait([each.process.sentinel for each in running.values()], timeout=5)
            for name, trial in list(running.items()):
                if (row := trial.row()) is not None:
                    del running[name]
                    yield name, row


def rows_in(known: Path) -> dict[str, dict[str, Any]]:
    rows = {}
    if known.exists():
        for line in known.read_text(encoding="utf-8").splitlines():
            rows.update(json.loads(line))
    return rows


def run(arguments: argparse.Namespace, known: Path) -> dict[str, dict[str, Any]]:
    """Try what is not known yet, in an order that makes a part of it a fair sample; several runs may share a file."""
    with contextlib.redirect_stderr(None):
        cases = CASES[arguments.kind]()
    order = sorted(cases)
    random.Random(arguments.seed).shuffle(order)
    begun = tuple(arguments.names)
    last = time.monotonic() + arguments.limit

    def wanted() -> Iterator[str]:
        for name in order:
            if time.monotonic() < last and (name.startswith(begun) if begun else name not in rows_in(known)):
                yield name

    warm(next(cases[name] for name in cases if name.startswith(WARM[arguments.kind])))
    for name, row in trials(cases, wanted(), arguments.seconds, arguments.jobs):
        print(name, row["result"], row.get("why", ""), file=sys.stderr, flush=True)
        with known.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: row}) + "\n")
    rows = rows_in(known)
    return {name: rows[name] for name in order if name in rows} | {"": {"of": len(order)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=CASES, help="which library")
    parser.add_argument("names", nargs="*", help="only what begins like these, again; leaves the page alone")
    parser.add_argument("--seconds", type=float, default=60, help="limit of processor time for each model")
    parser.add_argument("--jobs", type=int, default=1, help="how many models at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the order; with several, runs may share a file")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no other one is begun")
    parser.add_argument("--known", type=Path, help="what was tried before, and is not tried again")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page")
    arguments = parser.parse_args()
    known = arguments.known or Path(tempfile.gettempdir(), f"fxpipe-coverage-{arguments.kind}.jsonl")
    rows = run(arguments, known)
    if not arguments.names:
        text = f"## {TITLES[arguments.kind]}\n\n{section(arguments.kind, rows, MICROBATCHES)}"
        write_section(f"coverage {arguments.kind}", text, arguments.docs / "coverage.md")


if __name__ == "__main__":
    main()
