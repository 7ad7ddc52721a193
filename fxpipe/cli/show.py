"""``fxpipe show``: a saved plan, as a person reads it."""

from __future__ import annotations

import argparse
from typing import Any

from fxpipe.cli.options import add_command, read_plan, write
from fxpipe.planning.explain import advice_of
from fxpipe.planning.simulation.simulate import simulate
from fxpipe.report.table import render


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
        """,
    )
    parser.add_argument("plan", metavar="PLAN.json", help="what fxpipe plan --json wrote")
    parser.add_argument("--json", action="store_true", help="print the plan itself")
    parser.add_argument("--html", metavar="FILE", help="write the report as a page")
    parser.add_argument("--markdown", metavar="FILE", help="write the report as Markdown")


def _run(options: argparse.Namespace) -> None:
    plan = read_plan(options.plan)
    simulation = simulate(plan)
    advice = advice_of(plan, simulation)
    print(render(plan, "json" if options.json else "text", simulation=simulation, advice=advice))
    for path, format in ((options.html, "html"), (options.markdown, "markdown")):
        if path:
            write(path, render(plan, format, simulation=simulation, advice=advice))
