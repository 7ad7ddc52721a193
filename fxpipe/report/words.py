"""What every form of the report says in words and numbers: headline, balance, memory of ranks, warnings."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxpipe.ir.plan import PipelinePlan, StagePlan, TieGroup
from fxpipe.ir.simulation import Change
from fxpipe.ir.units import ranges_text, seconds_text, size_text

BASELINES = "The same model cut by others' rules, at the same costs and links"


@dataclass(frozen=True, slots=True)
class Memory:
    """What fills a stage's or a rank's memory at its fullest, in bytes.

    Attributes:
        weights: Weights.
        gradients: Gradients as they accumulate.
        optimizer: State of the optimiser, master weights.
        activations: Activations of the live microbatches, buffers and whatever else.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_of(stage: StagePlan) -> Memory:
    """Split a stage's most memory into what fills it.

    >>> memory_of(StagePlan(0, 0, (), bytes=10, peak_bytes=100, gradient_bytes=20, optimizer_bytes=30)).activations
    40
    """
    held = stage.bytes + stage.gradient_bytes + stage.optimizer_bytes
    return Memory(stage.bytes, stage.gradient_bytes, stage.optimizer_bytes, max(stage.peak_bytes - held, 0))


def headline(plan: PipelinePlan) -> str:
    """Say what is planned, in one line."""
    size = f" of {plan.microbatch_size}" if plan.microbatch_size is not None else ""
    ranks = [counted(plan.num_ranks, "rank")] if plan.num_ranks != plan.num_stages else []
    return " · ".join(
        [
            plan.model,
            counted(plan.num_stages, "stage"),
            *ranks,
            plan.schedule,
            counted(plan.num_microbatches, "microbatch", "microbatches") + size,
            plan.hardware.name,
            f"cost: {plan.cost}",
        ]
    )


def mean_load(plan: PipelinePlan) -> float:
    """Give the mean load of the ranks, in seconds."""
    return sum(stage.seconds for stage in plan.stages) / max(len({stage.rank for stage in plan.stages}), 1)


def slowest_load(plan: PipelinePlan) -> float:
    """Give the load of the slowest rank, in seconds."""
    if plan.bottleneck:
        return plan.bottleneck
    loads: dict[int, float] = defaultdict(float)
    for stage in plan.stages:
        loads[stage.rank] += stage.seconds
    return max(loads.values())


def balance(plan: PipelinePlan) -> float:
    """Give the slowest rank's load over the mean; 1 is perfect."""
    mean = mean_load(plan)
    return slowest_load(plan) / mean if mean else 1.0


def memory_by_rank(plan: PipelinePlan) -> dict[int, int]:
    """Give the most bytes of each rank."""
    per_rank: dict[int, int] = defaultdict(int)
    for stage in plan.stages:
        per_rank[stage.rank] += stage.peak_bytes
    return per_rank


def too_full(plan: PipelinePlan) -> str:
    """Say which ranks need more memory than the hardware has; empty where none does."""
    per_rank = memory_by_rank(plan)
    too_much = [rank for rank, need in sorted(per_rank.items()) if need > plan.hardware.memory]
    if not too_much:
        return ""
    who = f"rank {too_much[0]} needs" if len(too_much) == 1 else f"ranks {ranges_text(too_much)} need up to"
    most = size_text(max(per_rank[rank] for rank in too_much))
    return f"{who} {most}, and a {plan.hardware.name} has {size_text(plan.hardware.memory)}"


def _room(plan: PipelinePlan) -> Mapping[str, str | int | None]:
    """Give what to ask for where a plan does not fit: recomputation, and more stages where weights are too many."""
    kept = [memory_of(stage).total - memory_of(stage).activations for stage in plan.stages]
    times = math.ceil(1.25 * sum(kept) / plan.num_ranks / plan.hardware.memory)  # a quarter for activations
    more: dict[str, str | int | None] = {"stages": plan.num_stages * times, "ranks": None} if times > 1 else {}
    return more | {"memory_limit": "device", "recompute": "auto"}


def tries(plan: PipelinePlan, changes: Sequence[Change], command: Sequence[str]) -> list[tuple[str, str]]:
    """Give what would help as what to type, and what each gives, the best first."""
    found = [(typed(_room(plan), command), "keeps every rank within its memory")] if too_full(plan) else []
    for change in changes:
        if not change.options:
            continue
        options, gain = dict(change.options), f"{100 * change.gain:.1f} % faster"
        if "batch" in options:
            gain += " for each sample"
            if any(":" in word for word in command):  # a function that brings its own batch
                gain += f", with a batch of {options.pop('batch')} in the function"
        found.append((typed(options, command), gain))
    return found


def typed(options: Mapping[str, str | int | None], command: Sequence[str]) -> str:
    """Spell options as what to type.

    Args:
        options: Names of options of ``compile``, and values; None leaves one out.
        command: Words of the command whose options they replace; without one, it is Python.

    >>> typed({"schedule": "GPipe", "ranks": None}, ["fxpipe", "plan", "my model", "--ranks", "4", "--stages=8"])
    "fxpipe plan 'my model' --stages=8 --schedule GPipe"
    >>> typed({"memory_limit": "device", "recompute": "auto"}, ())
    'compile(…, memory_limit="device", training=Training(recompute="auto"))'
    >>> typed({"batch": 40, "microbatches": 40}, ())
    'compile(…, microbatches=40) with batches of 40'
    """
    if command:
        words = _without([f"--{name.replace('_', '-')}" for name in options], command)
        given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
        return shlex.join([*words, *(word for pair in given for word in pair)])
    spelled = []
    for name, value in options.items():
        shown = f'"{value}"' if isinstance(value, str) else str(value)
        if name == "recompute":
            spelled.append(f"training=Training(recompute={shown})")
        elif value is not None and name != "batch":
            spelled.append(f"{name}={shown}")
    size = f" with batches of {options['batch']}" if "batch" in options else ""
    return f"compile(…, {', '.join(spelled)}){size}"


def _without(flags: Sequence[str], words: Sequence[str]) -> list[str]:
    """Leave out options with their values."""
    kept: list[str] = []
    skipped = False
    for word in words:
        if skipped:
            skipped = False
        elif word in flags:
            skipped = True
        elif word.partition("=")[0] not in flags:
            kept.append(word)
    return kept


def notes(plan: PipelinePlan) -> list[str]:
    """Give warnings, and what was noted while planning."""
    warnings = [text] if (text := too_full(plan)) else []
    empty = [
        f"stage {stage.index} has no parameters: no possible partition into so many gives each some"
        for stage in plan.stages
        if not stage.parameters
    ]
    return [*warnings, *empty, *plan.notes]


def named_parts(plan: PipelinePlan, stage: StagePlan) -> tuple[str, ...]:
    """Name what lies in a stage as a person would; of a plan without such names, what it has alone of its layers."""
    if stage.parts or not stage.layers:
        return stage.parts
    shared = {name for other in plan.stages for name in other.duplicated}
    return tuple(name for name in stage.layers if name not in shared) or stage.layers


def ends_of(names: Sequence[str]) -> tuple[str, str]:
    """Give the first and the last of some names, the last without the module it shares with the first.

    >>> ends_of(["model.embed", "model.layers.0", "model.layers.1"])
    ('model.embed', 'layers.1')
    >>> ends_of(["blocks.0", "blocks.3"])  # "blocks.0 … 3" would say little
    ('blocks.0', 'blocks.3')
    """
    if not names:
        return "(none)", ""
    first, last = names[0], names[-1] if len(names) > 1 else ""
    rest = last.removeprefix(first.partition(".")[0] + ".")
    return first, last if rest[:1].isdigit() else rest


def cut_name(name: str, room: int) -> str:
    """Shorten a name from its front, between its parts where it can be: its end says what it is.

    >>> cut_name("model.layers.11.self_attn", 20), cut_name("model.layers.11.self_attn", 6)
    ('…layers.11.self_attn', '…_attn')
    """
    if len(name) <= room:
        return name
    parts = name.split(".")
    for start in range(1, len(parts)):
        short = "…" + ".".join(parts[start:])
        if len(short) <= room:
            return short
    return "…" + name[len(name) - max(room - 1, 1) :]


def gib_text(count: float) -> str:
    """Write bytes as a number of GiB.

    >>> gib_text(26.6 * 2**30), gib_text(2**20 * 56), gib_text(0), gib_text(300 * 2**30), gib_text(4096)
    ('26.6', '0.055', '0', '300', '<0.001')
    """
    gib = count / 2**30
    if gib <= 0:
        return "0"
    if gib < 0.001:
        return "<0.001"
    return f"{gib:.{0 if gib >= 100 else 1 if gib >= 1 else 2 if gib >= 0.1 else 3}f}"


def tie_names(tie: TieGroup) -> str:
    """Name a tie's tensor by its FQNs."""
    shown = " = ".join(tie.fqns[:3]) + (f" = … ({len(tie.fqns)} names)" if len(tie.fqns) > 3 else "")
    return shown if len(tie.fqns) > 1 else f"{shown} (called at several places)"


def tie_price(tie: TieGroup) -> str:
    """Say what keeping a tie's copies equal costs in a step."""
    if len(tie.stages) < 2:
        return "one copy"
    if not tie.trainable:
        return "frozen"
    return f"all-reduce {seconds_text(tie.seconds)}" if tie.seconds > 0 else "free"


def counted(number: int, one: str, many: str | None = None) -> str:
    """Join a number and its noun.

    >>> counted(1, "stage"), counted(2, "stage"), counted(3, "microbatch", "microbatches")
    ('1 stage', '2 stages', '3 microbatches')
    """
    return f"{number} {one if number == 1 else many or one + 's'}"
