"""The table of stages in text: who gets what, how long it takes, and what fills its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from fxpipe.ir.plan import PipelinePlan, StagePlan
from fxpipe.ir.units import count_text, digits, size_text, time_unit
from fxpipe.report.words import cut_name, ends_of, gib_text, memory_of, named_parts

GAP = 2
INDENT = 7
SPAN = "GiB = weights + gradients + optimizer + activations"
LEFT = ("stage", "rank", "layers")


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    short: str
    cell: Callable[[StagePlan], str]
    spare: int = 0  # the larger, the sooner it is left out where there is no room; 0: never


def stage_table(plan: PipelinePlan, width: int) -> list[str]:
    """Give the lines of the table: a row for each stage, which begins with its number, in at most ``width`` columns.

    Names that do not fit beside the numbers stand below them; in a narrow terminal columns that can be spared go.
    """
    columns = _columns(plan)
    without = [column for column in columns if column.name != "of time"]
    ways = [(columns, True), (columns, False), (without, False)]
    for some, long in ways:
        room = width - _width(plan, some, _header(some, long)) - GAP
        if all(len(_names(plan, stage)) <= room for stage in plan.stages):
            return _beside(plan, some, _header(some, long))
    for some, long in ways:
        if _width(plan, some, _header(some, long)) <= width:
            return _below(plan, some, _header(some, long), width)
    while _width(plan, without, _header(without, False)) > width and any(column.spare for column in without):
        without.remove(max(without, key=lambda column: column.spare))
    return _below(plan, without, _header(without, False), width)


def _header(columns: Sequence[_Column], long: bool) -> list[str]:
    return [column.name if long else column.short for column in columns]


def markdown_table(plan: PipelinePlan) -> str:
    """Give the table in Markdown, with every column and every name whole."""
    columns = _columns(plan)
    rows = [
        [columns[0].cell(stage), _names(plan, stage), *(column.cell(stage) for column in columns[1:])]
        for stage in plan.stages
    ]
    header = [columns[0].name, "layers", *(column.name for column in columns[1:])]
    header = [
        f"{name} GiB" if name in ("weights", "gradients", "optimizer", "activations") else name for name in header
    ]
    align = ["left" if name in LEFT else "right" for name in header]
    return tabulate(rows, header, tablefmt="github", colalign=align, disable_numparse=True)


def _columns(plan: PipelinePlan) -> list[_Column]:
    unit, scale = time_unit(max((max(stage.forward_s, stage.backward_s) for stage in plan.stages), default=0.0))
    total = sum(stage.seconds for stage in plan.stages) or 1.0
    several = plan.num_ranks != plan.num_stages
    last = plan.num_stages - 1
    return [
        _Column("stage", "stage", lambda stage: str(stage.index)),
        *([_Column("rank", "rank", lambda stage: str(stage.rank))] if several else []),
        _Column("params", "params", lambda stage: count_text(stage.parameters), 2),
        _Column("of time", "of time", lambda stage: f"{100 * stage.seconds / total:.1f} %", 9),
        _Column(f"fwd {unit}", f"fwd {unit}", lambda stage: digits(stage.forward_s * scale), 4),
        _Column(f"bwd {unit}", f"bwd {unit}", lambda stage: digits(stage.backward_s * scale), 3),
        _Column("GiB", "GiB", lambda stage: gib_text(stage.peak_bytes)),
        _Column("weights", "weights", lambda stage: gib_text(memory_of(stage).weights)),
        _Column("gradients", "grads", lambda stage: gib_text(memory_of(stage).gradients)),
        _Column("optimizer", "optim", lambda stage: gib_text(memory_of(stage).optimizer)),
        _Column("activations", "activ", lambda stage: gib_text(memory_of(stage).activations)),
        _Column("sends →", "sends →", lambda stage: _sends(stage) if stage.index < last else "", 5),
    ]


def _sends(stage: StagePlan) -> str:
    several = f" in {len(stage.sends)}" if len(stage.sends) > 1 else ""
    return size_text(stage.send_bytes) + several


def _width(plan: PipelinePlan, columns: Sequence[_Column], names: Sequence[str]) -> int:
    """Give how wide the table is without names of layers."""
    cells = [[column.cell(stage) for column in columns] for stage in plan.stages]
    widths = [max(map(len, (name, *each))) for name, each in zip(names, zip(*cells, strict=True), strict=True)]
    return sum(widths) + GAP * (len(widths) - 1)


def _beside(plan: PipelinePlan, columns: Sequence[_Column], names: Sequence[str]) -> list[str]:
    place = 1 + any(column.name == "rank" for column in columns)
    rows = [[*names[:place], "layers", *names[place:]]]
    for stage in plan.stages:
        cells = [column.cell(stage) for column in columns]
        rows.append([*cells[:place], _names(plan, stage), *cells[place:]])
    return _spanned(rows)


def _below(plan: PipelinePlan, columns: Sequence[_Column], names: Sequence[str], width: int) -> list[str]:
    lines = _spanned([list(names), *([column.cell(stage) for column in columns] for stage in plan.stages)])
    head = len(lines) - plan.num_stages
    made = lines[:head]
    for line, stage in zip(lines[head:], plan.stages, strict=True):
        made += [line, " " * INDENT + _names(plan, stage, width - INDENT)]
    return made


def _spanned(rows: list[list[str]]) -> list[str]:
    """Put over the columns of memory what they are."""
    align = ["left" if name in LEFT else "right" for name in rows[0]]
    # The header as a row, since tabulate widens columns that have one.
    lines = [
        line.rstrip() for line in tabulate(rows, tablefmt="plain", colalign=align, disable_numparse=True).split("\n")
    ]
    last = next(name for name in ("activations", "activ") if name in rows[0])
    end = lines[0].index(last) + len(last)
    return [SPAN.rjust(end) if len(SPAN) <= end else SPAN, *lines]


def _names(plan: PipelinePlan, stage: StagePlan, room: int = 10**6) -> str:
    """Give the first and last part of a stage and how many there are."""
    names = named_parts(plan, stage)
    first, last = ends_of(names)
    count = f" ({len(names)})" if len(names) > 2 else ""
    joint = " … " if len(names) > 2 else ", "
    if not last:
        return cut_name(first, room)
    room -= len(joint) + len(count)
    if len(first) + len(last) > room:
        last = cut_name(last, max(room // 2, room - len(first)))
        first = cut_name(first, room - len(last))
    return f"{first}{joint}{last}{count}"
