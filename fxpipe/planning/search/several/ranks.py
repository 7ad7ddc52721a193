"""Several stages on one rank: the largest sum of a rank's loads is minimised, then the largest load of a stage.

What a rank has so far is part of the state, so a chain of downsets is no shortest path any more: a state is the
downset reached and what every rank has. Over all downsets, as long as no state had to be dropped, the search is
exact; where there are more, it keeps the most even states over a pool of downsets near the best partitions known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxpipe.planning.search.downsets import enumerate_downsets
from fxpipe.planning.search.evaluate import Found
from fxpipe.planning.search.instance import Instance, Ints
from fxpipe.planning.search.orders import by_priority
from fxpipe.planning.search.request import Request
from fxpipe.planning.search.several.states import ANY, Effort, Pool, Score, score_of

MOST_DOWNSETS = 1_000  # all of them are searched up to here
POOL_WIDTH = 12  # downsets of the pool on either side of each cut of a known partition


@dataclass(frozen=True, slots=True)
class RankSearch:
    """What the search found.

    Attributes:
        found: The best partition, by its largest rank load (or memory); None where nothing is feasible.
        lower: No partition's largest rank load (or memory) is below.
        exact: Whether nothing was left out, so that no partition is better in any respect.
    """

    found: Found | None
    lower: int
    exact: bool


def search_ranks(
    instance: Instance,
    request: Request,
    lower: int,
    starts: Sequence[Ints],
    *,
    objective: str = "load",
    slack: float = 0.0,
) -> RankSearch:
    """Search for the best partition where ranks have several stages.

    Args:
        instance: The merged graph.
        request: Stages, ranks and limits.
        lower: A proven lower bound of the largest rank load (or memory).
        starts: Partitions to improve on; they need not keep the memory limit.
        objective: ``"load"``, within the memory limit; or ``"memory"``, whatever the load.
        slack: Share of the best rank load that ranks may have more, for the sake of the largest stage.

    Returns:
        The best partition, a lower bound, and whether it is proven.
    """
    best: tuple[Score, Ints] | None = None
    effort = Effort()
    for stage_of in starts:
        score = score_of(instance, request, stage_of, objective)
        if score is not None and (best is None or score < best[0]):
            best = score, stage_of
    masks = enumerate_downsets(instance, MOST_DOWNSETS) if instance.size < MOST_DOWNSETS else None
    if masks is not None:
        return _exact(Pool(instance, request, masks, None, objective, effort), lower, best, slack)
    widest = max(1, instance.size // (20 * request.stages))
    stride = widest
    while stride:
        centres = list(starts[:2]) if best is None else [best[1]]
        masks, near = _near(instance, request, centres, stride)
        better = _improved(Pool(instance, request, masks, near, objective, effort), lower, best)
        if better is None or (best is not None and better[0] >= best[0]):
            stride //= 2
        else:
            best = better
    if best is None:
        return RankSearch(None, lower, exact=False)
    if objective == "load":
        most = best[0][0] + int(slack * best[0][0])
        stride = widest
        while stride:
            masks, near = _near(instance, request, [best[1]], stride)
            evener = _evened(Pool(instance, request, masks, near, objective, effort), best, most)
            stride = stride if evener[0][1] < best[0][1] else stride // 2
            best = evener
    return RankSearch(Found(best[0][0], best[1]), lower, exact=False)


def _near(
    instance: Instance, request: Request, centres: Sequence[Ints], stride: int
) -> tuple[list[int], list[list[int]]]:
    """Give downsets near the cuts of known partitions, and for each stage those it may end at."""
    number: dict[int, int] = {0: 0}
    near: list[list[int]] = [[] for _ in range(request.stages)]
    for stage_of in centres:
        order = np.asarray(by_priority(instance, stage_of.tolist()))
        cuts = np.searchsorted(stage_of[order], np.arange(request.stages), side="right")
        for stage, cut in enumerate(cuts.tolist()):
            steps = range(-POOL_WIDTH, POOL_WIDTH + 1) if stage < request.stages - 1 else range(1)
            for place in sorted({min(max(cut + step * stride, 1), instance.size) for step in steps}):
                inside = np.zeros(instance.size, dtype=np.uint8)
                inside[order[:place]] = 1
                mask = int.from_bytes(np.packbits(inside, bitorder="little").tobytes(), "little")
                near[stage].append(number.setdefault(mask, len(number)))
    full = number.setdefault((1 << instance.size) - 1, len(number))
    return list(number), [sorted({*places, full}) for places in near]


def _exact(pool: Pool, lower: int, best: tuple[Score, Ints] | None, slack: float) -> RankSearch:
    """Ask whether a bound can be kept, a larger one each time; a search that leaves nothing out finds the best."""
    complete = True
    bound, step = lower, max(1, lower >> 8)
    while complete and (best is None or best[0][0] > lower):
        found, complete = pool.search(bound, ANY)
        if found is not None:
            best = found
            lower = best[0][0] if complete else lower
        elif complete:
            lower = bound + 1
            step *= 2
            if bound >= pool.most:
                return RankSearch(None, lower, exact=True)
        bound = lower + step if best is None else min(lower + step, best[0][0] - 1)
    if not complete:
        best = _improved(pool, lower, best)
    if best is None:
        return RankSearch(None, lower, exact=False)
    if pool.objective == "load":
        most = best[0][0] + int(slack * best[0][0])
        if complete:
            found, complete = pool.search(most, best[0][1] - 1, even=True)
            best = found or best
        if not complete:
            best = _evened(pool, best, most)
    return RankSearch(Found(best[0][0], best[1]), lower, exact=complete)


def _improved(pool: Pool, lower: int, best: tuple[Score, Ints] | None) -> tuple[Score, Ints] | None:
    """Look for better and better partitions, in large steps first, until none is found."""
    found = pool.search(ANY, ANY)[0] if best is None else None
    best = found or best
    shares = [2, 16, None]
    while best is not None and best[0][0] > lower and shares and not pool.effort.is_spent:
        value = best[0][0]
        step = max((value - lower) // shares[0], 1) if shares[0] else 1
        found = pool.search(value - step, ANY)[0]
        if found is None:
            shares.pop(0)
        best = found or best
    return best


def _evened(pool: Pool, best: tuple[Score, Ints], most: int) -> tuple[Score, Ints]:
    """Look for a smaller and smaller largest stage among what keeps a bound, in large steps first."""
    shares = [4, 32, None]
    while shares and not pool.effort.is_spent:
        slowest = best[0][1]
        step = max(slowest // shares[0], 1) if shares[0] else 1
        found = pool.search(most, slowest - step, even=True)[0]
        if found is None:
            shares.pop(0)
        best = found or best
    return best
