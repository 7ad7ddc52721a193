"""The plan: which rank runs which layers, what crosses between, what it costs. Frozen, and the same on every rank."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fxpipe.errors import PlanError
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.tensor import TensorMeta

FORMAT = 2
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: consecutive in the pipeline, on one rank.

    Attributes:
        index: Position in the pipeline, from 0.
        rank: Rank of the pipeline dimension that runs it.
        layers: Names of its layers (FQNs), in the model's order.
        parameters: Number of parameters, ties counted once within the stage.
        bytes: Bytes of those weights.
        seconds: Forward and backward of one microbatch, transfers included.
        forward_s: Forward of one microbatch, without transfers.
        backward_s: Backward of one microbatch, without transfers.
        weight_grad_s: The part of it that computes gradients of weights, which some schedules do later.
        transfer_s: Sends and receives of one microbatch, and its share of adding up tied gradients.
        peak_bytes: Most memory alive at once: weights, gradients, optimiser state, activations, buffers. Where a rank
            has several stages, the stage's part of it when the rank needs most.
        gradient_bytes: Bytes of the gradients, as they accumulate; part of ``peak_bytes``.
        optimizer_bytes: Bytes of the optimiser's state and master weights; part of ``peak_bytes``.
        activation_bytes: Activations kept per live microbatch.
        live_microbatches: Most microbatches alive at once under the plan's schedule.
        sends: Tensors sent to the next stage, one microbatch.
        duplicated: Layers run here as well as elsewhere instead of being sent (masks, rotary tables).
        recompute: FQNs of the modules whose activations are not kept: each runs its forward once more in the backward.
            A block that a cut crosses is recomputed as far as it lies in the stage.
    """

    index: int
    rank: int
    layers: tuple[str, ...]
    parameters: int = 0
    bytes: int = 0
    seconds: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0
    weight_grad_s: float = 0.0
    transfer_s: float = 0.0
    peak_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    activation_bytes: int = 0
    live_microbatches: int = 1
    sends: tuple[TensorMeta, ...] = ()
    duplicated: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()

    @property
    def send_bytes(self) -> int:
        """Bytes sent forward per microbatch."""
        return sum(meta.nbytes for meta in self.sends)


@dataclass(frozen=True, slots=True)
class TieGroup:
    """One tied parameter: its FQNs, the stages that hold a copy, and what keeping the copies equal costs.

    Attributes:
        key: The first FQN.
        fqns: All FQNs, in the model's order.
        stages: Stages that hold a copy, ascending.
        bytes: Bytes of one copy.
        seconds: All-reduce of its gradient, once per step; 0 when one stage holds it.
        trainable: Whether its gradients are summed over the holders.
    """

    key: str
    fqns: tuple[str, ...]
    stages: tuple[int, ...]
    bytes: int = 0
    seconds: float = 0.0
    trainable: bool = True


@dataclass(frozen=True, slots=True)
class Baseline:
    """The same model, cut by someone else's rule, at the same costs and on the same links.

    Attributes:
        name: Whose rule.
        source: Where it is written.
        bottleneck: Seconds of the slowest stage (or rank), one microbatch; None where the rule makes no such cut.
        balance: Bottleneck over the mean load of the ranks.
        peak_bytes: Largest memory of a rank.
        remark: What the reader should know, such as why there is no cut.
        stages: Blocks of each stage.
    """

    name: str
    source: str
    bottleneck: float | None = None
    balance: float = 0.0
    peak_bytes: int = 0
    remark: str = ""
    stages: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """Which stage and rank runs what: pure data, identical on every rank, JSON both ways.

    Attributes:
        model: Class name of the model.
        model_fingerprint: Of the model's parameters and layers; a plan fits only the model it was made for.
        stages: One ``StagePlan`` per stage, in order.
        ties: Tied parameters.
        num_ranks: Ranks of the pipeline dimension.
        schedule: One of torch's schedule names, for example ``"1F1B"``.
        num_microbatches: Microbatches per step.
        microbatch_size: Samples per microbatch; None without an example.
        grain: ``"block"`` or ``"op"`` or ``"auto"``.
        opened: FQNs of the blocks that a cut crosses; every other block runs as the user's own module.
        leaves: FQN patterns and class paths never opened.
        cost: Name of the cost model.
        hardware: What the seconds hold for.
        training: What memory holds for.
        seed: Of dropout and of initialisation.
        memory_limit: Bytes per rank the plan keeps; None for no limit.
        bottleneck: Seconds of the slowest stage, one microbatch; of the slowest rank's stages together where ranks
            have several.
        lower_bound: Seconds no partition into so many stages can beat (proven).
        proven: Whether no partition has a smaller bottleneck.
        method: How the partition was searched.
        limited_by: What keeps the plan from being faster, in words.
        inputs: Name, shape and dtype of each input tensor of one microbatch, as text.
        notes: What a reader of the report should know.
    """

    model: str
    model_fingerprint: str
    stages: tuple[StagePlan, ...]
    ties: tuple[TieGroup, ...] = ()
    num_ranks: int = 1
    schedule: str = "1F1B"
    num_microbatches: int = 1
    microbatch_size: int | None = None
    grain: str = "block"
    opened: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    cost: str = "roofline"
    hardware: Hardware = field(default_factory=lambda: Hardware.preset("h100"))
    training: Training = field(default_factory=Training)
    seed: int = 0
    memory_limit: int | None = None
    bottleneck: float = 0.0
    lower_bound: float = 0.0
    proven: bool = False
    method: str = ""
    limited_by: str = ""
    inputs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def gap(self) -> float:
        """How far the bottleneck may be above the best possible, as a share of the lower bound; 0 if it is the best."""
        if self.proven or not self.lower_bound:
            return 0.0
        return self.bottleneck / self.lower_bound - 1

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.stages)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the plan's JSON: equal plans, equal text, on every rank and in every process."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def stage_of(self, layer: str) -> int | None:
        """Give the stage that runs ``layer``, None for a layer the plan does not know."""
        for stage in self.stages:
            if layer in stage.layers:
                return stage.index
        return None

    def to_json(self) -> str:
        """Write the plan as JSON text with sorted keys; infinite bandwidths survive."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, sort_keys=True, indent=1, default=dict)

    @classmethod
    def from_json(cls, text: str) -> PipelinePlan:
        """Read a plan back; ``from_json(plan.to_json()) == plan``.

        Raises:
            PlanError: The text is not JSON, is of another format, or has missing or unknown fields.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(
                f"this is not a plan: not JSON ({error})\n  write plans with PipelinePlan.to_json()"
            ) from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise PlanError(f"this is not a plan of format {FORMAT}\n  make it anew with this version of fxpipe")
        try:
            data["stages"] = tuple(_stage_from(stage) for stage in data["stages"])
            data["ties"] = tuple(_from_fields(TieGroup, tie) for tie in data["ties"])
            data["hardware"] = Hardware(**_tuples(data["hardware"]))
            data["training"] = Training(**_tuples(data["training"]))
            return _from_fields(cls, data)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this plan is damaged: {error}\n  make it anew with fxpipe.compile") from error


def _stage_from(data: dict[str, Any]) -> StagePlan:
    sends = tuple(TensorMeta(tuple(m["shape"]), m["dtype"], m["requires_grad"]) for m in data.pop("sends"))
    return StagePlan(**_tuples(data), sends=sends)


def _from_fields(cls: type[T], data: dict[str, Any]) -> T:
    return cls(**_tuples(data))


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {key: _tuple(value) for key, value in data.items()}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, list | tuple) else value
