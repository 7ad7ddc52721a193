"""``fxpipe.compile``: the steps from a model to a pipeline, in order."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import torch
from torch import nn

from fxpipe.batch.dims import BatchDims
from fxpipe.batch.example import Example, as_loss_fn, example_batch, split_example, takes_target
from fxpipe.batch.weights import check_loss_weight
from fxpipe.capture.calls.counting import LayerCounter
from fxpipe.capture.capture import Capture, Captured
from fxpipe.capture.model.sequence import build_sequence
from fxpipe.capture.progress import shown_progress
from fxpipe.choosing import Asked, Chooser
from fxpipe.errors import CaptureError, PartitionError, PlanError, ScheduleError
from fxpipe.ir.files.hardware_file import resolve_hardware
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.mesh import num_replicas
from fxpipe.ir.plan import Baseline, PipelinePlan, layers_by_name
from fxpipe.ir.profile import Profile
from fxpipe.ir.schedule import default_ranks, least_microbatches, placement, schedule_named
from fxpipe.ir.spec import LayerSpec
from fxpipe.logs import log
from fxpipe.materialize import Origin
from fxpipe.pipeline import Pipeline
from fxpipe.planning.costs.estimate import Estimate, estimate_costs
from fxpipe.planning.layout import make_layout
from fxpipe.planning.peers import peer_baselines
from fxpipe.planning.planner import plan_pipeline
from fxpipe.planning.search.learned import Learned
from fxpipe.planning.settings import GRAINS, Settings, device_limit
from fxpipe.planning.solve import LEAST_GAIN
from fxpipe.profiling import Profiler, check_timeout
from fxpipe.recipes.deferred import is_recording
from fxpipe.variants import Variants

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

P = ParamSpec("P")
R = TypeVar("R")


def _out_of_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Call a function outside of inference mode: nothing that happens in it can be recorded, or trained with later."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return call


@_out_of_inference_mode
def compile(
    model: nn.Module | Sequence[LayerSpec | Callable[..., Any]],
    stages: int | str,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    loss_fn: Callable[..., Any] | None = None,
    loss_weight: Callable[..., float] | Literal["microbatch"] | None = None,
    batch_dims: Mapping[str, int | None] | None = None,
    microbatches: int | str | None = None,
    schedule: str = "1F1B",
    ranks: int | None = None,
    cost: str | Mapping[str, float] | Profile = "roofline",
    hardware: Hardware | str | os.PathLike[str] = "h100",
    memory_limit: float | str | None = None,
    grain: str = "auto",
    training: Training | None = None,
    leaves: Sequence[object] = (),
    mesh: DeviceMesh | None = None,
    plan: PipelinePlan | None = None,
    seed: int = 0,
    timeout: float | None = None,
) -> Pipeline:
    """Turn a model into a pipeline of stages.

    The model's forward runs once on tensors without memory and is written down; every layer is counted and costed, and
    the graph is cut where the slowest stage is fastest. Nothing is allocated, no process group is started, and the
    environment is not looked at: every rank gets the same plan.

    Args:
        model: A module on the meta device or a real one (not modified), or a sequence of ``LayerSpec``,
            ``TiedLayerSpec``, modules and callables.
        stages: Number of stages; ``"auto"``: the fastest for the given ``ranks``, else the fewest that fit.
        example_args: Positional arguments of one global batch, as ``step`` will get it; fake or meta tensors do.
        example_kwargs: Its keyword arguments; ``target`` among them where there is a ``loss_fn``.
        loss_fn: ``loss_fn(output, target)``, or ``loss_fn(output)``; None where the model returns its loss
            (``.loss``, ``["loss"]``, a scalar, or a tuple that begins with one).
        loss_weight: Weight of a microbatch in the batch's loss, from its inputs; ``"microbatch"``: the batch's loss is
            the plain mean of its microbatches'; None: found in the loss, and proved on small values.
        batch_dims: Dimension of samples by argument name or dotted path, None for what every microbatch gets whole;
            left out: dimension 0 of what is as large there as the first tensor.
        microbatches: A divisor of the batch size; None: the largest up to four per stage; ``"auto"``: chosen.
        schedule: ``"GPipe"``, ``"1F1B"``, ``"Interleaved1F1B"``, ``"LoopedBFS"``, ``"InterleavedZeroBubble"``,
            ``"ZBVZeroBubble"`` or ``"DualPipeV"``; ``"auto"``: chosen. What is chosen has the fastest simulated step of
            all that keep the memory limit (without one, the device's); a note names it and the runners-up.
        ranks: Number of ranks; None: as many as stages, half as many for schedules with several stages per rank.
        cost: ``"parameters"``, ``"flops"``, ``"roofline"``; ``"profile"``: times and memory of layers measured on this
            machine's device by rank 0, and of links between ranks; a ``Profile`` measured elsewhere; or seconds by FQN
            (forward and backward of one microbatch).
        hardware: A preset's name, a ``Hardware``, or a TOML file.
        memory_limit: Most bytes of a rank; ``"device"``: the hardware's memory less a margin; None: no limit.
        grain: ``"block"``: cut between the model's blocks only; ``"op"``: anywhere; ``"auto"``: open a block where
            that saves at least two per cent.
        training: What memory and time are computed for.
        leaves: Classes, class names and FQN patterns never opened.
        mesh: A ``DeviceMesh`` with a dimension ``"pp"``, and with ``"dp"`` (or ``"dp_replicate"``, ``"dp_shard"``) for
            data-parallel replicas; others need ``materialize(parallelize=)``. None: all ranks are the pipeline.
        plan: A ready plan, checked against the model.
        seed: Of dropout and of initialisation.
        timeout: Seconds that ranks which measure (``cost="profile"``) wait for one that does not come or stands still;
            None: ten minutes. One that is measuring is waited for. ``materialize`` has its own.

    Returns:
        The pipeline: a graph, a plan and a report until it is materialized.

    Raises:
        CaptureError: The forward does something that cannot be recorded without risking wrong numbers.
        PartitionError: There are fewer layers than stages, or an argument is out of range.
        InfeasibleError: No plan keeps the memory limit; says the least that works.
        ScheduleError: Schedule, stages, ranks, microbatches and batch do not fit together.
        PlanError: The hardware is unknown, or ``plan`` belongs to another model.
        SpecError: ``model`` is neither a module nor a sequence of layers.

    >>> import torch
    >>> with torch.device("meta"):
    ...     model = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(6)))
    >>> pipe = compile(model, 3, (torch.zeros(12 * 1024, 4096, device="meta"),))
    >>> [stage.layers for stage in pipe.plan.stages]
    [('0', '1'), ('2', '3'), ('4', '5')]
    """
    # Long: its words say what each argument means; the rest checks them and hands them on.
    if is_recording():
        raise CaptureError(
            "compile is called inside of deferred_init, which would record it too\n"
            "  leave the block first: only what builds the model belongs in it"
        )
    hardware = resolve_hardware(hardware)
    training = _with_replicas(training if training is not None else Training(), _replicas(mesh))
    _check(stages, grain, memory_limit, microbatches)
    check_timeout(timeout)
    limit = _limit(memory_limit, hardware)
    module = model if isinstance(model, nn.Module) else build_sequence(model)
    check_loss_weight(loss_weight)
    loss_fn, needs_target = as_loss_fn(loss_fn)
    capture = Capture(module, loss_fn=loss_fn, leaves=leaves, loss_weight=loss_weight)
    dims = BatchDims.of(capture.parameter_names, batch_dims)
    whole = example_batch(module, example_args, example_kwargs, needs_target=needs_target)
    explained: Callable[[PipelinePlan], str] | None = None
    if "auto" in (stages, schedule, microbatches):
        linked = cost.on_links(hardware) if isinstance(cost, Profile) else hardware
        chooser = Chooser(capture, whole, dims, cost, linked, training)
        asked = Asked.of(stages=stages, ranks=ranks, schedule=schedule, microbatches=microbatches, limit=limit)
        chosen, explained = chooser.choose(asked)
        stages, ranks, schedule = chosen.stages, chosen.ranks, chosen.schedule
        microbatches, limit = chosen.num_microbatches, chosen.limit
    assert isinstance(stages, int)
    assert not isinstance(microbatches, str)
    ranks = default_ranks(schedule_named(schedule).name, stages) if ranks is None else ranks
    placement(schedule, stages, ranks)
    example = None
    if whole is not None:
        example = split_example(
            whole, stages=stages, ranks=ranks, schedule=schedule, microbatches=microbatches, dims=dims
        )
    most = max(4 * stages, least_microbatches(schedule, stages))
    number = example.number if example is not None else microbatches or most
    settings = Settings.of(
        stages=stages,
        ranks=ranks,
        schedule=schedule,
        num_microbatches=number,
        hardware=hardware,
        training=training,
        cost=_named(cost),
        grain=grain,
        leaves=tuple(map(_spelled, leaves)),
        memory_limit=limit,
        seed=seed,
    )
    compiler = _Compiler(capture, settings, cost, example, timeout)
    graph, made, captured = compiler.from_plan(plan) if plan is not None else compiler.plan()
    said = () if explained is None else (explained(made),)
    lost = capture.skeleton.lost_compilations(capture.closed_modules(made.opened))
    made = replace(made, notes=(*said, *lost, *made.notes))
    stage_of_layer = {name: stage.index for stage in made.stages for name in stage.layers}
    holders = _holders(capture, graph, made)
    variants = Variants(capture, stage_of_layer, made.num_stages, made.opened, holders)
    if captured is not None:
        variants.add(captured, with_loss=captured.structure.is_loss)
    dims = example.dims if example is not None else dims
    log.info(
        "planned %s: %d stages, %s, %d microbatches, the slowest %.3g s a microbatch",
        made.model, made.num_stages, made.schedule, made.num_microbatches, made.bottleneck,
    )  # fmt: skip
    own_target = not needs_target and takes_target(module, example_kwargs)
    source = Origin(capture, dims, needs_target, own_target, loss_weight, mesh, compiler.baselines, compiler.profile)
    return Pipeline(graph, made, source, variants)


class _Compiler:
    """The steps between the arguments and the plan."""

    def __init__(
        self,
        capture: Capture,
        settings: Settings,
        cost: str | Mapping[str, float] | Profile,
        example: Example | None,
        timeout: float | None,
    ) -> None:
        self.capture = capture
        self.settings = settings
        self.cost = cost
        self.example = example
        self.profiler = Profiler(settings.ranks, timeout) if cost == "profile" else None
        self.profile = cost if isinstance(cost, Profile) else None
        self.counter = self._counter()

    def plan(self) -> tuple[LayerGraph, PipelinePlan, Captured | None]:
        """Capture at block grain, and at op grain where that may pay; plan; capture what the plan runs."""
        if self.example is None:
            return self._without_example()
        if self.settings.grain != "op" and not self._looks_inside():
            whole, captured = self._captured("block")
            found = self._planned_whole(whole, captured)
            if found is not None:
                return whole, found, captured
        made = self._planned(*self._captured("op"), self.settings)
        graph, captured = self._captured("block", made.opened)
        return graph, replace(made, notes=_joined(graph.notes, made.notes)), captured

    def from_plan(self, plan: PipelinePlan) -> tuple[LayerGraph, PipelinePlan, Captured | None]:
        """Take a ready plan after checking that it is one of this model."""
        if not isinstance(plan, PipelinePlan):
            raise PlanError(f"plan= is a {type(plan).__name__}\n  pass a PipelinePlan: PipelinePlan.from_json(text)")
        if plan.num_stages != self.settings.stages:
            raise PlanError(
                f"the plan has {plan.num_stages} stages, but {self.settings.stages} were asked for\n"
                f"  pass stages={plan.num_stages}, or compile without plan="
            )
        graph, captured = (
            self._captured("block", plan.opened) if self.example is not None else (self.capture.trace(), None)
        )
        if plan.model_fingerprint != graph.fingerprint:
            raise PlanError(
                f"this plan was made for another model: a {plan.model} whose parameters differ from those of this "
                f"{graph.name}\n  use the model it was made for, or compile without plan="
            )
        return graph, plan, captured

    def baselines(self) -> tuple[Baseline, ...]:
        """Cut the model as others would, at the same costs."""
        if self.example is None:
            return peer_baselines(make_layout(*self._by_parameters()))
        self.counter = self._counter()  # the model may have been cast since
        graph, captured = self._captured("block")
        estimate = self._estimate(graph, captured)
        return peer_baselines(make_layout(*self._measured(graph, estimate, self.settings)))

    def _looks_inside(self) -> bool:
        """Tell whether recomputation needs to know what lies in blocks, whatever the grain."""
        recompute = self.settings.training.recompute
        return recompute == "attention" or (recompute == "auto" and self.settings.memory_limit is not None)

    def _counter(self) -> LayerCounter:
        return LayerCounter(self.capture.skeleton, fused_attention=self.settings.hardware.device != "cpu")

    def _without_example(self) -> tuple[LayerGraph, PipelinePlan, Captured | None]:
        graph, estimate, settings = self._by_parameters()
        return graph, plan_pipeline(graph, estimate, settings), None

    def _by_parameters(self) -> tuple[LayerGraph, Estimate, Settings]:
        graph = self.capture.trace()
        settings = replace(self.settings, cost="parameters", grain="block")
        return graph, estimate_costs(graph, "parameters", settings.hardware, settings.training), settings

    def _captured(self, grain: str, opened: Sequence[str] = ()) -> tuple[LayerGraph, Captured]:
        assert self.example is not None
        captured = self.capture.capture(
            self.capture.inputs(*self.example.first, self.example.layout),
            grain=grain,
            opened=opened,
            counter=self.counter,
            weigh=grain == "block",
        )
        if self.example.number > 1:
            captured.check_separates()
        graph = self.capture.layer_graph(captured, batch_size=self.example.layout.size)
        return graph, captured

    def _planned_whole(self, graph: LayerGraph, captured: Captured) -> PipelinePlan | None:
        """Plan at block grain; None where opening blocks may pay."""
        settings = replace(self.settings, grain="block")
        if self.settings.grain == "block":
            return self._planned(graph, captured, settings)
        try:
            made = self._planned(graph, captured, settings)
        except PartitionError:  # too few blocks, or one that is too large: op grain will tell
            return None
        mean = math.fsum(stage.forward_s + stage.backward_s for stage in made.stages) / made.num_ranks
        if made.bottleneck * (1 - LEAST_GAIN) > mean:
            return None
        return replace(made, grain=self.settings.grain)

    def _planned(self, graph: LayerGraph, captured: Captured, settings: Settings) -> PipelinePlan:
        given = self._measured(graph, self._estimate(graph, captured), settings)
        with shown_progress(f"planning {graph.name}", None, "cut") as progress:
            return plan_pipeline(*given, Learned(lambda: progress("")))

    def _measured(
        self, graph: LayerGraph, estimate: Estimate, settings: Settings
    ) -> tuple[LayerGraph, Estimate, Settings]:
        """Put what was measured of memory and links in the place of what is counted and named."""
        if self.profile is None:
            return graph, estimate, settings
        links = self.profile.on_links(settings.hardware)
        return self.profile.with_kept(graph), estimate, replace(settings, hardware=links)

    def _estimate(self, graph: LayerGraph, captured: Captured) -> Estimate:
        cost = self.cost
        if self.profiler is not None:
            cost = self.profile = self.profiler.measure(captured, graph)
        return estimate_costs(graph, cost, self.settings.hardware, self.settings.training)


def _holders(capture: Capture, graph: LayerGraph, plan: PipelinePlan) -> dict[str, tuple[int, ...]]:
    """Give the stages that hold each tensor of the model, by every name it has."""
    layers, aliases = layers_by_name(graph, plan), capture.skeleton.aliases
    found: dict[str, dict[int, None]] = {}
    for stage in plan.stages:
        for spec in (spec for name in (*stage.layers, *stage.duplicated) for spec in layers.get(name, ())):
            for tensor in (*spec.parameters, *spec.buffers):
                found.setdefault(aliases.get(tensor.fqn, tensor.fqn), {})[stage.index] = None
    return {name: tuple(found[first]) for name, first in aliases.items() if first in found}


def _replicas(mesh: DeviceMesh | None) -> int:
    if mesh is not None and not hasattr(mesh, "mesh_dim_names"):
        raise ScheduleError(
            f"mesh is a {type(mesh).__name__}\n"
            "  pass a DeviceMesh: init_device_mesh('cuda', (4, 2), mesh_dim_names=('pp', 'dp'))"
        )
    return num_replicas(dict(zip(mesh.mesh_dim_names or (), mesh.mesh.shape, strict=False))) if mesh is not None else 1


def _with_replicas(training: Training, replicas: int) -> Training:
    """Plan for the replicas that the mesh has.

    Raises:
        PlanError: ``training`` says otherwise.
    """
    if training.data_parallel not in (1, replicas) and replicas > 1:
        raise PlanError(
            f"training says data_parallel={training.data_parallel}, but the mesh has {replicas} replicas\n"
            "  leave data_parallel out, or give the mesh as many"
        )
    return replace(training, data_parallel=max(replicas, training.data_parallel))


def _check(stages: object, grain: object, memory_limit: object, microbatches: object) -> None:
    if stages != "auto" and (isinstance(stages, bool) or not isinstance(stages, int) or stages < 1):
        raise PartitionError(f'stages is {stages!r}\n  pass a whole number of stages, 1 or more, or "auto"')
    if grain not in GRAINS:
        raise PartitionError(f"unknown grain {grain!r}\n  known: {', '.join(GRAINS)}")
    if memory_limit not in (None, "device") and (
        isinstance(memory_limit, bool) or not isinstance(memory_limit, int | float) or not memory_limit > 0
    ):
        raise PartitionError(
            f'memory_limit is {memory_limit!r}\n  pass a positive number of bytes per rank, "device", or None'
        )
    if microbatches not in (None, "auto") and (isinstance(microbatches, bool) or not isinstance(microbatches, int)):
        raise ScheduleError(f'microbatches is {microbatches!r}\n  pass a divisor of the batch size, "auto", or None')


def _limit(memory_limit: float | str | None, hardware: Hardware) -> int | None:
    if isinstance(memory_limit, str):
        return device_limit(hardware)
    return None if memory_limit is None or math.isinf(memory_limit) else math.floor(memory_limit)


def _named(cost: str | Mapping[str, float] | Profile) -> str:
    return cost if isinstance(cost, str) else "profile" if isinstance(cost, Profile) else "given"


def _spelled(pattern: object) -> str:
    return f"{pattern.__module__}:{pattern.__qualname__}" if isinstance(pattern, type) else str(pattern)


def _joined(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))
