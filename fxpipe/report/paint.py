"""Colours of a terminal: never the only thing that says something."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxpipe.ir.plan import PipelinePlan
from fxpipe.report.words import memory_by_rank, slowest_load

_CODES = {"bold": "1", "red": "31", "green": "32", "yellow": "33"}

Paint = Callable[[str, str], str]


def painter(color: bool) -> Paint:
    """Give what paints text, ``paint(name, text)``, or leaves it alone.

    >>> painter(True)("red", "hot"), painter(False)("red", "hot"), painter(True)("", "plain")
    ('\\x1b[31mhot\\x1b[0m', 'hot', 'plain')
    """
    return lambda name, text: f"\033[{_CODES[name]}m{text}\033[0m" if color and name and text else text


def painted_rows(plan: PipelinePlan, lines: Sequence[str], paint: Paint) -> list[str]:
    """Paint the rows of stages: red where the rank's memory is not enough, yellow on the slowest rank."""
    full = {rank for rank, need in memory_by_rank(plan).items() if need > plan.hardware.memory}
    loads: dict[int, float] = {}
    for stage in plan.stages:
        loads[stage.rank] = loads.get(stage.rank, 0.0) + stage.seconds
    slowest = {rank for rank, load in loads.items() if load >= slowest_load(plan) > 0}
    made = []
    for line in lines:
        number = line.split(" ", 1)[0]
        rank = plan.stages[int(number)].rank if number.isdecimal() else None
        made.append(paint("red" if rank in full else "yellow" if rank in slowest else "", line))
    return made
