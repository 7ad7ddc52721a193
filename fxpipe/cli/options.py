"""Options that several commands share, and the pipeline that they ask for."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxpipe.cli.models import MODEL, find_factory
from fxpipe.cli.shapes import ExampleSize
from fxpipe.errors import PlanError
from fxpipe.ir.hardware import RECOMPUTE, Training
from fxpipe.ir.plan import PipelinePlan
from fxpipe.ir.profile import Profile
from fxpipe.ir.schedule import SCHEDULES

if TYPE_CHECKING:
    from fxpipe.pipeline import Pipeline

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}


def add_command(commands: Any, name: str, run: Any, *, help: str, examples: str) -> argparse.ArgumentParser:
    """Add a command whose help ends with examples.

    Args:
        commands: What ``add_subparsers`` gave.
        name: What a person types.
        run: Called with the options; gives an exit code or None.
        help: One line.
        examples: Commands as typed, one a line.
    """
    text = "examples:\n" + "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model and the size of its example batch."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--batch", type=int, metavar="N", help="samples of the example batch, for a config or a shape")
    parser.add_argument("--sequence", type=int, metavar="N", help="tokens of each sample, for a config or a shape")
    parser.add_argument("--dtype", metavar="DTYPE", help="of the weights, for a config or a shape (default: bfloat16)")


def add_planning(parser: argparse.ArgumentParser, *, stages_required: bool = True) -> None:
    """Add what a plan depends on besides the model."""
    parser.add_argument("--stages", type=count, required=stages_required, help="number of stages, or auto")
    parser.add_argument("--ranks", type=int, help="number of ranks; default: as many as stages, or half as many")
    parser.add_argument("--schedule", default="1F1B", help=f"one of {', '.join(SCHEDULES)}, or auto (default: 1F1B)")
    parser.add_argument(
        "--microbatches",
        type=count,
        help="a number, or auto; default: the largest divisor of the batch up to 4 per stage",
    )
    parser.add_argument("--grain", default="auto", help="where cuts may go: block, op or auto (default)")
    parser.add_argument(
        "--cost", default="roofline", help="parameters, flops, roofline (default), profile, or a JSON file of times"
    )
    parser.add_argument("--hardware", default="h100", help="a preset (default: h100) or a TOML file")
    parser.add_argument(
        "--memory-limit", type=limit, metavar="SIZE", help="most bytes of a rank: 70GB, 64GiB, or device"
    )
    parser.add_argument(
        "--recompute",
        metavar="WHAT",
        help="block, attention, auto, or FQN patterns with commas between; default: nothing",
    )
    parser.add_argument("--seed", type=int, default=0, help="of dropout and initialisation, part of the plan")


def compiled(options: argparse.Namespace, *, on_meta: bool = True, **changes: Any) -> Pipeline:
    """Compile the model that the options name.

    Args:
        options: Of ``add_model`` and ``add_planning``.
        on_meta: Whether the model is built without memory.
        **changes: Arguments of ``compile`` that replace those of the options.
    """
    with waiting(f"reading {options.model}"):
        from fxpipe.capture.model.factory import build
        from fxpipe.compiler import compile
    size = options.stages if isinstance(options.stages, int) else options.ranks or 8
    example = ExampleSize.asked(options.batch, 4 * max(size, 1), options.sequence, options.dtype)
    with waiting(f"building {options.model}"):
        model, args, kwargs = build(find_factory(options.model, example), "meta" if on_meta else "cpu")
    arguments: dict[str, Any] = {
        "stages": options.stages,
        "microbatches": options.microbatches,
        "schedule": options.schedule,
        "ranks": options.ranks,
        "cost": read_cost(options.cost),
        "hardware": options.hardware,
        "memory_limit": options.memory_limit,
        "grain": options.grain,
        "training": training(options),
        "seed": options.seed,
        **changes,
    }
    return compile(model, arguments.pop("stages"), args, kwargs, **arguments)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on a terminal what is waited for, and take it away again; silent in pipes and on other ranks."""
    shown = sys.stderr.isatty() and is_first_rank()
    if shown:
        print(f"{what} …", end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print(" " * (len(what) + 2), end="\r", file=sys.stderr, flush=True)


def is_first_rank() -> bool:
    """Tell whether this process may speak for all that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def read_cost(text: str) -> Any:
    """Give a cost model by name, or times from a JSON file: a profile's, or seconds by FQN."""
    if not text.endswith(".json"):
        return text
    try:
        written = Path(text).read_text(encoding="utf-8")
        data = json.loads(written)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"cannot read costs from {text}: {error}\n  give a profile, or an object of FQN: seconds"
        ) from error
    return Profile.from_json(written) if isinstance(data, dict) and "format" in data else data


def read_plan(path: str) -> PipelinePlan:
    """Read a plan that ``fxpipe plan --json`` wrote.

    Raises:
        PlanError: There is no such file, or it holds no plan.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read {path}: {error}\n  give a file that fxpipe plan --json wrote") from error
    return PipelinePlan.from_json(text)


def write(path: str, text: str) -> None:
    """Write a file whole or not at all; ``-`` is standard output.

    Raises:
        PlanError: It cannot be written.
    """
    if path == "-":
        print(text)
        return
    target = Path(path)
    beside = target.with_name(f".{target.name}.part")
    try:
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(target)
    except OSError as error:
        raise PlanError(f"cannot write {path}: {error.strerror}\n  give a path that can be written") from error


def training(options: argparse.Namespace) -> Training:
    """Give the way of training that the options name."""
    words = tuple(filter(None, (options.recompute or "").split(",")))
    return Training(recompute=words[0] if len(words) == 1 and words[0] in RECOMPUTE else words or None)


def count(text: str) -> int | str:
    """Read a number, or ``auto``.

    >>> count("8"), count("auto")
    (8, 'auto')
    """
    return text if text == "auto" else int(text)


def limit(text: str) -> int | str:
    """Read a memory limit: a size, or ``device``.

    >>> limit("device"), limit("1kB")
    ('device', 1000)
    """
    return text if text == "device" else size(text)


def size(text: str) -> int:
    """Read a size.

    >>> size("70GB"), size("64 GiB"), size("1e9")
    (70000000000, 68719476736, 1000000000)
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 70GB, 64GiB or a number of bytes")
    number: int = round(float(match[1]) * _UNITS[match[2]])
    return number
