"""The hand-over from capture to running: one FX graph per stage, and what enters and leaves it.

A ``Program`` is one *variant* of a model (one training mode, one set of input shapes, one set of guard answers) cut
by one plan. Microbatches of one step may use different variants; all follow the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fxpipe.ir.tensor import TensorMeta

if TYPE_CHECKING:
    import torch
    from torch import fx


@dataclass(frozen=True, slots=True)
class BoundaryTensor:
    """One tensor that crosses from a stage to the next; ``name`` is the FX node that made it."""

    name: str
    meta: TensorMeta


@dataclass(frozen=True, slots=True, eq=False)
class StageProgram:
    """What one stage runs for one microbatch.

    Attributes:
        stage_index: Position of the stage in the pipeline.
        graph: Placeholders are ``received`` in order, then ``inputs`` in order (by name). ``call_module`` and
            ``get_attr`` targets are FQNs of the model (or names of ``Program.constants``). The output node holds one
            flat tuple: the tensors of ``sent`` on all stages but the last; on the last stage those of
            ``Program.outputs`` followed by those of ``Program.loss_terms``.
        received: Tensors that come from the stage before, in order; empty for stage 0.
        sent: Tensors that go to the next stage, in order; equal to ``received`` of that stage.
        inputs: Names of the model inputs read here, taken from the local batch.
        modules: FQNs of the modules called here, in order of first call.
        attributes: FQNs of the parameters and buffers read directly here.
        constants: Names of ``Program.constants`` read here.
        draws: Whether any node draws random numbers (``node.meta["random"]`` says which).
    """

    stage_index: int
    graph: fx.Graph
    received: tuple[BoundaryTensor, ...]
    sent: tuple[BoundaryTensor, ...]
    inputs: tuple[str, ...]
    modules: tuple[str, ...]
    attributes: tuple[str, ...]
    constants: tuple[str, ...]
    draws: bool


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One summand of the loss, and how microbatches weigh it.

    The batch's loss is the sum over terms and microbatches of ``share × term``.

    Attributes:
        name: FX node of the (unweighted) scalar in the last stage.
        kind: ``"tokens"``: share of valid targets; ``"samples"``: share of the batch; ``"sum"``: 1.
        count: For ``"tokens"``: gives the weight (a float: valid targets, class weights included) of a microbatch
            from its named inputs; None otherwise.
    """

    name: str
    kind: str
    count: Callable[[Mapping[str, Any]], float] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """All stages of one variant.

    Attributes:
        stages: One ``StageProgram`` per stage, in order.
        outputs: FX nodes of the model's output tensors, flat, in the order ``rebuild`` takes them; empty in a
            training program, whose last stage computes the loss alone.
        rebuild: Puts the flat output tensors back into the structure the model returns.
        loss_terms: Summands of the loss; empty in a forward-only program.
        constants: Tensors made outside the model's parameters and buffers (numpy constants, plain attributes), by
            the name ``get_attr`` uses.
        draw_names: Names of the torch functions that draw random numbers in this model, sorted.
    """

    stages: tuple[StageProgram, ...]
    outputs: tuple[str, ...]
    rebuild: Callable[[tuple[torch.Tensor, ...]], Any]
    loss_terms: tuple[LossTerm, ...]
    constants: Mapping[str, torch.Tensor]
    draw_names: tuple[str, ...]
