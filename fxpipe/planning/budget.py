"""A budget of devices: pipeline times data parallel, sharding, size of a microbatch, schedule, recomputation.

What is simulated is one replica; at the end of a step every rank adds its gradients to those of the other replicas (a
ring all-reduce, or under FSDP2 a reduce-scatter and the gather of the weights), with nothing to hide behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fxpipe.errors import FxpipeError, PlanError
from fxpipe.ir.cost import PHASES
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.plan import PipelinePlan
from fxpipe.ir.schedule import fits_microbatches, schedule_named
from fxpipe.ir.tensor import dtype_bytes
from fxpipe.ir.units import size_text
from fxpipe.planning.configurations import SHARPENED, Configuration, Cuts, Offer, Outcome, cut_again, outcome, shapes
from fxpipe.planning.simulation.simulate import simulate

KEPT = 12  # configurations of which the slowest must be within reach of one that is tried
MOST_PIPELINE = 64  # ranks of a pipeline that are tried
NEAR = "replicas of a stage in a node"
FAR = "stages of a pipeline in a node"


@dataclass(frozen=True, slots=True)
class Budget:
    """What there is to spend.

    Attributes:
        devices: Accelerators.
        node_size: Accelerators of a node; 0 for one node.
        batch: Samples of a step, all replicas together.
        sizes: Samples of a microbatch that may be tried.
    """

    devices: int
    node_size: int
    batch: int
    sizes: tuple[int, ...] = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Spent:
    """One way to spend it.

    Attributes:
        outcome: The plan of one replica.
        size: Samples of a microbatch.
        step_s: Seconds of a step, gradients of the replicas added up.
        reduce_s: The part of it that adds them up.
        nodes: What lies within a node.
        samples_per_s: Samples of all replicas per second.
        utilisation: Model FLOPs (no recomputation) over what the devices could do at their peak.
    """

    outcome: Outcome
    size: int
    step_s: float
    reduce_s: float
    nodes: str
    samples_per_s: float
    utilisation: float


def configurations(budget: Budget, training: Training, schedule: str | None) -> Iterator[tuple[Configuration, int]]:
    """Give every configuration that divides the budget, with the size of its microbatches.

    Raises:
        PlanError: There is none.
    """
    found = False
    for ranks in (n for n in range(1, min(budget.devices, MOST_PIPELINE) + 1) if budget.devices % n == 0):
        replicas = budget.devices // ranks
        if budget.batch % replicas:
            continue
        for size in budget.sizes:
            count, rest = divmod(budget.batch // replicas, size)
            if rest or not count:
                continue
            for stages, _, name in shapes(stages=None, ranks=ranks, schedule=schedule):
                if not fits_microbatches(name, stages, ranks, count) or (ranks == 1 and name != (schedule or "GPipe")):
                    continue
                found = True
                for fsdp in (False, True) if replicas > 1 else (False,):
                    way = replace(training, data_parallel=replicas, fsdp=fsdp or (training.fsdp and replicas > 1))
                    yield Configuration(stages, ranks, name, count, way), size
    if not found:
        raise PlanError(
            f"no configuration divides {budget.devices} devices and a batch of {budget.batch}\n"
            "  use a batch that is a multiple of the replicas times the size of a microbatch, or other devices"
        )


def spend(
    budget: Budget, offers: dict[int, Offer], hardware: Hardware, training: Training, limit: int | None,
    schedule: str | None = None,
) -> list[Spent]:  # fmt: skip
    """Plan and simulate every configuration of a budget.

    Args:
        budget: Devices and batch.
        offers: For each size of microbatch its graph and seconds.
        hardware: The accelerator.
        training: Recomputation and the like; replicas and sharding are chosen.
        limit: Bytes of each rank.
        schedule: One schedule; None: all of them.

    Returns:
        All that can be planned: those that fit first, the fastest first.

    Raises:
        PlanError: No configuration divides the budget.
    """
    found: list[Spent] = []
    cuts: Cuts = {}
    wanted = list(configurations(budget, training, schedule))
    # The promising ones first: what cannot come near the best of them is left out.
    wanted.sort(key=lambda each: _least_s(each[0], each[1], offers))
    for configuration, size in wanted:
        kept = sorted(each.step_s for each in found if each.outcome.fits)[:KEPT]
        if len(kept) == KEPT and _least_s(configuration, size, offers) > kept[-1]:
            continue
        if configuration.training.fsdp and not _shards_matter(found, configuration):
            continue
        first, *others = _layouts(budget, configuration)
        device = replace(hardware, node_size=_node_size(budget, configuration, first))
        done = outcome(configuration, offers[size], device, limit, cuts=cuts)
        if done.plan is None:
            continue
        graph = offers[size](configuration.num_microbatches)[0]
        found.append(_spent(budget, done, size, first, hardware, graph))
        for nodes in others:  # the same cut, laid over nodes the other way
            device = replace(hardware, node_size=_node_size(budget, configuration, nodes))
            plan = replace(done.plan, hardware=device)
            moved = replace(done, plan=plan, step_s=simulate(plan).step_s)
            found.append(_spent(budget, moved, size, nodes, hardware, graph))
    found.sort(key=_place)
    for index, each in enumerate(found[:SHARPENED]):
        offer = offers[each.size]
        done = cut_again(each.outcome, offer)
        if done is not each.outcome:
            graph = offer(done.configuration.num_microbatches)[0]
            found[index] = _spent(budget, done, each.size, each.nodes, hardware, graph)
    return sorted(found, key=_place)


def _place(each: Spent) -> tuple[bool, float, int]:
    return not each.outcome.fits, each.step_s, each.outcome.peak_bytes


def _least_s(configuration: Configuration, size: int, offers: dict[int, Offer]) -> float:
    """Give seconds that no plan of a configuration is below: even stages, free links, the bubble of its schedule."""
    count, ranks = configuration.num_microbatches, configuration.ranks
    total = math.fsum(cost.seconds for cost in offers[size](count)[1].costs)
    fill = 0 if schedule_named(configuration.schedule).splits_backward else (ranks - 1) * ranks / configuration.stages
    return (count + fill) * total / ranks


def _shards_matter(found: Sequence[Spent], configuration: Configuration) -> bool:
    """Tell whether the same without sharding did not fit: only then is it worth its messages."""
    plain = replace(configuration, training=replace(configuration.training, fsdp=False))
    return not any(each.outcome.configuration == plain and each.outcome.fits for each in found)


def _layouts(budget: Budget, configuration: Configuration) -> tuple[str, ...]:
    """Give what may lie within a node; one way where all fits into one, or where there is one of either."""
    replicas, ranks = configuration.training.data_parallel, configuration.ranks
    if not budget.node_size or budget.devices <= budget.node_size or replicas == 1:
        return (FAR,)
    return (NEAR,) if ranks == 1 else (FAR, NEAR)


def _node_size(budget: Budget, configuration: Configuration, nodes: str) -> int:
    """Give the size of a node as the planner counts: it takes a stage's replicas for neighbours."""
    return budget.node_size * (configuration.training.data_parallel if nodes == FAR else 1)


def _spent(budget: Budget, done: Outcome, size: int, nodes: str, hardware: Hardware, graph: LayerGraph) -> Spent:
    assert done.plan is not None
    configuration = done.configuration
    reduce_s = reduction_s(done.plan, replace(hardware, node_size=budget.node_size), nodes)
    step_s = done.step_s + reduce_s
    flops = sum(counts.flops(phase) for counts in graph.counts for phase in PHASES)
    peak = hardware.peak_flops(configuration.training.param_dtype or _dtype(graph))
    steps = configuration.num_microbatches * configuration.training.data_parallel
    return Spent(
        done, size, step_s, reduce_s, nodes, budget.batch / step_s, steps * flops / step_s / (budget.devices * peak)
    )


def _dtype(graph: LayerGraph) -> str:
    work: dict[str, int] = {}
    for counts in graph.counts:
        for op in counts.ops:
            work[op.dtype] = work.get(op.dtype, 0) + op.flops
    return max(work, key=lambda dtype: work[dtype], default="float32")


def reduction_s(plan: PipelinePlan, hardware: Hardware, nodes: str) -> float:
    """Give the seconds in which the slowest rank adds its gradients to those of the other replicas.

    Args:
        plan: The plan of one replica.
        hardware: With the real size of a node.
        nodes: What lies within a node.
    """
    training = plan.training
    if training.data_parallel < 2:
        return 0.0
    apart = plan.num_ranks if nodes == FAR else 1
    ring = tuple(replica * apart for replica in range(training.data_parallel))
    width = dtype_bytes(training.grad_dtype)
    needs = [0.0] * plan.num_ranks
    for stage in plan.stages:
        nbytes = max(stage.parameters * width, stage.bytes)
        # Under FSDP2 gradients are scattered (half of an all-reduce), and the weights gathered (another half).
        needs[stage.rank] += (nbytes + stage.bytes) / 2 if training.fsdp else nbytes
    return max(hardware.all_reduce_s(nbytes, ring) for nbytes in needs)


def best_or_error(found: Sequence[Spent], budget: Budget, limit: int | None) -> FxpipeError | None:
    """Give the error where nothing fits; None where something does."""
    if any(each.outcome.fits for each in found):
        return None
    if not found:
        return PlanError(
            f"no configuration of {budget.devices} devices can be planned\n  use more or fewer devices or another batch"
        )
    nearest = min(found, key=lambda each: each.outcome.peak_bytes)
    return PlanError(
        f"none of {len(found)} configurations of {budget.devices} devices keeps {size_text(limit or math.inf)} "
        f"per device: the nearest needs {size_text(nearest.outcome.peak_bytes)}\n"
        "  use more devices, a smaller batch, or --recompute auto"
    )
