"""A Python file for DeepSpeed: the model's modules as ``LayerSpec`` and ``TiedLayerSpec``, cut as the plan says."""

from __future__ import annotations

from fxpipe.errors import PlanError
from fxpipe.export.parts import parts_of
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

    A module that needs more (a mask, rotary tables) gets it here: extend ``call``, which DeepSpeed's layers call with
    what the layer before returned. Modules of one stage that share a weight are built together, ``tied`` says by which
    attribute of each.
    """

    def __init__(self, *fqns, tied=()):
        super().__init__()
        model = model_parts()
        self.fqns = fqns
        self.module = nn.ModuleList(model.get_submodule(fqn).to_empty(device="cpu") for fqn in fqns)
        for part in self.module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        for module, name in zip(self.module[1:], tied[1:]):
            setattr(module, name, getattr(self.module[0], tied[0]))
        self.tied = tied[0] if tied else None

    @property
    def tied_weight(self):
        """The tied weight."""
        return getattr(self.module[0], self.tied)

    def call(self, fqn, hidden):
        out = self.module[self.fqns.index(fqn)](hidden)
        return out[0] if isinstance(out, tuple) else out

    def forward(self, hidden):
        return self.call(self.fqns[0], hidden)


def calling(fqn):
    """Give what DeepSpeed calls where several layers of a stage are one tied module."""
    return lambda part, hidden: part.call(fqn, hidden)


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
        own = [name for name in names if name not in parts.shared]
        rows += [_layer(name, own, plan) for name in own]
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


def _layer(fqn: str, stage: list[str], plan: PipelinePlan) -> str:
    """Write one layer; tied modules of one stage name each other, for DeepSpeed builds one module for one key."""
    keys = [tie.key.replace(".", "_") for tie in plan.ties]  # DeepSpeed names a module by it
    for index, tie in enumerate(plan.ties):
        owners = {owner: attribute for owner, _, attribute in (name.rpartition(".") for name in tie.fqns)}
        if fqn not in owners:
            continue
        key = keys[index] if keys.count(keys[index]) == 1 else f"{keys[index]}_{index}"
        together = [name for name in stage if name in owners]
        names = ", ".join(f'"{name}"' for name in together)
        tied = tuple(owners[name] for name in together)
        return (
            f'TiedLayerSpec("{key}", Part, {names}, tied={tied!r}, forward_fn=calling("{fqn}"), '
            'tied_weight_attr="tied_weight")'
        )
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
