"""fxpipe: a pipeline-parallelism compiler for PyTorch.

>>> import fxpipe
>>> pipe = fxpipe.compile(model, 4, (batch,))  # doctest: +SKIP
>>> pipe.print_report()  # doctest: +SKIP

Names load on first use; importing the package costs no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxpipe.compiler import compile
    from fxpipe.errors import (
        CaptureError,
        FxpipeError,
        InfeasibleError,
        MaterializeError,
        MismatchError,
        NonFiniteError,
        PartitionError,
        PlanError,
        RankError,
        ScheduleError,
        SpecError,
        TieError,
        TorchVersionError,
        WeightsError,
    )
    from fxpipe.ir.graph import LayerGraph
    from fxpipe.ir.hardware import Hardware, Training
    from fxpipe.ir.plan import PipelinePlan, StagePlan, TieGroup
    from fxpipe.ir.simulation import Simulation
    from fxpipe.ir.spec import LayerSpec, TiedLayerSpec
    from fxpipe.pipeline import Pipeline
    from fxpipe.planning.search.partition import partition
    from fxpipe.planning.simulation.simulate import simulate
    from fxpipe.recipes.deferred import deferred_init

__all__ = [
    "CaptureError",
    "FxpipeError",
    "Hardware",
    "InfeasibleError",
    "LayerGraph",
    "LayerSpec",
    "MaterializeError",
    "MismatchError",
    "NonFiniteError",
    "PartitionError",
    "Pipeline",
    "PipelinePlan",
    "PlanError",
    "RankError",
    "ScheduleError",
    "Simulation",
    "SpecError",
    "StagePlan",
    "TieError",
    "TieGroup",
    "TiedLayerSpec",
    "TorchVersionError",
    "Training",
    "WeightsError",
    "compile",
    "deferred_init",
    "partition",
    "simulate",
]

_HOMES = {
    "fxpipe.compiler": ("compile",),
    "fxpipe.errors": (
        *(
            "CaptureError",
            "FxpipeError",
            "InfeasibleError",
            "MaterializeError",
            "MismatchError",
            "NonFiniteError",
            "PartitionError",
        ),
        *("PlanError", "RankError", "ScheduleError", "SpecError", "TieError", "TorchVersionError", "WeightsError"),
    ),
    "fxpipe.ir.graph": ("LayerGraph",),
    "fxpipe.ir.hardware": ("Hardware", "Training"),
    "fxpipe.ir.plan": ("PipelinePlan", "StagePlan", "TieGroup"),
    "fxpipe.ir.simulation": ("Simulation",),
    "fxpipe.ir.spec": ("LayerSpec", "TiedLayerSpec"),
    "fxpipe.pipeline": ("Pipeline",),
    "fxpipe.planning.search.partition": ("partition",),
    "fxpipe.planning.simulation.simulate": ("simulate",),
    "fxpipe.recipes.deferred": ("deferred_init",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
