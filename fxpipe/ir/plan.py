"""The plan: which rank runs which layers, what crosses between, what it costs. Frozen, and the same on every rank."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from dataclasses import dataclass, field
from typing import Any

from fxpipe.errors import PlanError, ScheduleError
from fxpipe.ir.files.reading import check_dtype, read_fields, read_json
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.schedule import placement
from fxpipe.ir.spec import LayerSpec
from fxpipe.ir.tensor import TensorMeta
from fxpipe.ir.units import folded

FORMAT = 2
MOST_MICROBATCHES = 10**6
"""More than any step has: what is read from a file must not keep a simulation busy for days."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: consecutive in the pipeline, on one rank.

    Attributes:
        index: Position in the pipeline, from 0.
        rank: Rank of the pipeline dimension that runs it.
        layers: Names of its layers (FQNs), in the model's order.
        parts: The same as a person names it: modules of the model, a whole one in place of what lies in it, and no
            operations between them; of nothing but operations, the one that takes longest.
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
        recompute_s: The part of the backward that runs those forwards once more.
        head: Of the last stage, the largest layer behind the model's last block: its LM head, or the loss.
        head_s: Forward and backward of all that lies there.
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
    recompute_s: float = 0.0
    head: str = ""
    head_s: tuple[float, ...] = ()
    parts: tuple[str, ...] = ()

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

    @property
    def described(self) -> dict[str, str]:
        """Say what is planned, part by part, in names, counts and shapes: in what two plans differ."""
        said = {
            "the model": self.model,
            "the number of stages": str(self.num_stages),
            "its schedule": f"{self.schedule} on {self.num_ranks} ranks",
            "its microbatches": f"{self.num_microbatches} of {self.microbatch_size}",
            "its inputs": ", ".join(self.inputs),
        }
        for stage in self.stages:
            said[f"stage {stage.index}"] = f"{folded(stage.layers)}, {stage.parameters:,} parameters"
            said[f"what stage {stage.index} sends"] = ", ".join(f"{m.dtype}{list(m.shape)}" for m in stage.sends)
        rest = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return said | {name: str(value) for name, value in rest.items() if name not in ("stages", "inputs")}

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
            PlanError: The text is no JSON, of another format, or a field is missing, unknown or wrong: names its path.
        """
        data = read_json(text, "a plan", "write plans with PipelinePlan.to_json() or fxpipe plan --json")
        if data.pop("format", None) != FORMAT:
            raise PlanError(f"this is not a plan of format {FORMAT}\n  make it anew with this version of fxpipe")
        plan = read_fields(cls, data, "")
        _check(plan)
        return plan


def _check(plan: PipelinePlan) -> None:
    """Refuse a plan whose parts do not fit together.

    Raises:
        PlanError: Names the field.
    """
    _check_numbers(plan)
    if not plan.stages:
        raise PlanError("stages is empty\n  a plan has at least one stage; make it anew with fxpipe.compile")
    if plan.num_ranks > len(plan.stages):
        raise PlanError(f"num_ranks is {plan.num_ranks}, more than the {len(plan.stages)} stages\n  mend the file")
    try:
        ranks = placement(plan.schedule, len(plan.stages), plan.num_ranks)
    except ScheduleError as error:
        raise PlanError(f"schedule: {error}") from error
    home: dict[str, int] = {}
    for place, stage in enumerate(plan.stages):
        if stage.index != place:
            raise PlanError(f"stages[{place}].index is {stage.index}\n  stages stand in order, from 0")
        if stage.rank >= plan.num_ranks:
            raise PlanError(
                f"stages[{place}].rank is {stage.rank}, but there are {plan.num_ranks} ranks\n  mend the file"
            )
        if stage.rank != ranks[place]:
            raise PlanError(
                f"stages[{place}].rank is {stage.rank}, and {plan.schedule} places it on rank {ranks[place]}\n"
                "  mend the file, or make the plan anew"
            )
        for layer in stage.layers:
            if home.setdefault(layer, place) != place:
                raise PlanError(
                    f"stages[{place}].layers has {layer!r}, which stages[{home[layer]}] has too\n"
                    "  each layer stands in one stage; make the plan anew"
                )
        for number, meta in enumerate(stage.sends):
            check_dtype(meta.dtype, f"stages[{place}].sends[{number}].dtype")
    for place, tie in enumerate(plan.ties):
        if not tie.stages or any(stage >= len(plan.stages) for stage in tie.stages):
            raise PlanError(
                f"ties[{place}].stages is {list(tie.stages)}, and there are {len(plan.stages)} stages\n  mend it"
            )


_SIGNED = frozenset({"seed"})


def _check_numbers(plan: PipelinePlan) -> None:
    """Refuse negative and infinite numbers, and counts of nothing."""
    parts: list[tuple[str, Any]] = [("", plan), *((f"stages[{i}].", stage) for i, stage in enumerate(plan.stages))]
    for path, value in parts:
        for each in dataclasses.fields(value):
            number = getattr(value, each.name)
            if isinstance(number, bool) or not isinstance(number, int | float) or each.name in _SIGNED:
                continue
            if not 0 <= number < math.inf:
                raise PlanError(f"{path}{each.name} is {number}\n  give a finite number of at least 0")
    if plan.num_microbatches > MOST_MICROBATCHES:
        raise PlanError(f"num_microbatches is {plan.num_microbatches}\n  give at most {MOST_MICROBATCHES}")
    for name in ("num_ranks", "num_microbatches"):
        if getattr(plan, name) < 1:
            raise PlanError(f"{name} is {getattr(plan, name)}\n  give a whole number, 1 or more")
    for place, tie in enumerate(plan.ties):
        if tie.bytes < 0 or not 0 <= tie.seconds < math.inf or any(stage < 0 for stage in tie.stages):
            raise PlanError(f"ties[{place}] has a negative or infinite number\n  mend the file, or make it anew")
    for place, stage in enumerate(plan.stages):
        for number, meta in enumerate(stage.sends):
            if any(size < 0 for size in meta.shape):
                raise PlanError(
                    f"stages[{place}].sends[{number}].shape is {list(meta.shape)}\n  give sizes of at least 0"
                )


def layers_by_name(graph: LayerGraph, plan: PipelinePlan) -> dict[str, list[LayerSpec]]:
    """Give the layers that a plan means by each name: one, or those of a block that lies whole in a stage.

    A module that the graph does not call lies with the first layer of the plan's inside it: a plan of opened blocks
    calls what another path leaves out.
    """
    blocks = graph.blocks or ("",) * len(graph.specs)
    planned = dict.fromkeys(name for stage in plan.stages for name in (*stage.layers, *stage.duplicated))
    found: dict[str, list[LayerSpec]] = {}
    for layer, block, spec in zip(graph.layer_names, blocks, graph.specs, strict=True):
        names = dict.fromkeys((layer, block))
        if planned.keys().isdisjoint(names):
            inside = (name for name in planned if name.startswith(f"{spec.fqn}."))
            names.update(dict.fromkeys(itertools.islice(inside, 1)))
        for name in names:
            found.setdefault(name, []).append(spec)
    return found
