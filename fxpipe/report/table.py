"""A plan as a person reads it: who gets what, what limits the pipeline, and what to do about it."""

import dataclasses
import json
import textwrap
from collections.abc import Callable, Collection, Sequence

from tabulate import tabulate

from fxpipe.errors import PlanError
from fxpipe.ir.plan import Baseline, PipelinePlan, StagePlan, TieGroup
from fxpipe.ir.simulation import Simulation
from fxpipe.ir.units import count_text, digits, size_text, time_unit
from fxpipe.report.page import render_page
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
)

WIDTH = 100


def render(
    plan: PipelinePlan,
    format: str = "text",
    baselines: Sequence[Baseline] = (),
    *,
    simulation: Simulation | None = None,
    advice: Sequence[str] = (),
) -> str:
    """Render a plan as ``"text"`` (at most 100 columns), ``"markdown"`` (or ``"md"``), ``"html"`` or ``"json"``.

    The page is one file that needs no other. The JSON is the plan itself; ``PipelinePlan.from_json`` reads it back.

    Args:
        plan: The plan.
        format: One of the above.
        baselines: The same model cut by others' rules, to stand beside the plan; in JSON the plan is then the entry
            ``"plan"`` beside ``"baselines"``.
        simulation: The plan's step, simulated: what the step and the bubble are read from; without it neither is shown.
        advice: What limits the step, in one line, and then what would help, the best first.

    Raises:
        PlanError: The format is none of these.

    >>> from fxpipe.ir.plan import PipelinePlan, StagePlan
    >>> stages = (StagePlan(0, 0, ("wte", "h.0"), 7000, 28000, 3e-3, 1e-3, 2e-3), StagePlan(1, 1, ("head",)))
    >>> print(render(PipelinePlan("GPT", "", stages, num_ranks=2)).splitlines()[0])
    GPT · 2 stages · 1F1B · 1 microbatch · h100 · cost: roofline
    """
    renderers: dict[str, Callable[[PipelinePlan, Sequence[Baseline], Simulation | None, Sequence[str]], str]] = {
        "text": _text,
        "markdown": _markdown,
        "html": lambda plan, rows, done, said: render_page(plan, rows, done, said[1:]),
        "json": _json,
    }
    format = "markdown" if format == "md" else format
    if format not in renderers:
        raise PlanError(f"unknown report format {format!r}\n  known: {', '.join(renderers)}")
    return renderers[format](plan, baselines, simulation, advice)


def _text(
    plan: PipelinePlan, baselines: Sequence[Baseline], simulation: Simulation | None, advice: Sequence[str]
) -> str:
    lines = textwrap.wrap(headline(plan), WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    lines += _paragraph("inputs", ", ".join(plan.inputs)) if plan.inputs else []
    lines += ["", _stage_table(plan, "plain"), ""]
    if plan.ties:
        lines += [_tie_table(plan, "plain"), ""]
    lines += _pieces(_summary(plan, simulation))
    lines += _paragraph("step", advice[0]) if advice else []
    lines += _paragraph("opened", ", ".join(plan.opened)) if plan.opened else []
    for note in notes(plan):
        lines += _paragraph("note", note)
    if baselines:
        lines += ["", f"{BASELINES}:", "", _baseline_table(plan, baselines, "plain")]
    return "\n".join(lines)


def _markdown(
    plan: PipelinePlan, baselines: Sequence[Baseline], simulation: Simulation | None, advice: Sequence[str]
) -> str:
    parts = [f"**{headline(plan)}**"]
    if plan.inputs:
        parts.append("Inputs of one microbatch: " + ", ".join(f"`{text}`" for text in plan.inputs))
    parts.append(_stage_table(plan, "github"))
    if plan.ties:
        parts.append(_tie_table(plan, "github"))
    parts.append("  \n".join([*_summary(plan, simulation), *advice[:1]]))
    if plan.opened:
        parts.append("Opened, because a cut crosses them: " + ", ".join(f"`{name}`" for name in plan.opened))
    parts += [f"> {note}" for note in notes(plan)]
    parts += [f"{BASELINES}:", _baseline_table(plan, baselines, "github")] if baselines else []
    return "\n\n".join(parts)


def _json(
    plan: PipelinePlan, baselines: Sequence[Baseline], simulation: Simulation | None, advice: Sequence[str]
) -> str:
    if not baselines:
        return plan.to_json()
    rows = [dataclasses.asdict(row) for row in baselines]
    return json.dumps({"baselines": rows, "plan": json.loads(plan.to_json())}, sort_keys=True, indent=1)


def _baseline_table(plan: PipelinePlan, baselines: Sequence[Baseline], style: str) -> str:
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
    room = WIDTH - sum(max(len(row[i]) for row in (header, *rows)) + 2 for i in range(5))
    for row in rows:
        row[5] = _shorten(row[5], max(room, 8)) if style == "plain" else row[5]
    align = ["left", "right", "right", "right", "right", "left"]
    if style == "plain":
        return tabulate([header, *rows], tablefmt=style, colalign=align, disable_numparse=True)
    return tabulate(rows, header, tablefmt=style, colalign=align, disable_numparse=True)


def _stage_table(plan: PipelinePlan, style: str) -> str:
    total = sum(stage.seconds for stage in plan.stages) or 1.0
    unit, scale = time_unit(max((max(stage.forward_s, stage.backward_s) for stage in plan.stages), default=0.0))
    several = plan.num_ranks != plan.num_stages
    header = ["stage", *(["rank"] if several else []), "layers", "params", "of time"]
    header += [f"fwd {unit}", f"bwd {unit}", "memory", "sends →"]
    rows = [
        [
            str(stage.index),
            *([str(stage.rank)] if several else []),
            "",
            count_text(stage.parameters),
            f"{100 * stage.seconds / total:.1f} %",
            digits(stage.forward_s * scale),
            digits(stage.backward_s * scale),
            size_text(stage.peak_bytes),
            _sends(stage) if stage.index < plan.num_stages - 1 else "",
        ]
        for stage in plan.stages
    ]
    place = header.index("layers")
    others = sum(max(len(row[i]) for row in (header, *rows)) + 2 for i in range(len(header)) if i != place)
    shared = {name for stage in plan.stages for name in stage.duplicated}
    for row, stage in zip(rows, plan.stages, strict=True):
        row[place] = _layers(stage, WIDTH - others if style == "plain" else WIDTH, shared)
    align = ["left" if name in ("stage", "rank", "layers") else "right" for name in header]
    if style == "plain":  # as a row, since tabulate widens columns that have a header
        return tabulate([header, *rows], tablefmt=style, colalign=align, disable_numparse=True)
    return tabulate(rows, header, tablefmt=style, colalign=align, disable_numparse=True)


def _sends(stage: StagePlan) -> str:
    several = f" in {len(stage.sends)}" if len(stage.sends) > 1 else ""
    return size_text(stage.send_bytes) + several


def _tie_table(plan: PipelinePlan, style: str) -> str:
    rows = [["tied", "", *_tie_cells(tie)] for tie in plan.ties]
    room = WIDTH - 2 * 4 - 4 - sum(max(len(row[i]) for row in rows) for i in (2, 3, 4))
    for row, tie in zip(rows, plan.ties, strict=True):
        row[1] = _shorten(tie_names(tie), room if style == "plain" else 10 * WIDTH)
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


def _layers(stage: StagePlan, room: int, shared: Collection[str]) -> str:
    """First and last layer of a stage, what other stages compute too left aside, and how many there are.

    The last goes without the module it shares with the first.
    """
    if not stage.layers:
        return "(none)"
    ends = [name for name in stage.layers if name not in shared] or stage.layers
    first, last = ends[0], ends[-1]
    if len(stage.layers) == 1:
        return _shorten(first, room)
    if len(ends) == 1:
        return _shorten(first, max(room - len(f" ({len(stage.layers)})"), 8)) + f" ({len(stage.layers)})"
    count = f" ({len(stage.layers)})"
    joint = " … " if len(stage.layers) > 2 else ", "
    rest = last.removeprefix(first.partition(".")[0] + ".")
    last = last if rest[:1].isdigit() else rest  # "blocks.3 … 4" would say little
    each = max((room - len(count) - len(joint)) // 2, 8)
    spare = max(each - len(last), 0)
    first = _shorten(first, each + spare)
    last = _shorten(last, max(room - len(count) - len(joint) - len(first), 8))
    return f"{first}{joint}{last}{count}"


def _shorten(text: str, room: int) -> str:
    """Leave the middle out.

    >>> _shorten("transformer.h.11.attention", 12)
    'trans…ention'
    """
    if len(text) <= room:
        return text
    head = max((room - 1) // 2, 1)
    return f"{text[:head]}…{text[len(text) - max(room - 1 - head, 1) :]}"


def _pieces(pieces: Sequence[str]) -> list[str]:
    """Put the pieces on as few lines as fit, three blanks between."""
    lines: list[str] = []
    for piece in pieces:
        if lines and len(lines[-1]) + 3 + len(piece) <= WIDTH:
            lines[-1] += f"   {piece}"
        else:
            lines += textwrap.wrap(piece, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return lines


def _paragraph(label: str, text: str) -> list[str]:
    indent = " " * 8
    return textwrap.wrap(text, WIDTH, initial_indent=f"{label:<8}", subsequent_indent=indent, break_on_hyphens=False)
