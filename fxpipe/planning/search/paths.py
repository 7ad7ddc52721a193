"""The best chain of downsets, by dynamic programming over all of them: the exact search where they are few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxpipe.planning.search.downsets import BLOCK_ENTRIES, DownsetCosts
from fxpipe.planning.search.evaluate import Found
from fxpipe.planning.search.instance import UNREACHABLE, Instance, Ints
from fxpipe.planning.search.learned import Learned
from fxpipe.planning.search.request import FREE, Request

MOST_DOWNSETS = 150_000
MOST_BITS = 40_000_000  # downsets times nodes: what their members take in bytes
MOST_WORK = 400_000_000  # pairs of downsets, times words of 64 nodes, looked at in one search before it is given up


class TooManyPairsError(Exception):
    """The search over all downsets was given up; nothing follows from that."""


@dataclass(frozen=True, slots=True)
class Downsets:
    """All downsets of an instance, ready to be searched."""

    instance: Instance
    masks: list[int]
    costs: DownsetCosts

    def best(self, request: Request, upper: int, *, objective: str = "load") -> Found | None:
        """Give the best partition if its bottleneck (or memory) is below ``upper``; one stage per rank.

        Raises:
            TooManyPairsError: It would take too long.
        """
        chain = best_chain(self.costs, request, upper, objective=objective)
        return None if chain is None else Found(chain[0], self.stages(chain[1]))

    def stages(self, chain: Sequence[int]) -> Ints:
        """Give each node's stage in a chain of downsets, from the empty one to the full one."""
        stage_of = np.zeros(self.instance.size, dtype=np.int64)
        for position in chain[1:-1]:
            stage_of += 1 - self.costs.members[position].astype(np.int64)
        return stage_of


def all_downsets(instance: Instance, request: Request, learned: Learned) -> Downsets | None:
    """Enumerate the downsets and what lies between them; None if they are too many."""
    limit = min(MOST_DOWNSETS, MOST_BITS // instance.size)
    masks = learned.downsets(instance, limit) if instance.size < limit else None
    return None if masks is None else Downsets(instance, masks, DownsetCosts(instance, request.routing, masks))


def best_chain(
    costs: DownsetCosts, request: Request, upper: int, *, objective: str = "load"
) -> tuple[int, list[int]] | None:
    """Find the chain of downsets with the smallest bottleneck below ``upper``: exact over the downsets given.

    ``value[D]`` after ``s`` stages is the smallest bottleneck of ``s`` stages that make up ``D``. A downset is looked
    at after ``s`` stages only if what it holds fits ``s`` stages and the rest fits the others.

    Args:
        costs: Downsets and what lies between them.
        request: Stages and limits.
        upper: Only a bottleneck below this is of interest.
        objective: ``"load"``, within the memory limit; or ``"memory"``, whatever the load.

    Returns:
        The bottleneck and the downsets' positions from the empty to the full one; None if none is below ``upper``.

    Raises:
        TooManyPairsError: It would take too long.
    """
    base = costs.least(request, objective)
    by_base = np.argsort(base, kind="stable")
    most = upper - 1
    total = int(base[costs.full])
    alike = len(set(request.live)) == 1 and request.one_kind not in (None, FREE) and not request.exactly
    settled = np.full(costs.size, upper, dtype=np.int64)  # the best value with fewer stages, where stages are alike
    reached, values = np.asarray([costs.empty]), np.zeros(1, dtype=np.int64)
    budget = MOST_WORK
    parents: list[dict[int, int]] = []
    best: tuple[int, int] | None = None
    for stage in range(request.stages):
        rest = request.stages - stage - 1
        inside = by_base[(base[by_base] <= (stage + 1) * most) & (total - base[by_base] <= rest * most)]
        if request.exactly and rest:
            inside = inside[inside != costs.full]
        bound = min(upper, best[0] if best else upper)
        budget -= _work(costs, reached, inside, base, bound)
        if budget < 0:
            raise TooManyPairsError
        value, parent = _step(costs, request, reached, values, inside, base, stage, bound, objective)
        kept = value < (settled[inside] if alike else upper)
        inside, value, parent = inside[kept], value[kept], parent[kept]
        parents.append(dict(zip(inside.tolist(), parent.tolist(), strict=True)))
        if alike:
            settled[inside] = value
        at_end = np.flatnonzero(inside == costs.full)
        if len(at_end) and (best is None or value[at_end[0]] < best[0]) and (not request.exactly or not rest):
            best = int(value[at_end[0]]), stage + 1
        onward = inside != costs.full
        reached, values = inside[onward], value[onward]
        if not len(reached):
            break
    return None if best is None else (best[0], _trace(parents[: best[1]], costs.full))


def _work(costs: DownsetCosts, reached: Ints, inside: Ints, base: Ints, upper: int) -> int:
    """Count the pairs that the next stage makes, times what each costs."""
    inside_base = base[inside]
    low = np.searchsorted(inside_base, base[reached], side="left")
    high = np.searchsorted(inside_base, base[reached] + upper, side="left")
    return int(np.maximum(high - low, 0).sum()) * (4 + costs.words)


def _trace(parents: Sequence[dict[int, int]], full: int) -> list[int]:
    chain = [full]
    for parent in reversed(parents):
        chain.append(parent[chain[-1]])
    return chain[::-1]


def _step(
    costs: DownsetCosts,
    request: Request,
    reached: Ints,
    values: Ints,
    inside: Ints,
    base: Ints,
    stage: int,
    upper: int,
    objective: str,
) -> tuple[Ints, Ints]:
    """Extend every downset in ``reached`` by one stage to those in ``inside`` (ascending in base)."""
    value = np.full(len(inside), UNREACHABLE, dtype=np.int64)
    parent = np.zeros(len(inside), dtype=np.int64)
    order = np.argsort(base[reached], kind="stable")
    inside_base = base[inside]
    start = 0
    while start < len(order):
        stop, low, high = start + 1, 0, 0
        lightest = int(base[reached[order[start]]])
        low = int(np.searchsorted(inside_base, lightest, side="left"))
        while stop < len(order) and stop - start < 512:
            high = int(np.searchsorted(inside_base, int(base[reached[order[stop]]]) + upper, side="left"))
            if (stop + 1 - start) * (high - low) > BLOCK_ENTRIES:
                break
            stop += 1
        block = order[start:stop]
        high = int(np.searchsorted(inside_base, int(base[reached[block[-1]]]) + upper, side="left"))
        if high > low:
            right = inside[low:high]
            cost = np.maximum(costs.block(request, reached[block], right, stage, objective), values[block][:, None])
            chosen = cost.argmin(axis=0)
            least = cost[chosen, np.arange(len(right))]
            better = least < value[low:high]
            value[low:high][better] = least[better]
            parent[low:high][better] = reached[block][chosen[better]]
        start = stop
    return value, parent
