"""From a batch to the jobs of a step: microbatches, the variant each takes, and its weight in the batch's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxpipe.batch.example import as_microbatch
from fxpipe.batch.inputs import Inputs
from fxpipe.batch.microbatches import fit_microbatches
from fxpipe.batch.split import Microbatch, batch_size_of, check_microbatches, loss_weights, split_batch
from fxpipe.errors import ScheduleError
from fxpipe.ir.schedule import check_microbatches as check_schedule
from fxpipe.program import LossTerm
from fxpipe.runtime.build.randomness import microbatch_seed
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.run.work import Job
from fxpipe.variants import Variant, Variants


@dataclass(frozen=True, slots=True)
class Order:
    """What a step's microbatches must suit.

    Attributes:
        schedule: torch's name.
        stages: Number of stages.
        ranks: Number of ranks.
        microbatches: The plan's number of microbatches.
        microbatch_size: Samples of each in the plan; None without an example.
    """

    schedule: str
    stages: int
    ranks: int
    microbatches: int
    microbatch_size: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A batch, cut and understood, before anything is computed.

    Attributes:
        inputs: The microbatches.
        variants: The graph each takes.
        sizes: Samples of each.
        shares: Weight of each loss term of each microbatch.
    """

    inputs: tuple[Inputs, ...]
    variants: tuple[Variant, ...]
    sizes: tuple[int, ...]
    shares: tuple[tuple[float, ...], ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """What all ranks must agree on."""
        return tuple(variant.key for variant in self.variants)


def prepare_training(
    variants: Variants,
    order: Order,
    batch: Microbatch | None,
    ready: Sequence[Any] | None,
    loss_weight: Callable[..., float] | None,
) -> Prepared:
    """Cut a batch into microbatches and weigh them.

    Args:
        variants: Finds the graph of each.
        order: What they must suit.
        batch: The whole batch; None where ready-split microbatches are given.
        ready: Ready-split microbatches, which may differ in shape.
        loss_weight: The user's own weight of a microbatch.

    Raises:
        ScheduleError: The batch cannot be cut for the schedule.
        CaptureError: The model does something new that cannot be recorded.
    """
    parts = _split(order, batch, ready)
    sizes = check_microbatches(parts)
    inputs = tuple(variants.capture.inputs(*part) for part in parts)
    found = tuple(variants.find(each, with_loss=True) for each in inputs)
    if loss_weight is not None:
        weights = loss_weights(loss_weight, parts)
        total = sum(weights)
        shares = tuple(
            (weight / total,) * len(variant.program.loss_terms) for weight, variant in zip(weights, found, strict=True)
        )
    else:
        shares = _shares(found, inputs, sizes)
    return Prepared(inputs, found, sizes, shares)


def prepare_inference(variants: Variants, batch: Microbatch, num_microbatches: int) -> Prepared:
    """Cut a batch for a forward alone; every output is the model's own where it is one microbatch."""
    size = batch_size_of(*batch)
    if not 1 <= num_microbatches <= size:
        raise ScheduleError(
            f"infer cannot cut a batch of {size} into {num_microbatches} microbatches\n  use 1 to {size}"
        )
    parts = split_batch(*batch, num_microbatches=num_microbatches, batch_size=size)
    inputs = tuple(variants.capture.inputs(*part) for part in parts)
    found = tuple(variants.find(each, with_loss=False) for each in inputs)
    return Prepared(inputs, found, check_microbatches(parts), ((),) * len(parts))


def with_outputs(prepared: Prepared, variants: Variants) -> Prepared:
    """Give the same microbatches for the model's outputs instead of a loss."""
    with torch.no_grad():
        found = tuple(variants.find(each, with_loss=False) for each in prepared.inputs)
    return replace(prepared, variants=found, shares=((),) * len(found))


def on_one_stage(prepared: Prepared) -> Prepared:
    """Give the same microbatches for the whole model on one stage."""
    variants = tuple(
        replace(variant, key=f"{variant.key} whole", program=variant.alone()) for variant in prepared.variants
    )
    return replace(prepared, variants=variants)


def install(prepared: Prepared, stages: Sequence[StageModule]) -> None:
    """Make this rank's stages ready for the microbatches' variants.

    Raises:
        PlanError: A variant reads something that its stage does not hold.
    """
    for variant in prepared.variants:
        for stage in stages:
            stage.add_program(variant.key, variant.program)


def make_jobs(
    prepared: Prepared, stages: Sequence[StageModule], device: torch.device, *, seed: int, step: int
) -> list[Job]:
    """Give each microbatch the form that engines take, its inputs on the stages' device.

    Args:
        prepared: The microbatches.
        stages: This rank's stages, the variants installed.
        device: Where the stages run.
        seed: Seed of the random numbers.
        step: Which step it is.
    """
    jobs = []
    for index, (inputs, variant, shares) in enumerate(
        zip(prepared.inputs, prepared.variants, prepared.shares, strict=True)
    ):
        names: dict[str, None] = {}
        for stage in stages:
            names.update(dict.fromkeys(variant.program.stages[stage.stage_index].inputs))
        tensors = {name: inputs.tensors[name].to(device, non_blocking=True) for name in names}
        jobs.append(Job(variant.key, variant.program, tensors, shares, microbatch_seed(seed, step, index)))
    return jobs


def _split(order: Order, batch: Microbatch | None, ready: Sequence[Any] | None) -> list[Microbatch]:
    if ready is not None:
        parts = [as_microbatch(part) for part in ready]
        check_schedule(order.schedule, order.stages, order.ranks, len(parts))
        return parts
    assert batch is not None
    size = batch_size_of(*batch)
    number = order.microbatches
    if order.microbatch_size is None or size != order.microbatches * order.microbatch_size:
        number = fit_microbatches(size, order.stages, order.ranks, order.schedule, order.microbatches)
    return split_batch(*batch, num_microbatches=number, batch_size=size)


def _shares(
    variants: Sequence[Variant], inputs: Sequence[Inputs], sizes: Sequence[int]
) -> tuple[tuple[float, ...], ...]:
    """Give the weights under which the microbatches' losses add up to the batch's."""
    columns = []
    most = max(len(variant.program.loss_terms) for variant in variants)
    for position in range(most):
        terms = [_term(variant, position) for variant in variants]
        weights = [
            _weight(term, each.tensors, size) if term is not None else 0.0
            for term, each, size in zip(terms, inputs, sizes, strict=True)
        ]
        total = sum(weights)
        columns.append(
            [
                1.0 if term is not None and term.kind == "sum" else (weight / total if total else 0.0)
                for term, weight in zip(terms, weights, strict=True)
            ]
        )
    return tuple(
        tuple(columns[position][index] for position in range(len(variant.program.loss_terms)))
        for index, variant in enumerate(variants)
    )


def _term(variant: Variant, position: int) -> LossTerm | None:
    terms = variant.program.loss_terms
    return terms[position] if position < len(terms) else None


def _weight(term: LossTerm, tensors: Mapping[str, torch.Tensor], size: int) -> float:
    if term.kind == "tokens" and term.count is not None:
        return term.count(tensors)
    return float(size)
