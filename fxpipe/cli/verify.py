"""``fxpipe verify``: a pipeline's numbers held against the model's, on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from fxpipe.cli.options import add_command, add_model, add_planning, compiled, is_first_rank


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "verify",
        _run,
        help="run one batch through the pipeline and through the model, and compare every number",
        examples="""
        fxpipe verify train.py:build --stages 4
        torchrun --nproc-per-node 4 -m fxpipe verify train.py:build --stages 4
        """,
    )
    add_model(parser)
    add_planning(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _run(options: argparse.Namespace) -> None:
    """Build the model for real, train on one batch, compare."""
    import dataclasses
    import json

    from fxpipe.capture.model.factory import build
    from fxpipe.cli.models import find_factory
    from fxpipe.cli.shapes import ExampleSize

    example = ExampleSize.asked(options.batch, 4 * max(options.stages, 1), options.sequence, options.dtype)
    _, args, kwargs = build(find_factory(options.model, example), "cpu")
    with compiled(options, on_meta=False) as pipe:
        pipe.materialize()
        found = pipe.verify(*args, **kwargs)
    if is_first_rank():
        print(json.dumps(dataclasses.asdict(found), indent=1) if options.json else found)
