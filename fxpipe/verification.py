"""Hold a pipeline's numbers against those of the unpartitioned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fxpipe.capture.capture import Capture
from fxpipe.capture.observe import find_loss
from fxpipe.errors import MismatchError
from fxpipe.jobs import Prepared
from fxpipe.runtime.local import LocalEngine
from fxpipe.runtime.stage import StageParts, build_stages, build_whole
from fxpipe.runtime.work import Job

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest error relative to the largest entry of a tensor: what another order of additions may leave."""
_NARROW = 5e-2


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


def compare(name: str, stage: int, found: torch.Tensor | None, wanted: torch.Tensor | None) -> Difference:
    """Compare one tensor; a missing one counts as zero.

    >>> compare("loss", 0, torch.tensor(1.0), torch.tensor(1.0)).error
    0.0
    """
    either = found if found is not None else wanted
    assert either is not None
    found = torch.zeros_like(either) if found is None else found
    wanted = torch.zeros_like(either) if wanted is None else wanted
    narrowest = min((found.dtype, wanted.dtype), key=lambda dtype: -torch.finfo(dtype).eps)
    allowed = _TOLERANCES.get(narrowest, _NARROW)
    wide = [
        tensor.detach().to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)
        for tensor in (found, wanted)
    ]
    wide = [tensor.to_dense() for tensor in wide]
    if wide[0].shape != wide[1].shape:
        return Difference(name, stage, float("inf"), allowed)
    if not wide[0].numel():
        return Difference(name, stage, 0.0, allowed)
    both_nan = wide[0].isnan() & wide[1].isnan()
    difference = (wide[0] - wide[1]).abs().masked_fill(both_nan, 0.0).nan_to_num(nan=float("inf"))
    scale = wide[1].abs().nan_to_num().max().clamp(min=torch.finfo(torch.float64).tiny)
    return Difference(name, stage, float(difference.max() / scale), allowed)


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
    found: Mapping[str, torch.Tensor | None], wanted: Mapping[str, torch.Tensor | None], stage_of: Mapping[str, int]
) -> list[Difference]:
    """Compare gradients by FQN."""
    return [
        compare(name, stage_of.get(name, 0), gradient, wanted.get(name))
        for name, gradient in found.items()
        if gradient is not None or wanted.get(name) is not None
    ]


class WholeModel:
    """The unpartitioned model on one rank, with the pipeline's own values.

    Where nothing draws random numbers it is the user's modules called as they are; where something does, they are
    called in the order that was recorded, so that the draws are those of the pipeline.
    """

    def __init__(self, capture: Capture, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._capture = capture
        skeleton = capture.skeleton
        values = {fqn: tensor.to(device) for fqn, tensor in tensors.items()}
        part = StageParts(0, tuple(sorted(capture.closed_modules(()))), tuple(skeleton.infos))
        (self.stage,) = build_stages(skeleton.module, [part], values, skeleton.aliases, device)
        self.plain = build_whole(skeleton.module, self.stage, skeleton.aliases)

    def losses(self, prepared: Prepared, jobs: Sequence[Job]) -> tuple[torch.Tensor, str]:
        """Run forward and backward of every microbatch; gives the loss, and what computed it."""
        draws = any(stage.draws for job in jobs for stage in job.program.stages)
        mixed = any(len(set(job.shares)) > 1 for job in jobs)
        if draws or mixed:
            return LocalEngine([self.stage]).train(jobs), "the recorded model on one rank"
        losses = []
        for inputs, job in zip(prepared.inputs, jobs, strict=True):
            args, kwargs, target = inputs.with_tensors(job.inputs)
            output = self.plain(*args, **kwargs)
            loss = self._capture.loss_fn(output, target) if self._capture.loss_fn else find_loss(output)
            assert loss is not None
            if job.shares[0]:
                (loss * job.shares[0]).backward()
            losses.append(loss.detach().double() * job.shares[0])
        return torch.stack(losses).sum(), "the unpartitioned model"

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """Give each parameter's gradient by first FQN."""
        aliases = self._capture.skeleton.aliases
        return {aliases[fqn]: parameter.grad for fqn, parameter in self.stage.named_parameters()}
