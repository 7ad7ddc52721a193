"""Plans side by side: one row each, the fastest step first."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tabulate import tabulate

from fxpipe.ir.plan import PipelinePlan
from fxpipe.ir.simulation import Simulation
from fxpipe.ir.units import seconds_text, size_text
from fxpipe.report.words import memory_by_rank

HEADER = (
    "plan",
    "stages",
    "ranks",
    "schedule",
    "microbatches",
    "step",
    "to best",
    "bubble",
    "slowest",
    "memory",
    "opened",
)


def render_comparison(plans: Sequence[tuple[str, PipelinePlan, Simulation]], format: str = "text") -> str:
    """Render plans side by side.

    Args:
        plans: A name for each plan, and its simulated step.
        format: ``"text"`` or ``"json"``.

    >>> from fxpipe.ir.plan import StagePlan
    >>> render_comparison([], "json")
    '[]'
    """
    ordered = sorted(plans, key=lambda row: row[2].step_s)
    if format == "json":
        return json.dumps([_values(*row) for row in ordered], indent=1)
    best = ordered[0][2].step_s if ordered else 0.0
    rows = []
    for name, plan, simulation in ordered:
        rows.append(
            [
                name,
                plan.num_stages,
                plan.num_ranks,
                plan.schedule,
                plan.num_microbatches,
                seconds_text(simulation.step_s),
                f"{simulation.step_s / best:.3f} ×" if best else "",
                f"{100 * simulation.mean_bubble:.1f} %",
                seconds_text(plan.bottleneck),
                size_text(max(memory_by_rank(plan).values(), default=0)),
                len(plan.opened) or "–",
            ]
        )
    align = ["left", "right", "right", "left", *["right"] * 7]
    return tabulate([HEADER, *rows], tablefmt="plain", colalign=align, disable_numparse=True)


def _values(name: str, plan: PipelinePlan, simulation: Simulation) -> dict[str, object]:
    return {
        "plan": name,
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "stages": plan.num_stages,
        "ranks": plan.num_ranks,
        "schedule": plan.schedule,
        "microbatches": plan.num_microbatches,
        "step_s": simulation.step_s,
        "bubble": simulation.mean_bubble,
        "bottleneck_s": plan.bottleneck,
        "memory_bytes": max(memory_by_rank(plan).values(), default=0),
        "opened": list(plan.opened),
        "layers": [list(stage.layers) for stage in plan.stages],
    }
