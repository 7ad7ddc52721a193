"""The hand-over from capture to running: one FX graph per stage, and what enters and leaves it.

A ``Program`` is one *variant* of a model (one training mode, one set of input shapes, one set of guard answers) cut
by one plan. Microbatches of one step may use different variants; all follow the same plan.

Each node of a ``StageProgram.graph`` carries a ``RunInfo``; see ``run_info``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fxpipe.ir.tensor import TensorMeta

if TYPE_CHECKING:
    import torch
    from torch import fx

MARKS = "fxpipe_marks"
"""Attribute of a skeleton's parameter: what the user set on the model's own, by name."""


@dataclass(frozen=True, slots=True)
class AutocastState:
    """State of autocast for one device type.

    Attributes:
        device_type: ``"cuda"``, ``"cpu"``, …; ``""`` for that of the device the stage runs on.
        enabled: Whether it is on.
        dtype: Name of the dtype it casts to.
        cache_enabled: Whether casts of weights are kept.
    """

    device_type: str
    enabled: bool
    dtype: str
    cache_enabled: bool = True


@dataclass(frozen=True, slots=True)
class CallContext:
    """What a call of the model's forward is surrounded by, where it differs from what surrounds the forward.

    Attributes:
        grad_enabled: Gradient mode; None for the surrounding one.
        inference: Whether the call runs in inference mode.
        autocast: States of autocast that differ.
        attention: Names in ``torch.nn.attention.SDPBackend`` of the kernels that attention may take, preferred first;
            None for the surrounding ones.
    """

    grad_enabled: bool | None = None
    inference: bool = False
    autocast: tuple[AutocastState, ...] = ()
    attention: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """Identity of one call that draws random numbers: the same for every partition, schedule and grain.

    Attributes:
        block: FQN of the block the call is made in, ``""`` outside of blocks.
        block_call: Which call of that block it is, from 0.
        fqn: FQN of the module whose forward makes the call.
        call: Which call of that module it is within the block call, from 0.
        index: Which drawing call of that module's forward it is, from 0.
    """

    block: str
    block_call: int
    fqn: str
    call: int
    index: int


@dataclass(frozen=True, slots=True)
class DrawScope:
    """Where a module call stands among the draws of its block.

    Attributes:
        block: FQN of the block the call is made in (or is), ``""`` outside of blocks.
        block_call: Which call of that block it is, from 0.
        first_calls: For each drawing module inside (and the module itself, if it draws) how often it was called
            before within the block call, as pairs.
    """

    block: str
    block_call: int
    first_calls: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What running must know of one node of a stage's graph. Capture's cut writes it, the runtime's lowering reads it.

    Attributes:
        layer: Name of the layer the node belongs to; empty for what belongs to none.
        context: What surrounds the call, None where it is what surrounds the forward.
        draw: The draw that a function makes, None where it makes none.
        scope: For a module call: where the draws inside it stand, None where there are none.
        checkpoint: Number of the activation-checkpointing region the call was made in, None outside of one.
    """

    layer: str = ""
    context: CallContext | None = None
    draw: Draw | None = None
    scope: DrawScope | None = None
    checkpoint: int | None = None

    @property
    def draws(self) -> bool:
        """Whether the call draws random numbers."""
        return self.draw is not None or self.scope is not None


_NOTHING = RunInfo()
_KEY = "fxpipe"


def run_info(node: fx.Node) -> RunInfo:
    """Give what is known of a node of a stage's graph; an empty value where nothing was set."""
    found: RunInfo = node.meta.get(_KEY, _NOTHING)
    return found


def set_run_info(node: fx.Node, info: RunInfo) -> None:
    """Say what running must know of a node; nothing else of its ``meta`` is read."""
    node.meta[_KEY] = info


@dataclass(frozen=True, slots=True)
class BoundaryTensor:
    """One tensor that crosses from a stage to the next.

    Attributes:
        name: FX node that made it.
        meta: Shape, dtype, and whether its gradient comes back.
        strides: Its strides where it is dense but not contiguous (``channels_last``); empty for contiguous.
        ends: Whether it takes a gradient in the model, and yet none comes back.
    """

    name: str
    meta: TensorMeta
    strides: tuple[int, ...] = ()
    ends: bool = False


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
        draws: Whether anything here draws random numbers.
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


LossKind = Literal["tokens", "samples", "sum"]


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One summand of the loss, and how microbatches weigh it.

    The batch's loss is the sum over terms and microbatches of ``share × term``.

    Attributes:
        name: FX node of the (unweighted) scalar in the last stage.
        kind: ``"tokens"``: share of valid targets; ``"samples"``: share of the batch; ``"sum"``: 1.
        count: For ``"tokens"``: gives the weight (a float: valid targets, class weights included) of a microbatch
            from its named inputs; None otherwise. Counts add up over microbatches.
        finish: Turns a count into what the sum is divided by, where that is not the count itself (it is kept from 0,
            say): ``share = finish(count) / finish(total)``.
        auxiliary: Whether it couples samples, and is weighed like the main term.
        spelling: A digest of how it is computed, the same for other samples; ``""`` where there is none.
        nothing: Whether it is 0 for all values, on the path that it was recorded on, and has no gradient.
    """

    name: str
    kind: LossKind
    count: Callable[[Mapping[str, Any]], float] | None = field(default=None, compare=False)
    finish: Callable[[float], float] | None = field(default=None, compare=False)
    auxiliary: bool = False
    spelling: str = field(default="", compare=False)
    nothing: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """All stages of one variant.

    Attributes:
        stages: One ``StageProgram`` per stage, in order.
        outputs: FX nodes of the model's output tensors, flat, in the order ``rebuild`` takes them; empty in a
            training program, whose last stage computes the loss alone.
        rebuild: Puts the flat output tensors back into the structure the model returns.
        loss_terms: Summands of the loss; empty in a forward-only program.
        constants: What the graphs read that is no parameter or buffer (numpy constants, plain attributes, functions),
            by the name ``get_attr`` uses.
        drawing: FQNs of the modules whose own forward draws random numbers: ``"once"`` where it makes one drawing
            call and no module inside draws, else ``"each"``.
        draw_names: Names (``__name__``) of the torch functions that draw random numbers in this model, sorted.
        overwritten: FQNs of buffers that each forward writes to and whose value its backward needs: forwards of several
            microbatches must not run before the first one's backward.
        loss_dtype: Of the model's own loss, where it is another one than that of its last summand, else None.
    """

    stages: tuple[StageProgram, ...]
    outputs: tuple[str, ...]
    rebuild: Callable[[tuple[torch.Tensor, ...]], Any]
    loss_terms: tuple[LossTerm, ...]
    constants: Mapping[str, Any]
    drawing: Mapping[str, Literal["once", "each"]]
    draw_names: tuple[str, ...]
    overwritten: tuple[str, ...] = ()
    loss_dtype: torch.dtype | None = None
