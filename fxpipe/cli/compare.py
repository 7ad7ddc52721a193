"""``fxpipe compare``: plans side by side: two saved ones, or one model under several schedules and grains."""

from __future__ import annotations

import argparse
from typing import Any

from fxpipe.cli.options import add_command, add_model, add_planning, compiled, read_plan
from fxpipe.errors import PlanError
from fxpipe.ir.plan import PipelinePlan
from fxpipe.planning.simulation.simulate import simulate
from fxpipe.report.comparison import render_comparison


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "compare",
        _run,
        help="put plans side by side: saved ones, or schedules and grains of one model",
        examples="""
        fxpipe compare before.json after.json
        fxpipe compare llama-8b --stages 8 --schedule 1F1B,GPipe --grain block,op
        """,
    )
    add_model(parser)
    parser.add_argument("others", metavar="PLAN.json", nargs="*", help="where MODEL is a saved plan: the others")
    add_planning(parser)
    stages = next(action for action in parser._actions if action.dest == "stages")
    stages.required = False
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def _run(options: argparse.Namespace) -> int:
    """Print the rows; 1 where the plans are of different models."""
    plans = _saved(options) if options.others else _made(options)
    rows = [(name, plan, simulate(plan)) for name, plan in plans]
    print(render_comparison(rows, "json" if options.json else "text"))
    return int(len({plan.model_fingerprint for _, plan in plans}) > 1)


def _saved(options: argparse.Namespace) -> list[tuple[str, PipelinePlan]]:
    return [(path, read_plan(path)) for path in (options.model, *options.others)]


def _made(options: argparse.Namespace) -> list[tuple[str, PipelinePlan]]:
    if options.stages is None:
        raise PlanError("compare needs --stages for a model\n  or give two saved plans: fxpipe compare A.json B.json")
    schedules, grains = options.schedule.split(","), options.grain.split(",")
    made = []
    for schedule in schedules:
        for grain in grains:
            words = [schedule] * (len(schedules) > 1) + [f"grain {grain}"] * (len(grains) > 1)
            pipe = compiled(options, schedule=schedule, grain=grain)
            made.append((", ".join(words) or schedule, pipe.plan))
    return made
