"""Lists of modules: torchtitan's and NeMo AutoModel's ``module_fqns_per_model_part``, Hugging Face's ``device_map``."""

from __future__ import annotations

import json

from fxpipe.export.parts import Parts, parts_of, refuse_ties
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.plan import PipelinePlan


def to_torchtitan(plan: PipelinePlan, graph: LayerGraph, source: str) -> str:
    """Write the TOML table that torchtitan reads: one list of FQNs per stage.

    Source: torchtitan, ``docs/`` and ``torchtitan/distributed/pipeline_parallel.py``: ``pipeline_module_split`` keeps
    the modules of a stage's list and sets the others to None.

    Raises:
        PlanError: A cut lies inside a block, or a tie joins stages.
    """
    refuse_ties(plan, "torchtitan")
    rows = _rows(parts_of(plan, graph, "torchtitan"))
    lines = [f"  {json.dumps(row)}," for row in rows]
    per_rank = -(-plan.num_stages // plan.num_ranks)
    return "\n".join(
        [
            "[parallelism]",
            f"pipeline_parallel_degree = {plan.num_ranks}",
            f'pipeline_parallel_schedule = "{plan.schedule}"',
            f"# {plan.num_stages} stages, {per_rank} per rank",
            "module_fqns_per_model_part = [",
            *lines,
            "]",
        ]
    )


def to_nemo(plan: PipelinePlan, graph: LayerGraph, source: str) -> str:
    """Write the part of a recipe's YAML that NeMo AutoModel's AutoPipeline reads.

    Source: NeMo AutoModel, ``nemo_automodel/components/distributed/pipelining/autopipeline.py``.

    Raises:
        PlanError: A cut lies inside a block, or a tie joins stages.
    """
    refuse_ties(plan, "NeMo AutoModel")
    rows = _rows(parts_of(plan, graph, "NeMo AutoModel"))
    return "\n".join(
        [
            "autopipeline:",
            "  _target_: nemo_automodel.components.distributed.pipelining.AutoPipeline",
            f"  pp_schedule: {json.dumps(plan.schedule)}",
            f"  pp_microbatch_size: {plan.microbatch_size or 1}",
            "  module_fqns_per_model_part:",
            *(f"    - {json.dumps(row)}" for row in rows),
        ]
    )


def to_device_map(plan: PipelinePlan, graph: LayerGraph, source: str) -> str:
    """Write the dictionary that ``from_pretrained(device_map=…)`` takes: the rank of each module.

    Modules that several stages run stand on the first. Tied parameters need no word: Accelerate ties them on load.

    Raises:
        PlanError: A cut lies inside a block.
    """
    parts = parts_of(plan, graph, "device_map")
    places: dict[str, int] = {}
    for stage, names in zip(plan.stages, parts.modules, strict=True):
        for name in names:
            places.setdefault(name, stage.rank)
    return json.dumps(places, indent=1)


def _rows(parts: Parts) -> list[list[str]]:
    """Give the modules of each stage, those that several stages run in each of them."""
    return [list(dict.fromkeys((*names, *parts.shared))) if parts.shared else list(names) for names in parts.modules]
