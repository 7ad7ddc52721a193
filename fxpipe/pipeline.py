"""The object that ``compile`` returns: a plan to read, and stages to train and run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fxpipe.batch.split import Microbatch, merge_outputs
from fxpipe.capture.capture import Capture
from fxpipe.capture.model.sequence import SpecSequential
from fxpipe.errors import FxpipeError, MaterializeError, ScheduleError
from fxpipe.ir.canonical import import_path
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.plan import Baseline, PipelinePlan, StagePlan
from fxpipe.ir.profile import Profile
from fxpipe.ir.spec import LayerSpec
from fxpipe.jobs import Order, Prepared, install, make_jobs, prepare_inference, prepare_training
from fxpipe.planning.simulation.simulate import simulate
from fxpipe.report.table import render
from fxpipe.runtime.build.stage import StageModule, StageParts, build_stages
from fxpipe.runtime.build.state import (
    StateNames,
    full_state,
    match_state,
    own_state,
    state_names,
    write_state,
)
from fxpipe.runtime.build.values import initial_values
from fxpipe.runtime.ranks.agreement import agree
from fxpipe.runtime.ranks.groups import Groups, make_groups, start_process_group, stop_process_group
from fxpipe.runtime.ranks.place import default_device, is_distributed, is_first
from fxpipe.runtime.run.distributed import DistributedEngine
from fxpipe.runtime.run.gradients import Gradients
from fxpipe.runtime.run.local import LocalEngine
from fxpipe.variants import Variants
from fxpipe.verification import Verification, Verifier


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The live objects behind a plan.

    Attributes:
        capture: The user's model.
        variants: Its graphs on this plan.
        loss_weight: The user's own weight of a microbatch.
        mesh: The user's mesh; None: all ranks are one pipeline.
        baselines: Cuts the same model as others would.
        profile: The times the plan was made of, where they were measured.
    """

    capture: Capture
    variants: Variants
    loss_weight: Callable[..., float] | None = None
    mesh: DeviceMesh | None = None
    baselines: Callable[[], Sequence[Baseline]] = tuple
    profile: Profile | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Running:
    """What ``materialize`` made."""

    stages: tuple[StageModule, ...]
    engine: LocalEngine | DistributedEngine
    gradients: Gradients
    groups: Groups | None
    device: torch.device
    unfilled: set[str]
    started: bool


class Pipeline:
    """A compiled model.

    Made by ``fxpipe.compile``. Until ``materialize`` it is a graph and a plan, and needs no memory; afterwards it
    trains (``step``) and runs (``infer``) this rank's stages, or all of them in one process.

    Attributes:
        graph: The model's layers.
        plan: Which stage and rank runs which.
    """

    graph: LayerGraph
    plan: PipelinePlan

    def __init__(self, graph: LayerGraph, plan: PipelinePlan, source: Source) -> None:
        self.graph = graph
        self.plan = plan
        self._source = source
        self._running: _Running | None = None
        self._seed = plan.seed
        self._step = 0

    # --- to read --------------------------------------------------------------------------------------------------

    def report(self, format: str = "text", *, baselines: bool = False) -> str:
        """Give the plan as a person reads it.

        Args:
            format: ``"text"``, ``"markdown"``, ``"html"`` or ``"json"`` (the plan itself).
            baselines: Whether to add how DeepSpeed, torchtitan, Megatron and torchgpipe would cut the same model.

        Raises:
            PlanError: The format is none of these.
        """
        compared = self._source.baselines() if baselines else ()
        return render(self.plan, format, compared, simulation=simulate(self.plan))

    def print_report(self) -> None:
        """Print the text report, on rank 0 only."""
        if is_first():
            print(self.report(), flush=True)

    def __str__(self) -> str:
        return self.report()

    def __repr__(self) -> str:
        plan = self.plan
        state = "materialized" if self._running is not None else "not materialized"
        return f"Pipeline({plan.model}, {plan.num_stages} stages, {plan.num_ranks} ranks, {plan.schedule}, {state})"

    @property
    def profile(self) -> Profile | None:
        """The times the plan was made of where ``cost="profile"`` measured them; ``to_json`` keeps them."""
        return self._source.profile

    @property
    def tied_modules(self) -> dict[str, nn.Module]:
        """Of a hand-written sequence: the module first built for each key, as this rank holds it."""
        model = self._source.capture.skeleton.module
        if not isinstance(model, SpecSequential):
            return {}
        names = {id(part): fqn for fqn, part in model.named_modules()}
        found = {key: names[id(module)] for key, module in model.tied_modules.items()}
        if self._running is None:
            return dict(model.tied_modules)
        held = {fqn: part for stage in self._running.stages for fqn, part in stage.named_modules()}
        return {key: held[fqn] for key, fqn in found.items() if fqn in held}

    # --- to begin -------------------------------------------------------------------------------------------------

    def materialize(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
        init: Callable[[nn.Module], Any] | str | None = None,
    ) -> Self:
        """Allocate and initialise this rank's stages; all of them outside torchrun.

        Args:
            device: Where to; None: ``cuda:LOCAL_RANK`` if there is one, else the CPU.
            dtype: Floating-point dtype of parameters and buffers; None keeps the model's.
            seed: Of initialisation; None: the one given to ``compile``.
            init: What gives values to tensors without a real one: a function of a module (called on each module after
                its ``reset_parameters``), ``"reset"``, ``"huggingface"``, ``"empty"``, or None for nothing.

        Returns:
            The pipeline itself.

        Raises:
            MaterializeError: A tensor has no source for its values, or this was called before.
            PlanError: Another rank holds another plan.
            ScheduleError: There are more or fewer processes than ranks.
        """
        if self._running is not None:
            raise MaterializeError("this pipeline is materialized already\n  compile again for another device or dtype")
        where = default_device() if device is None else torch.device(device)
        started = is_distributed() and start_process_group(where)
        groups = self._groups(where) if is_distributed() else None
        agree(groups, None, "the plan", self.plan.fingerprint)
        if dtype is not None:
            self._source.capture.cast(dtype)
            self._source.variants.forget()
        own = [stage for stage in self.plan.stages if groups is None or stage.rank == groups.position]
        parts = [self._parts(stage) for stage in own]
        stages, unfilled = self._build(parts, where, self._seed if seed is None else seed, init)
        engine: LocalEngine | DistributedEngine
        if groups is None:
            engine = LocalEngine(stages)
        else:
            engine = DistributedEngine(stages, self.plan.num_stages, self.plan.schedule, groups, where)
        placement = [stage.rank for stage in self.plan.stages]
        gradients = Gradients(stages, self.plan.ties, placement, groups)
        self._running = _Running(tuple(stages), engine, gradients, groups, where, unfilled, started)
        return self

    def _groups(self, device: torch.device) -> Groups:
        """Join the other ranks."""
        pipelines = _pipelines(self._source.mesh)
        size = len(pipelines[0])
        if size != self.plan.num_ranks:
            raise ScheduleError(
                f"the plan is for {self.plan.num_ranks} ranks, but {size} processes were started\n"
                f"  use torchrun --nproc-per-node {self.plan.num_ranks}, or compile with "
                f"{_stages_for(self.plan, size)}"
            )
        placement = {stage.index: stage.rank for stage in self.plan.stages}
        ties = [[placement[stage] for stage in tie.stages] for tie in self.plan.ties]
        return make_groups(pipelines, ties, device)

    def _parts(self, stage: StagePlan) -> StageParts:
        """Sort what a stage holds into modules that are called and tensors that are read directly."""
        capture = self._source.capture
        closed, root = capture.closed_modules(self.plan.opened), capture.skeleton.module
        specs = self._specs()
        modules: dict[str, None] = {}
        attributes: dict[str, None] = {}
        for name in (*stage.layers, *stage.duplicated):
            for spec in specs.get(name, ()):
                is_module = spec.fqn in closed and spec.type_path == import_path(type(root.get_submodule(spec.fqn)))
                if is_module:
                    modules[spec.fqn] = None
                inside = f"{spec.fqn}." if is_module else None  # what it is given besides is read directly
                names = (info.fqn for info in (*spec.parameters, *spec.buffers))
                attributes.update(dict.fromkeys(fqn for fqn in names if inside is None or not fqn.startswith(inside)))
        return StageParts(stage.index, tuple(modules), tuple(attributes))

    def _specs(self) -> dict[str, list[LayerSpec]]:
        """Give the layers that a plan means by each name: one, or those of a block that lies whole in a stage."""
        graph = self.graph
        blocks = graph.blocks or ("",) * len(graph.specs)
        found: dict[str, list[LayerSpec]] = {}
        for layer, block, spec in zip(graph.layer_names, blocks, graph.specs, strict=True):
            for name in dict.fromkeys((layer, block)):
                found.setdefault(name, []).append(spec)
        return found

    def _build(
        self,
        parts: Sequence[StageParts],
        device: torch.device,
        seed: int,
        init: Callable[[nn.Module], Any] | str | None,
    ) -> tuple[list[StageModule], set[str]]:
        skeleton = self._source.capture.skeleton
        wanted: dict[str, None] = {}
        for part in parts:
            prefixes = tuple(f"{fqn}." for fqn in part.modules)
            inside = (fqn for fqn in skeleton.aliases if fqn.startswith(prefixes))
            wanted.update(dict.fromkeys(skeleton.aliases[fqn] for fqn in (*inside, *part.attributes)))
        sequence = skeleton.module if isinstance(skeleton.module, SpecSequential) else None
        values = initial_values(
            skeleton.module,
            list(wanted),
            skeleton.originals,
            aliases=skeleton.aliases,
            blocks=self._source.capture.blocks,
            init=init,
            seed=seed,
            device=device,
            dtype=self._source.capture.dtype,
            constructor_values=sequence.initial_values if sequence is not None else None,
        )
        stages = build_stages(skeleton.module, parts, values.tensors, skeleton.aliases, device)
        return stages, set(values.unfilled)

    # --- to train and run -----------------------------------------------------------------------------------------

    def step(
        self,
        *args: Any,
        target: Any = None,
        last: bool = True,
        microbatches: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run forward and backward of one batch.

        Every rank calls it with the same batch. Gradients accumulate until ``zero_grad``.

        Args:
            *args: Positional arguments of the model: the whole batch.
            target: What ``loss_fn`` compares the output with.
            last: Whether the optimiser comes next; False while more batches follow.
            microbatches: Instead of a batch, ready-split ones: dictionaries of keyword arguments, tuples of positional
                ones, or ``(args, kwargs)`` pairs. They may differ in shape.
            **kwargs: Keyword arguments of the model.

        Returns:
            The batch's loss: a detached scalar, the same on every rank.

        Raises:
            ScheduleError: The batch cannot be cut into microbatches for the schedule.
            CaptureError: The model does something for this batch that cannot be recorded.
            MaterializeError: There are no stages yet, or tensors without values.
        """
        running = self._materialized()
        prepared = self._prepared(running, args, kwargs, target, microbatches)
        jobs = make_jobs(prepared, running.stages, running.device, seed=self._seed, step=self._step)
        running.gradients.begin()
        loss = running.engine.train(jobs)
        running.gradients.finish(last=last)
        self._step += 1
        return loss

    def infer(self, *args: Any, gather: bool = True, microbatches: int = 1, **kwargs: Any) -> Any:
        """Run the model forward, without gradients.

        Args:
            *args: Positional arguments of the model, of any batch size; what has a default (labels) may be left out.
            gather: Whether every rank gets the output; else only the ranks of the last stage do, the others None.
            microbatches: Parts that follow each other through the stages. With one, the output is the model's own
                whatever the model does; with several, samples must not depend on each other.
            **kwargs: Keyword arguments of the model.

        Returns:
            What the model returns.

        Raises:
            CaptureError: The model does something for this batch that cannot be recorded.
        """
        running = self._materialized()
        prepared: Prepared | None = None
        error: FxpipeError | None = None
        try:
            self._check_filled(running)
            with torch.no_grad():
                prepared = prepare_inference(self._source.variants, (args, kwargs, None), microbatches)
            install(prepared, running.stages)
        except FxpipeError as found:
            error = found
        agree(running.groups, error, "the batch", prepared.keys if prepared else ())
        assert prepared is not None
        jobs = make_jobs(prepared, running.stages, running.device, seed=self._seed, step=self._step)
        flat = running.engine.infer(jobs, gather=gather)
        if flat is None:
            return None
        outputs = [job.program.rebuild(tensors) for job, tensors in zip(jobs, flat, strict=True)]
        return merge_outputs(outputs, prepared.sizes)

    def _prepared(
        self,
        running: _Running,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        target: Any,
        microbatches: Sequence[Any] | None,
    ) -> Prepared:
        """Check a batch, cut it and find its variants; every rank goes on, or all raise the same error."""
        prepared: Prepared | None = None
        error: FxpipeError | None = None
        try:
            self._check_filled(running)
            if isinstance(running.engine, DistributedEngine):
                running.engine.check()
            batch = self._batch(args, kwargs, target, microbatches)
            prepared = prepare_training(
                self._source.variants, self._order(), batch, microbatches, self._source.loss_weight
            )
            install(prepared, running.stages)
        except FxpipeError as found:
            error = found
        agree(running.groups, error, "the batch", *((prepared.keys, prepared.sizes) if prepared else ()))
        assert prepared is not None
        return prepared

    def _batch(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, ready: Sequence[Any] | None
    ) -> Microbatch | None:
        has_loss_fn = self._source.capture.loss_fn is not None
        if ready is not None:
            if args or kwargs or target is not None:
                raise ScheduleError(
                    "step got a batch and microbatches=[...]\n  pass one of them, targets within the microbatches"
                )
            return None
        if has_loss_fn and target is None:
            raise ScheduleError("step got no target for loss_fn\n  pass it by name: pipe.step(inputs, target=targets)")
        if not has_loss_fn and target is not None:
            raise ScheduleError(
                "step got a target, but the pipeline was compiled without loss_fn\n"
                "  compile with loss_fn=, or pass the model's own argument (labels=)"
            )
        return args, kwargs, target

    def _order(self) -> Order:
        plan = self.plan
        return Order(plan.schedule, plan.num_stages, plan.num_ranks, plan.num_microbatches, plan.microbatch_size)

    def _materialized(self) -> _Running:
        if self._running is None:
            raise MaterializeError(
                "the pipeline has no parameters yet\n  call pipe.materialize(init=...) first; until then it is a plan"
            )
        return self._running

    def _check_filled(self, running: _Running) -> None:
        if running.unfilled:
            names = sorted(running.unfilled)
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise MaterializeError(
                f"{len(names)} tensors were allocated (init='empty') and never filled: {shown}\n"
                "  call pipe.load_state_dict with all of them first"
            )

    # --- what it holds --------------------------------------------------------------------------------------------

    @property
    def stage_modules(self) -> list[nn.Module]:
        """This rank's stages, in stage order, for FSDP2, ``torch.compile``, optimiser groups and adapters."""
        return list(self._materialized().stages)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters, each once, under its first FQN in the model."""
        yield from self._named(nn.Module.named_parameters)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield this rank's parameters, each once."""
        yield from (parameter for _, parameter in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield this rank's buffers, each once, under its first FQN in the model."""
        yield from self._named(nn.Module.named_buffers)

    def _named(self, method: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
        aliases = self._source.capture.skeleton.aliases
        seen: set[int] = set()
        for stage in self._materialized().stages:
            for name, tensor in method(stage, remove_duplicate=False):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield aliases.get(name, name), tensor

    def train(self, mode: bool = True) -> Self:
        """Switch every module to training mode, or with False to evaluation."""
        self._source.capture.skeleton.module.train(mode)
        self._source.variants.mode_changed()
        for stage in self._running.stages if self._running is not None else ():
            stage.train(mode)
        return self

    def eval(self) -> Self:
        """Switch every module to evaluation mode."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._materialized().gradients.zero()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale the gradients of the whole model so that their norm is at most ``max_norm``.

        Args:
            max_norm: The largest norm.
            norm_type: Order of the norm; ``inf`` for the largest magnitude.

        Returns:
            The norm before, of all ranks' parameters, ties once; the same on every rank.
        """
        return self._materialized().gradients.clip(max_norm, norm_type)

    def state_dict(self, full: bool = False) -> dict[str, torch.Tensor]:
        """Give tensors under all of the model's names, as ``nn.Module.state_dict`` has them.

        Args:
            full: Whether to gather the whole model's on rank 0 (copies on the CPU; other ranks get an empty
                dictionary) instead of giving this rank's own (which share memory with the stages). Every rank calls it.
        """
        running = self._materialized()
        names = self._names()
        return full_state(names, running.stages, running.groups) if full else own_state(names, running.stages)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy tensors in, from a dictionary of the whole model or of this rank's part.

        Args:
            state: Names of other stages are ignored; non-persistent buffers may be among them.

        Raises:
            WeightsError: Lists names the model does not have, own tensors left out, and wrong shapes; nothing was
                changed then.
        """
        running = self._materialized()
        names = self._names()
        error: FxpipeError | None = None
        matched: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
        try:
            matched = match_state(names, running.stages, state)
        except FxpipeError as found:
            error = found
        agree(running.groups, error, "the state dictionary")
        write_state(matched)
        running.unfilled.difference_update(names.first.get(fqn, fqn) for fqn in state)

    def _names(self) -> StateNames:
        skeleton = self._source.capture.skeleton
        return state_names(skeleton.module, skeleton.aliases)

    # --- to check -------------------------------------------------------------------------------------------------

    def verify(self, *args: Any, target: Any = None, **kwargs: Any) -> Verification:
        """Compare loss, gradients and outputs of one batch with the unpartitioned model's.

        The model is built whole on rank 0. Where it does not fit there, every stage runs by itself instead, from the
        boundary tensors of the stage before, without a schedule. Parameters, buffers and gradients are left as they
        are.

        Args:
            *args: A batch, as ``step`` gets it.
            target: As in ``step``.
            **kwargs: As in ``step``.

        Returns:
            What was compared, and the largest error.

        Raises:
            MismatchError: Names the worst tensor, its stage and its error. Every rank raises it.
        """
        running = self._materialized()
        prepared = self._prepared(running, args, kwargs, target, None)
        specs = self._specs()
        stage_of_tensor = {
            info.fqn: stage.index
            for stage in self.plan.stages
            for name in stage.layers
            for spec in specs.get(name, ())
            for info in spec.parameters
        }
        verifier = Verifier(
            self._source.variants,
            running.stages,
            [stage.rank for stage in self.plan.stages],
            running.engine,
            running.gradients,
            running.groups,
            running.device,
            self._names(),
            stage_of_tensor,
        )
        return verifier.verify(prepared, seed=self._seed, step=self._step)

    # --- to end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the pipeline's process groups; the stages stay."""
        running, self._running = self._running, None
        if running is not None and running.groups is not None:
            running.groups.close()
            if running.started:
                stop_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pipelines(mesh: DeviceMesh | None) -> list[list[int]]:
    """Give the global ranks of every pipeline."""
    if mesh is None:
        return [list(range(dist.get_world_size()))]
    names = mesh.mesh_dim_names or ()
    if "pp" not in names:
        raise ScheduleError(f"the mesh has the dimensions {names}\n  name one of them 'pp': the pipeline's")
    rows = mesh.mesh.movedim(names.index("pp"), -1).reshape(-1, mesh.size(names.index("pp")))
    return [[int(rank) for rank in row] for row in rows]


def _stages_for(plan: PipelinePlan, ranks: int) -> str:
    per_rank = plan.num_stages // plan.num_ranks
    return f"stages={ranks * per_rank}" if per_rank == 1 else f"stages={ranks * per_rank}, ranks={ranks}"
