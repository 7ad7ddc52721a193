"""One step: a batch in, microbatches through the stages, a loss or an output out.

A ``Step`` is a batch that was cut, weighed and found its variants, before anything is computed; its ``jobs`` are what
engines take.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fxpipe.batch.digest import LateDigest, digest_inputs, on_host
from fxpipe.batch.dims import BatchDims, Microbatch
from fxpipe.batch.example import out_of_inference, with_own_target
from fxpipe.batch.inputs import Inputs, name_parts
from fxpipe.batch.merge import differ, few_samples, merge_outputs
from fxpipe.batch.moving import OnDevice
from fxpipe.batch.order import Order, check_call
from fxpipe.batch.paths import check_kinds, check_paths
from fxpipe.batch.split import cut
from fxpipe.batch.weights import Counts, add_counts, count_terms, given_counts, make_shares
from fxpipe.capture.graph.loss import path_of
from fxpipe.comparison import check_apart, nudged
from fxpipe.errors import CaptureError, FxpipeError, ScheduleError
from fxpipe.materialize import Origin, Running
from fxpipe.runtime.build.extra_state import kept_buffers
from fxpipe.runtime.build.randomness import microbatch_seed
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.ranks.agreement import CALL, ModesChanged, agree
from fxpipe.runtime.ranks.groups import Groups, busy
from fxpipe.runtime.ranks.modes import Modes
from fxpipe.runtime.ranks.trained import Trained
from fxpipe.runtime.run.reduction import sum_over
from fxpipe.runtime.run.refusals import refuse_overlap
from fxpipe.runtime.run.work import Job
from fxpipe.variants import MOST_VARIANTS, Variant, Variants


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A batch, cut and understood, before anything is computed.

    Attributes:
        inputs: The microbatches.
        variants: The graph each takes.
        sizes: Samples of each.
        counts: What each loss term of each microbatch is a mean over.
        shares: Weight of each loss term of each microbatch in the loss of the batch, of all replicas' together.
        output_dims: Of a forward alone in several microbatches: the outputs' dimensions of samples, by path.
    """

    inputs: tuple[Inputs, ...]
    variants: tuple[Variant, ...]
    sizes: tuple[int, ...]
    counts: Counts = ()
    shares: tuple[tuple[float, ...], ...] = ()
    output_dims: Mapping[str, int | None] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """What all ranks must agree on."""
        return tuple(variant.key for variant in self.variants)

    def described(self) -> dict[str, object]:
        """Give the inputs of its microbatches as a person reads them, those of each kind once."""
        return {"its inputs": tuple(dict.fromkeys(", ".join(inputs.described()) for inputs in self.inputs))}

    def weighed(self, groups: Groups | None) -> Step:
        """Give every loss term its share in the batch of all replicas; every rank calls this."""
        totals = add_counts(self.counts)
        if groups is not None and groups.replicas is not None:
            with groups.waiting():
                totals = sum_over(groups.replicas.control, totals)
        terms = [variant.program.loss_terms for variant in self.variants]
        return replace(self, shares=make_shares(terms, self.counts, totals))

    def with_outputs(self, variants: Variants) -> Step:
        """Give the same microbatches for the model's outputs instead of a loss."""
        with torch.no_grad():
            found = variants.find_all(self.inputs, with_loss=False)
        return replace(self, variants=found, counts=(), shares=())

    def on_one_stage(self) -> Step:
        """Give the same microbatches for the whole model on one stage."""
        return replace(self, variants=tuple(each.whole() for each in self.variants))

    def install(self, stages: Sequence[StageModule]) -> None:
        """Make stages ready for the microbatches' variants.

        Raises:
            PlanError: A variant reads something that its stage does not hold.
        """
        for variant in dict.fromkeys(self.variants):
            for stage in stages:
                stage.add_program(variant.runs, variant.program)

    def jobs(
        self,
        device: torch.device,
        *,
        seed: int,
        step: int,
        replica: int = 0,
        scale: torch.Tensor | None = None,
    ) -> list[Job]:
        """Give each microbatch the form that engines take.

        Args:
            device: Where the stages run.
            seed: Seed of the random numbers.
            step: Which step it is.
            replica: Which data-parallel replica this is: random numbers differ between them.
            scale: What the loss is multiplied by before the backward, on the device.
        """
        jobs = []
        drawing = {variant: any(stage.draws for stage in variant.program.stages) for variant in set(self.variants)}
        shares_of = self.shares or ((),) * len(self.inputs)
        for index, (inputs, variant, shares) in enumerate(zip(self.inputs, self.variants, shares_of, strict=True)):
            draws = microbatch_seed(seed, step, index, replica) if drawing[variant] else 0
            given = OnDevice(inputs, device)
            jobs.append(Job(variant.runs, variant.program, given, shares, draws, scale, variant.key))
        return jobs


class Trainer:
    """Runs the batches of a pipeline: the same call on every rank, agreed before anything is exchanged.

    Args:
        variants: The model's graphs on the plan.
        source: What the user says of batches and their weights.
        seed: Of the random numbers; ``materialize`` may set another.
    """

    def __init__(self, variants: Variants, source: Origin, seed: int) -> None:
        self.variants = variants
        self.seed = seed
        self.num_steps = 0
        self._trained = Trained()
        self._source = source
        self._modes: Modes | None = None
        self._paths: dict[Variant, tuple[bool, ...]] = {}
        self._apart: set[Hashable] = set()  # kinds of batches whose samples were seen not to depend on each other

    def step(
        self,
        running: Running,
        batch: Microbatch,
        ready: Sequence[Any] | None,
        *,
        last: bool,
        scaler: torch.amp.GradScaler | None = None,
    ) -> torch.Tensor:
        """Run forward and backward of one batch; see ``Pipeline.step``."""
        step = self.prepare(running, batch, ready, last=last, scaler=scaler is not None)
        scale = scaler.scale(torch.ones((), dtype=torch.float32, device=running.device)) if scaler is not None else None
        jobs = self.jobs(running, step, scale)
        late: LateDigest | None = None
        if self._checks(running) and not on_host(running.device):
            late = LateDigest(step.inputs, running.device)
        running.gradients.begin(last=last)
        with running.recording(step.sizes, step.inputs):
            with self._noting(step.inputs):
                loss = running.engine.train(jobs)
            if late is not None:  # before this step's gradients are anybody's
                self._compare(running, late)
            with running.span("communication"):
                running.gradients.finish(last=last)
        self.num_steps += 1
        if running.groups is not None:
            self._trained.after_step(parameter for stage in running.stages for parameter in stage.parameters())
        return loss

    def _checks(self, running: Running) -> bool:
        return running.groups is not None and running.checks_batch(self.num_steps)

    def _compare(self, running: Running, late: LateDigest) -> None:
        """Compare batches that lie on accelerators; where they differ, the step's gradients are forgotten."""
        try:
            agree(running.groups, None, "the batch", within={CALL: "step"}, tensors=late.read())
        except FxpipeError:
            running.gradients.zero()
            raise

    def resume(self, step: int | None, seed: int | None) -> None:
        """Go on from a step, with the random numbers of a seed; None changes nothing."""
        self.num_steps = self.num_steps if step is None else step
        self.seed = self.seed if seed is None else seed

    def infer(self, running: Running, batch: Microbatch, num_microbatches: int, *, gather: bool) -> Any:
        """Run the model forward; see ``Pipeline.infer``."""
        make = partial(self._for_inference, running, batch, num_microbatches)
        step = self._agreed(running, make, "infer", gather=gather)
        if len(step.inputs) > 1:
            self._check_apart(running, batch, step)
        outputs = self._outputs(running, step, gather=gather)
        return None if outputs is None else merge_outputs(outputs, step.sizes, step.output_dims)

    def _outputs(self, running: Running, step: Step, *, gather: bool) -> list[Any] | None:
        jobs = self.jobs(running, step)
        with self._noting(step.inputs):
            flat = running.engine.infer(jobs, gather=gather)
        if flat is None:
            return None
        return [job.program.rebuild(tensors) for job, tensors in zip(jobs, flat, strict=True)]

    def _check_apart(self, running: Running, batch: Microbatch, step: Step) -> None:
        """Run a few samples at once and in microbatches, the first time that a batch of a kind is cut for a forward.

        Where random numbers are drawn, the two differ by those, and nothing is checked.

        Raises:
            ScheduleError: A sample's output depends on other samples.
        """
        kind = self.variants.kind_of(step.inputs[0], False)
        if kind in self._apart or any(part.draws for each in step.variants for part in each.program.stages):
            return
        size, parts = few_samples(sum(step.sizes), len(step.sizes))
        layout = self._source.dims.layout(batch, split=False)
        dims = self._source.dims.learned(layout)
        few = cut(batch, layout, layout.size // size, dims)[0]
        with kept_buffers(running.stages):
            together = self._agreed(running, partial(self._for_inference, running, few, 1, dims), "infer", gather=True)
            whole = self._outputs(running, together, gather=True)
            with nudged(running.stages, _computed_in(running.device)):
                control = self._outputs(running, together, gather=True)
            apart = self._agreed(running, partial(self._for_inference, running, few, parts, dims), "infer", gather=True)
            outputs = self._outputs(running, apart, gather=True)
        assert whole is not None
        assert control is not None
        assert outputs is not None
        merged = merge_outputs(outputs, apart.sizes, apart.output_dims)
        check_apart(merged, whole[0], control[0], (size, size // parts))
        if differ(outputs):  # of samples that are all the same nothing can be told
            self._apart.add(kind)

    def batch(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Microbatch:
        """Put together what a call was given; ``target`` is the model's own where no loss function takes one."""
        batch = out_of_inference((args, kwargs, target))
        return with_own_target(batch) if self._source.own_target else batch

    def prepare(
        self,
        running: Running,
        batch: Microbatch,
        ready: Sequence[Any] | None,
        what: str = "step",
        **arguments: object,
    ) -> Step:
        """Check a batch, cut it and find its variants; every rank goes on, or all raise the same error.

        Args:
            running: This rank's stages.
            batch: Whole; or nothing.
            ready: Instead of it, microbatches.
            what: The method that was called.
            **arguments: What else must be the same on all ranks.
        """
        step = self._agreed(running, lambda: self._for_training(running, batch, ready, what), what, **arguments)
        return step.weighed(running.groups)

    def evaluate(self, running: Running, batch: Microbatch, ready: Sequence[Any] | None) -> torch.Tensor:
        """Compute the loss of a batch alone; see ``Pipeline.evaluate``."""
        with torch.no_grad():
            step = self.prepare(running, batch, ready, "evaluate")
        with self._noting(step.inputs):
            return running.engine.evaluate(self.jobs(running, step))

    def jobs(self, running: Running, step: Step, scale: torch.Tensor | None = None) -> list[Job]:
        """Give a step the form that the engine takes."""
        replica = running.groups.replica if running.groups is not None else 0
        return step.jobs(running.device, seed=self.seed, step=self.num_steps, replica=replica, scale=scale)

    def start(self, running: Running) -> Modes:
        """Take note of how the modules of this rank's stages are before a user has changed any."""
        opened = [stage.opened for stage in running.stages]
        self._modes = Modes(self.variants.capture.skeleton.module, running.stages, opened)
        return self._modes

    def _held(self, step: Step, what: str) -> dict[str, object]:
        """Give what must be the same on all ranks of a pipeline before a batch is exchanged."""
        held: dict[str, object] = {
            CALL: what,
            "steps since materialize": self.num_steps,
            "the sizes of its microbatches": step.sizes if step.counts else (),
            "what the model does with them": step.keys,
            "the numbers among its arguments": tuple(tuple(each.numbers.values()) for each in step.inputs),
            "the seed": self.seed,
            "the weights of the loss": step.counts,
        }
        return held

    def _agreed(self, running: Running, make: Callable[[], Step], what: str, **arguments: object) -> Step:
        step: Step | None = None
        error: Exception | None = None
        modes = self._modes or self.start(running)
        try:
            sizes = tuple(stage.num_programs for stage in running.stages)
            self.variants.settings = modes.settings(sizes)
            if modes.changed(sizes):
                raise ModesChanged
            with busy(running.groups, "preparing the batch"):
                step = make()
                step.install(running.stages)
            modes.note_hooks(tuple(stage.num_programs for stage in running.stages))
        except Exception as found:  # whatever it is, the other ranks must not wait for this one
            error = found
        # Replicas may infer at their own pace: how many microbatches each takes is its own.
        same = {**({"microbatches": len(step.inputs)} if step and step.counts else {}), **arguments}
        within = self._held(step, what) if step is not None and running.groups is not None else None
        trained = self._trained.before_step() if what == "step" else None
        tensors = digest_inputs(step.inputs) if step is not None and self._checks(running) else None
        try:
            of_step = step.described if step is not None else None
            checked: dict[str, Any] = {"within": within, "tensors": tensors, "trained": trained, "shown": of_step}
            agree(running.groups, error, "the batch", same, **checked)
        except ModesChanged:  # of some rank: what was recorded with other flags is not what runs
            modes.gather(running.groups)
            self.variants.mode_changed()
            return self._agreed(running, make, what, **arguments)
        assert step is not None
        for stage in running.stages:
            if stage.num_programs > MOST_VARIANTS:
                stage.keep_programs({*self.variants.programs, *(variant.runs for variant in step.variants)})
        return step

    def _for_training(self, running: Running, batch: Microbatch, ready: Sequence[Any] | None, what: str) -> Step:
        """Cut a batch into microbatches and weigh them, for a call of ``what``.

        Raises:
            MaterializeError: A tensor has no values yet.
            ScheduleError: The batch cannot be cut for the schedule, or a module cannot be run by it.
            CaptureError: The model does something new that cannot be recorded.
        """
        running.check_ready()
        check_call(batch, ready, needs_target=self._source.needs_target, first=self._source.dims.first)
        order = Order.of(running.plan, self._source.dims, own_target=self._source.own_target)
        parts, layouts = order.split(batch, ready)
        sizes = tuple(layout.size for layout in layouts)
        inputs = name_parts(self.variants.capture.parameter_names, parts, layouts)
        with self._beside_example(inputs), torch.set_grad_enabled(what != "evaluate"):
            found = self.variants.find_all(inputs, with_loss=True)
            for variant in dict.fromkeys(found) if len(parts) > 1 else ():
                variant.captured.check_separates()
            if self._source.loss_weight is None:
                on_path = self._on_path(found, batch if ready is None else None)
                check_paths([each.program.loss_terms for each in found], on_path, [each.values for each in inputs])
        for variant in dict.fromkeys(found) if len(parts) > 1 else ():
            if running.groups is not None and running.plan.num_ranks > 1:
                refuse_overlap(variant.program)
        check_kinds([each.program.loss_terms for each in found])
        return Step(inputs, found, sizes, self._counts(found, inputs, sizes, parts))

    def _on_path(self, found: Sequence[Variant], batch: Microbatch | None) -> list[bool]:
        """Tell which microbatches take the path through the loss that their batch takes, or most of its terms do."""
        if len(found) < 2 or not any(map(self._path, dict.fromkeys(found))):
            return [True] * len(found)
        if batch is not None:
            layouts = [self._source.dims.layout(batch, split=False)]
            (whole,) = name_parts(self.variants.capture.parameter_names, [batch], layouts)
            path = self._path(self.variants.find(whole, with_loss=True))
        else:  # what was split before is not put together: the path with most terms has those of all others
            path = self._path(max(found, key=lambda each: sum(not term.nothing for term in each.program.loss_terms)))
        return [self._path(variant) == path for variant in found]

    def _path(self, variant: Variant) -> tuple[bool, ...]:
        """Give what Python asks on the way to the loss, past the model's layers."""
        if variant not in self._paths:
            of = variant.captured
            guards, recorder = (of.symbolic or of.observation).guards, of.observation.recorder
            self._paths = {} if len(self._paths) >= MOST_VARIANTS else self._paths
            self._paths[variant] = path_of(guards, recorder, of.terms, of.inputs.dims)
        return self._paths[variant]

    @contextmanager
    def _beside_example(self, microbatches: Sequence[Inputs]) -> Iterator[None]:
        """Refuse tensors without values, and say of what cannot be recorded in what it differs from the example."""
        for inputs in microbatches if microbatches[-1].signature is not microbatches[0].signature else microbatches[:1]:
            inputs.check_values()
        try:
            yield
        except CaptureError as error:
            told = self._unlike_example(microbatches)
            if not told:
                raise
            raise CaptureError(f"{error}\n  {told}") from error.__cause__

    @contextmanager
    def _noting(self, microbatches: Sequence[Inputs]) -> Iterator[None]:
        """Note on an error of torch's, which passes as it is, in what the batch differs from the example."""
        try:
            yield
        except Exception as error:
            told = "" if isinstance(error, FxpipeError) else self._unlike_example(microbatches)
            if told:
                error.add_note(told)
            raise

    def _unlike_example(self, microbatches: Sequence[Inputs]) -> str:
        example = self.variants.example
        told = next(filter(None, (inputs.unlike(example) for inputs in microbatches)), "") if example else ""
        return f"unlike the example that was compiled: {told}" if told else ""

    def _counts(
        self, found: Sequence[Variant], inputs: Sequence[Inputs], sizes: Sequence[int], parts: Sequence[Microbatch]
    ) -> Counts:
        """Count what each microbatch weighs: numbers that add up over microbatches, and over replicas."""
        terms = [variant.program.loss_terms for variant in found]
        if self._source.loss_weight is not None:
            return given_counts(self._source.loss_weight, parts, terms)
        return count_terms(terms, [each.values for each in inputs], sizes)

    def _for_inference(
        self, running: Running, batch: Microbatch, num_microbatches: int, dims: BatchDims | None = None
    ) -> Step:
        """Cut a batch for a forward alone; every output is the model's own where it is one microbatch."""
        running.check_filled()
        dims = dims or self._source.dims
        layout = dims.layout(batch, split=False)
        size = layout.size
        if not isinstance(num_microbatches, int) or not 1 <= num_microbatches <= size:
            raise ScheduleError(
                f"infer cannot cut a batch of {size} into {num_microbatches!r} microbatches\n  use 1 to {size}"
            )
        if num_microbatches > 1:
            layout.check_clear()
        own = replace(layout, size=size // num_microbatches)
        parts = cut(batch, layout, num_microbatches, dims)
        inputs = name_parts(self.variants.capture.parameter_names, parts, [own] * num_microbatches)
        with self._beside_example(inputs), torch.no_grad():
            found = self.variants.find_all(inputs, with_loss=False)
        output_dims = self.variants.output_dims(found[0], inputs[0]) if num_microbatches > 1 else None
        return Step(inputs, found, (own.size,) * num_microbatches, output_dims=output_dims)


def _computed_in(device: torch.device) -> torch.dtype | None:
    """Give the dtype to which a device rounds what it multiplies, where it may be a narrower one than is kept."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None if device.type == "cpu" else torch.float16  # as many digits as TF32 has
