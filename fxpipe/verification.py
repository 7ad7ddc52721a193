"""Hold a pipeline's numbers against those of the unpartitioned model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fxpipe.capture.capture import Capture
from fxpipe.capture.record.outcome import find_loss
from fxpipe.errors import FxpipeError, MismatchError
from fxpipe.ir.spec import TensorInfo
from fxpipe.ir.tree import map_tree
from fxpipe.materialize import Running
from fxpipe.runtime.build.stage import StageModule, StageParts, build_stages, build_whole
from fxpipe.runtime.build.state import gather_tensors
from fxpipe.runtime.ranks.agreement import agree
from fxpipe.runtime.run.distributed import DistributedEngine
from fxpipe.runtime.run.local import LocalEngine
from fxpipe.runtime.run.reduction import any_over
from fxpipe.runtime.run.stepwise import StepwiseEngine
from fxpipe.runtime.run.work import Job, Tensors
from fxpipe.training import Step, Variants

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest error relative to the largest entry of a tensor: what another order of additions may leave."""
_NARROW = 5e-2
_EXACT = 1e-12


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor of the pipeline against the model's.

    Attributes:
        name: ``"loss"``, ``"output …"`` or the FQN of the parameter whose gradient it is.
        stage: Stage that holds it.
        error: Largest difference of an entry, relative to the largest entry of the model's tensor.
        allowed: Largest error that another order of additions explains.
    """

    name: str
    stage: int
    error: float
    allowed: float

    @property
    def severity(self) -> float:
        """How many times the error is what is allowed."""
        return self.error / self.allowed


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared.

    Attributes:
        compared: Number of tensors.
        worst: The one with the largest error relative to what is allowed.
        reference: What the pipeline was held against, in words.
    """

    compared: int
    worst: Difference
    reference: str

    def __str__(self) -> str:
        return (
            f"{self.compared} tensors equal {self.reference}; the largest error is {self.worst.error:.1e} "
            f"({self.worst.name}, stage {self.worst.stage})"
        )


def compare(
    name: str, stage: int, found: torch.Tensor | None, wanted: torch.Tensor | None, floor: float = 0.0
) -> Difference:
    """Compare one tensor; a missing one counts as zero.

    Args:
        name: What it is.
        stage: Where it is.
        found: The pipeline's.
        wanted: The model's.
        floor: The error is relative to this at least: entries that would cancel out exactly are noise.

    >>> compare("loss", 0, torch.tensor(1.0), torch.tensor(1.0)).error
    0.0
    """
    either = found if found is not None else wanted
    assert either is not None
    found = torch.zeros_like(either) if found is None else found
    wanted = torch.zeros_like(either) if wanted is None else wanted
    allowed = max(_allowed(found.dtype), _allowed(wanted.dtype))
    wide = [_wide(found), _wide(wanted)]
    if wide[0].shape != wide[1].shape:
        return Difference(name, stage, float("inf"), allowed)
    if not wide[0].numel():
        return Difference(name, stage, 0.0, allowed)
    both_nan = wide[0].isnan() & wide[1].isnan()
    difference = (wide[0] - wide[1]).abs().masked_fill(both_nan, 0.0).nan_to_num(nan=float("inf"))
    scale = wide[1].abs().nan_to_num().max().clamp(min=max(floor, torch.finfo(torch.float64).tiny))
    return Difference(name, stage, float(difference.max() / scale), allowed)


def _allowed(dtype: torch.dtype) -> float:
    if not (dtype.is_floating_point or dtype.is_complex):
        return _EXACT
    return _TOLERANCES.get(dtype.to_real(), _NARROW)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    return dense.to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)


def check(differences: Sequence[Difference], reference: str) -> Verification:
    """Give what was compared.

    Raises:
        MismatchError: A tensor differs by more than another order of additions explains; names the worst.
    """
    worst = max(differences, key=lambda difference: difference.severity)
    if worst.severity > 1:
        wrong = sum(difference.severity > 1 for difference in differences)
        what = worst.name if worst.name.startswith(("loss", "output")) else f"the gradient of {worst.name}"
        raise MismatchError(
            f"{wrong} of {len(differences)} tensors differ from {reference}; the worst is {what} (stage "
            f"{worst.stage}): relative error {worst.error:.2e}, at most {worst.allowed:.0e} expected\n"
            "  name modules of that stage in leaves= to find the one that is captured wrongly"
        )
    return Verification(len(differences), worst, reference)


def compare_gradients(
    found: Mapping[str, torch.Tensor | None],
    wanted: Mapping[str, torch.Tensor | None],
    stage_of: Mapping[str, int],
    largest: float,
) -> list[Difference]:
    """Compare gradients by FQN.

    Args:
        found: The pipeline's.
        wanted: The model's.
        stage_of: Stage of each.
        largest: The largest entry of any gradient of the model. A bias before a normalisation has a gradient of zero
            but for rounding, so errors are relative to a thousandth of this at least.
    """
    return [
        compare(name, stage_of.get(name, 0), gradient, wanted.get(name), largest / 1_000)
        for name, gradient in found.items()
        if gradient is not None or wanted.get(name) is not None
    ]


def largest_entry(gradients: Iterable[torch.Tensor | None]) -> float:
    """Give the largest finite entry of any gradient.

    >>> largest_entry([torch.tensor([1.0, -3.0]), None])
    3.0
    """
    wide = (_wide(gradient).abs().nan_to_num(posinf=0.0) for gradient in gradients if gradient is not None)
    return max((float(gradient.max()) for gradient in wide if gradient.numel()), default=0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What a pipeline's numbers are held against.

    Attributes:
        loss: The batch's loss.
        outputs: Every tensor of the model's output, by microbatch and place: ``"output logits of microbatch 0"``.
        name: What computed it, in words.
    """

    loss: torch.Tensor
    outputs: Mapping[str, torch.Tensor]
    name: str


def named_outputs(jobs: Sequence[Job], flat: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """Name every tensor of the microbatches' outputs."""
    found: dict[str, torch.Tensor] = {}
    for index, (job, tensors) in enumerate(zip(jobs, flat, strict=True)):
        found.update(_named(job.program.rebuild(tensors), index))
    return found


def _named(output: Any, microbatch: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def add(path: str, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            found[f"output {path or '·'} of microbatch {microbatch}"] = leaf.detach()
        return leaf

    map_tree(add, output)
    return found


def compare_outputs(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], stage: int
) -> list[Difference]:
    """Compare outputs by name; one that either side lacks counts as wrong."""
    names = dict.fromkeys((*wanted, *found))
    return [
        compare(name, stage, found[name], wanted[name])
        if name in found and name in wanted
        else Difference(name, stage, float("inf"), _EXACT)
        for name in names
    ]


def fits_whole(tensors: Iterable[TensorInfo], device: torch.device) -> bool:
    """Tell whether a device has room for the whole model beside what it holds: weights, gradients and as much again."""
    needed = 3 * sum(tensor.nbytes for tensor in tensors)
    if device.type == "cuda":
        return needed <= torch.cuda.mem_get_info(device)[0]
    return needed <= os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class WholeModel:
    """The unpartitioned model on one rank, with the pipeline's own values.

    Where nothing draws random numbers it is the user's modules called as they are; where something does, they are
    called in the order that was recorded, so that the draws are those of the pipeline.
    """

    def __init__(self, capture: Capture, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._capture = capture
        self._device = device
        skeleton = capture.skeleton
        values = {fqn: tensor.to(device) for fqn, tensor in tensors.items()}
        part = StageParts(0, tuple(sorted(capture.closed_modules(()))), tuple(skeleton.infos))
        (self.stage,) = build_stages(skeleton.module, [part], values, skeleton.aliases, device)
        self.plain = build_whole(skeleton.module, self.stage, skeleton.aliases)

    def run(self, prepared: Step, jobs: Sequence[Job], output_jobs: Sequence[Job]) -> Reference:
        """Run forward and backward of every microbatch.

        Args:
            prepared: The microbatches, for the whole model on one stage.
            jobs: They, with a loss.
            output_jobs: They, with the model's outputs.
        """
        draws = any(stage.draws for job in jobs for stage in job.program.stages)
        mixed = any(len(set(job.shares)) > 1 for job in jobs)
        recorded = LocalEngine([self.stage])
        if draws or mixed:
            outputs = recorded.infer(output_jobs)
            return Reference(
                recorded.train(jobs), named_outputs(output_jobs, outputs), "the recorded model on one rank"
            )
        losses, found = [], {}
        for index, (inputs, job) in enumerate(zip(prepared.inputs, jobs, strict=True)):
            tensors = {name: tensor.to(self._device) for name, tensor in inputs.tensors.items()}
            args, kwargs, target = inputs.with_tensors(tensors)
            output = self.plain(*args, **kwargs)
            loss = self._capture.loss_fn(output, target) if self._capture.loss_fn else find_loss(output)
            assert loss is not None
            if job.shares[0]:
                (loss * job.shares[0]).backward()
            losses.append(loss.detach().double() * job.shares[0])
            found.update(_named(output, index))
        return Reference(torch.stack(losses).sum(), found, "the unpartitioned model")

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """Give each parameter's gradient by first FQN."""
        aliases = self._capture.skeleton.aliases
        return {aliases[fqn]: parameter.grad for fqn, parameter in self.stage.named_parameters()}


class Verifier:
    """Compares one batch of a pipeline with the unpartitioned model, and leaves everything as it was.

    Args:
        running: The pipeline's stages on this rank.
        variants: The model's graphs on the plan.
    """

    def __init__(self, running: Running, variants: Variants) -> None:
        self._running = running
        self._variants = variants

    def verify(self, prepared: Step, *, seed: int, step: int) -> Verification:
        """Compare loss, outputs and gradients of prepared microbatches.

        Raises:
            MismatchError: On every rank.
        """
        shown = prepared.with_outputs(self._variants)
        shown.install(self._running.stages)
        jobs, output_jobs = self._jobs(self._running.stages, (prepared, shown), seed, step)
        buffers = [(buffer, buffer.clone()) for stage in self._running.stages for buffer in stage.buffers()]
        try:
            infos = self._variants.capture.skeleton.infos.values()
            whole = bool(self._first_of_all(fits_whole(infos, self._running.device)))
            groups = self._running.groups
            if groups is not None and groups.replicas is not None:
                whole = not any_over(groups.everyone, [not whole])[0]
            tensors = gather_tensors(self._running.names, self._running.stages, self._running.groups) if whole else {}
            loss, gradients = self._tried(self._running.engine, jobs)
            _write(buffers)
            outputs = named_outputs(output_jobs, self._running.engine.infer(output_jobs) or ())
            _write(buffers)
            found = _Found(loss, outputs, gradients)
            if whole:
                differences, name = self._against_whole((prepared, shown), tensors, found, seed, step)
            else:
                differences, name = self._against_stages(jobs, output_jobs, found)
        finally:
            _write(buffers)
        result: Verification | None = None
        error: FxpipeError | None = None
        gathered = self._of_all(differences)
        try:
            result = check([difference for part in gathered for difference in part], name)
        except FxpipeError as raised:
            error = raised
        agree(self._running.groups, error, "the result")
        assert result is not None
        return result

    def _jobs(
        self, stages: Sequence[StageModule], prepared: tuple[Step, Step], seed: int, step: int
    ) -> list[list[Job]]:
        groups = self._running.groups
        replica = groups.replica if groups is not None else 0
        return [each.jobs(stages, self._running.device, seed=seed, step=step, replica=replica) for each in prepared]

    def _first_of_all(self, value: Any) -> Any:
        """Give every rank what the first one has."""
        box = [value]
        if self._running.groups is not None:
            dist.broadcast_object_list(box, group=self._running.groups.control, group_src=0)
        return box[0]

    def _of_all(self, value: Any) -> list[Any]:
        """Give every rank what each of them has."""
        if self._running.groups is None:
            return [value]
        everywhere: list[Any] = [None] * len(self._running.groups.ranks)
        dist.all_gather_object(everywhere, value, group=self._running.groups.control)
        return everywhere

    def _tried(
        self, engine: LocalEngine | DistributedEngine | StepwiseEngine, jobs: Sequence[Job]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """Run a step whose gradients are given back, and leave those that were there."""
        parameters = dict(self._running.named(nn.Module.named_parameters))
        kept = [(parameter, parameter.grad) for parameter in parameters.values()]
        try:
            self._running.gradients.zero()
            self._running.gradients.begin()
            loss = engine.train(jobs)
            self._running.gradients.finish(last=True)
            found = {fqn: _on_cpu(parameter.grad) for fqn, parameter in parameters.items()}
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient
        return loss, found

    def _against_whole(
        self,
        prepared: tuple[Step, Step],
        tensors: Mapping[str, torch.Tensor],
        found: _Found,
        seed: int,
        step: int,
    ) -> tuple[list[Difference], str]:
        """Compare on rank 0, which builds the model; other ranks only send their gradients."""
        everywhere = self._of_all(found.gradients)
        error: FxpipeError | None = None
        reference: Reference | None = None
        wanted: dict[str, torch.Tensor | None] = {}
        try:
            if self._running.groups is None or self._running.groups.position == 0:
                whole = WholeModel(self._variants.capture, tensors, self._running.device)
                alone = prepared[0].on_one_stage(), prepared[1].on_one_stage()
                for each in alone:
                    each.install([whole.stage])
                reference = whole.run(alone[0], *self._jobs([whole.stage], alone, seed, step))
                wanted = whole.gradients()
        except FxpipeError as raised:
            error = raised
        agree(self._running.groups, error, "the reference")
        differences: list[Difference] = []
        if reference is not None:
            loss, wanted = self._of_all_replicas(reference.loss, wanted)
            last = len(self._running.placement) - 1
            differences = [
                compare("loss", last, found.loss, loss),
                *compare_outputs(found.outputs, reference.outputs, last),
            ]
            largest = largest_entry(wanted.values())
            for gradients in everywhere:
                differences += compare_gradients(gradients, wanted, self._running.stage_of_tensor, largest)
        return differences, str(self._first_of_all(reference.name if reference is not None else ""))

    def _of_all_replicas(
        self, loss: torch.Tensor, gradients: dict[str, torch.Tensor | None]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """Add up what the model gave for each replica's batch, on the ranks that hold the first stages."""
        replicas = self._running.groups.replicas if self._running.groups is not None else None
        if replicas is None:
            return loss, gradients
        everywhere: list[Any] = [None] * len(replicas.ranks)
        own = loss.cpu(), {fqn: _on_cpu(gradient) for fqn, gradient in gradients.items()}
        dist.all_gather_object(everywhere, own, group=replicas.control)
        total: dict[str, torch.Tensor | None] = dict.fromkeys(gradients)
        for _, each in everywhere:
            for fqn, gradient in each.items():
                before = total[fqn]
                if gradient is not None:
                    total[fqn] = gradient if before is None else before + gradient
        return torch.stack([loss for loss, _ in everywhere]).sum(), total

    def _against_stages(
        self, jobs: Sequence[Job], output_jobs: Sequence[Job], found: _Found
    ) -> tuple[list[Difference], str]:
        """Compare on every rank what its own stages give by themselves."""
        engine: LocalEngine | StepwiseEngine = LocalEngine(self._running.stages)
        if self._running.groups is not None:
            engine = StepwiseEngine(
                self._running.stages, self._running.placement, self._running.groups, self._running.device
            )
        loss, gradients = self._tried(engine, jobs)
        largest = max(self._of_all(largest_entry(gradients.values())))
        last = len(self._running.placement) - 1
        differences = [
            compare("loss", last, found.loss, loss),
            *compare_outputs(found.outputs, named_outputs(output_jobs, engine.infer(output_jobs)), last),
            *compare_gradients(found.gradients, gradients, self._running.stage_of_tensor, largest),
        ]
        return differences, "the stages run one by one"


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What the pipeline gave: this rank's gradients by FQN, the loss, and the outputs."""

    loss: torch.Tensor
    outputs: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor | None]


def _on_cpu(gradient: Any) -> torch.Tensor | None:
    if gradient is None:
        return None
    whole: torch.Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return whole.cpu()


def _write(buffers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give buffers the values they had."""
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
