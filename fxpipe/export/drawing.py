"""Drawings of the stage graph: Graphviz and Mermaid."""

from __future__ import annotations

from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.plan import PipelinePlan, StagePlan
from fxpipe.ir.units import seconds_text, size_text

NEWLINE = "\\n"


def to_dot(plan: PipelinePlan, graph: LayerGraph, source: str) -> str:
    """Draw the stages for Graphviz (``dot -Tsvg``): a box each, what is sent between, ties dashed."""
    lines = [f'digraph "{_plain(plan.model)}" {{', "  rankdir=LR;", "  node [shape=box];"]
    for stage in plan.stages:
        lines.append(f'  stage{stage.index} [label="{_label(stage, NEWLINE)}"];')
    for stage in plan.stages[:-1]:
        lines.append(f'  stage{stage.index} -> stage{stage.index + 1} [label="{size_text(stage.send_bytes)}"];')
    for tie in plan.ties:
        for one, other in zip(tie.stages, tie.stages[1:], strict=False):
            lines.append(
                f'  stage{one} -> stage{other} [label="{_plain(tie.key)}", style=dashed, dir=none, constraint=false];'
            )
    return "\n".join([*lines, "}"])


def to_mermaid(plan: PipelinePlan, graph: LayerGraph, source: str) -> str:
    """Draw the stages for Mermaid, which Markdown pages show."""
    lines = ["flowchart LR"]
    lines += [f'  stage{stage.index}["{_label(stage, "<br>")}"]' for stage in plan.stages]
    lines += [
        f'  stage{stage.index} -- "{size_text(stage.send_bytes)}" --> stage{stage.index + 1}'
        for stage in plan.stages[:-1]
    ]
    for tie in plan.ties:
        lines += [
            f'  stage{one} -. "{_plain(tie.key)}" .- stage{other}'
            for one, other in zip(tie.stages, tie.stages[1:], strict=False)
        ]
    return "\n".join(lines)


def _label(stage: StagePlan, newline: str) -> str:
    ends = stage.layers if len(stage.layers) < 2 else (stage.layers[0], "…", stage.layers[-1])
    words = [f"stage {stage.index}, rank {stage.rank}", " ".join(map(_plain, ends))]
    return newline.join([*words, f"{seconds_text(stage.seconds)}, {size_text(stage.peak_bytes)}"])


def _plain(text: str) -> str:
    return text.replace('"', "'")
