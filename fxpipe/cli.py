"""The command line: ``fxpipe plan FILE.py:build --stages 4``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxpipe.errors import FxpipeError, PlanError
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words of the command line; None for the process's own.

    Returns:
        0; 2 where the command or the model does not allow what was asked, after one line that says why.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except FxpipeError as error:
        print(f"fxpipe: {_one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


def _one_line(message: str) -> str:
    """Join what was wrong and the way out.

    >>> _one_line("no such schedule\\n  use GPipe")
    'no such schedule; use GPipe'
    """
    return re.sub(r"\s*\n\s*", "; ", message.strip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxpipe", description="A pipeline-parallelism compiler for PyTorch.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser(
        "plan",
        help="show how a model would be cut into stages, without memory or processes",
        description="FILE.py:FUNCTION names a function without arguments that returns a model, or (model, args, "
        "kwargs) with one example batch. It is called with meta as the default device.",
    )
    plan.add_argument("factory", metavar="FILE.py:FUNCTION")
    plan.add_argument("--stages", type=int, required=True, help="number of stages")
    plan.add_argument("--ranks", type=int, help="number of ranks; default: as many as stages, or half as many")
    plan.add_argument("--schedule", default="1F1B", help=f"one of {', '.join(SCHEDULES)} (default: 1F1B)")
    plan.add_argument("--microbatches", type=int, help="default: the largest divisor of the batch up to 4 per stage")
    plan.add_argument("--grain", default="auto", help="where cuts may go: block, op or auto (default)")
    plan.add_argument(
        "--cost", default="roofline", help="parameters, flops, roofline (default), profile, or a JSON file of times"
    )
    plan.add_argument("--hardware", default="h100", help="a preset (default: h100) or a TOML file")
    plan.add_argument("--memory-limit", type=_bytes, metavar="SIZE", help="most bytes of a rank: 70GB, 64GiB")
    plan.add_argument("--seed", type=int, default=0, help="of dropout and initialisation, part of the plan")
    plan.add_argument("--baselines", action="store_true", help="also cut as DeepSpeed, torchtitan and torchgpipe do")
    plan.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the plan; without FILE, print it")
    plan.add_argument("--html", metavar="FILE", help="write the report as a page")
    plan.add_argument("--markdown", metavar="FILE", help="write the report as Markdown")
    plan.set_defaults(run=_plan)
    return parser


def _bytes(text: str) -> int:
    """Read a size.

    >>> _bytes("70GB"), _bytes("64 GiB"), _bytes("1e9")
    (70000000000, 68719476736, 1000000000)
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 70GB, 64GiB or a number of bytes")
    size: int = round(float(match[1]) * _UNITS[match[2]])
    return size


def _plan(options: argparse.Namespace) -> None:
    pipe = _compiled(options)
    if options.json == "-":
        print(pipe.report("json"))
    else:
        print(pipe.report(baselines=options.baselines))
    for path, format in ((options.json, "json"), (options.html, "html"), (options.markdown, "markdown")):
        if path and path != "-":
            _write(path, pipe.report(format))


def _compiled(options: argparse.Namespace) -> Pipeline:
    from fxpipe.capture.model.factory import build_on_meta
    from fxpipe.compiler import compile

    model, args, kwargs = build_on_meta(_factory(options.factory))
    return compile(
        model,
        options.stages,
        args,
        kwargs,
        microbatches=options.microbatches,
        schedule=options.schedule,
        ranks=options.ranks,
        cost=_cost(options.cost),
        hardware=options.hardware,
        memory_limit=options.memory_limit,
        grain=options.grain,
        seed=options.seed,
    )


def _cost(text: str) -> Any:
    """A cost model by name, or times from a JSON file: a profile's, or seconds by FQN."""
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


def _factory(text: str) -> Callable[[], Any]:
    """Load ``FILE.py:FUNCTION``."""
    file, colon, name = text.rpartition(":")
    path = Path(file)
    if not colon or not name.isidentifier():
        raise PlanError(f"{text!r} names no function\n  write FILE.py:FUNCTION, as in train.py:build")
    if not path.is_file():
        raise PlanError(f"there is no file {file}\n  give the path of the Python file that has {name}()")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise PlanError(f"{file} is no Python file\n  give the path of the Python file that has {name}()")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # classes in it can be found by their import path
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        mine = [key for key in known if getattr(vars(module)[key], "__module__", None) == path.stem]
        raise PlanError(f"{file} has no function {name}\n  it has {', '.join(sorted(mine)) or 'none'}")
    factory: Callable[[], Any] = function
    return factory


def _write(path: str, text: str) -> None:
    """Write a file whole or not at all."""
    target = Path(path)
    beside = target.with_name(f".{target.name}.part")
    try:
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(target)
    except OSError as error:
        raise PlanError(f"cannot write {path}: {error.strerror}\n  give a path that can be written") from error
