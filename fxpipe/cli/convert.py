"""``fxpipe convert``: a checkpoint as safetensors and back, without the model in memory."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fxpipe.cli.options import add_command


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "convert",
        _run,
        help="turn a checkpoint into safetensors, or safetensors into a checkpoint, one tensor at a time",
        examples="""
        fxpipe convert checkpoints model.safetensors
        fxpipe convert checkpoints/step-100 exported
        fxpipe convert downloaded checkpoint
        """,
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint, a directory of them, or safetensors")
    parser.add_argument("target", metavar="DST", help="a new directory, or a new .safetensors file")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def _run(options: argparse.Namespace) -> None:
    from fxpipe.runtime.weights.consolidation import convert

    path, what = convert(options.source, options.target)
    print(json.dumps({"path": str(path), "written": what}, indent=1) if options.json else f"{path}: {what}")
