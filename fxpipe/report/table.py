"""A plan as a person reads it: who gets what, what limits the pipeline, and what to do about it."""

import dataclasses
import json
import re
import textwrap
from collections.abc import Callable, Sequence

from tabulate import tabulate

from fxpipe.errors import PlanError
from fxpipe.ir.plan import Baseline, PipelinePlan, TieGroup
from fxpipe.ir.simulation import Explanation, Simulation
from fxpipe.ir.units import digits, folded, size_text, time_unit
from fxpipe.report.page import render_page
from fxpipe.report.paint import painted_rows, painter
from fxpipe.report.stages import markdown_table, stage_table
from fxpipe.report.words import (
    BASELINES,
    balance,
    headline,
    mean_load,
    memory_by_rank,
    notes,
    slowest_load,
    tie_names,
    tie_price,
    too_full,
    tries,
)

WIDTH = 100
NARROWEST = 60
INDENT = 8
SHOWN = 2
"""Changes that are proposed at most; ``explain`` has all."""


def render(
    plan: PipelinePlan,
    format: str = "text",
    baselines: Sequence[Baseline] = (),
    *,
    simulation: Simulation | None = None,
    advice: Explanation | None = None,
    command: Sequence[str] = (),
    width: int = WIDTH,
    color: bool = False,
) -> str:
    """Render a plan as ``"text"``, ``"markdown"`` (or ``"md"``), ``"html"`` or ``"json"``.

    The page is one file that needs no other. The JSON is the plan itself; ``PipelinePlan.from_json`` reads it back.

    Args:
        plan: The plan.
        format: One of the above.
        baselines: The same model cut by others' rules, to stand beside the plan; in JSON the plan is then the entry
            ``"plan"`` beside ``"baselines"``.
        simulation: The plan's step, simulated: what the step and the bubble are read from; without it neither is shown.
        advice: What limits the step, and what would help.
        command: Words of the command that made the plan: what would help is spelled as another such command, without
            one as a call of ``compile``.
        width: Columns of the text.
        color: Whether the text is coloured for a terminal.

    Raises:
        PlanError: The format is none of these.

    >>> from fxpipe.ir.plan import PipelinePlan, StagePlan
    >>> stages = (StagePlan(0, 0, ("wte", "h.0"), 7000, 28000, 3e-3, 1e-3, 2e-3), StagePlan(1, 1, ("head",)))
    >>> print(render(PipelinePlan("GPT", "", stages, num_ranks=2)).splitlines()[0])
    GPT · 2 stages · 1F1B · 1 microbatch · h100 · cost: roofline
    """
    format = "markdown" if format == "md" else format
    helping = tries(plan, advice.changes if advice is not None else (), command)
    renderers: dict[str, Callable[[], str]] = {
        "text": lambda: _text(plan, baselines, simulation, advice, helping, max(width, NARROWEST), color),
        "markdown": lambda: _markdown(plan, baselines, simulation, advice, helping),
        "html": lambda: render_page(plan, baselines, simulation, advice, helping),
        "json": lambda: _json(plan, baselines),
    }
    if format not in renderers:
        raise PlanError(f"unknown report format {format!r}\n  known: {', '.join(renderers)}, and md for markdown")
    return renderers[format]()


def _text(
    plan: PipelinePlan,
    baselines: Sequence[Baseline],
    simulation: Simulation | None,
    advice: Explanation | None,
    helping: Sequence[tuple[str, str]],
    width: int,
    color: bool,
) -> str:
    paint = painter(color)
    head = textwrap.wrap(headline(plan), width, subsequent_indent="  ", break_on_hyphens=False)
    lines = [paint("bold", line) for line in head]
    lines += _paragraph("inputs", ", ".join(plan.inputs), width) if plan.inputs else []
    lines += ["", *painted_rows(plan, stage_table(plan, width), paint), ""]
    if plan.ties:
        lines += [_tie_table(plan, "plain", width), ""]
    lines += _pieces(_summary(plan, simulation), width)
    lines += _paragraph("step", f"limited by {advice.limited}", width) if advice is not None else []
    for command, gain in helping[:SHOWN]:
        lines += [paint("green", line) for line in _try(command, gain, width)]
    lines += _paragraph("opened", folded(plan.opened), width) if plan.opened else []
    for note in notes(plan):
        urgent = "red" if note == too_full(plan) else ""
        lines += [paint(urgent, line) for line in _paragraph("note", note, width)]
    if baselines:
        lines += ["", *textwrap.wrap(f"{BASELINES}:", width), "", _baseline_table(plan, baselines, "plain", width)]
    return "\n".join(lines)


def _try(command: str, gain: str, width: int) -> list[str]:
    """What to type, broken as a shell takes it, and what it gives."""
    room = width - INDENT - 2
    rows: list[str] = []
    for option in re.split(r" (?=--)", command):  # an option and its value stay together where they can
        for part in [option] if len(option) <= room else option.split(" "):
            if rows and len(rows[-1]) + 1 + len(part) <= room:
                rows[-1] += f" {part}"
            else:
                rows.append(part)
    joint = " \\" if command.startswith("fxpipe ") else ""
    lines = [f"{'' if place else 'try':<{INDENT}}{row}{joint}" for place, row in enumerate(rows[:-1])]
    lines.append(f"{'' if lines else 'try':<{INDENT}}{rows[-1]}")
    if len(lines[-1]) + 3 + len(gain) <= width:
        return [*lines[:-1], f"{lines[-1]}   {gain}"]
    return [*lines, *_paragraph("", gain, width)]


def _markdown(
    plan: PipelinePlan,
    baselines: Sequence[Baseline],
    simulation: Simulation | None,
    advice: Explanation | None,
    helping: Sequence[tuple[str, str]],
) -> str:
    parts = [f"**{headline(plan)}**"]
    if plan.inputs:
        parts.append("Inputs of one microbatch: " + ", ".join(f"`{text}`" for text in plan.inputs))
    parts.append(markdown_table(plan))
    if plan.ties:
        parts.append(_tie_table(plan, "github", WIDTH))
    limit = [f"step limited by {advice.limited}"] if advice is not None else []
    parts.append("  \n".join([*_summary(plan, simulation), *limit]))
    parts += [f"Try `{command}`: {gain}." for command, gain in helping[:SHOWN]]
    if plan.opened:
        parts.append("Opened, because a cut crosses them: " + ", ".join(f"`{name}`" for name in plan.opened))
    parts += [f"> {note}" for note in notes(plan)]
    parts += [f"{BASELINES}:", _baseline_table(plan, baselines, "github", WIDTH)] if baselines else []
    return "\n\n".join(parts)


def _json(plan: PipelinePlan, baselines: Sequence[Baseline]) -> str:
    if not baselines:
        return plan.to_json()
    rows = [dataclasses.asdict(row) for row in baselines]
    return json.dumps({"baselines": rows, "plan": json.loads(plan.to_json())}, sort_keys=True, indent=1)


def _baseline_table(plan: PipelinePlan, baselines: Sequence[Baseline], style: str, width: int) -> str:
    unit, scale = time_unit(plan.bottleneck)
    per_rank = memory_by_rank(plan)
    own = Baseline("this plan", "", plan.bottleneck, balance(plan), max(per_rank.values(), default=0))
    rows = [
        [row.name, "–", "", "", "", row.remark]
        if row.bottleneck is None
        else [
            row.name,
            digits(row.bottleneck * scale),
            f"{row.bottleneck / plan.bottleneck:.3f} ×" if plan.bottleneck else "",
            f"{row.balance:.3f}",
            size_text(row.peak_bytes),
            row.remark,
        ]
        for row in (own, *baselines)
    ]
    header = ["rule", f"slowest {unit}", "to plan", "max/mean", "memory", ""]
    room = width - sum(max(len(row[i]) for row in (header, *rows)) + 2 for i in range(5))
    for row in rows:
        row[5] = _shorten(row[5], max(room, 8)) if style == "plain" else row[5]
    align = ["left", "right", "right", "right", "right", "left"]
    if style == "plain":
        return tabulate([header, *rows], tablefmt=style, colalign=align, disable_numparse=True)
    return tabulate(rows, header, tablefmt=style, colalign=align, disable_numparse=True)


def _tie_table(plan: PipelinePlan, style: str, width: int) -> str:
    rows = [["tied", "", *_tie_cells(tie)] for tie in plan.ties]
    room = width - 2 * 4 - 4 - sum(max(len(row[i]) for row in rows) for i in (2, 3, 4))
    for row, tie in zip(rows, plan.ties, strict=True):
        row[1] = _shorten(tie_names(tie), max(room, 8) if style == "plain" else 10 * WIDTH)
    header = () if style == "plain" else ("", "tensor", "stages", "bytes", "per step")
    return tabulate(rows, header, tablefmt=style, disable_numparse=True)


def _tie_cells(tie: TieGroup) -> tuple[str, str, str]:
    stages = ("stages " if len(tie.stages) > 1 else "stage ") + ", ".join(map(str, tie.stages))
    return stages, size_text(tie.bytes), tie_price(tie)


def _summary(plan: PipelinePlan, simulation: Simulation | None) -> list[str]:
    """Bottleneck, balance, bubble, step time and limit: the pieces of the last lines."""
    mean = mean_load(plan)
    bottleneck = slowest_load(plan)
    pieces = []
    if mean > 0:
        unit, scale = time_unit(bottleneck)
        pieces.append(f"bottleneck {digits(bottleneck * scale)} {unit}")
        bound = ""
        if plan.lower_bound > 0:
            gap = "best possible" if plan.proven else f"gap {100 * plan.gap:.1f} %"
            bound = f" (lower bound {plan.lower_bound / mean:.3f}, {gap})"
        pieces.append(f"balance max/mean {balance(plan):.3f}{bound}")
    if simulation is not None and simulation.step_s > 0:
        unit, scale = time_unit(simulation.step_s)
        pieces.append(f"bubble ≈ {100 * simulation.mean_bubble:.1f} %")
        pieces.append(f"step ≈ {digits(simulation.step_s * scale)} {unit}")
    if plan.limited_by:
        pieces.append(f"limited by: {plan.limited_by}")
    if plan.method:
        pieces.append(f"search: {plan.method}")
    return pieces


def _shorten(text: str, room: int) -> str:
    """Leave the middle out.

    >>> _shorten("transformer.h.11.attention", 12)
    'trans…ention'
    """
    if len(text) <= room:
        return text
    head = max((room - 1) // 2, 1)
    return f"{text[:head]}…{text[len(text) - max(room - 1 - head, 1) :]}"


def _pieces(pieces: Sequence[str], width: int) -> list[str]:
    """Put the pieces on as few lines as fit, three blanks between."""
    lines: list[str] = []
    for piece in pieces:
        if lines and len(lines[-1]) + 3 + len(piece) <= width:
            lines[-1] += f"   {piece}"
        else:
            lines += textwrap.wrap(piece, width, subsequent_indent="  ", break_on_hyphens=False)
    return lines


def _paragraph(label: str, text: str, width: int) -> list[str]:
    start, indent = f"{label:<{INDENT}}", " " * INDENT
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)
