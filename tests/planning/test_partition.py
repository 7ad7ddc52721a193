"""The partitioner against a judge that tries everything, and against bad input."""

from __future__ import annotations

import itertools
import math

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpipe.errors import InfeasibleError, PartitionError
from fxpipe.planning.partition import partition, partition_nodes
from fxpipe.planning.problem import PartitionProblem, TiedNodes, TransferValue

INFEASIBLE = math.inf


def stage_costs(problem, stage_of, stages, *, routing, live, ranks):
    """Give loads per stage, loads per rank and bytes per rank, from the contract's words."""
    loads = [0.0] * stages
    memory = [0.0] * (max(ranks) + 1)
    for stage in range(stages):
        inside = [node for node, where in enumerate(stage_of) if where == stage]
        loads[stage] += sum(problem.seconds[node] for node in inside)
        memory[ranks[stage]] += sum(problem.memory[node] for node in inside) if problem.memory else 0
        memory[ranks[stage]] += live[stage] * (
            sum(problem.activation[node] for node in inside) if problem.activation else 0
        )
        for value in problem.values:
            where = {stage_of[node] for node in value.nodes}
            times = 0
            if routing == "direct":
                times = int(stage in where and len(where) > 1)
            else:
                if min(where) < stage <= max(where) and ranks[stage - 1] != ranks[stage]:
                    times += 1
                if min(where) <= stage < max(where) and ranks[stage + 1] != ranks[stage]:
                    times += 1
            loads[stage] += times * value.seconds
            memory[ranks[stage]] += live[stage] * times * value.bytes
    for tie in problem.ties:
        holders = {ranks[stage_of[node]] for node in tie.nodes}
        for rank in holders:
            memory[rank] += tie.bytes
            if len(holders) > 1:
                loads[min(stage_of[node] for node in tie.nodes if ranks[stage_of[node]] == rank)] += tie.seconds
    rank_loads = [
        sum(load for load, where in zip(loads, ranks, strict=True) if where == rank) for rank in range(len(memory))
    ]
    return loads, rank_loads, memory


def assignments(problem, stages, *, exactly):
    """Yield every valid assignment: edges forward, groups together, stages numbered without gaps."""
    count = len(problem.seconds)
    for stage_of in itertools.product(range(stages), repeat=count):
        used = set(stage_of)
        if len(used) != (stages if exactly else max(used) + 1):
            continue
        if any(stage_of[before] > stage_of[after] for before, after in problem.edges):
            continue
        if any(stage_of[node] != stage_of[group[0]] for group in problem.groups for node in group):
            continue
        yield stage_of


def brute_force(problem, stages, *, routing="adjacent", memory_limit=None, exactly=False, live=None, ranks=None):
    """Give the smallest (largest rank load, largest stage load) within the limit, and the least limit that works."""
    live, ranks = live or [1] * stages, ranks or list(range(stages))
    best_load, least_memory = (INFEASIBLE, INFEASIBLE), INFEASIBLE
    for stage_of in assignments(problem, stages, exactly=exactly):
        loads, rank_loads, memory = stage_costs(problem, stage_of, stages, routing=routing, live=live, ranks=ranks)
        least_memory = min(least_memory, max(memory))
        if memory_limit is None or max(memory) <= memory_limit:
            best_load = min(best_load, (max(rank_loads), max(loads)))
    return best_load, least_memory


TIME = st.one_of(st.integers(0, 9), st.floats(0, 10, allow_subnormal=False))
SIZE = st.integers(0, 20)


@st.composite
def problems(draw, most_nodes=7, extras=False):
    count = draw(st.integers(1, most_nodes))
    nodes = st.integers(0, count - 1)
    order = draw(st.permutations(range(count)))
    pairs = draw(st.lists(st.tuples(nodes, nodes), max_size=2 * count))
    edges = tuple((order[min(pair)], order[max(pair)]) for pair in pairs if pair[0] != pair[1])
    sets = st.lists(nodes, min_size=1, max_size=4, unique=True).map(tuple)
    return PartitionProblem(
        seconds=tuple(draw(st.lists(TIME, min_size=count, max_size=count))),
        edges=edges,
        values=tuple(
            TransferValue(seconds, members, size)
            for seconds, members, size in draw(
                st.lists(st.tuples(TIME, sets, SIZE if extras else st.just(0)), max_size=6)
            )
        ),
        memory=tuple(draw(st.lists(SIZE, min_size=count, max_size=count))),
        activation=tuple(draw(st.lists(SIZE, min_size=count, max_size=count))) if extras else (),
        groups=tuple(draw(st.lists(sets, max_size=1))),
        ties=tuple(
            TiedNodes(members, size, seconds)
            for members, size, seconds in draw(st.lists(st.tuples(sets, SIZE, TIME), max_size=2 if extras else 0))
        ),
    )


def agree(problem, stages, memory_limit, **options):
    """Check a result against the judge: same objective, same feasibility, a true bound, valid stages."""
    brute = dict(options)
    brute["ranks"] = brute.pop("rank_of_stage", None)
    exactly = options.get("exactly", False)
    (best_load, best_stage), least = brute_force(problem, stages, memory_limit=memory_limit, **brute)
    if best_load == math.inf:
        with pytest.raises(PartitionError) as caught:
            partition_nodes(problem, stages, memory_limit=memory_limit, **options)
        if least < math.inf:
            assert isinstance(caught.value, InfeasibleError)
            assert caught.value.least_memory_limit == least
        return
    found = partition_nodes(problem, stages, memory_limit=memory_limit, **options)
    used = stages if exactly else max(found.stage_of) + 1
    live, ranks = options.get("live") or [1] * stages, brute["ranks"] or list(range(stages))
    loads, rank_loads, memory = stage_costs(
        problem, found.stage_of, used, routing=options.get("routing", "adjacent"), live=live, ranks=ranks[:used]
    )
    assert found.stage_of in set(assignments(problem, used, exactly=True))
    assert found.loads == pytest.approx(loads, rel=1e-12, abs=1e-12)  # sums of a few floats in another order
    assert found.bottleneck == pytest.approx(best_load, rel=1e-12, abs=1e-12)
    assert found.lower_bound <= best_load * (1 + 1e-15)  # the judge's own sums round
    assert memory_limit is None or max(memory) <= memory_limit
    assert max(rank_loads) == pytest.approx(best_load, rel=1e-12, abs=1e-12)
    if "rank_of_stage" in options:
        assert max(loads) == pytest.approx(best_stage, rel=1e-12, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(1, 4), st.sampled_from(["adjacent", "direct"]), st.one_of(st.none(), st.integers(1, 60)))
def test_no_assignment_has_a_smaller_bottleneck(problem, stages, routing, memory_limit):
    agree(problem, stages, memory_limit, routing=routing)


@settings(max_examples=150, deadline=None)
@given(
    problems(most_nodes=6, extras=True),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.sampled_from(["adjacent", "direct"]),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 150)),
)
def test_exact_numbers_of_stages_live_microbatches_and_ties_agree_with_the_judge(
    problem, live, routing, exactly, limit
):
    agree(problem, len(live), limit, routing=routing, exactly=exactly, live=live)


def graph_of(costs, edges=(), **attributes):
    graph = nx.DiGraph()
    for node, seconds in costs.items():
        graph.add_node(node, seconds=seconds)
    graph.add_edges_from(edges)
    graph.graph.update(attributes)
    return graph


def test_the_result_names_the_graphs_own_nodes():
    graph = graph_of({"a": 1, ("b", 2): 1}, [("a", ("b", 2))])
    assert partition(graph, 2) == {"a": 0, ("b", 2): 1}


def test_more_stages_than_nodes_leave_no_gap():
    assert sorted(partition(graph_of({0: 1, 1: 1}), 9).values()) == [0, 1]


@pytest.mark.parametrize(
    ("graph", "stages", "options", "message"),
    [
        (graph_of({"a": 1, "b": 1}, [("a", "b"), ("b", "a")]), 2, {}, "cycle: a -> b -> a|cycle: b -> a -> b"),
        (graph_of({"a": 1}, [("a", "a")]), 2, {}, "cycle: a -> a"),
        (graph_of({"a": -1}), 2, {}, "seconds of node a is -1"),
        (graph_of({"a": 1, "b": math.inf}), 2, {}, "seconds of node b is inf"),
        (graph_of({"a": math.nan}), 2, {}, "seconds of node a is nan"),
        (graph_of({"a": "1"}), 2, {}, "seconds of node a is '1', a str"),
        (graph_of({"a": 1}, [("a", "b")]), 2, {}, "node b without `seconds`"),
        (graph_of({"a": 1}, transfers=[(1, ["a", "z"])]), 2, {}, "transfer 0 names the unknown node z"),
        (graph_of({"a": 1}, transfers=[(-1, ["a"])]), 2, {}, "transfer 0 of node a is -1"),
        (graph_of({"a": 1}, transfers=[3]), 2, {}, "transfer 0 is 3"),
        (graph_of({"a": 1}), 0, {}, "stages is 0"),
        (graph_of({"a": 1}), 1.5, {}, "stages is 1.5"),
        (graph_of({"a": 1}), 2, {"memory_limit": 0}, "memory_limit is 0"),
        (graph_of({"a": 1}), 2, {"memory_limit": math.nan}, "memory_limit is nan"),
        (graph_of({"a": 1}), 2, {"memory_limit": "8"}, "memory_limit is '8'"),
        (graph_of({"a": 1}), 2, {"routing": "ring"}, "routing is 'ring'"),
        (nx.DiGraph(), 2, {}, "without nodes"),
        (nx.path_graph(3), 2, {}, "cannot partition a Graph"),
    ],
)
def test_bad_input_is_one_error_that_names_it(graph, stages, options, message):
    with pytest.raises(PartitionError, match=message) as caught:
        partition(graph, stages, **options)
    assert str(caught.value).count("\n") == 1


def test_both_kinds_of_transfer_are_an_error():
    graph = graph_of({"a": 1, "b": 1}, transfers=[(1, ["a", "b"])])
    graph.nodes["b"]["transfer"] = 1
    with pytest.raises(PartitionError, match="both kinds of transfer: node b"):
        partition(graph, 2)


def test_a_group_over_the_limit_is_named_with_the_least_limit_that_works():
    graph = graph_of({"a": 1, "b": 1, "c": 1}, [("a", "b"), ("b", "c")])
    nx.set_node_attributes(graph, 5, "memory")
    graph.nodes["a"]["group"] = graph.nodes["c"]["group"] = "tied"
    with pytest.raises(InfeasibleError, match="the group of node a alone needs that much") as caught:
        partition(graph, 3, memory_limit=14)
    assert caught.value.least_memory_limit == 15
    assert partition(graph, 3, memory_limit=15) == {"a": 0, "b": 0, "c": 0}


def test_more_stages_than_nodes_are_an_error_where_all_must_be_used():
    with pytest.raises(PartitionError, match="cannot cut 2 nodes into 3 stages"):
        partition_nodes(PartitionProblem(seconds=(1.0, 1.0)), 3, exactly=True)
