"""One run's numbers against another's: what rounding explains is what a control run, nudged by rounding, shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxpipe.errors import MismatchError, ScheduleError
from fxpipe.ir.tree import tree_leaves
from fxpipe.runtime.run.gradients import local_part
from fxpipe.runtime.run.work import Job, Tensors

MARGIN = 16.0
"""How many times the control run's difference is still taken for rounding."""
_UNITS = {torch.float64: 64.0, torch.float32: 64.0}
"""Units in the last place, of a tensor's largest entry, that another order of additions may leave; 1 for 16 bits."""
_TINY = 1e-300
MOST_OTHERS = 0.1
"""Share of integers that may differ where the control run's happen to be equal: of a few, one may be such a tie."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor of the pipeline against the model's.

    Attributes:
        name: ``"loss"``, ``"output …"``, ``"buffer …"`` or the FQN of the parameter whose gradient it is.
        stage: Stage that holds it.
        error: Largest difference of an entry, relative to the largest entry of the model's tensor.
        allowed: Largest error that rounding explains.
    """

    name: str
    stage: int
    error: float
    allowed: float

    @property
    def severity(self) -> float:
        """How many times the error is what is allowed."""
        return self.error / max(self.allowed, _TINY)


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared.

    Attributes:
        compared: Number of tensors.
        worst: The one with the largest error relative to what is allowed.
        reference: What the pipeline was held against, in words.
        note: What was found of the whole batch at once; empty where it equals its microbatches.
    """

    compared: int
    worst: Difference
    reference: str
    note: str = ""

    def __str__(self) -> str:
        said = (
            f"{self.compared} tensors equal {self.reference}; the largest error is {self.worst.error:.1e} "
            f"({self.worst.name}, stage {self.worst.stage})"
        )
        return f"{said}\n{self.note}" if self.note else said


@dataclass(frozen=True, slots=True, eq=False)
class Figures:
    """What one run of a step gave.

    Attributes:
        loss: The batch's loss.
        outputs: Every tensor of the model's output, by microbatch and place: ``"output logits of microbatch 0"``.
        gradients: By first FQN.
        buffers: As the step left them, by first FQN.
        states: What modules save beside tensors, as the step left it, in one spelling, by its name.
    """

    loss: torch.Tensor
    outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    gradients: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)


def compare(
    name: str,
    stage: int,
    found: torch.Tensor | None,
    wanted: torch.Tensor | None,
    control: torch.Tensor | None = None,
    largest: float = 0.0,
) -> Difference:
    """Compare one tensor; a missing one counts as zero.

    Args:
        name: What it is.
        stage: Where it is.
        found: The pipeline's.
        wanted: The model's.
        control: The model's again, nudged by rounding; None for a tensor that nothing nudges.
        largest: Largest entry of all tensors of its kind: what cancels out exactly leaves rounding of that size.

    >>> compare("loss", 0, torch.tensor(1.0), torch.tensor(1.0)).error
    0.0
    >>> compare("w", 0, torch.tensor(1.0), torch.tensor(1.1), control=torch.tensor(1.09)).severity < 1
    True
    """
    either = found if found is not None else wanted
    assert either is not None
    found = torch.zeros_like(either) if found is None else found
    wanted = torch.zeros_like(either) if wanted is None else wanted
    wide = [_wide(found), _wide(wanted)]
    if wide[0].shape != wide[1].shape:
        return Difference(name, stage, float("inf"), _TINY)
    if not wide[0].numel():
        return Difference(name, stage, 0.0, _TINY)
    difference, scale = _apart(*wide), float(wide[1].abs().nan_to_num().max())
    slack = 0.0
    if wanted.dtype.is_floating_point or wanted.dtype.is_complex:
        narrow = max((found.dtype, wanted.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        unit = torch.finfo(narrow).eps
        noise = min(unit, torch.finfo(torch.float32).eps) * largest / 100  # gradients are summed in 32 bits at least
        slack = unit * _UNITS.get(narrow.to_real(), 1.0) * scale + noise
        if control is not None and control.shape == wanted.shape:
            slack += MARGIN * _apart(_wide(control), wide[1])
    scale = max(scale, _TINY)
    return Difference(name, stage, difference / scale, slack / scale)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Give the largest difference; what is no number in both is equal."""
    both_nan = one.isnan() & other.isnan()
    return float((one - other).abs().masked_fill(both_nan, 0.0).nan_to_num(nan=float("inf")).max())


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    return dense.to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)


def check(differences: Sequence[Difference], reference: str, note: str = "") -> Verification:
    """Give what was compared.

    Raises:
        MismatchError: A tensor differs by more than rounding explains; names the worst.
    """
    worst = max(differences, key=lambda difference: difference.severity)
    if worst.severity > 1:
        wrong = sum(difference.severity > 1 for difference in differences)
        plain = worst.name.startswith(("loss", "output", "buffer", "state"))
        what = worst.name if plain else f"the gradient of {worst.name}"
        raise MismatchError(
            f"{wrong} of {len(differences)} tensors differ from {reference}; the worst is {what} (stage "
            f"{worst.stage}): relative error {worst.error:.2e}, at most {worst.allowed:.0e} expected\n"
            "  name modules of that stage in leaves= to find the one that is captured wrongly"
        )
    return Verification(len(differences), worst, reference, note)


def compare_figures(
    found: Sequence[Figures], wanted: Figures, control: Figures, stage_of: Mapping[str, int], last: int
) -> list[Difference]:
    """Compare all that a step gave.

    Args:
        found: Of each rank; loss and outputs of the first.
        wanted: Of the model.
        control: Of the model again, nudged by rounding.
        stage_of: Stage of each parameter.
        last: The last stage.
    """
    differences = [compare("loss", last, found[0].loss, wanted.loss, control.loss)]
    for name in dict.fromkeys((*wanted.outputs, *found[0].outputs)):
        if name in found[0].outputs and name in wanted.outputs:
            pair = found[0].outputs[name], wanted.outputs[name]
            differences.append(compare(name, last, *pair, control.outputs.get(name)))
        else:
            differences.append(Difference(name, last, float("inf"), _TINY))
    largest = largest_entry(wanted.gradients.values())
    for each in found:
        for name, gradient in each.gradients.items():
            own = wanted.gradients.get(name)
            if gradient is not None or own is not None:
                stage = stage_of.get(name, 0)
                differences.append(compare(name, stage, gradient, own, control.gradients.get(name), largest))
        for name, buffer in each.buffers.items():
            if name in wanted.buffers:
                pair = buffer, wanted.buffers[name]
                differences.append(compare(f"buffer {name}", stage_of.get(name, 0), *pair, control.buffers.get(name)))
        for name, state in each.states.items():
            same = state == wanted.states.get(name, state)
            differences.append(Difference(f"state {name}", stage_of.get(name, 0), 0.0 if same else float("inf"), _TINY))
    held = {name for each in found for name in each.gradients}
    lost = [name for name, gradient in wanted.gradients.items() if gradient is not None and name not in held]
    differences += [Difference(name, stage_of.get(name, 0), float("inf"), _TINY) for name in lost]
    return differences


def largest_entry(gradients: Iterable[torch.Tensor | None]) -> float:
    """Give the largest finite entry of any gradient.

    >>> largest_entry([torch.tensor([1.0, -3.0]), None])
    3.0
    """
    wide = (_wide(gradient).abs().nan_to_num(posinf=0.0) for gradient in gradients if gradient is not None)
    return max((float(gradient.max()) for gradient in wide if gradient.numel()), default=0.0)


def named_outputs(jobs: Sequence[Job], flat: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """Name every tensor of the microbatches' outputs."""
    found: dict[str, torch.Tensor] = {}
    for index, (job, tensors) in enumerate(zip(jobs, flat, strict=True)):
        found.update(named_output(job.program.rebuild(tensors), index))
    return found


def named_output(output: object, microbatch: int) -> dict[str, torch.Tensor]:
    """Name every tensor of one microbatch's output."""
    leaves = tree_leaves(output)
    return {
        f"output {path or '·'} of microbatch {microbatch}": leaf.detach()
        for path, leaf in leaves
        if isinstance(leaf, torch.Tensor)
    }


@contextmanager
def nudged(modules: Sequence[nn.Module], computed_in: torch.dtype | None = None) -> Iterator[None]:
    """Move every finite floating-point parameter by one unit in the last place, up or down, for a while.

    A bit is turned over and back again in place: that takes no memory, and leaves every parameter as it was.

    Args:
        modules: What holds the parameters; of sharded ones what lies on this rank is moved.
        computed_in: What they are rounded to when they are computed with (autocast), whose unit counts then.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> before = layer.weight.item()
    >>> with nudged([layer]):
    ...     0 < abs(layer.weight.item() - before) < 1e-6
    True
    >>> layer.weight.item() == before
    True
    """
    unique = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
    parts = [part for part in map(local_part, unique) if part.is_floating_point() or part.is_complex()]
    for part in parts:
        _turn_over(part, computed_in)
    try:
        yield
    finally:
        for part in parts:
            _turn_over(part, computed_in)


def _turn_over(tensor: torch.Tensor, computed_in: torch.dtype | None) -> None:
    """Turn the last bit over of every finite entry, or the last one that another dtype keeps."""
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    digits, kept = (-math.log2(torch.finfo(dtype).eps) for dtype in (real.dtype, computed_in or real.dtype))
    bits = real.view(_BITS[real.element_size()])
    bits.bitwise_xor_(real.isfinite().to(bits.dtype) << max(round(digits - kept), 0))


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_apart(found: Any, wanted: Any, control: Any, rows: tuple[int, int]) -> None:
    """Refuse outputs in which samples depend on each other.

    Integers may be what a maximum was taken of, where two were equal but for rounding: a few may differ.

    Args:
        found: What some samples gave in microbatches, put together.
        wanted: What they gave in one.
        control: The same again, nudged by rounding.
        rows: How many samples, and how many in a microbatch.

    Raises:
        ScheduleError: They differ; the first that does is named.

    >>> one = {"y": torch.tensor([1.0, -1.0])}
    >>> check_apart(one, one, one, (2, 1))
    """
    columns = zip(*(tree_leaves(output, "output") for output in (found, wanted, control)), strict=False)
    for (name, part), (_, whole), (_, again) in columns:
        if not isinstance(part, torch.Tensor) or not isinstance(whole, torch.Tensor):
            agrees = not isinstance(part, int | float) or part == whole
        elif part.shape == whole.shape and not (part.is_floating_point() or part.is_complex()):
            agrees = _share(part, whole) <= max(MOST_OTHERS, MARGIN * _share(again, whole))
        else:
            agrees = compare(name, 0, part, whole, again).severity <= 1
        if not agrees:
            raise ScheduleError(
                f"{name} of a sample depends on the others of its microbatch: {rows[0]} samples give another at once "
                f"than in {rows[0] // rows[1]} times {rows[1]}\n"
                "  call infer with one microbatch (after pipe.eval(), if it is BatchNorm that couples them)"
            )


def _share(one: torch.Tensor, other: torch.Tensor) -> float:
    """Give which share of the entries differs."""
    return float((one != other).double().mean()) if one.numel() else 0.0
