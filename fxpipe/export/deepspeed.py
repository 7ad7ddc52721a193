"""A Python file for DeepSpeed: the model's modules as ``LayerSpec`` and ``TiedLayerSpec``, cut as the plan says."""

from __future__ import annotations

from fxpipe.errors import PlanError
from fxpipe.export.parts import Parts, parts_of
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.plan import PipelinePlan

_FILE = '''"""{model} as a DeepSpeed pipeline of {stages} stages. Written by fxpipe; the plan is {fingerprint}."""

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

{imports}

BOUNDS = {bounds}  # stage i is layers BOUNDS[i]:BOUNDS[i + 1]


def model_parts():
    """Build the model without memory: its submodules are taken by name."""
    with torch.device("meta"):
        built = {function}()
    return built[0] if isinstance(built, tuple) else built


class Part(nn.Module):
    """One module of the model, built alone; what it is given and returns is the hidden state.

    A module that needs more (a mask, rotary tables) gets it here: extend ``forward``, which DeepSpeed calls with what
    the layer before returned.
    """

    def __init__(self, fqn):
        super().__init__()
        self.module = model_parts().get_submodule(fqn).to_empty(device="cpu")
        for part in self.module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()

    @property
    def weight(self):
        """The tied weight."""
        return self.module.weight

    def forward(self, hidden):
        out = self.module(hidden)
        return out[0] if isinstance(out, tuple) else out


class CutPipelineModule(PipelineModule):
    """Cuts where the plan says, instead of balancing parameters or layers."""

    def _partition_layers(self, method="uniform"):
        self.parts = list(BOUNDS)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


def layers():
    """Give the pipeline's layers, in order."""
    return [
{layers}
    ]


def pipeline(loss_fn, **options):
    """Build this rank's part; options as ``PipelineModule``'s."""
    return CutPipelineModule(layers(), num_stages=len(BOUNDS) - 1, loss_fn=loss_fn, **options)
'''


def to_deepspeed(plan: PipelinePlan, graph: LayerGraph, source: str) -> str:
    """Write a Python file whose ``pipeline(loss_fn)`` is a ``PipelineModule`` with the plan's cuts.

    A live module has lost its constructor's arguments, so the file imports what made the model and takes its submodules
    by FQN. Tied parameters become ``TiedLayerSpec``s with one key.

    Source: DeepSpeed, ``deepspeed/runtime/pipe/module.py``.

    Raises:
        PlanError: A cut lies inside a block, several stages share a rank, or the model comes from no function that can
            be imported.
    """
    parts = parts_of(plan, graph, "DeepSpeed")
    if plan.num_ranks != plan.num_stages:
        raise PlanError("DeepSpeed's pipeline has one stage per rank\n  plan with 1F1B or GPipe")
    imports, function = _import(source)
    rows, bounds = [], [0]
    for names in parts.modules:
        rows += [_layer(name, plan, parts) for name in names if name not in parts.shared]
        bounds.append(len(rows))
    return _FILE.format(
        model=plan.model,
        stages=plan.num_stages,
        fingerprint=plan.fingerprint[:16],
        imports=imports,
        function=function,
        bounds=bounds,
        layers="\n".join(f"        {row}," for row in rows),
    )


def _layer(fqn: str, plan: PipelinePlan, parts: Parts) -> str:
    keys = [tie.key.replace(".", "_") for tie in plan.ties]  # DeepSpeed names a module by it
    for index, tie in enumerate(plan.ties):
        for tied in tie.fqns:
            owner, _, attribute = tied.rpartition(".")
            if owner == fqn:
                key = keys[index] if keys.count(keys[index]) == 1 else f"{keys[index]}_{index}"
                return f'TiedLayerSpec("{key}", Part, "{fqn}", tied_weight_attr="{attribute}")'
    return f'LayerSpec(Part, "{fqn}")'


def _import(source: str) -> tuple[str, str]:
    place, colon, name = source.rpartition(":")
    if not colon or not name.isidentifier():
        raise PlanError(
            f"the DeepSpeed file imports the function that makes the model, and {source or 'this model'} is none\n"
            "  write a function and give FILE.py:FUNCTION"
        )
    if place.endswith(".py"):
        stem = place.rpartition("/")[2].removesuffix(".py")
        return f"from {stem} import {name}  # {stem}.py must be on the path", name
    return f"from {place} import {name}", name
