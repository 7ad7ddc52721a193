"""From a plan to running stages: groups, agreement on the plan, memory and values, an engine.

Everything above this file is values; from here on there are effects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fxpipe.batch.dims import BatchDims
from fxpipe.batch.inputs import Inputs
from fxpipe.batch.weights import LossWeight
from fxpipe.capture.capture import Capture
from fxpipe.capture.model.sequence import SpecSequential
from fxpipe.errors import FxpipeError, MaterializeError
from fxpipe.ir.canonical import import_path
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.plan import Baseline, PipelinePlan, StagePlan, layers_by_name
from fxpipe.ir.profile import Profile
from fxpipe.ir.source import WeightSource
from fxpipe.ir.spec import LayerSpec
from fxpipe.ir.units import folded
from fxpipe.runtime.build.stage import StageModule, StageParts, build_stages
from fxpipe.runtime.build.state import StateNames, state_names
from fxpipe.runtime.build.values import initial_values
from fxpipe.runtime.build.wrappers import added_by_peft
from fxpipe.runtime.ranks.agreement import CALL, agree
from fxpipe.runtime.ranks.dimensions import check_mesh
from fxpipe.runtime.ranks.groups import Groups, busy, stop_process_group
from fxpipe.runtime.ranks.joining import closed_on_failure, join_ranks
from fxpipe.runtime.ranks.place import device_of
from fxpipe.runtime.run.distributed import DistributedEngine
from fxpipe.runtime.run.gradients import Gradients
from fxpipe.runtime.run.local import LocalEngine
from fxpipe.runtime.run.prepare import RunOptions, spelled
from fxpipe.runtime.run.timeline import SpanRecorder
from fxpipe.runtime.weights.checkpoints import Checkpoints
from fxpipe.runtime.weights.model import Model

Init = Callable[[nn.Module], Any] | str | None
FIRST_CHECKED, CHECKED_EVERY = 8, 32
"""Steps in which ranks compare their batches: of the first ones all, since loaders are wrong from the start."""


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """The live objects behind a plan.

    Attributes:
        capture: The user's model.
        dims: Where samples lie in a batch.
        needs_target, own_target: Whether the loss function compares with a target; whether the model takes one itself.
        loss_weight: What the user says of the microbatches' weights.
        mesh: The user's mesh; None: all ranks are one pipeline.
        baselines: Cuts the same model as others would.
        profile: The times the plan was made of, where they were measured.
    """

    capture: Capture
    dims: BatchDims = field(default_factory=BatchDims)
    needs_target: bool = False
    own_target: bool = False
    loss_weight: LossWeight = None
    mesh: DeviceMesh | None = None
    baselines: Callable[[], Sequence[Baseline]] = tuple
    profile: Profile | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """This rank's stages and what runs them: what ``materialize`` makes.

    Attributes:
        plan: What is run.
        capture: The live model behind it.
        stages: This rank's stages, in stage order.
        engine: Runs microbatches through them.
        gradients: Their gradients.
        groups: The pipeline's groups; None where one process holds it all.
        device: Where this rank's stages run.
        names: The model's names of tensors.
        stage_of_tensor: Stage of each parameter, by FQN; of a tied one, one of its stages.
        unfilled: FQNs of tensors that were allocated and not given values yet.
        started: Whether the process group is fxpipe's own.
        checkpoints: Reads and writes the stages.
        recorder: Keeps what this rank does when; None for nothing.
        check_batches: As in ``RunOptions``.
    """

    plan: PipelinePlan
    capture: Capture
    stages: tuple[StageModule, ...]
    engine: LocalEngine | DistributedEngine
    gradients: Gradients
    groups: Groups | None
    device: torch.device
    names: StateNames
    stage_of_tensor: Mapping[str, int]
    unfilled: set[str]
    started: bool
    checkpoints: Checkpoints
    recorder: SpanRecorder | None = None
    check_batches: bool | str = "auto"

    def checks_batch(self, step: int) -> bool:
        """Whether ranks compare checksums of their batches in a step."""
        if self.check_batches == "auto":
            return step < FIRST_CHECKED or step % CHECKED_EVERY == 0
        return bool(self.check_batches)

    @contextmanager
    def together(self, call: str, **arguments: object) -> Iterator[None]:
        """Guard a call in which all ranks meet, once they have agreed that it is this one, with these arguments.

        Raises:
            PlanError: Another rank makes another call.
            RankError: From within: another rank failed.
        """
        with self.guard(call):
            agree(self.groups, None, call, arguments, within={CALL: call})
            yield

    @contextmanager
    def guard(self, call: str) -> Iterator[None]:
        """Guard a call that lets the ranks agree by itself; see ``Failures.guard``.

        Inference mode ends before it: a step in it would leave no gradients, without a word, and what a forward alone
        makes and keeps (graphs, buffers) could not be trained with afterwards.
        """
        inside = torch.is_inference_mode_enabled()
        with (
            self.groups.guard(call) if self.groups is not None else nullcontext(),
            torch.inference_mode(False) if inside else nullcontext(),
        ):
            yield

    @property
    def placement(self) -> list[int]:
        """Rank of each stage."""
        return [stage.rank for stage in self.plan.stages]

    def check_filled(self) -> None:
        """Refuse to compute with memory that has no values.

        Raises:
            MaterializeError: Names the tensors.
        """
        if self.unfilled:
            names = sorted(self.unfilled)
            shown = folded(names, 8)
            raise MaterializeError(
                f"{len(names)} tensors were allocated (init='empty') and never filled: {shown}\n"
                "  call pipe.load or pipe.load_state_dict with all of them first"
            )

    def check_ready(self) -> None:
        """Refuse to train what would get wrong numbers.

        Raises:
            MaterializeError: A tensor has no values yet.
            ScheduleError: A stage holds a module that the schedule would get wrong.
        """
        self.check_filled()
        self.checkpoints.keep_adapters()
        if self.groups is not None:
            self.engine.check()

    def recording(self, sizes: Sequence[int], microbatches: Sequence[Inputs]) -> AbstractContextManager[None]:
        """Record a step of microbatches of some sizes, if steps are recorded."""
        if self.recorder is not None:
            self.recorder.begin(sum(sizes), sum(inputs.tokens for inputs in microbatches))
        return self.span("step")

    def span(self, kind: str) -> AbstractContextManager[None]:
        """Record what runs inside, if that is recorded."""
        return nullcontext() if self.recorder is None else self.recorder.span(kind)

    def recorded(self) -> SpanRecorder:
        """Give what was recorded.

        Raises:
            MaterializeError: Nothing was.
        """
        if self.recorder is None:
            raise MaterializeError("nothing was recorded\n  call pipe.materialize(timings=True)")
        return self.recorder

    def named(self, method: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
        """Yield tensors of this rank, each once, under the first FQN of the model.

        Args:
            method: ``nn.Module.named_parameters`` or ``nn.Module.named_buffers``.
        """
        seen: set[int] = set()
        for stage in self.stages:
            for name, tensor in method(stage, remove_duplicate=False):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield self.names.first_of(name), tensor

    def tied_modules(self) -> dict[str, nn.Module]:
        """Give the tied modules of a hand-written sequence as this rank holds them."""
        held = {fqn: part for stage in self.stages for fqn, part in stage.named_modules()}
        return {key: held[fqn] for key, fqn in tied_names(self.capture).items() if fqn in held}

    def close(self) -> None:
        """End the groups, and the process group if it is fxpipe's own; a save in the background ends first."""
        ended = self.groups is not None and self.groups.failures is not None and self.groups.failures.cause is not None
        try:
            self.checkpoints.close()
        except (RuntimeError, FxpipeError):
            if not ended:  # what a failure has interrupted is no news
                raise
        finally:
            if self.groups is not None:
                self.groups.close()
                if self.started:
                    stop_process_group()


def materialize(
    source: Origin,
    graph: LayerGraph,
    plan: PipelinePlan,
    *,
    device: torch.device | str | int | None,
    dtype: torch.dtype | None,
    seed: int,
    init: Init,
    options: RunOptions,
) -> Running:
    """Allocate and initialise this rank's stages; all of them outside torchrun.

    Args:
        source: The live objects behind the plan.
        graph: The model's layers.
        plan: What each rank runs.
        device: As in ``Pipeline.materialize``; likewise the rest.
        dtype: Floating-point dtype of parameters and buffers.
        seed: Of initialisation.
        init: What gives values to tensors without a real one.
        options: How the stages are run.

    Raises:
        MaterializeError: A tensor has no source for its values.
        PlanError: Another rank holds another plan.
        ScheduleError: There are more or fewer processes than ranks.
    """
    capture = source.capture
    layers = layers_by_name(graph, plan)
    where, error = _where(source, plan, (device, dtype), options)
    same = {"the seed": seed, "the kind of device": where.type, "dtype": dtype, "init": spelled(init), **options.same}
    groups, started = join_ranks(source.mesh, plan, where, options.patience, same, error)
    with closed_on_failure(groups, started), groups.guard("materialize") if groups is not None else nullcontext():
        if dtype is not None:
            capture.cast(dtype)
        stages, unfilled = _build_own(capture, plan, layers, groups, where, seed, init, options)
        gradients = Gradients(stages, plan.ties, [s.rank for s in plan.stages], groups, keep_wide=options.keep_wide)
        engine = _engine(plan, stages, groups, where, gradients)
        kept = capture.skeleton
        model = Model(kept.module, state_names(kept.module, kept.aliases))
        checkpoints = Checkpoints(model, stages, groups, unfilled, kept.caching, seed, kept.origins)
        checkpoints.start_adapters(has_all=init != "empty")
        recorder = options.recorder(engine, where)
    return Running(
        plan,
        capture,
        tuple(stages),
        engine,
        gradients,
        groups,
        where,
        model.names,
        _stage_of_tensor(plan, layers),
        unfilled,
        started,
        checkpoints,
        recorder,
        options.check_batches,
    )


def _where(
    source: Origin, plan: PipelinePlan, place: Any, options: RunOptions
) -> tuple[torch.device, Exception | None]:
    """Give this rank's device, and what is wrong with how it is to be run: the other ranks must not wait for it."""
    try:
        options.check(plan.schedule)
        check_mesh(source.mesh, parallelized=options.parallelize is not None)
        return device_of(*place), None
    except Exception as error:
        return torch.device("cpu"), error


def _build_own(
    capture: Capture,
    plan: PipelinePlan,
    layers: Mapping[str, Sequence[LayerSpec]],
    groups: Groups | None,
    device: torch.device,
    seed: int,
    init: Init,
    options: RunOptions,
) -> tuple[list[StageModule], set[str]]:
    """Build this rank's stages, and let go of every other tensor of the model; every rank goes on, or none."""
    own = [stage for stage in plan.stages if groups is None or stage.rank == groups.position]
    stages: list[StageModule] = []
    unfilled: set[str] = set()
    error: Exception | None = None
    with busy(groups, "building"):
        try:
            parts = [_parts(capture, plan, layers, stage) for stage in own]
            stages, unfilled = _build(capture, parts, device, seed, init)
            capture.release()
            for stage, planned in zip(stages, own, strict=True):
                options.apply(stage, planned.recompute, capture.blocks)
        except Exception as found:  # whatever it is, an initialiser's or memory, the others must not wait for this one
            error = found
    agree(groups, error, "what is built")
    return stages, unfilled


def _engine(
    plan: PipelinePlan, stages: Sequence[StageModule], groups: Groups | None, device: torch.device, gradients: Gradients
) -> LocalEngine | DistributedEngine:
    if groups is None:
        return LocalEngine(stages)
    return DistributedEngine(stages, plan.num_stages, plan.schedule, groups, device, when_done=gradients.stage_done)


def weight_sources(
    source: Origin, graph: LayerGraph, plan: PipelinePlan, seed: int, init: Init, loaded: Mapping[str, str]
) -> list[WeightSource]:
    """Say where every tensor's first value comes from, as ``materialize`` goes about it.

    Args:
        source: The live objects behind the plan.
        graph: The model's layers.
        plan: Which stage holds what.
        seed: As in ``materialize``.
        init: As in ``materialize``; before it was called None.
        loaded: What this rank's tensors were read from since.

    Returns:
        All parameters and buffers of the model, in its order.
    """
    skeleton = source.capture.skeleton
    layers = layers_by_name(graph, plan)
    stages: dict[str, dict[int, None]] = {}
    for stage in plan.stages:
        for fqn in _wanted(skeleton.aliases, [_parts(source.capture, plan, layers, stage)]):
            stages.setdefault(fqn, {})[stage.index] = None
    found, is_added = [], added_by_peft(skeleton.module)
    sequence = skeleton.module if isinstance(skeleton.module, SpecSequential) else None
    for fqn, info in skeleton.infos.items():
        origin = skeleton.origins[fqn]
        if origin == "none" and sequence and isinstance(sequence.specs[int(fqn.partition(".")[0])], LayerSpec):
            origin = "built"
        is_by_peft = origin == "none" and init is not None and is_added(fqn)
        words = loaded.get(fqn) or (f"peft, seed {seed}" if is_by_peft else _words(origin, info.persistent, seed, init))
        found.append(WeightSource(fqn, info.nbytes, words, tuple(sorted(stages.get(fqn, ())))))
    return found


def _words(origin: str, persistent: bool, seed: int, init: Init) -> str:
    if origin == "real":
        return "the model's own value"
    recorded = {"recorded": "recorded", "built": f"constructor, seed {seed}"}
    if origin in recorded and (init is None or (init == "empty" and not persistent)):
        return recorded[origin]
    if init is None:
        return "none: give init= or load"
    if init == "empty":
        return "init='empty': to be loaded" if persistent else "init='empty'"
    return f"init={init!r}" if isinstance(init, str) else "init= function"


def tied_names(capture: Capture) -> dict[str, str]:
    """Give, for a hand-written sequence, the FQN of the module first built for each key; empty for other models."""
    model = capture.skeleton.module
    if not isinstance(model, SpecSequential):
        return {}
    names = {id(part): fqn for fqn, part in model.named_modules()}
    return {key: names[id(module)] for key, module in model.tied_modules.items()}


def _stage_of_tensor(plan: PipelinePlan, layers: Mapping[str, Sequence[LayerSpec]]) -> dict[str, int]:
    return {
        info.fqn: stage.index
        for stage in plan.stages
        for name in stage.layers
        for spec in layers.get(name, ())
        for info in spec.parameters
    }


def _parts(
    capture: Capture, plan: PipelinePlan, layers: Mapping[str, Sequence[LayerSpec]], stage: StagePlan
) -> StageParts:
    """Sort what a stage holds into modules that are called and tensors that are read directly."""
    closed, root = capture.closed_modules(plan.opened), capture.skeleton.module
    modules: dict[str, None] = {}
    attributes: dict[str, None] = {}
    for name in (*stage.layers, *stage.duplicated):
        for spec in layers.get(name, ()):
            is_module = spec.fqn in closed and spec.type_path == import_path(type(root.get_submodule(spec.fqn)))
            if is_module:
                modules[spec.fqn] = None
            inside = f"{spec.fqn}." if is_module else None  # what it is given besides is read directly
            names = (info.fqn for info in (*spec.parameters, *spec.buffers))
            attributes.update(dict.fromkeys(fqn for fqn in names if inside is None or not fqn.startswith(inside)))
    return StageParts(stage.index, tuple(modules), tuple(attributes))


def _wanted(aliases: Mapping[str, str], parts: Sequence[StageParts]) -> dict[str, None]:
    """Give the first FQNs of the tensors that some stages hold."""
    wanted: dict[str, None] = {}
    for part in parts:
        prefixes = tuple(f"{fqn}." for fqn in part.modules)
        inside = (fqn for fqn in aliases if fqn.startswith(prefixes))
        wanted.update(dict.fromkeys(aliases[fqn] for fqn in (*inside, *part.attributes)))
    return wanted


def _build(
    capture: Capture, parts: Sequence[StageParts], device: torch.device, seed: int, init: Init
) -> tuple[list[StageModule], set[str]]:
    skeleton = capture.skeleton
    wanted = _wanted(skeleton.aliases, parts)
    sequence = skeleton.module if isinstance(skeleton.module, SpecSequential) else None
    values = initial_values(
        skeleton.module,
        list(wanted),
        skeleton.originals,
        aliases=skeleton.aliases,
        blocks=capture.blocks,
        init=init,
        seed=seed,
        device=device,
        dtype=capture.dtype,
        constructed=sequence.recorded(seed) if sequence is not None else None,
    )
    return build_stages(skeleton.module, parts, values.tensors, skeleton.aliases, device), set(values.unfilled)
