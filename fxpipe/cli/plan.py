"""``fxpipe plan``: how a model would be cut into stages."""

from __future__ import annotations

import argparse
from typing import Any

from fxpipe.cli.budget import add_budget, print_best
from fxpipe.cli.options import add_command, add_model, add_planning, compiled, write
from fxpipe.errors import PlanError
from fxpipe.report.terminal import terminal


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "plan",
        _run,
        help="show how a model would be cut into stages, without memory or processes",
        examples="""
        fxpipe plan llama-8b --stages 8
        fxpipe plan llama-70b --devices 64 --nodes-of 8 --global-batch 1024
        fxpipe plan train.py:build --stages 4 --schedule ZBVZeroBubble --html plan.html
        fxpipe plan config.json --stages 16 --memory-limit 70GB --json plan.json
        """,
    )
    add_model(parser)
    add_planning(parser, stages_required=False)
    add_budget(parser)
    parser.set_defaults(schedule=None)
    parser.add_argument("--baselines", action="store_true", help="also cut as DeepSpeed, torchtitan and torchgpipe do")
    parser.add_argument("--weights", action="store_true", help="also where each tensor's first value comes from")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the plan; without FILE, print it")
    parser.add_argument("--html", metavar="FILE", help="write the report as a page")
    parser.add_argument("--markdown", metavar="FILE", help="write the report as Markdown")


def _run(options: argparse.Namespace) -> None:
    if options.devices is not None:
        if options.stages is not None:
            raise PlanError("--devices and --stages are both given\n  give one: of devices the stages are chosen")
        options.schedule = options.schedule or "auto"
        print_best(options)
        return
    options.schedule = options.schedule or "1F1B"
    if options.stages is None:
        raise PlanError("neither --stages nor --devices is given\n  give --stages 8, --stages auto or --devices 64")
    pipe = compiled(options)
    extra = {"baselines": options.baselines, "weights": options.weights}
    if options.json == "-":
        print(pipe.report("json", weights=options.weights))
    else:
        print(pipe.report(**extra, **terminal(), command=_asked(options)))
    if options.json not in (None, "-"):
        write(options.json, pipe.report("json", weights=options.weights))
    for path, format in ((options.html, "html"), (options.markdown, "markdown")):
        if path:
            write(path, pipe.report(format, **extra, command=_asked(options)))


def _asked(options: argparse.Namespace) -> tuple[str, ...]:
    """Give the command's words without where its output goes."""
    words = list(options.words)
    for flag, value in (("--json", options.json), ("--html", options.html), ("--markdown", options.markdown)):
        if flag in words:
            place = words.index(flag)
            del words[place : place + 1 + (words[place + 1 : place + 2] == [value])]
        elif value is not None and f"{flag}={value}" in words:
            words.remove(f"{flag}={value}")
    return tuple(words)
