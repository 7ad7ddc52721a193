"""The report as one page that needs no other file: what a person wants to know first, then all there is to see."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from fxpipe.ir.plan import Baseline, PipelinePlan, StagePlan
from fxpipe.ir.simulation import Explanation, Simulation
from fxpipe.ir.units import count_text, folded, seconds_text, size_text, time_unit
from fxpipe.report.words import (
    BASELINES,
    balance,
    ends_of,
    headline,
    memory_by_rank,
    memory_of,
    named_parts,
    notes,
    slowest_load,
    tie_names,
    tie_price,
    too_full,
)

MOST_BOXES = 40_000
"""Actions that are drawn at most: of a longer step the time line shows the first and says so."""


def render_page(
    plan: PipelinePlan,
    baselines: Sequence[Baseline] = (),
    simulation: Simulation | None = None,
    advice: Explanation | None = None,
    helping: Sequence[tuple[str, str]] = (),
) -> str:
    """Render a plan as one HTML page.

    Args:
        plan: The plan.
        baselines: The same model cut by others' rules.
        simulation: The plan's step, simulated; without it there are no times of a step and no time line.
        advice: What limits the step, and what would help.
        helping: What would help as what to type, and what each gives, the best first.

    Returns:
        A page without any reference to another file: it opens offline, on a phone, with a keyboard, in dark mode.
    """
    parts = [
        f"<h1>{_text(plan.model)}</h1>",
        f'<p class="headline">{_text(headline(plan))}</p>',
        _answers(plan, simulation, advice, helping),
        _model_bar(plan),
        _timeline() if simulation is not None and simulation.step_s > 0 else "",
        _memory_section(plan, simulation),
        _stage_table(plan),
        _tie_table(plan),
        _baseline_table(plan, baselines) if baselines else "",
        _remarks(plan),
    ]
    data = json.dumps(_data(plan, simulation), separators=(",", ":")).replace("<", "\\u003c")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(plan.model)}: {plan.num_stages} stages</title>",
            f"<style>{_asset('page.css')}</style></head><body><main>",
            *filter(None, parts),
            "</main>",
            f'<script type="application/json" id="data">{data}</script>',
            f"<script>{_asset('page.js')}</script>",
            "</body></html>",
        ]
    )


def framed(page: str, height: int = 900) -> str:
    """Put a page into a frame, for a notebook.

    Args:
        page: As ``render_page`` gives it.
        height: Of the frame, in pixels.

    >>> framed("<p>")
    '<iframe srcdoc="&lt;p&gt;" style="width:100%;height:900px;border:0" title="fxpipe plan"></iframe>'
    """
    style = f"width:100%;height:{height}px;border:0"
    return f'<iframe srcdoc="{html.escape(page)}" style="{style}" title="fxpipe plan"></iframe>'


def _asset(name: str) -> str:
    return resources.files("fxpipe.report").joinpath("assets", name).read_text(encoding="utf-8")


def _text(text: object) -> str:
    return html.escape(str(text))


# --- the four answers -----------------------------------------------------------------------------------------------


def _answers(
    plan: PipelinePlan,
    simulation: Simulation | None,
    advice: Explanation | None,
    helping: Sequence[tuple[str, str]],
) -> str:
    """Say whether it fits, how fast it is, what limits it and what would help: the top of the page."""
    cards = [
        ("Does it fit?", *map(_text, _fit(plan))),
        ("How fast?", *map(_text, _speed(plan, simulation))),
        ("What limits it?", *map(_text, _limit(plan, simulation, advice))),
        ("What would help?", *_help(plan, advice, helping)),
    ]
    rows = [
        f'<section class="card"><h2>{title}</h2><p class="big">{short}</p><p>{long}</p></section>'
        for title, short, long in cards
    ]
    return f'<div class="cards">{"".join(rows)}</div>'


def _fit(plan: PipelinePlan) -> tuple[str, str]:
    per_rank = memory_by_rank(plan)
    rank, need = max(per_rank.items(), key=lambda item: (item[1], -item[0]))
    limit = plan.memory_limit if plan.memory_limit is not None else plan.hardware.memory
    whose = "the limit" if plan.memory_limit is not None else f"a {plan.hardware.name}"
    if need <= limit:
        return "Yes", f"Rank {rank} needs most: {size_text(need)} of the {size_text(limit)} of {whose}."
    return "No", f"Rank {rank} needs {size_text(need)}, and {whose} has {size_text(limit)}."


def _speed(plan: PipelinePlan, simulation: Simulation | None) -> tuple[str, str]:
    if simulation is None or simulation.step_s <= 0:
        return seconds_text(slowest_load(plan)), "per microbatch in the slowest rank; no step was simulated."
    samples = plan.num_microbatches * (plan.microbatch_size or 1)
    rate = count_text(samples / simulation.step_s)
    what = "samples" if plan.microbatch_size else "microbatches"
    idle = f"{100 * simulation.mean_bubble:.1f} % of the ranks' time is idle"
    return f"{seconds_text(simulation.step_s)} per step", f"{rate} {what} per second; {idle}."


def _limit(plan: PipelinePlan, simulation: Simulation | None, advice: Explanation | None) -> tuple[str, str]:
    if advice is not None:
        compute, links, idle = (f"{100 * share:.0f} %" for share in advice.shares)
        parts = f"{compute} of the step is work of the slowest rank, {links} its links, {idle} waiting."
        more = f" The slowest rank is {100 * (balance(plan) - 1):.0f} % above the mean." if balance(plan) > 1.02 else ""
        more += "" if plan.limited_by in ("", advice.limit) else f" What limits it: {plan.limited_by}."
        return f"{advice.limited[0].upper()}{advice.limited[1:]}", parts + more
    slowest = max(plan.stages, key=lambda stage: stage.seconds)
    bubble = simulation.mean_bubble if simulation is not None else 0.0
    uneven = 1 - 1 / balance(plan) if balance(plan) else 0.0
    moving = slowest.transfer_s / slowest.seconds if slowest.seconds else 0.0
    causes = {"the bubble": bubble - uneven, "uneven stages": uneven, "the links": moving}
    cause = max(causes, key=lambda name: causes[name])
    words = {
        "the bubble": f"{100 * bubble:.0f} % idle while the pipeline fills and drains",
        "uneven stages": f"stage {slowest.index} is {100 * (balance(plan) - 1):.0f} % slower than the mean",
        "the links": f"{100 * moving:.0f} % of stage {slowest.index}'s time are transfers",
    }
    limited = f" {plan.limited_by[0].upper()}{plan.limited_by[1:]}." if plan.limited_by else ""
    return cause[0].upper() + cause[1:], f"{words[cause][0].upper()}{words[cause][1:]}.{limited}"


def _help(plan: PipelinePlan, advice: Explanation | None, helping: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """What would help, in words and as what to type."""
    if helping:
        short = "Less memory" if too_full(plan) else helping[0][1].partition(",")[0]
        rows = [f"<code>{_command(command)}</code>" for command, _ in helping[:2]]
        if len(rows) > 1:
            rows[1] = f"{_text(helping[1][1])}: {rows[1]}"
        return _text(f"{short[0].upper()}{short[1:]}"), "<br>".join(rows)
    if plan.proven:
        return "Nothing on this cut", "No partition of these layers has a faster slowest stage: this is proven."
    return "A little, at most", f"No partition can be more than {100 * plan.gap:.1f} % faster in its slowest stage."


def _command(command: str) -> str:
    """A command whose lines break between options."""
    first, *options = command.split(" --")
    return " ".join([_text(first), *(f"<span>--{_text(option)}</span>" for option in options)])


# --- sections -------------------------------------------------------------------------------------------------------


def _model_bar(plan: PipelinePlan) -> str:
    """The model as a bar cut into stages, widths by time; each opens to its layers."""
    slowest = max((stage.seconds for stage in plan.stages), default=0.0) or 1.0
    buttons = "".join(
        f'<button type="button" role="tab" aria-selected="false" aria-controls="layers" data-stage="{stage.index}" '
        f'title="{_text(chr(10).join(stage.layers))}" style="flex:{max(stage.seconds / slowest, 1e-3):.5f}"'
        f"{' class=slowest' if stage.seconds == slowest else ''}>"
        f"<strong>{stage.index}</strong><span>{seconds_text(stage.seconds)}</span></button>"
        for stage in plan.stages
    )
    return (
        "<section><h2>The model, cut into stages</h2>"
        "<p>As wide as the time of one microbatch, forward, backward and transfers. The slowest has a double edge. "
        "Choose a stage to see its layers.</p>"
        f'<div class="bar" role="tablist" aria-label="stages">{buttons}</div>'
        '<div id="layers" role="tabpanel" tabindex="0" aria-live="polite"></div></section>'
    )


def _timeline() -> str:
    keys = (
        ("F", "forward"),
        ("B", "backward"),
        ("I", "gradients of inputs"),
        ("W", "gradients of weights"),
        ("R", "recomputation, within the backward"),
        (">", "waiting for a message"),
        ("·", "idle"),
    )
    legend = "".join(f'<li><i class="key k{ord(mark)}">{_text(mark)}</i>{_text(word)}</li>' for mark, word in keys)
    return (
        '<section><h2>One step</h2><p id="timenote">A row for each rank, a box for each microbatch in a stage. '
        "Zoom with the buttons or + and −, move with the arrow keys, point at a box or step through with Tab and Enter."
        f'</p><ul class="legend">{legend}</ul>'
        '<div class="tools"><button type="button" id="in">zoom in +</button>'
        '<button type="button" id="out">zoom out −</button>'
        '<button type="button" id="all">whole step</button></div>'
        '<div id="timeline" class="scroll" tabindex="0" role="img" aria-label="time line of one step"></div>'
        '<p id="pointed" role="status"></p></section>'
    )


def _memory_section(plan: PipelinePlan, simulation: Simulation | None) -> str:
    if not any(stage.peak_bytes for stage in plan.stages):
        return ""
    chart = (
        '<p>Of each rank over the step; the line across is the limit.</p><div id="memory"></div>'
        if simulation is not None and simulation.step_s > 0 and simulation.static_bytes
        else ""
    )
    rows = "".join(_memory_row(stage) for stage in plan.stages)
    return (
        f"<section><h2>Memory</h2>{chart}"
        '<div class="scroll" tabindex="0" role="region" aria-label="memory of each stage"><table><thead><tr>'
        "<th>stage</th><th>weights</th><th>gradients</th><th>optimizer</th><th>activations</th>"
        "<th>microbatches alive</th><th>in all</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
        "<p>A tensor that two stages of one rank share counts once in all.</p></section>"
    )


def _memory_row(stage: StagePlan) -> str:
    memory = memory_of(stage)
    sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
    cells = "".join(f"<td>{size_text(size)}</td>" for size in sizes)
    return (
        f"<tr><th scope=row>{stage.index}</th>{cells}<td>{stage.live_microbatches}</td>"
        f"<td><strong>{size_text(stage.peak_bytes)}</strong></td></tr>"
    )


def _stage_table(plan: PipelinePlan) -> str:
    total = sum(stage.seconds for stage in plan.stages) or 1.0
    rows = []
    for stage in plan.stages:
        sends = size_text(stage.send_bytes) if stage.index < plan.num_stages - 1 else ""
        again = f"{len(stage.recompute)} recomputed" if stage.recompute else ""
        cells = (
            stage.rank,
            _names(plan, stage),
            count_text(stage.parameters),
            f"{100 * stage.seconds / total:.1f} %",
            seconds_text(stage.forward_s),
            seconds_text(stage.backward_s),
            seconds_text(stage.transfer_s),
            sends,
            again,
        )
        rows.append(f"<tr><th scope=row>{stage.index}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>")
    names = ("stage", "rank", "layers", "parameters", "of time", "forward", "backward", "transfers", "sends →", "")
    return (
        '<section><h2>Stages</h2><div class="scroll" tabindex="0" role="region" aria-label="stages"><table><thead><tr>'
        f"{''.join(f'<th>{name}</th>' for name in names)}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _names(plan: PipelinePlan, stage: StagePlan) -> str:
    names = named_parts(plan, stage)
    first, last = ends_of(names)
    return f"{first} … {last} ({len(names)})" if len(names) > 2 else ", ".join(filter(None, (first, last)))


def _tie_table(plan: PipelinePlan) -> str:
    if not plan.ties:
        return ""
    rows = "".join(
        f"<tr><td>{_text(tie_names(tie))}</td><td>{', '.join(map(str, tie.stages))}</td><td>{size_text(tie.bytes)}</td>"
        f"<td>{_text(tie_price(tie))}</td></tr>"
        for tie in plan.ties
    )
    return (
        '<section><h2>Tied parameters</h2><div class="scroll" tabindex="0" role="region" aria-label="ties"><table>'
        "<thead><tr><th>tensor</th><th>stages</th><th>bytes</th><th>per step</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _baseline_table(plan: PipelinePlan, baselines: Sequence[Baseline]) -> str:
    own = Baseline("this plan", "", slowest_load(plan), balance(plan), max(memory_by_rank(plan).values(), default=0))
    rows = []
    for row in (own, *baselines):
        cells: tuple[str, ...] = ("–", "", "", "")
        if row.bottleneck is not None:
            ratio = f"{row.bottleneck / slowest_load(plan):.3f} ×" if slowest_load(plan) else ""
            cells = (seconds_text(row.bottleneck), ratio, f"{row.balance:.3f}", size_text(row.peak_bytes))
        rows.append(
            f"<tr><th scope=row>{_text(row.name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}"
            f"<td>{_text(row.remark)}</td></tr>"
        )
    return (
        f"<section><h2>Beside others' rules</h2><p>{_text(BASELINES)}.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="other rules"><table><thead><tr><th>rule</th>'
        "<th>slowest</th><th>to plan</th><th>max/mean</th><th>memory</th><th></th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _remarks(plan: PipelinePlan) -> str:
    bound = ""
    if plan.lower_bound > 0:
        how = "which is the best possible" if plan.proven else f"at most {100 * plan.gap:.1f} % above the best possible"
        bound = f"Slowest rank {seconds_text(slowest_load(plan))} per microbatch, {how}."
    items = [
        bound,
        f"limited by: {plan.limited_by}" if plan.limited_by else "",
        f"Search: {plan.method}." if plan.method else "",
        f"Inputs of one microbatch: {', '.join(plan.inputs)}." if plan.inputs else "",
        f"Opened, because a cut crosses them: {folded(plan.opened)}." if plan.opened else "",
        *notes(plan),
    ]
    rows = "".join(f"<li>{_text(item)}</li>" for item in items if item)
    return f"<section><h2>Remarks</h2><ul>{rows}</ul></section>" if rows else ""


# --- what the script draws ------------------------------------------------------------------------------------------


def _data(plan: PipelinePlan, simulation: Simulation | None) -> dict[str, Any]:
    stages = [
        {
            "rank": stage.rank,
            "layers": list(stage.layers),
            "duplicated": list(stage.duplicated),
            "recompute": list(stage.recompute),
            "time": seconds_text(stage.seconds),
        }
        for stage in plan.stages
    ]
    data: dict[str, Any] = {"stages": stages, "step": 0}
    if simulation is None or simulation.step_s <= 0:
        return data
    limit = plan.memory_limit if plan.memory_limit is not None else plan.hardware.memory
    per_rank = max(MOST_BOXES // max(len(simulation.orders), 1), 1)
    unit, scale = time_unit(simulation.step_s)
    data |= {
        "step": simulation.step_s,
        "unit": unit,
        "scale": scale,
        "limit": limit,
        "cut": max(map(len, simulation.orders)) > per_rank,
        "ranks": [
            [
                [event.stage, event.kind, event.microbatch, _short(event.start_s), _short(event.end_s)]
                for event in events[:per_rank]
            ]
            for events in simulation.timeline
        ],
        "memory": [[[_short(when), nbytes] for when, nbytes in curve[:per_rank]] for curve in simulation.memory]
        if simulation.static_bytes
        else [],
    }
    return data


def _short(seconds: float) -> float:
    return float(f"{seconds:.6g}")
