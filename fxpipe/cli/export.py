"""``fxpipe export``: a plan in the form that another trainer reads."""

from __future__ import annotations

import argparse
from typing import Any

from fxpipe.cli.options import add_command, add_model, add_planning, compiled, write
from fxpipe.errors import PlanError
from fxpipe.export.export import FORMATS, export

BETWEEN_MODULES = ("torchtitan", "nemo", "megatron", "deepspeed", "device_map")


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "export",
        _run,
        help="write the plan for another trainer: standard output, or a file",
        examples="""
        fxpipe export llama-8b --stages 8 --format torchtitan
        fxpipe export train.py:build --stages 4 --format deepspeed -o pipeline.py
        """,
    )
    add_model(parser)
    add_planning(parser)
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="who reads it")
    parser.add_argument("-o", "--output", metavar="FILE", default="-", help="where to (default: standard output)")
    parser.set_defaults(grain=None)


def _run(options: argparse.Namespace) -> None:
    """Plan between blocks for those who cut there, unless told otherwise."""
    if options.grain is None:
        options.grain = "block" if options.format in BETWEEN_MODULES else "auto"
    pipe = compiled(options)
    source = options.model if ":" in options.model else ""
    if options.format == "deepspeed" and not source:
        raise PlanError(
            "the DeepSpeed file imports the function that makes the model\n  give FILE.py:FUNCTION instead of a config"
        )
    write(options.output, export(pipe.plan, pipe.graph, options.format, source))
