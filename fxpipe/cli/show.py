"""``fxpipe show``: a saved plan, as a person reads it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fxpipe.cli.options import add_command, read_plan, write
from fxpipe.errors import PlanError
from fxpipe.ir.files.schema import plan_schema
from fxpipe.ir.plan import PipelinePlan
from fxpipe.ir.schedule import default_ranks
from fxpipe.planning.explain import advice_of
from fxpipe.planning.simulation.simulate import simulate
from fxpipe.report.table import render
from fxpipe.report.terminal import terminal


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "show",
        _run,
        help="show a saved plan; needs no torch and no model",
        examples="""
        fxpipe show plan.json
        fxpipe show plan.json --html plan.html
        fxpipe show --schema
        """,
    )
    parser.add_argument("plan", metavar="PLAN.json", nargs="?", help="what fxpipe plan --json wrote")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of plans")
    parser.add_argument("--json", action="store_true", help="print the plan itself")
    parser.add_argument("--html", metavar="FILE", help="write the report as a page")
    parser.add_argument("--markdown", metavar="FILE", help="write the report as Markdown")


def _run(options: argparse.Namespace) -> None:
    if options.schema:
        print(json.dumps(plan_schema(), indent=1))
        return
    if options.plan is None:
        raise PlanError("show is given no plan\n  give a file that fxpipe plan --json wrote, or --schema")
    plan = read_plan(options.plan)
    simulation = simulate(plan)
    advice, command = advice_of(plan, simulation), _command(plan)

    def rendered(format: str, width: int = 100, color: bool = False) -> str:
        return render(plan, format, simulation=simulation, advice=advice, command=command, width=width, color=color)

    print(rendered("json" if options.json else "text", **terminal()))
    for path, format in ((options.html, "html"), (options.markdown, "markdown")):
        if path:
            write(path, rendered(format))


def _command(plan: PipelinePlan) -> tuple[str, ...]:
    """Give a command that plans likewise, but for the model, whose place a plan does not know."""
    words = ["fxpipe", "plan", "MODEL", "--stages", str(plan.num_stages), "--schedule", plan.schedule]
    if plan.num_ranks != default_ranks(plan.schedule, plan.num_stages):
        words += ["--ranks", str(plan.num_ranks)]
    return tuple(words)
