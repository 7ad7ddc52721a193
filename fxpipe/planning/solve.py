"""Partition a layout: which blocks are opened, and stages that have parameters where the model allows it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from fxpipe.errors import InfeasibleError, PartitionError
from fxpipe.planning.costs.blocks import Block
from fxpipe.planning.fastest import Shortlist
from fxpipe.planning.judge import step_s
from fxpipe.planning.layout import Layout
from fxpipe.planning.peers import partitions
from fxpipe.planning.search.partition import Partition, most_stages, partition_nodes
from fxpipe.planning.search.problem import PartitionProblem, Placement, measure

LEAST_GAIN = 0.02  # share of the bottleneck, and then of a simulated step, that opening blocks must save
EVENNESS = 0.005  # share that a rank of several stages may have more, so that its stages are more alike
MORE_GAIN = 0.01  # share of a simulated step that opening more blocks than some must save
STEP_GAIN = 0.001  # share of a simulated step that is worth a slower slowest stage
ROUNDING = 1e-9  # two searches of one problem round differently
CLOSING_NODES = 40_000  # layers looked at in vain while blocks are closed again
COLOCATION_NODES = 3_000  # largest problem for which co-locating ties is tried
COLOCATION_TIES = 4


@dataclass(frozen=True, slots=True)
class Solution:
    """A partition of a layout.

    Attributes:
        problem: What was partitioned, groups included.
        partition: Stage of each node, and how good that is.
        opened: Calls of blocks that a cut crosses.
        bare: Whether some stage has no parameters, since the model or the limit forces it.
        gain: Share of a simulated step that opening the blocks saves; 0 where none is open, or none can stay whole.
        step_gain: Share of a simulated step that it saves over the partition with the smallest bottleneck.
    """

    problem: PartitionProblem
    partition: Partition
    opened: tuple[Block, ...] = ()
    bare: bool = False
    gain: float = 0.0
    step_gain: float = 0.0

    @property
    def bottleneck(self) -> float:
        """Seconds of the slowest rank."""
        return self.partition.bottleneck


def solve(layout: Layout, *, simulated: bool = True) -> Solution:
    """Partition a layout at its grain.

    ``"block"`` keeps all blocks whole, ``"op"`` opens any; ``"auto"`` opens as few as come within two per cent of
    what opening all of them gives, and none where that saves less than two per cent of a simulated step.

    Args:
        layout: The layers, laid out.
        simulated: Whether the fastest of simulated steps is wanted, or the smallest bottleneck will do.

    Raises:
        PartitionError: There are fewer parts than stages; the message says how many stages are possible.
        InfeasibleError: No partition keeps the memory limit.
    """
    grain = layout.settings.grain
    several = _has_several_per_rank(layout)
    unopened: Solution | None = None
    fine: Solution | None = None
    if grain == "auto":
        solution, unopened, fine = _fewest_opened(layout)
    elif grain == "block":
        solution = _solved(layout, layout.grouped())
    else:
        solution = _solved(layout, layout.problem)
        whole = _tried(layout, layout.grouped()) if several else None  # the search over ranks may miss what these give
        if isinstance(whole, Solution) and whole.bottleneck < solution.bottleneck and whole.bare <= solution.bare:
            solution = _solved(layout, layout.problem, whole)
    finished = _finished(layout, solution, simulated=simulated)
    if simulated and fine is not None:
        finer = _fastest(layout, fine, layout.problem)
        least = MORE_GAIN if finished.opened else LEAST_GAIN
        if step_s(layout, finer.partition.stage_of) <= (1 - least) * step_s(layout, finished.partition.stage_of):
            finished = finer
    if unopened is None or not finished.opened:
        return finished
    whole = _finished(layout, unopened, simulated=simulated)
    gain = 1 - step_s(layout, finished.partition.stage_of) / step_s(layout, whole.partition.stage_of)
    return replace(finished, gain=gain) if gain >= LEAST_GAIN else _bounded(whole, finished.partition.lower_bound)


def _finished(layout: Layout, solution: Solution, *, simulated: bool) -> Solution:
    together = _with_ties_together(layout, solution)
    if not _has_several_per_rank(layout):  # with several, every search evens out
        together = _evened(layout, together)
    return _fastest(layout, together) if simulated else together


def _fastest(layout: Layout, solution: Solution, problem: PartitionProblem | None = None) -> Solution:
    """Take the fastest simulated step of a shortlist: cuts near this one, and those by the rules of others.

    Args:
        layout: The layers, laid out.
        solution: Where to begin.
        problem: What may be cut; None: the blocks that it opens, or any at op grain.
    """
    if problem is None:
        opened = [block.name for block in solution.opened]
        problem = layout.problem if layout.settings.grain == "op" else layout.grouped(opened)
    old = solution.partition
    shortlist = Shortlist(layout, problem, old.stage_of, bare=solution.bare)
    for stage_of in (*partitions(layout), *_apart(layout, problem, solution)):
        shortlist.look_at(stage_of)
    shortlist.search()
    stage_of = shortlist.best
    measured = measure(layout.problem, stage_of, placement=layout.placement)
    bottleneck = max(measured.rank_loads)
    if shortlist.gain <= (STEP_GAIN if bottleneck > old.bottleneck * (1 + ROUNDING) else 0.0):
        return solution
    bound = min(old.lower_bound, bottleneck)
    partition = replace(
        old, stage_of=stage_of, loads=measured.loads, bottleneck=bottleneck, lower_bound=bound,
        proven=old.proven and bottleneck <= old.bottleneck * (1 + ROUNDING),
    )  # fmt: skip
    return replace(solution, partition=partition, opened=layout.cut_blocks(stage_of), step_gain=shortlist.gain)


def _apart(layout: Layout, problem: PartitionProblem, solution: Solution) -> list[tuple[int, ...]]:
    """Where ranks have several stages, give the cut as if each had a rank of its own: even stages may fill faster."""
    if not _has_several_per_rank(layout):
        return []
    anchored = problem if solution.bare else replace(problem, anchors=layout.anchors)
    live = layout.placement.most_live
    own = Placement.simple(layout.settings.stages, live=live, far=layout.placement.far)
    found = partition_nodes(
        anchored, layout.settings.stages, exactly=True, placement=own, even=True, learned=layout.learned
    )
    return [found.stage_of]


def _fewest_opened(layout: Layout) -> tuple[Solution, Solution | None, Solution | None]:
    """Open blocks only where it pays.

    Returns:
        That, and, where they were made, the partition with all blocks whole, and the one with any of them open.
    """
    whole = _tried(layout, layout.grouped())
    if not any(len(block.layers) > 1 for block in layout.blocks):
        return (whole if isinstance(whole, Solution) else _raised(whole)), None, None
    if isinstance(whole, Solution) and whole.bottleneck * (1 - LEAST_GAIN) <= _least_load(layout):
        return _bounded(whole, _least_load(layout)), None, None  # no cut at all can save so much
    fine = _tried(layout, layout.problem, whole if isinstance(whole, Solution) else None)
    if not isinstance(fine, Solution):
        return (whole if isinstance(whole, Solution) else _raised(fine)), None, None
    reference = whole.bottleneck if isinstance(whole, Solution) else math.inf
    if fine.bottleneck > reference * (1 - LEAST_GAIN):
        assert isinstance(whole, Solution)
        return _bounded(whole, fine.partition.lower_bound, fine), whole, fine
    bound = min(fine.bottleneck * (1 + LEAST_GAIN), reference * (1 - LEAST_GAIN))
    best = _closed(layout, fine.opened, bound) or fine
    budget = CLOSING_NODES
    chunks = [best.opened]
    while chunks and budget > 0:
        chunk = tuple(block for block in chunks.pop() if block in best.opened)
        if not chunk:
            continue
        rest = [block for block in best.opened if block not in chunk]
        closed = _closed(layout, rest, bound) if rest or not isinstance(whole, Solution) else None
        budget -= len(layout.layers) if closed is None else 0
        best = closed or best
        if closed is None and len(chunk) > 1:
            half = len(chunk) // 2
            chunks += [chunk[half:], chunk[:half]]
    names = [block.name for block in best.opened]
    polished = _tried(layout, layout.grouped(names), best)
    # A search that stopped at its bound evens nothing out; one that goes on may give a rank more for the sake of that.
    more = EVENNESS if _has_several_per_rank(layout) else 0.0
    if isinstance(polished, Solution) and polished.bottleneck <= best.bottleneck * (1 + more):
        best = polished
    return _bounded(best, fine.partition.lower_bound, fine), whole if isinstance(whole, Solution) else None, fine


def _bounded(solution: Solution, lower_bound: float, fine: Solution | None = None) -> Solution:
    """Give the solution with a bound that holds for every way of opening blocks, not just for this one.

    Args:
        solution: With some blocks open.
        lower_bound: For any blocks open.
        fine: With any blocks open; where that is proven the best, so is what is as fast.
    """
    bound = min(lower_bound, solution.bottleneck)
    proven = solution.bottleneck <= bound or (
        fine is not None and fine.partition.proven and solution.bottleneck <= fine.bottleneck * (1 + ROUNDING)
    )
    return replace(solution, partition=replace(solution.partition, lower_bound=bound, proven=proven))


def _has_several_per_rank(layout: Layout) -> bool:
    return layout.settings.ranks < layout.settings.stages


def _least_load(layout: Layout) -> float:
    """Give what no partition at any grain is below: the mean load and the largest layer."""
    seconds = layout.problem.seconds
    return max(math.fsum(seconds) / layout.settings.ranks, max(seconds))


def _closed(layout: Layout, opened: Collection[Block], bound: float) -> Solution | None:
    """Partition with only these blocks open; None if no partition found keeps the bound."""
    found = _tried(layout, layout.grouped([block.name for block in opened]), goal=bound)
    return found if isinstance(found, Solution) and found.bottleneck <= bound else None


def _tried(
    layout: Layout, problem: PartitionProblem, start: Solution | None = None, goal: float = 0.0
) -> Solution | PartitionError:
    try:
        return _solved(layout, problem, start, goal)
    except PartitionError as error:
        return error


def _raised(error: PartitionError) -> Solution:
    raise error


def _solved(layout: Layout, problem: PartitionProblem, start: Solution | None = None, goal: float = 0.0) -> Solution:
    """Partition into stages that all have parameters; into others only where there is none, or where it pays."""
    stages = layout.settings.stages
    anchored = replace(problem, anchors=layout.anchors)
    bare = not layout.anchors or most_stages(anchored) < stages
    if bare and most_stages(problem) < stages:
        raise PartitionError(_too_many(layout, problem))
    known = () if start is None else start.partition.stage_of
    if least_memory(layout) > (layout.settings.memory_limit or math.inf):
        bare = True  # the limit is too low for either; what is the least one, without that wish?

    try:
        partition = _cut(layout, problem if bare else anchored, known, goal)
    except InfeasibleError:
        if bare:
            raise
        bare = True
        partition = _cut(layout, problem, known, goal)
    most = partition.bottleneck * (1 - LEAST_GAIN)
    enough = 0 < partition.bottleneck <= goal
    settled = _has_several_per_rank(layout) or most <= max(_least_load(layout), partition.lower_bound)
    if not enough and not bare and not settled:
        # The loss of a large vocabulary beside its projection may be more than any other stage.
        other = _cut(layout, problem, partition.stage_of, goal)
        if other.bottleneck <= most:
            bare, partition = True, other
    return Solution(problem, partition, layout.cut_blocks(partition.stage_of), bare)


def _cut(
    layout: Layout, problem: PartitionProblem, start: Sequence[int], goal: float, *, even: bool = False
) -> Partition:
    return partition_nodes(
        problem,
        layout.settings.stages,
        memory_limit=layout.settings.memory_limit,
        exactly=True,
        placement=layout.placement,
        start=start,
        goal=goal,
        slack=EVENNESS,
        even=even,
        learned=layout.learned,
    )


def _too_many(layout: Layout, problem: PartitionProblem) -> str:
    most = most_stages(problem)
    graph, settings = layout.graph, layout.settings
    finer = most_stages(layout.problem)
    ways = [f"stages={most} or fewer"]
    if finer > most:
        ways.append(f'grain="op" (up to {finer})')
    elif not any(len(block.layers) > 1 for block in layout.blocks) and settings.grain != "op":
        ways.append('grain="op"')
    return (
        f"cannot cut {graph.name} into {settings.stages} stages: its {len(layout.layers)} layers can be separated into "
        f"{most} at most\n  use {', or '.join(ways)}"
    )


def _with_ties_together(layout: Layout, solution: Solution) -> Solution:
    """Put the layers that share a tensor into one stage where the bottleneck stays the same."""
    ranks = layout.settings.rank_of_stage
    spread = [
        tie
        for tie in solution.problem.ties
        if (tie.seconds or tie.bytes) and len({ranks[solution.partition.stage_of[node]] for node in tie.nodes}) > 1
    ]
    if len(layout.layers) > COLOCATION_NODES or len(spread) > COLOCATION_TIES:
        return solution
    for tie in spread:
        problem = replace(solution.problem, groups=(*solution.problem.groups, tie.nodes))
        closed = [block for block in layout.blocks if block not in solution.opened]
        problem = replace(problem, groups=(*problem.groups, *(block.layers for block in closed)))
        other = _tried(layout, problem)
        if isinstance(other, Solution) and other.bottleneck <= solution.bottleneck and other.bare <= solution.bare:
            bound = solution.partition.lower_bound
            partition = replace(other.partition, lower_bound=bound, proven=solution.partition.proven)
            solution = replace(other, partition=partition)
    return solution


def _evened(layout: Layout, solution: Solution) -> Solution:
    """Take the most even one of the partitions that are as good; what is proven of one holds for all."""
    old = solution.partition
    goal = old.bottleneck * (1 + ROUNDING)
    problem = solution.problem if solution.bare else replace(solution.problem, anchors=layout.anchors)
    new = _cut(layout, problem, old.stage_of, goal, even=True)
    if new.bottleneck > goal:
        return solution
    partition = replace(new, lower_bound=min(old.lower_bound, new.bottleneck), proven=old.proven, method=old.method)
    return replace(solution, partition=partition, opened=layout.cut_blocks(new.stage_of))


def least_memory(layout: Layout) -> float:
    """Give bytes that some rank needs whatever the partition: the mean of what does not depend on it."""
    problem = layout.problem
    least_live = min(min(entry) for sets in layout.placement.live for entry in sets)
    static = math.fsum(problem.memory) + math.fsum(tie.bytes for tie in problem.ties)
    return (static + least_live * math.fsum(problem.activation)) / layout.settings.ranks
