"""Ranks visited in passes: against all partitions of small graphs, and as bounds of what is found on larger ones.

Drawn from: seconds, transfers and ties in eighths from 0 to 10 s (zeros often), far links dearer, cheaper or free apart
from the near ones, up to seven nodes with any edges, two ranks whose stages loop, two or three each, or turn back.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_partition import EXACT_TIME, FREE_FAR_LINK, brute_force, problems, random_graph, stage_costs

from fxpipe.planning.search.bounds import Frontier
from fxpipe.planning.search.chains import order_costs
from fxpipe.planning.search.downsets import DownsetCosts, downset_costs, enumerate_downsets
from fxpipe.planning.search.evaluate import evaluate, is_partition
from fxpipe.planning.search.instance import make_instance, without_memory, without_tie_loads
from fxpipe.planning.search.learned import Learned
from fxpipe.planning.search.orders import given_order
from fxpipe.planning.search.partition import partition_nodes
from fxpipe.planning.search.pools import stages_of_cuts
from fxpipe.planning.search.problem import PartitionProblem, Placement, TransferValue
from fxpipe.planning.search.reductions import reduced
from fxpipe.planning.search.request import Request
from fxpipe.planning.search.several.frontier import frontier_bound
from fxpipe.planning.search.several.pairs import search_pairs
from fxpipe.planning.search.several.passes import cut_passes

LOOP, TURN, THREE = (0, 1, 0, 1), (0, 1, 1, 0), (0, 1, 0, 1, 0, 1)
FARS = st.lists(st.booleans(), min_size=5, max_size=5)


def placed(ranks, far):
    return Placement.simple(len(ranks), rank_of_stage=ranks, far=far[: len(ranks) - 1])


@settings(max_examples=150, deadline=None)
@given(problems(extras=True, time=EXACT_TIME), st.sampled_from([LOOP, TURN]), FARS, st.booleans(), st.booleans())
@example(FREE_FAR_LINK, LOOP, [True] * 5, True, False)
@example(FREE_FAR_LINK, TURN, [True] * 5, True, True)
def test_two_passes_are_bounded_by_what_exists_and_the_best_of_whole_graphs_is_found(
    problem, ranks, far, exactly, merge
):
    placement = placed(ranks, far)
    (best, _), _ = brute_force(problem, 4, placement, exactly=exactly)
    assume(best < float("inf"))
    instance = without_memory(without_tie_loads(make_instance(problem)))
    small = reduced(instance).instance if merge else instance
    whole = small.size == instance.size or not instance.anchors.all()
    request = Request.of(4, "adjacent", exactly, None, placement)
    upper = int(instance.load.sum()) + 8 * int(instance.values.amounts[:, :2].sum()) + 1
    masks = enumerate_downsets(small, 1000)
    found = search_pairs(small, request, masks, 0, upper, whole=whole)
    assert instance.seconds(found.lower) <= best
    fit = instance if exactly and instance.anchors.all() else small
    for most_downsets in (0, 999):
        assert instance.seconds(frontier_bound(fit, request, 0, upper, Learned(), most_downsets=most_downsets)) <= best
    if not problem.ties and whole and exactly and found.stage_of is not None:
        assert is_partition(small, request, found.stage_of)
        reached = evaluate(small, request, found.stage_of).bottleneck
        assert reached - found.lower <= max(1, upper // 2048)


@settings(max_examples=150, deadline=None)
@given(problems(extras=True, time=EXACT_TIME), st.integers(1, 5))
def test_for_every_downset_a_cut_stands_that_costs_no_more_on_either_side(problem, count):
    instance = make_instance(problem)
    masks = enumerate_downsets(instance, 1000)
    crossing = instance.values.column(0)
    loads, crossed, anchors = downset_costs(instance, masks, crossing)
    costs = DownsetCosts(instance, "adjacent", masks)
    assert (loads == costs.load).all()
    assert (crossed == costs.crossing[0]).all()
    assert (anchors == costs.anchors).all()
    kept = Frontier.of(loads + crossed, loads - crossed)
    for frontier in (kept, kept.thinned(count)):
        stands = (frontier.ends[:, None] <= loads + crossed) & (frontier.begins[:, None] >= loads - crossed)
        assert stands.any(axis=0).all()
        assert (np.diff(frontier.ends) > 0).all()
        assert (np.diff(frontier.begins) > 0).all()


@pytest.mark.parametrize("ranks", [(*range(4), *range(4)), (*range(4), *range(3, -1, -1))])
def test_blocks_with_branches_are_cut_to_within_a_hundredth_of_the_bound(ranks):
    seconds, edges, values = [0.3], [], []
    for block in range(30):
        first = len(seconds) - 1
        branches = [range(first + 1, first + 7), range(first + 7, first + 13)]
        seconds += [0.1 + 0.01 * ((7 * block + node) % 5) for node in range(12)]
        seconds.append(0.2)
        for branch in branches:
            path = [first, *branch, first + 13]
            edges += list(itertools.pairwise(path))
            values += [TransferValue(0.15, pair) for pair in itertools.pairwise(path[1:])]
        values.append(TransferValue(0.15, (first, first + 1, first + 7)))
    problem = PartitionProblem(tuple(seconds), tuple(edges), tuple(values))
    found = partition_nodes(problem, 8, exactly=True, rank_of_stage=ranks)
    assert found.bottleneck <= 1.01 * found.lower_bound


@settings(max_examples=150, deadline=None)
@given(problems(extras=True, time=EXACT_TIME), st.sampled_from([LOOP, TURN, THREE]), FARS, st.booleans())
def test_an_order_is_cut_into_stages_that_all_have_an_anchor(problem, ranks, far, exactly):
    placement = placed(ranks, far)
    instance = without_memory(make_instance(problem))
    stages = len(ranks)
    assume(int((instance.anchors > 0).sum()) >= stages if exactly else instance.size >= stages)
    start = partition_nodes(problem, stages, exactly=True).stage_of if exactly else None
    assume(start is not None or stages == 4)
    request = Request.of(stages, "adjacent", exactly, None, placement)
    merged = np.zeros(instance.size, dtype=np.int64)
    if start is not None:
        merged[list(instance.merged_of)] = start
    order = sorted(given_order(instance), key=lambda node: merged[node])
    costs = order_costs(instance, order, "adjacent")
    begin = np.searchsorted(merged[order], np.arange(stages + 1)).tolist()
    cuts = cut_passes(costs, request, 0, begin)
    if cuts is not None:
        assert is_partition(instance, request, stages_of_cuts(costs, cuts))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=4, max_size=12),
    st.sampled_from([LOOP, TURN]),
)
def test_a_chain_is_cut_as_well_as_any_cuts_allow(nodes, ranks):
    seconds = tuple(cost for cost, _ in nodes)
    values = tuple(TransferValue(moved, (node, node + 1)) for node, (_, moved) in enumerate(nodes[:-1]))
    problem = PartitionProblem(seconds, tuple(itertools.pairwise(range(len(nodes)))), values)
    placement = Placement.simple(4, rank_of_stage=ranks)
    every = []
    for cuts in itertools.combinations(range(1, len(nodes)), 3):
        stage_of = np.searchsorted(cuts, np.arange(len(nodes)), side="right").tolist()
        every.append(max(stage_costs(problem, stage_of, placement)[1]))
    instance = make_instance(problem)
    request = Request.of(4, "adjacent", True, None, placement)
    found = search_pairs(instance, request, enumerate_downsets(instance, 1000), 0, 10_000, whole=True)
    assert evaluate(instance, request, found.stage_of).bottleneck <= min(every) + 10_000 // 2048
    assert found.lower <= min(every)
    assert partition_nodes(problem, 4, placement=placement, exactly=True).bottleneck == min(every)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ranks", [(0, 1, 2, 3) * 2, (0, 1, 2, 3, 3, 2, 1, 0), (0, 1, 2) * 3])
def test_larger_graphs_keep_their_bounds_with_several_stages_on_a_rank(seed, ranks):
    problem = random_graph(seed, count=90, width=3)
    found = partition_nodes(problem, len(ranks), rank_of_stage=ranks, exactly=True)
    free = partition_nodes(problem, len(ranks), rank_of_stage=ranks, exactly=True, memory_limit=sum(problem.memory))
    loads, rank_loads, _ = stage_costs(problem, found.stage_of, Placement.simple(len(ranks), rank_of_stage=ranks))
    assert found.loads == pytest.approx(loads)
    assert found.lower_bound <= max(rank_loads) == pytest.approx(found.bottleneck)
    assert found.lower_bound <= free.bottleneck
    assert free.lower_bound <= found.bottleneck
    assert set(found.stage_of) == set(range(len(ranks)))
