"""Gradients after the backward: summed over the holders of ties and over replicas, rounded, each once; the norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fxpipe._torch import norms, scale
from fxpipe.errors import ScheduleError
from fxpipe.ir.plan import TieGroup
from fxpipe.runtime.build.holdings import parts_of
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.ranks.groups import Groups
from fxpipe.runtime.run.reduction import GroupSum, any_over

_NARROW = (torch.bfloat16, torch.float16)


class Gradients:
    """The gradients of one rank's parameters over the steps up to an optimiser's.

    ``begin`` and ``finish`` go around the backward of each step. While several steps accumulate, the sum that was
    finished before them is set aside: adding a gradient of all holders to one of this holder, and summing over holders
    again, would count it twice. The same holds for sums over replicas.
    """

    def __init__(
        self,
        stages: Sequence[StageModule],
        ties: Sequence[TieGroup] = (),
        placement: Sequence[int] = (),
        groups: Groups | None = None,
        *,
        wide: bool = True,
        keep_wide: bool = False,
    ) -> None:
        """Store what to work on.

        Args:
            stages: This rank's stages.
            ties: The plan's tied parameters.
            placement: Position of the rank of each stage.
            groups: The pipeline's groups; None where one process holds it all. Where they have replicas, gradients are
                added up over these: every replica weighs its microbatches by their share in the batch of all.
            wide: Whether gradients of 16-bit parameters accumulate in float32.
            keep_wide: Whether they stay so; else the sum is rounded to the parameter's dtype at the last step.
        """
        self._stages = list(stages)
        self._groups = groups
        self._wide = wide
        self._keep_wide = keep_wide
        self._holders = {tie.key: tuple(sorted({placement[stage] for stage in tie.stages})) for tie in ties if groups}
        self._ties = [tie for tie in ties if len(tie.stages) > 1]
        self._aside: dict[nn.Parameter, torch.Tensor] = {}
        self._returned: set[nn.Parameter] = set()
        self._is_open = False
        self._replicas = groups.replicas if groups is not None else None
        self._sum = GroupSum(self._replicas.gradients) if self._replicas is not None else None
        if groups is not None and groups.failures is not None:
            groups.failures.before_closing(self._let_go)
        self._is_last = False
        self._started: set[nn.Parameter] = set()
        self._done: set[int] = set()
        self._is_double: bool | None = None
        self._has_apart = True

    def _let_go(self, _error: BaseException | None) -> None:
        self._sum = self._replicas = None

    def begin(self, *, last: bool = False) -> None:
        """Make ready for the backward of a step.

        Args:
            last: Whether the optimiser comes after it, as ``finish`` will be told: sums over replicas may then start
                while other stages still work.
        """
        self._is_last = last
        self._started.clear()
        self._done.clear()
        if not self._is_open:
            self._aside.clear()
        # None in the middle of an accumulation: the user has started anew.
        self._aside = {p: gradient for p, gradient in self._aside.items() if p.grad is not None}
        apart = self._apart()
        self._has_apart = bool(apart)
        for parameter in apart:
            if parameter.grad is not None and (not self._is_open or parameter in self._returned):
                self._aside[parameter] = parameter.grad
                parameter.grad = None
            if self._accumulates_wide(parameter) and parameter.grad is None:
                parameter.grad_dtype = torch.float32
        self._returned.clear()

    def finish(self, *, last: bool) -> None:
        """End a step.

        Args:
            last: Whether the optimiser comes next: ties are summed over their holders and sums are rounded. Else more
                steps accumulate.
        """
        self._is_open = not last
        if not last:
            for parameter in [p for p in self._aside if p.grad is None]:
                _assign(parameter, self._aside.pop(parameter))
                self._returned.add(parameter)
            return
        self._sum_ties()
        if self._sum is not None:
            self._start(self._parameters())
            with self._waiting():
                self._sum.finish()
        if self._has_apart:
            for parameter in self._apart():
                self._complete(parameter)
        self._aside.clear()

    def stage_done(self, stage_index: int) -> None:
        """Hear that a stage's last backward of this step is done: its sums over replicas may start."""
        self._done.add(stage_index)
        if self._sum is None or not self._is_last:
            return
        busy = [stage for stage in self._stages if stage.stage_index not in self._done]
        waiting = {id(parameter) for stage in busy for parameter in stage.parameters()}
        waiting |= self._tied()
        self._start(parameter for parameter in self._parameters() if id(parameter) not in waiting)

    def zero(self) -> None:
        """Forget all gradients."""
        for parameter in self._parameters():
            parameter.grad = None
        self._aside.clear()
        self._returned.clear()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Work on other gradients for a while; those of the steps so far are there again afterwards."""
        state = self._aside, self._returned, self._is_open
        kept = [(p, p.grad, p.grad_dtype) for p in self._parameters()]
        self._aside, self._returned, self._is_open = {}, set(), False
        try:
            for parameter, *_ in kept:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient, dtype in kept:
                parameter.grad = None
                if parameter.grad_dtype != dtype:
                    parameter.grad_dtype = dtype
                parameter.grad = gradient
            self._aside, self._returned, self._is_open = state

    def clip(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale the gradients of the whole model so that their norm is at most ``max_norm``.

        Args:
            max_norm: The largest norm.
            norm_type: Order of the norm; ``inf`` for the largest magnitude.

        Returns:
            The norm before, over all parameters of all ranks, ties once; in float32, or float64 if a gradient is.
        """
        own = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        norms = _norms([p.grad for p in self._counted() if p.grad is not None], norm_type)
        local = _combine(torch.stack(norms), norm_type) if norms else _nothing(norm_type, self._device())
        total = _combine(self._gather(local), norm_type)
        scale([local_part(gradient) for gradient in own], (max_norm / (total + 1e-6)).clamp(max=1.0))
        return total if self._has_double() else total.float()

    def _parameters(self) -> Iterable[nn.Parameter]:
        """Give each parameter of this rank once, in the order of ``named_parameters``."""
        found: dict[int, nn.Parameter] = {}
        for part in parts_of(self._stages):
            for parameter in part._parameters.values():
                if parameter is not None:
                    found[id(parameter)] = parameter
        return found.values()

    def _apart(self) -> list[nn.Parameter]:
        """List the parameters whose gradients are not simply what autograd accumulates."""
        if self._sum is not None:
            return list(self._parameters())
        tied = self._tied()
        return [p for p in self._parameters() if id(p) in tied or (p.dtype in _NARROW and self._accumulates_wide(p))]

    def _accumulates_wide(self, parameter: nn.Parameter) -> bool:
        # FSDP2 has its own rule, MixedPrecisionPolicy(reduce_dtype=...).
        return self._wide and parameter.dtype in _NARROW and parameter.requires_grad and not _is_sharded(parameter)

    def _copies(self, tie: TieGroup) -> list[nn.Parameter]:
        """List a tied parameter as this rank holds it.

        Its stages share one object, unless FSDP2 has made a sharded one of it in each.
        """
        found: dict[int, nn.Parameter] = {}
        for stage in self._stages:
            if stage.stage_index in tie.stages:
                named: Mapping[str, nn.Parameter] = dict(stage.named_parameters(remove_duplicate=False))
                found.update((id(named[fqn]), named[fqn]) for fqn in tie.fqns if fqn in named)
        return list(found.values())

    def _tied(self) -> set[int]:
        """Give the ids of the parameters whose gradients are added up over several holders or copies."""
        return {id(p) for _, copies in self._summed_ties() for p in copies}

    def _summed_ties(self) -> Iterator[tuple[TieGroup, list[nn.Parameter]]]:
        for tie in self._ties:
            copies = self._copies(tie)
            if len(copies) > 1 or (copies and len(self._holders.get(tie.key, ())) > 1):
                yield tie, copies

    def _sum_ties(self) -> None:
        """Add tied gradients up over copies, and over their holders: those of the same holders together.

        One that no holder has stays None. Only a rank without one looks whether another has, since a look waits for
        the device.
        """
        gradients: dict[tuple[int, ...], list[torch.Tensor]] = {}
        found: dict[tuple[int, ...], list[torch.Tensor]] = {}
        copied: list[tuple[torch.Tensor, nn.Parameter]] = []
        absent: list[tuple[torch.Tensor, list[nn.Parameter]]] = []
        for tie, copies in self._summed_ties():
            if not tie.trainable:
                continue
            parameter, *others = copies
            gradient, has_one = self._dense(parameter), any(each.grad is not None for each in copies)
            for other in others:
                local_part(gradient).add_(local_part(self._dense(other)))
                copied.append((gradient, other))
            if parameter.requires_grad:
                _assign(parameter, gradient)
            holders = self._holders.get(tie.key, ())
            gradients.setdefault(holders, []).append(local_part(gradient))
            found.setdefault(holders, []).append(local_part(gradient).new_full((1,), float(has_one)))
            if not has_one:
                absent.append((found[holders][-1], copies))
        for holders, tensors in sorted(gradients.items()):
            if self._groups is not None and len(holders) > 1:
                total = GroupSum(self._groups.ties[holders])
                total.start(tensors)
                total.start(found[holders])  # apart: what is large is not copied to lie beside it
                with self._groups.waiting():
                    total.finish()
        for gradient, other in copied:
            _assign(other, gradient.clone())
        for count, copies in absent:
            if not count.item():
                for each in copies:
                    each.grad = None

    def _start(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begin to add gradients up over replicas; one that no replica has stays None."""
        if self._sum is None or self._replicas is None:
            return
        due = [p for p in parameters if p.requires_grad and p not in self._started and not self._is_reduced(p)]
        if not due:
            return
        self._started.update(due)
        with self._waiting():
            wanted = any_over(self._replicas.control, [parameter.grad is not None for parameter in due])
        found = [parameter for parameter, is_wanted in zip(due, wanted, strict=True) if is_wanted]
        for parameter in found:
            gradient = self._dense(parameter)
            if gradient is not parameter.grad:
                _assign(parameter, gradient)
        self._sum.start(local_part(parameter.grad) for parameter in found)

    def _dense(self, parameter: nn.Parameter) -> torch.Tensor:
        """Give a parameter's gradient in the form in which others have it too: zeros for none."""
        gradient = parameter.grad
        if gradient is None:
            dtype = torch.float32 if self._accumulates_wide(parameter) else parameter.dtype
            return torch.zeros_like(parameter, dtype=dtype)
        # Another rank's is dense, or has other rows.
        return gradient if gradient.layout == torch.strided else gradient.to_dense()

    def _is_reduced(self, parameter: Any) -> bool:
        """Tell whether a parameter is sharded over the replicas, so that FSDP2 adds its gradient up.

        Raises:
            ScheduleError: It is sharded over some of them.
        """
        if not _is_sharded(parameter) or self._replicas is None:
            return False
        there = set(parameter.device_mesh.mesh.flatten().tolist())
        shared = there.intersection(self._replicas.ranks)
        if len(shared) == 1:
            return False
        if len(shared) < len(self._replicas.ranks):
            raise ScheduleError(
                f"a parameter of shape {list(parameter.shape)} is sharded over ranks {sorted(shared)} of the replicas "
                f"{list(self._replicas.ranks)}, and nothing adds its gradient up over the others\n"
                "  give fully_shard the mesh of all data-parallel dimensions"
            )
        return True

    def _complete(self, parameter: nn.Parameter) -> None:
        """Add what was set aside, and round."""
        fresh, before = parameter.grad, self._aside.get(parameter)
        if fresh is None or before is None:
            total = before if fresh is None else fresh
        else:
            total = fresh + before
        if total is None:
            return
        if self._accumulates_wide(parameter):
            total = total.to(torch.float32 if self._keep_wide else parameter.dtype)
        _assign(parameter, total)

    def _counted(self) -> list[nn.Parameter]:
        """List the parameters whose gradients this rank counts: a tie's first holder does."""
        position = self._groups.position if self._groups else 0
        elsewhere = {
            id(parameter)
            for tie, copies in self._summed_ties()
            for parameter in copies[1 if self._holders[tie.key][0] == position else 0 :]
        }
        return [parameter for parameter in self._parameters() if id(parameter) not in elsewhere]

    def _gather(self, value: torch.Tensor) -> torch.Tensor:
        """Give the values of all ranks, in one order: every rank then computes the same number."""
        if self._groups is None:
            return value.unsqueeze(0)
        rows = [torch.empty_like(value) for _ in self._groups.ranks]
        with self._groups.waiting():
            dist.all_gather(rows, value, group=self._groups.pipeline)
        return torch.stack(rows)

    def _has_double(self) -> bool:
        """Tell whether any rank has a parameter of float64; asked once, on the CPU."""
        if self._is_double is None:
            own = any(parameter.dtype == torch.float64 for parameter in self._parameters())
            self._is_double = own if self._groups is None else any_over(self._groups.control, [own])[0]
        return self._is_double

    def _waiting(self) -> AbstractContextManager[None]:
        return self._groups.waiting() if self._groups is not None else nullcontext()

    def _device(self) -> torch.device:
        return next((p.device for p in self._parameters()), torch.device("cpu"))


def _assign(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
    """Set a gradient of any dtype."""
    parameter.grad = None
    if parameter.grad_dtype not in (None, gradient.dtype):
        parameter.grad_dtype = gradient.dtype
    parameter.grad = gradient


def _norms(gradients: Sequence[torch.Tensor], order: float) -> list[torch.Tensor]:
    """Give the norm of each gradient in float64, computed in float32 or wider; plain ones all at once."""
    plain: dict[torch.dtype, list[torch.Tensor]] = {}
    found: list[torch.Tensor] = []
    for gradient in gradients:
        if gradient.layout != torch.strided:
            gradient = gradient.coalesce().values()
        if gradient.is_complex():
            gradient = gradient.abs()
        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        if _is_sharded(gradient):
            norm: Any = torch.linalg.vector_norm(gradient, order, dtype=dtype)
            found.append(norm.full_tensor().double())
        else:
            plain.setdefault(dtype, []).append(gradient)
    for dtype, tensors in plain.items():
        found += [norm.double() for norm in norms(tensors, order, dtype)]
    return found


def _combine(norms: torch.Tensor, order: float) -> torch.Tensor:
    """Give the norm of the whole from those of its parts."""
    if order == 0:
        return norms.sum()  # counts of what is not zero
    combined: torch.Tensor = torch.linalg.vector_norm(norms, order)
    return combined


def _nothing(order: float, device: torch.device) -> torch.Tensor:
    return torch.tensor(math.inf if order < 0 else 0.0, dtype=torch.float64, device=device)


def _is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "to_local")  # DTensor; importing its module takes a second


def local_part(tensor: Any) -> torch.Tensor:
    """Give what of a tensor lies on this rank."""
    local: torch.Tensor = tensor.to_local() if _is_sharded(tensor) else tensor
    return local
