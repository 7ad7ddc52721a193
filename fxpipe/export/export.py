"""A plan as text that another trainer reads: the formats by name."""

from __future__ import annotations

from collections.abc import Callable

from fxpipe.errors import PlanError
from fxpipe.export.deepspeed import to_deepspeed
from fxpipe.export.drawing import to_dot, to_mermaid
from fxpipe.export.lists import to_device_map, to_nemo, to_torchtitan
from fxpipe.export.megatron import to_megatron
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.plan import PipelinePlan

FORMATS: dict[str, Callable[[PipelinePlan, LayerGraph, str], str]] = {
    "torchtitan": to_torchtitan,
    "nemo": to_nemo,
    "megatron": to_megatron,
    "deepspeed": to_deepspeed,
    "device_map": to_device_map,
    "json": lambda plan, graph, source: plan.to_json(),
    "dot": to_dot,
    "mermaid": to_mermaid,
}
"""What writes each format: plan, layers, and where the model comes from (``train.py:build``)."""


def export(plan: PipelinePlan, graph: LayerGraph, format: str, source: str = "") -> str:
    """Write a plan in another trainer's form.

    Args:
        plan: The plan.
        graph: The layers it was made of (``pipe.graph``).
        format: ``"torchtitan"``, ``"nemo"``, ``"megatron"``, ``"deepspeed"``, ``"device_map"``, ``"json"``, ``"dot"``
            or ``"mermaid"``.
        source: What makes the model, as the command line takes it; the DeepSpeed file imports it.

    Returns:
        The text.

    Raises:
        PlanError: The format is unknown, or cannot say what the plan says: a cut inside a block, a tie across stages.
            Then names the nearest plan that it can say.
    """
    if format not in FORMATS:
        raise PlanError(f"unknown export format {format!r}\n  known: {', '.join(FORMATS)}")
    return FORMATS[format](plan, graph, source)
