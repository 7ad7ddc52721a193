"""Hold a pipeline's numbers against those of the unpartitioned model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fxpipe.batch.dims import Microbatch
from fxpipe.capture.capture import Capture
from fxpipe.capture.record.outcome import find_loss
from fxpipe.comparison import (
    Difference,
    Figures,
    Verification,
    check,
    compare_figures,
    named_output,
    named_outputs,
    nudged,
)
from fxpipe.errors import MismatchError
from fxpipe.ir.spec import TensorInfo
from fxpipe.ir.tree import map_tree
from fxpipe.materialize import Running
from fxpipe.runtime.build.extra_state import (
    extra_modules,
    full_extra_states,
    held_extra_modules,
    kept_buffers,
    spelled_states,
)
from fxpipe.runtime.build.stage import StageParts, build_stages, build_whole
from fxpipe.runtime.build.state import gather_tensors
from fxpipe.runtime.ranks.agreement import agree
from fxpipe.runtime.ranks.groups import busy
from fxpipe.runtime.run.distributed import DistributedEngine
from fxpipe.runtime.run.local import LocalEngine
from fxpipe.runtime.run.reduction import any_over
from fxpipe.runtime.run.stepwise import StepwiseEngine
from fxpipe.runtime.run.work import Job
from fxpipe.training import Step
from fxpipe.variants import Variants


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

    def __init__(
        self,
        capture: Capture,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        states: Mapping[str, Any],
    ) -> None:
        self._capture = capture
        self._device = device
        skeleton = capture.skeleton
        values = {fqn: tensor.to(device) for fqn, tensor in tensors.items()}
        part = StageParts(0, tuple(sorted(capture.closed_modules(()))), tuple(skeleton.infos))
        (self.stage,) = build_stages(skeleton.module, [part], values, skeleton.aliases, device)
        self.plain = build_whole(skeleton.module, self.stage, skeleton.aliases)
        self._states = extra_modules(skeleton.module)
        for modules in (extra_modules(self.plain), held_extra_modules(self._states, [self.stage])):
            for key, module in modules.items():
                module.set_extra_state(copy.deepcopy(states[key]))

    def run(self, prepared: Step, jobs: Sequence[Job], output_jobs: Sequence[Job]) -> tuple[Figures, str]:
        """Run forward and backward of every microbatch.

        Args:
            prepared: The microbatches, for the whole model on one stage.
            jobs: They, with a loss.
            output_jobs: They, with the model's outputs.

        Returns:
            What they gave, and what computed it, in words.
        """
        if _draws(jobs) or _is_mixed(jobs):
            with kept_buffers([self.stage]):
                outputs = named_outputs(output_jobs, LocalEngine([self.stage]).infer(output_jobs))
            return self.run_recorded(jobs, outputs), "the recorded model on one rank"
        return self.run_plain(prepared, jobs), "the unpartitioned model"

    def run_recorded(self, jobs: Sequence[Job], outputs: Mapping[str, torch.Tensor]) -> Figures:
        """Run forward and backward of every microbatch as it was recorded: each term of the loss by itself."""
        with kept_buffers([self.stage]):
            self.plain.zero_grad()
            return self._figures(LocalEngine([self.stage]).train(jobs), outputs, self.stage)

    def run_plain(self, prepared: Step, jobs: Sequence[Job]) -> Figures:
        """Run forward and backward of every microbatch through the user's modules."""
        losses, found = [], {}
        with kept_buffers([self.stage]):
            self.plain.zero_grad()
            for index, (inputs, job) in enumerate(zip(prepared.inputs, jobs, strict=True)):
                share = job.shares[0]
                tensors = {name: tensor.to(self._device) for name, tensor in inputs.tensors.items()}
                args, kwargs, target = inputs.with_tensors(tensors)
                output = self.plain(*args, **kwargs)
                found.update(_kept(named_output(output, index)))
                loss = self._loss(output, target)
                if share:
                    torch.autograd.backward(loss * share)
                    losses.append(loss.detach().double() * share)
            return self._figures(torch.stack(losses).sum().to(loss.dtype), found, self.plain)

    def run_whole(self, batch: Microbatch) -> Figures:
        """Run forward and backward of a batch at once."""
        with kept_buffers([self.stage]):
            self.plain.zero_grad()
            loss = self._computed(_moved(batch, self._device))
            torch.autograd.backward(loss)
            return self._figures(loss.detach(), {}, self.plain)

    def _computed(self, batch: Microbatch) -> torch.Tensor:
        args, kwargs, target = batch
        return self._loss(self.plain(*args, **kwargs), target)

    def _loss(self, output: Any, target: Any) -> torch.Tensor:
        loss = self._capture.loss_fn(output, target) if self._capture.loss_fn else find_loss(output)
        assert loss is not None
        return loss

    def _figures(self, loss: torch.Tensor, outputs: Mapping[str, torch.Tensor], ran: nn.Module) -> Figures:
        first = self._capture.skeleton.aliases
        gradients = {first[fqn]: _on_cpu(parameter.grad) for fqn, parameter in self.stage.named_parameters()}
        buffers = {first.get(fqn, fqn): buffer.clone().cpu() for fqn, buffer in self.stage.named_buffers()}
        saving = extra_modules(ran) if ran is self.plain else held_extra_modules(self._states, [self.stage])
        return Figures(loss, outputs, gradients, buffers, spelled_states(saving))

    def writers(self, batch: Microbatch) -> list[str]:
        """Name the modules whose buffers a forward of the batch changes: they look at several samples at once."""
        first = self._capture.skeleton.aliases
        with kept_buffers([self.stage]):  # with gradients: the model, or its loss, may have hooks on some
            before = {fqn: buffer.clone() for fqn, buffer in self.stage.named_buffers()}
            self._computed(_moved(batch, self._device))
            changed = [first.get(f, f) for f, b in self.stage.named_buffers() if not torch.equal(b, before[f])]
        return list(dict.fromkeys(fqn.rpartition(".")[0] for fqn in changed))


class Verifier:
    """Compares one batch of a pipeline with the unpartitioned model, and leaves everything as it was.

    Args:
        running: The pipeline's stages on this rank.
        variants: The model's graphs on the plan.
    """

    def __init__(self, running: Running, variants: Variants) -> None:
        self._running = running
        self._variants = variants

    def verify(self, prepared: Step, batch: Microbatch, *, seed: int, step: int) -> Verification:
        """Compare loss, outputs and gradients of prepared microbatches, and the buffers they leave.

        Args:
            prepared: The microbatches.
            batch: The batch that they were cut from.
            seed: Of random numbers.
            step: Which step it would be.

        Raises:
            MismatchError: On every rank.
        """
        shown = prepared.with_outputs(self._variants)
        stages = self._running.stages
        shown.install(stages)
        jobs, output_jobs = self._jobs((prepared, shown), seed, step)
        with kept_buffers(stages):
            infos = self._variants.capture.skeleton.infos.values()
            whole = bool(self._first_of_all(fits_whole(infos, self._running.device)))
            groups = self._running.groups
            if groups is not None and groups.replicas is not None:
                whole = not any_over(groups.everyone, [not whole])[0]
            tensors = gather_tensors(self._running.names, stages, groups) if whole else {}
            found = self._tried(self._running.engine, jobs, output_jobs)
            if whole:
                differences, name, note = self._against_whole((prepared, shown), batch, tensors, found, seed, step)
            else:
                differences, name, note = *self._against_stages(jobs, output_jobs, found), ""
        result: Verification | None = None
        error: Exception | None = None
        gathered = self._of_all(differences)
        try:
            result = check([difference for part in gathered for difference in part], name, note)
        except Exception as raised:
            error = raised
        agree(groups, error, "the result")
        assert result is not None
        return result

    def _jobs(self, prepared: tuple[Step, Step], seed: int, step: int) -> list[list[Job]]:
        groups = self._running.groups
        replica = groups.replica if groups is not None else 0
        return [each.jobs(self._running.device, seed=seed, step=step, replica=replica) for each in prepared]

    def _first_of_all(self, value: Any) -> Any:
        """Give every rank what the first one has."""
        box = [value]
        if self._running.groups is not None:
            with self._running.groups.waiting():
                dist.broadcast_object_list(box, group=self._running.groups.control, group_src=0)
        return box[0]

    def _of_all(self, value: Any) -> list[Any]:
        """Give every rank what each of them has."""
        if self._running.groups is None:
            return [value]
        return self._running.groups.gather_along(value)

    def _tried(
        self,
        engine: LocalEngine | DistributedEngine | StepwiseEngine,
        jobs: Sequence[Job],
        output_jobs: Sequence[Job],
    ) -> Figures:
        """Run a step whose gradients are given back, and leave gradients and buffers as they were."""
        parameters = dict(self._running.named(nn.Module.named_parameters))
        with self._running.gradients.set_aside(), kept_buffers(self._running.stages):
            self._running.gradients.begin()
            loss = engine.train(jobs)
            self._running.gradients.finish(last=True)
            gradients = {fqn: _on_cpu(parameter.grad) for fqn, parameter in parameters.items()}
            named = self._running.named(nn.Module.named_buffers)
            buffers = {fqn: buffer.clone().cpu() for fqn, buffer in named}
            saving = extra_modules(self._variants.capture.skeleton.module)
            states = spelled_states(held_extra_modules(saving, self._running.stages))
        with kept_buffers(self._running.stages):
            outputs = named_outputs(output_jobs, engine.infer(output_jobs) or ())
        return Figures(loss, outputs, gradients, buffers, states)

    def _against_whole(
        self,
        prepared: tuple[Step, Step],
        batch: Microbatch,
        tensors: Mapping[str, torch.Tensor],
        found: Figures,
        seed: int,
        step: int,
    ) -> tuple[list[Difference], str, str]:
        """Compare on rank 0, which builds the model; other ranks only send their gradients and buffers."""
        sent = replace(found, outputs={})
        everywhere = self._of_all(sent)
        groups = self._running.groups
        saving = extra_modules(self._variants.capture.skeleton.module)
        states = full_extra_states(saving, self._running.stages, groups)
        error: Exception | None = None
        references: list[Figures] = []
        name, note = "", ""
        try:
            if groups is None or groups.position == 0:
                with busy(groups, "computing the reference"):
                    model = WholeModel(self._variants.capture, tensors, self._running.device, states)
                    alone = prepared[0].on_one_stage(), prepared[1].on_one_stage()
                    for each in alone:
                        each.install([model.stage])
                    jobs = self._jobs(alone, seed, step)
                    wanted, name = model.run(alone[0], *jobs)
                    with nudged([model.stage]):
                        control, _ = model.run(alone[0], *jobs)
                    references = [wanted, control]
                    note = self._of_the_batch(model, alone[0], batch, jobs[0])
        except Exception as raised:
            error = raised
        agree(groups, error, "the reference")
        differences: list[Difference] = []
        if references:
            if groups is not None and groups.replicas is not None:  # replicas have buffers of their own batches
                everywhere = [replace(each, buffers={}, states={}) for each in everywhere]
            wanted, control = (self._of_all_replicas(each) for each in references)
            ranks = [replace(everywhere[0], outputs=found.outputs), *everywhere[1:]]
            last = len(self._running.placement) - 1
            differences = compare_figures(ranks, wanted, control, self._running.stage_of_tensor, last)
        name, note = self._first_of_all((name, note))
        return differences, name, note

    def _of_the_batch(self, model: WholeModel, prepared: Step, batch: Microbatch, jobs: Sequence[Job]) -> str:
        """Compare the whole batch at once with its microbatches, both through the untouched model.

        Returns:
            What the model itself couples; empty where nothing differs.

        Raises:
            MismatchError: They differ, and nothing of the model explains it.
        """
        captured = prepared.variants[0].captured
        if self._variants.capture.loss_weight is not None:
            return "the batch at once was not compared: loss_weight= says what its loss is"
        if len(prepared.inputs) == 1:
            return ""
        if len({share for job in jobs for share in job.shares[1:]}) > 0 and len(captured.terms) > 1:
            auxiliary = [term.what for term in captured.terms if term.auxiliary]
            if auxiliary:
                return f"the batch at once was not compared: {auxiliary[0]}"
        shares = prepared.weighed(None).shares
        local = [replace(job, shares=share) for job, share in zip(jobs, shares, strict=True)]
        draws = _draws(jobs)
        if not draws and self._same(model, prepared, batch, local):
            return ""
        writers = model.writers(batch)
        names = ", ".join(writers[:3]) or "no buffer says which module"
        if _is_mixed(jobs) and (draws or writers):  # what was recorded in training is not run in evaluation
            return "the batch at once was not compared: the terms of its loss weigh differently, and " + (
                "random numbers are drawn" if draws else f"the model couples samples ({names})"
            )
        with in_evaluation(model.plain):
            if self._same(model, prepared, batch, local):
                if draws:
                    return "the batch at once was compared without its random draws"
                return f"the batch at once gives other numbers in training mode: the model couples samples ({names})"
        raise MismatchError(
            "the batch as a whole gives another loss or other gradients than its microbatches, each through the "
            "untouched model\n  something is split that every microbatch needs whole, or along another dimension: say "
            "where the samples lie, batch_dims={'name': dimension or None} on fxpipe.compile; or the model itself "
            "couples samples (a statistic, a path or a capacity that the whole batch decides): microbatches then train "
            "on another number, and microbatches=1 on the batch's"
        )

    def _same(self, model: WholeModel, prepared: Step, batch: Microbatch, jobs: Sequence[Job]) -> bool:
        """Whether a batch at once, through the untouched model, gives the numbers of its microbatches."""
        whole = model.run_whole(batch)
        with nudged([model.stage]):
            control = model.run_whole(batch)
        found = model.run_recorded(jobs, {}) if _is_mixed(jobs) else model.run_plain(prepared, jobs)
        parts = replace(found, outputs={}, buffers={}, states={})
        return all(each.severity <= 1 for each in compare_figures([parts], whole, control, {}, 0))

    def _of_all_replicas(self, figures: Figures) -> Figures:
        """Add up what the model gave for each replica's batch, on the ranks that hold the first stages."""
        replicas = self._running.groups.replicas if self._running.groups is not None else None
        if replicas is None:
            return figures
        everywhere: list[Any] = [None] * len(replicas.ranks)
        own = figures.loss.cpu(), dict(figures.gradients)
        dist.all_gather_object(everywhere, own, group=replicas.control)
        total: dict[str, torch.Tensor | None] = dict.fromkeys(figures.gradients)
        for _, each in everywhere:
            for fqn, gradient in each.items():
                before = total[fqn]
                if gradient is not None:
                    total[fqn] = gradient if before is None else before + gradient
        return replace(figures, loss=torch.stack([loss for loss, _ in everywhere]).sum(), gradients=total)

    def _against_stages(
        self, jobs: Sequence[Job], output_jobs: Sequence[Job], found: Figures
    ) -> tuple[list[Difference], str]:
        """Compare on every rank what its own stages give by themselves."""
        running = self._running
        engine: LocalEngine | StepwiseEngine = LocalEngine(running.stages)
        if running.groups is not None:
            engine = StepwiseEngine(running.stages, running.placement, running.groups, running.device)
        wanted = self._tried(engine, jobs, output_jobs)
        with nudged(running.stages):
            control = self._tried(engine, jobs, output_jobs)
        last = len(running.placement) - 1
        return compare_figures([found], wanted, control, running.stage_of_tensor, last), "the stages run one by one"


def _kept(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give outputs as the model gives them: the loss may write to them."""
    return {name: output.detach().clone() for name, output in outputs.items()}


def _on_cpu(gradient: Any) -> torch.Tensor | None:
    if gradient is None:
        return None
    whole: torch.Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return whole.cpu()


def _draws(jobs: Sequence[Job]) -> bool:
    """Whether random numbers are drawn."""
    return any(stage.draws for job in jobs for stage in job.program.stages)


def _is_mixed(jobs: Sequence[Job]) -> bool:
    """Whether a microbatch's loss has terms that weigh differently: the loss as a whole has no weight then."""
    return any(len(set(job.shares)) > 1 for job in jobs)


def _moved(batch: Microbatch, device: torch.device) -> Microbatch:
    def move(_: str, leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf

    args, kwargs, target = batch
    return tuple(map_tree(move, each) for each in args), map_tree(move, dict(kwargs)), map_tree(move, target)


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Switch a module to evaluation, and every part of it back to the mode it was in.

    By its flags alone: ``eval`` may do more (adapters that are merged into the weights), which no flag undoes.
    """
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
